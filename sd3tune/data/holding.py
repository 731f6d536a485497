"""Which pictures are held out: a share of a data set to train on, and how many of each data set are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sd3tune.errors import DataError
from sd3tune.files import digest

if TYPE_CHECKING:
    from sd3tune.config.sections import Evaluation
    from sd3tune.data.buckets import Placement
    from sd3tune.data.catalog import Item


def chosen(items: Sequence[Item], share: float) -> list[Item]:
    """The items of one data set, those of a share of its different pictures marked: at least one, and never all.

    They are those whose digests of digests are smallest: names and order do not matter, copies of a picture go together, and a picture
    that is added moves at most one other.
    """
    if not share:
        return list(items)
    marks = sorted({_mark(item) for item in items})
    held = set(marks[: min(max(1, round(share * len(marks))), len(marks) - 1)])
    return [replace(item, chosen=True) if _mark(item) in held else item for item in items]


def _mark(item: Item) -> str:
    """Apart from the digest itself, so that what else is drawn by it is not drawn alike."""
    return digest("eval_share", item.pixels)


def judged(held: Sequence[Placement], evaluation: Evaluation, items: Sequence[Item]) -> tuple[Placement, ...]:
    """The held-out pictures that count: the first ``num_eval_images`` of each data set, or of ``eval_dataset_id`` alone.

    Raises: DataError when there is no such data set.
    """
    only = evaluation.eval_dataset_id
    names = sorted({item.dataset.id for item in items if item.held_out})
    if only is not None and only not in names:
        there = ", ".join(map(repr, names)) or "none"
        raise DataError(
            f"eval_dataset_id: no data set {only!r} has held-out pictures (there: {there}); give it dataset_type: eval or an eval_share"
        )
    if evaluation.eval_loss_disable:
        return ()
    rows: dict[str, list[Placement]] = {}
    for placement in held:
        if only in (None, placement.item.dataset.id):
            rows.setdefault(placement.item.dataset.id, []).append(placement)
    return tuple(placement for found in rows.values() for placement in found[: evaluation.num_eval_images])
