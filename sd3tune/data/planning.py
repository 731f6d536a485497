"""What an epoch holds, decided before anything is encoded: pure data, shown to a person first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sd3tune.config.rules import spreads_of
from sd3tune.config.schema import RunConfig
from sd3tune.data import holding, wording
from sd3tune.data.buckets import Bucket, Placement, place
from sd3tune.data.catalog import Catalog, Problem
from sd3tune.data.datasets import Dataset
from sd3tune.data.timeline import Phase, appearances, phases, start_of_epoch
from sd3tune.errors import DataError
from sd3tune.shown import Shown


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
    write_batch_size: int = 128
    processes: int = 1
    """Processes that share each batch; ``batch_size`` is that of one."""
    left_out: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] | None = None
    """What should be looked at (near-duplicates, blur); ``None`` until the cache builder has looked."""

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

    @property
    def cuts(self) -> Iterator[Placement]:
        """Every cut of every picture, to train on and held out."""
        return (cut for placement in (*self.train, *self.evaluation) for cut in placement.variants)

    def batch_size_of(self, dataset: Dataset) -> int:
        """Images of one batch of a data set, of all processes together."""
        return (dataset.train_batch_size or self.batch_size) * self.processes

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The stretches of the run with the same data sets."""
        batches: Counter[str] = Counter()
        datasets = {rows[0].item.dataset.id: rows[0].item.dataset for rows in self.groups.values()}
        for group, rows in self.groups.items():
            batches[group.dataset] += math.ceil(len(rows) / self.batch_size_of(rows[0].item.dataset))
        return phases(list(datasets.values()), batches, self.accumulation)

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes of the first epoch; the last batch of a group may be short."""
        return self.phases[0].length

    @property
    def updates_per_epoch(self) -> float:
        """Updates of the first epoch; not always a whole number."""
        return self.batches_per_epoch / self.accumulation

    @property
    def appearances(self) -> dict[str, tuple[int, int]]:
        """Data set -> how often, at least and at most, each placement is seen in the whole run."""
        return appearances(self.phases, self.steps * self.accumulation)

    @property
    def held_out(self) -> int:
        """Pictures that are never trained on; ``evaluation`` are those of them that are judged."""
        return sum(item.held_out for item in self.catalog.items)

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
        gone = {str(p.item.path): p.item.path for p in (*self.train, *self.evaluation) if str(p.item.path) in broken}
        problems = tuple(Problem(gone.get(path, Path(path)), reason) for path, reason in sorted(broken.items()))
        return replace(self, train=kept, evaluation=held, left_out=(*self.left_out, *problems))

    def hashed(self, pixels: Mapping[str, str]) -> Plan:
        """The plan with the digests of pictures that were not hashed yet, by path. No cut depends on them."""
        items = {id(i): replace(i, pixels=pixels[str(i.path)]) for i in self.catalog.items if not i.pixels and str(i.path) in pixels}
        catalog = replace(self.catalog, items=tuple(items.get(id(i), i) for i in self.catalog.items))
        train, held = (tuple(replace(p, item=items.get(id(p.item), p.item)) for p in rows) for rows in (self.train, self.evaluation))
        return replace(self, train=train, evaluation=held, catalog=catalog)

    def diff(self, other: Plan) -> str:
        """What going from this plan to another one encodes anew, and what else changes."""
        return wording.difference(self, other)

    def sentence(self, seconds_per_update: float | None = None) -> str:
        """What the run will do, in one sentence."""
        return wording.sentence(self, seconds_per_update)

    def advice(self) -> list[str]:
        """For each group that does not fill one batch: what to write so that it does."""
        return wording.advice(self)

    def __str__(self) -> str:
        return wording.describe(self)

    def _repr_html_(self) -> str:
        from sd3tune.data.sheet import page

        return page(self)


def plan(catalog: Catalog, config: RunConfig) -> Plan:
    """Decide size, cut and repeats of every picture, and list every text. Raises: DataError."""
    if catalog.missing_captions and not config.data.allow_missing_captions:
        count, total = len(catalog.missing_captions), len(catalog.items)
        raise DataError(
            f"{count} of {total} pictures have no caption, the first is {catalog.missing_captions[0]}; write a .txt file beside "
            "each, set caption_strategy: filename in datasets.yaml, or set allow_missing_captions: true"
        )
    check_offsets(catalog, config)
    train: list[Placement] = []
    evaluation: list[Placement] = []
    left_out: list[Problem] = []
    for item in catalog.items:
        placed = place(item, config.data.aspect_bucket_alignment)
        if isinstance(placed, Problem):
            left_out.append(placed)
        elif item.held_out:
            evaluation.append(placed[0])
        else:
            train += placed
    made = Plan(
        train=tuple(train), evaluation=holding.judged(evaluation, config.evaluation, catalog.items), texts=(), catalog=catalog,
        batch_size=config.data.train_batch_size, accumulation=config.data.gradient_accumulation_steps, steps=0,
        cache_dir=config.run.cache_dir, vae_batch_size=config.data.vae_batch_size, text_batch_size=config.data.text_encoder_batch_size,
        write_batch_size=config.data.write_batch_size, processes=config.run.num_processes or 1, left_out=tuple(left_out),
    )  # fmt: skip
    if config.data.allow_dataset_oversubscription:
        made = oversubscribed(made)
    made = without_small_groups(made, config.data.small_bucket)
    if not made.train:
        raise DataError("no picture is left to train on:\n  " + "\n  ".join(f"{p.path}: {p.reason}" for p in made.problems[:5]))
    texts = {c for p in made.train for c in p.item.captions} | {p.item.caption for p in made.evaluation}
    texts |= {*config.validation_texts, ""}
    made = replace(made, texts=tuple(sorted(texts)), steps=config.max_train_steps or 0)
    if not made.steps:
        batches = start_of_epoch(made.phases, (config.schedule.num_train_epochs or 1) + 1)
        made = replace(made, steps=max(1, math.ceil(batches / made.accumulation)))
    check_phases(made)
    return made


def check_offsets(catalog: Catalog, config: RunConfig) -> None:
    """Raises: DataError for a data set whose offset of noise levels would be ignored."""
    chosen = next(iter(spreads_of(config.noise)), None)
    moved = next((d for d in catalog.datasets if d.timestep_sampling_offset), None)
    if chosen and moved:
        raise DataError(
            f"{moved.id}: timestep_sampling_offset moves the logit-normal alone, and {chosen} draws otherwise; remove one of the two"
        )


def check_phases(made: Plan) -> None:
    """Raises: DataError when there are updates for which no data set is there."""
    empty = next((p for p in made.phases if not p.length), None)
    if empty is not None and empty.start < made.steps * made.accumulation:
        raise DataError(
            f"from update {empty.start // made.accumulation + 1} (epoch {empty.epoch}) on, no data set is seen; widen start_step, "
            "end_step, start_epoch or end_epoch of one, or lower max_train_steps"
        )


def oversubscribed(made: Plan) -> Plan:
    """Small groups with more repeats, as many as fill a batch; data sets whose ``repeats`` are set by hand stay as they are."""
    more: list[Placement] = []
    for rows in made.groups.values():
        dataset = rows[0].item.dataset
        if not dataset.repeats:
            times = math.ceil(made.batch_size_of(dataset) / len(rows))
            more += [replace(p, copy=number) for number in range(1, times) for p in rows]
    return replace(made, train=(*made.train, *more))


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
