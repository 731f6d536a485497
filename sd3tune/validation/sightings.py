"""Each time a picture was seen in training, held against what the loss is at that noise level: a pure function of the history.

The logarithm of a loss is taken to be a function of the noise level plus a number of the picture's own, fitted in turns (backfitting;
Hastie and Tibshirani 1986). Numbers of the pictures are 0 on average, so that 1 is the loss of the others at the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd3tune.validation.verdict import Change, student

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PARTS, LEAST = 16, 8
"""Most parts of the noise levels in which the mean is taken, and least sightings of one."""

TURNS = 12
"""Turns of fitting levels and pictures."""


@dataclass(frozen=True)
class Learned:
    """One training picture in a run."""

    id: str
    seen: int
    """How often it was learned from."""
    share: float
    """Its share of all sightings, and (``share_of_loss``) of the sum of their losses."""
    share_of_loss: float
    beside: Change
    """Its mean loss as a multiple of that of the others at the same noise levels, with half a 95 % band."""
    early: float | None
    """The same in the first half of the times it was seen, and (``late``) in the second."""
    late: float | None
    change: Change | None
    """From the first half to the second, as a share; nothing when it was seen less than four times."""
    fixed: float | None
    """Change of its loss under fixed noise, from the first evaluation to the last, when it is one of those that are looked at."""


def learned(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]] = (), stays: Collection[str] = ()) -> list[Learned]:
    """A row for each training picture of the history's ``step`` lines. Pictures of ``stays``, and losses that are 0 or not finite,
    do not count."""
    import numpy as np

    found = [
        (item, float(sigma), float(loss))
        for row in steps
        if row["loss"] is not None
        for item, sigma, loss in zip(row["items"], row["sigmas"], row["losses"], strict=True)
        if item not in stays and math.isfinite(loss) and loss > 0
    ]
    if not found:
        return []
    ids = sorted({item for item, _, _ in found})
    at = {item: place for place, item in enumerate(ids)}
    own_N = np.array([at[item] for item, _, _ in found])
    sigma_N, loss_N = np.array([sigma for _, sigma, _ in found]), np.array([loss for _, _, loss in found])
    rest_N = np.log(loss_N) - expected(sigma_N, np.log(loss_N), own_N, len(ids))
    fixed, total = _fixed(evals), math.fsum(loss_N.tolist())
    return [_row(item, rest_N[own_N == at[item]].tolist(), loss_N[own_N == at[item]].tolist(), total, len(found), fixed) for item in ids]


def expected(sigma_N: Array, value_N: Array, own_N: Array, pictures: int) -> Array:
    """What values are at their noise levels for the mean picture: straight lines between the means of parts of equal size."""
    import numpy as np

    order = np.argsort(sigma_N, kind="stable")
    parts = np.array_split(order, min(PARTS, max(1, len(order) // LEAST)))
    center_P = np.array([sigma_N[part].mean() for part in parts])
    count_I, picture_I, level_N = np.bincount(own_N, minlength=pictures), np.zeros(pictures), np.zeros(len(value_N))
    for _ in range(TURNS):
        rest_N = value_N - picture_I[own_N]
        level_N = np.interp(sigma_N, center_P, np.array([rest_N[part].mean() for part in parts]))
        picture_I = np.bincount(own_N, weights=value_N - level_N, minlength=pictures) / count_I
        level_N, picture_I = level_N + picture_I.mean(), picture_I - picture_I.mean()
    return level_N


def _row(item: str, rest: list[float], losses: list[float], total: float, sightings: int, fixed: Mapping[str, float]) -> Learned:
    half = len(rest) // 2
    early, late = rest[:half], rest[len(rest) - half :]
    middle = math.fsum(rest) / len(rest)
    known = half >= 2
    change = None
    if known:
        by = _mean(late) - _mean(early)
        band = student(2 * half - 1) * math.sqrt((_variance(early) + _variance(late)) / half)
        change = Change(math.expm1(by), math.exp(by) * band)
    band = student(len(rest)) * math.sqrt(_variance(rest) / len(rest)) if len(rest) > 1 else math.inf
    return Learned(
        id=item, seen=len(rest), share=len(rest) / sightings, share_of_loss=math.fsum(losses) / total,
        beside=Change(math.exp(middle), math.exp(middle) * band), early=math.exp(_mean(early)) if known else None,
        late=math.exp(_mean(late)) if known else None, change=change, fixed=fixed.get(item),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    middle = _mean(values)
    return math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)


def _fixed(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Change of the training pictures' loss from the first evaluation to the last one of the same pictures and levels."""
    rows = [row for row in evals if row.get("train_items")]
    if not rows:
        return {}
    last = rows[-1]
    first = next(row for row in rows if row["train_items"] == last["train_items"] and row["sigmas"] == last["sigmas"])
    pairs = zip(last["train_items"], first["train_losses_by_image"], last["train_losses_by_image"], strict=True)
    return {item: after / before - 1 for item, before, after in pairs if before > 0} if first is not last else {}
