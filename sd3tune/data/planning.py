"""What an epoch holds, decided before anything is encoded: pure data, shown to a person first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sd3tune.config.schema import RunConfig
from sd3tune.data.buckets import Bucket, Placement, place
from sd3tune.data.catalog import Catalog, Problem
from sd3tune.data.datasets import Dataset
from sd3tune.errors import DataError
from sd3tune.shown import Shown, duration


class Group(NamedTuple):
    """Placements that may stand in one batch: of one data set and one size."""

    dataset: str
    bucket: Bucket


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What will be encoded and trained on. What is shown here is what the cache and the batches then use."""

    train: tuple[Placement, ...]
    evaluation: tuple[Placement, ...]
    texts: tuple[str, ...]
    catalog: Catalog
    batch_size: int
    accumulation: int
    steps: int
    cache_dir: str
    vae_batch_size: int
    text_batch_size: int
    left_out: tuple[Problem, ...] = ()

    @cached_property
    def groups(self) -> dict[Group, tuple[Placement, ...]]:
        """Placements by data set and size, in a fixed order."""
        found: dict[Group, list[Placement]] = {}
        for placement in self.train:
            found.setdefault(Group(placement.item.dataset.id, placement.bucket), []).append(placement)
        return {group: tuple(found[group]) for group in sorted(found)}

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Placements of each size, most first."""
        return dict(Counter(p.bucket for p in self.train).most_common())

    def batch_size_of(self, dataset: Dataset) -> int:
        """Images of one forward pass of a data set."""
        return dataset.train_batch_size or self.batch_size

    @cached_property
    def batches_per_epoch(self) -> int:
        """Forward passes of one epoch; the last batch of a group may be short."""
        return sum(math.ceil(len(rows) / self.batch_size_of(rows[0].item.dataset)) for rows in self.groups.values())

    @property
    def updates_per_epoch(self) -> float:
        """Updates of one epoch; not always a whole number."""
        return self.batches_per_epoch / self.accumulation

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is left out, and why."""
        return (*self.catalog.problems, *self.left_out)

    def without(self, broken: Mapping[str, str]) -> Plan:
        """The plan without the pictures of some paths, each with its reason. Raises: DataError when none is left to train on."""
        if not broken:
            return self
        kept = tuple(p for p in self.train if str(p.item.path) not in broken)
        if not kept:
            raise DataError("no picture is left to train on:\n  " + "\n  ".join(f"{path}: {why}" for path, why in [*broken.items()][:5]))
        held = tuple(p for p in self.evaluation if str(p.item.path) not in broken)
        problems = tuple(Problem(Path(path), reason) for path, reason in sorted(broken.items()))
        return replace(self, train=kept, evaluation=held, left_out=(*self.left_out, *problems))

    def sentence(self, seconds_per_update: float | None = None) -> str:
        """What the run will do, in one sentence."""
        pictures = len({p.item.path for p in self.train})
        times = self.steps / self.updates_per_epoch * len(self.train) / pictures
        batch = f"batch {self.batch_size}" + (f" x {self.accumulation}" if self.accumulation > 1 else "")
        text = (
            f"{pictures} images, {batch}: {_number(self.updates_per_epoch)} updates per epoch, {self.steps:,} updates = "
            f"each image {_number(times)} times"
        )
        return text if seconds_per_update is None else f"{text}, about {duration(self.steps * seconds_per_update)}"

    def __str__(self) -> str:
        sets = {d.id: d for d in self.catalog.datasets}
        lines = [
            self.sentence(),
            f"held out: {len(self.evaluation)} images; texts to encode: {len(self.texts)}",
            f"{'data set':16} {'size':10} images  seen per epoch  batches  cut away  enlarged",
        ]
        for (name, bucket), rows in self.groups.items():
            pictures = len({p.item.path for p in rows})
            size = self.batch_size_of(sets[name])
            cut = sum(p.cropped for p in rows) / len(rows)
            most = max(p.geometry.resized[0] / p.item.width for p in rows)
            lines.append(
                f"{name[:16]:16} {bucket!s:10} {pictures:6}  {_number(len(rows) / pictures):>14}  {math.ceil(len(rows) / size):7}  "
                f"{cut:8.1%}  {'to ' + format(most, '.0%') if most > 1 else 'no':>8}"
            )
        lines += [f"note: {text}" for text in (*self.catalog.notes, *self.advice())]
        lines += [f"left out: {p.path}: {p.reason}" for p in self.problems]
        return "\n".join(lines)

    def advice(self) -> list[str]:
        """For each group that does not fill one batch: what to write so that it does."""
        said = []
        sets = {d.id: d for d in self.catalog.datasets}
        for (name, bucket), rows in self.groups.items():
            size, copies = self.batch_size_of(sets[name]), sets[name].repeats + 1
            if len(rows) < size:
                need = math.ceil(size / (len(rows) / copies)) - 1
                said.append(
                    f"{name} {bucket}: {len(rows)} of a batch of {size}, trained as one short batch; to change that: "
                    f"`repeats: {need}`, or `train_batch_size: {len(rows)}`, or `small_bucket: merge`"
                )
        return [*said[:3], f"and {len(said) - 3} more sizes with less than a batch"] if len(said) > 4 else said


def _number(value: float) -> str:
    """One decimal place where there is something to show, two below one."""
    return f"{value:,.{2 if value < 1 else 1}f}".removesuffix(".0")


def plan(catalog: Catalog, config: RunConfig) -> Plan:
    """Decide size, cut and repeats of every picture, and list every text. Raises: DataError."""
    if catalog.missing_captions and not config.data.allow_missing_captions:
        count, total = len(catalog.missing_captions), len(catalog.items)
        raise DataError(
            f"{count} of {total} pictures have no caption, the first is {catalog.missing_captions[0]}; write a .txt file beside "
            "each, set caption_strategy: filename in datasets.yaml, or set allow_missing_captions: true"
        )
    train: list[Placement] = []
    evaluation: list[Placement] = []
    left_out: list[Problem] = []
    for item in catalog.items:
        placed = place(item, config.data.aspect_bucket_alignment)
        if isinstance(placed, Problem):
            left_out.append(placed)
        elif item.dataset.dataset_type == "eval":
            evaluation.append(placed[0])
        else:
            train += placed
    evaluation = [] if config.evaluation.eval_loss_disable else evaluation[: config.evaluation.num_eval_images]
    made = Plan(
        train=tuple(train), evaluation=tuple(evaluation), texts=(), catalog=catalog,
        batch_size=config.data.train_batch_size, accumulation=config.data.gradient_accumulation_steps, steps=0,
        cache_dir=config.run.cache_dir, vae_batch_size=config.data.vae_batch_size, text_batch_size=config.data.text_encoder_batch_size,
        left_out=tuple(left_out),
    )  # fmt: skip
    made = without_small_groups(made, config.data.small_bucket)
    if not made.train:
        raise DataError("no picture is left to train on:\n  " + "\n  ".join(f"{p.path}: {p.reason}" for p in made.problems[:5]))
    texts = {c for p in made.train for c in p.item.captions} | {p.item.caption for p in made.evaluation}
    texts |= {*config.prompts, config.validation.validation_negative_prompt, ""}
    epochs = config.schedule.num_train_epochs
    steps = config.max_train_steps or math.ceil((epochs or 1) * made.updates_per_epoch)
    return replace(made, texts=tuple(sorted(texts)), steps=steps)


def without_small_groups(made: Plan, what: str) -> Plan:
    """Deal with groups that do not fill one batch as ``small_bucket`` says. Raises: DataError when it says error."""
    small = {g: rows for g, rows in made.groups.items() if len(rows) < made.batch_size_of(rows[0].item.dataset)}
    if what == "short" or not small:
        return made
    if what == "error":
        raise DataError("sizes with fewer pictures than one batch (small_bucket: error):\n  " + "\n  ".join(made.advice()))
    if what == "drop":
        dropped = {p.item.path: group for group, rows in small.items() for p in rows}
        reasons = [Problem(path, f"alone in the small bucket {group.bucket} (small_bucket: drop)") for path, group in dropped.items()]
        kept = tuple(p for p in made.train if Group(p.item.dataset.id, p.bucket) not in small)
        return replace(made, train=kept, left_out=(*made.left_out, *reasons))
    home = {group: _nearest(group, [g for g in made.groups if g not in small and g.dataset == group.dataset]) for group in small}
    moved = tuple(replace(p, bucket=home.get(Group(p.item.dataset.id, p.bucket), p.bucket)) for p in made.train)
    return replace(made, train=moved)


def _nearest(group: Group, others: list[Group]) -> Bucket:
    """The bucket of the nearest shape among the groups that are large enough; its own when there is none."""
    shape = math.log(group.bucket.width / group.bucket.height)
    return min((g.bucket for g in others), key=lambda b: (abs(math.log(b.width / b.height) - shape), b), default=group.bucket)
