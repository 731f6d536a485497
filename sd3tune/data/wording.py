"""A plan in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sd3tune.config.advice import Advice, about_data
from sd3tune.config.advice import advice as about
from sd3tune.shown import duration

if TYPE_CHECKING:
    from sd3tune.config.schema import RunConfig
    from sd3tune.data.datasets import Dataset
    from sd3tune.data.planning import Plan


def number(value: float) -> str:
    """One decimal place where there is something to show, two below one."""
    return f"{value:,.{2 if value < 1 else 1}f}".removesuffix(".0")


def times(least: int, most: int) -> str:
    """Such as ``12`` or ``12 to 13``."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def sentence(plan: Plan, seconds_per_update: float | None) -> str:
    """What the run will do, in one sentence."""
    pictures = len({p.item.path for p in plan.train})
    batch = f"batch {plan.batch_size}" + (f" x {plan.accumulation}" if plan.accumulation > 1 else "")
    batch += f" x {plan.processes} processes" if plan.processes > 1 else ""
    counts = [count * len(plan.train) / pictures for count in _mean_appearances(plan)]
    text = (
        f"{pictures} images, {batch}: {number(plan.updates_per_epoch)} updates per epoch, {plan.steps:,} updates = "
        f"each image {number(sum(counts))} times"
    )
    return text if seconds_per_update is None else f"{text}, about {duration(plan.steps * seconds_per_update)}"


def _mean_appearances(plan: Plan) -> list[float]:
    """Epochs of the run, phase by phase, each weighed by the share of the placements that it shows."""
    total, found = plan.steps * plan.accumulation, []
    starts = [*[phase.start for phase in plan.phases[1:]], total]
    for phase, after in zip(plan.phases, starts, strict=True):
        shown = sum(len(rows) for group, rows in plan.groups.items() if group.dataset in phase.datasets)
        if phase.length and phase.start < total:
            found.append((min(after, total) - phase.start) / phase.length * shown / len(plan.train))
    return found


def describe(plan: Plan) -> str:
    """Everything that a plan holds, as a table with notes."""
    sets = {d.id: d for d in plan.catalog.datasets}
    lines = [
        sentence(plan, None),
        f"held out: {held_out(plan)}; texts to encode: {len(plan.texts)}",
        f"{'data set':16} {'size':10} images  seen per epoch  in the run  batches  cut away  enlarged",
    ]
    for (name, bucket), rows in plan.groups.items():
        pictures = len({p.item.path for p in rows})
        size, per_epoch = plan.batch_size_of(sets[name]), len(rows) / pictures
        least, most = plan.appearances.get(name, (0, 0))
        cut = sum(p.cropped for p in rows) / len(rows)
        enlarged = max(p.geometry.resized[0] / p.item.width for p in rows)
        lines.append(
            f"{name[:16]:16} {bucket!s:10} {pictures:6}  {number(per_epoch):>14}  "
            f"{times(math.floor(least * per_epoch), math.ceil(most * per_epoch)):>10}  {math.ceil(len(rows) / size):7}  {cut:8.1%}  "
            f"{'to ' + format(enlarged, '.0%') if enlarged > 1 else 'no':>8}"
        )
    lines += _windows(plan)
    lines += [said for dataset in plan.catalog.datasets for said in _purpose(plan, dataset)]
    lines += [f"note: {text}" for text in (*plan.catalog.notes, *advice(plan))]
    lines += [f"left out: {p.path}: {p.reason}" for p in plan.problems]
    if plan.warnings is None:
        lines.append("near-duplicates and blur: not looked at yet; the cache builder looks while it decodes")
    lines += [f"look at: {p.path}: {p.reason}" for p in plan.warnings or ()]
    return "\n".join(lines)


def held_out(plan: Plan) -> str:
    """How many pictures are never trained on, and how many of them are judged."""
    judged = len(plan.evaluation)
    said = f", {judged} of them judged (num_eval_images)" if judged else ", none of them judged"
    return f"{plan.held_out} images" + said * (judged < plan.held_out)


def _purpose(plan: Plan, dataset: Dataset) -> list[str]:
    """What is special about how a data set counts."""
    where = "their alpha channels" if dataset.mask_from_alpha else dataset.conditioning_data
    said = [f"{dataset.id}: counted by masks from {where}; their mean share is in the manifest"] if where else []
    if dataset.eval_share:
        held = [item.held_out for item in plan.catalog.items if item.dataset == dataset]
        said.append(f"{dataset.id}: {sum(held)} of its {len(held)} pictures are held out (eval_share {dataset.eval_share:g})")
    if dataset.is_regularisation_data:
        said.append(f"{dataset.id}: regularisation; the target is what the base model predicts, so one more forward pass for each batch")
    return said


def _windows(plan: Plan) -> list[str]:
    """From which update on which data sets are seen, when that changes."""
    if len(plan.phases) == 1:
        return []
    total = plan.steps * plan.accumulation
    return [
        f"from update {phase.start // plan.accumulation + 1:,} (epoch {phase.epoch:,}): {', '.join(sorted(phase.datasets))}"
        for phase in plan.phases
        if phase.start < total
    ]


def advice(plan: Plan) -> list[str]:
    """For each group that does not fill one batch: what to write so that it does."""
    said = []
    sets = {d.id: d for d in plan.catalog.datasets}
    for (name, bucket), rows in plan.groups.items():
        size, copies = plan.batch_size_of(sets[name]), sets[name].repeats + 1
        if len(rows) < size:
            need = math.ceil(size / (len(rows) / copies)) - 1
            said.append(
                f"{name} {bucket}: {len(rows)} of a batch of {size}, trained as one short batch; to change that: "
                f"`repeats: {need}`, or `train_batch_size: {len(rows)}`, or `small_bucket: merge`, "
                "or `allow_dataset_oversubscription: true`"
            )
    return [*said[:3], f"and {len(said) - 3} more sizes with less than a batch"] if len(said) > 4 else said


def considered(config: RunConfig, plan: Plan) -> tuple[Advice, ...]:
    """What should be thought of for a configuration and what it is to be trained on."""
    sets = [d for d in plan.catalog.datasets if d.dataset_type == "image"]
    masks = any(d.mask_from_alpha or d.conditioning_data for d in sets)
    kept = any(d.is_regularisation_data for d in sets)
    return (*about(config), *about_data(config, sizes=len(plan.buckets), masks=masks, regularisation=kept))


def difference(old: Plan, new: Plan) -> str:
    """What going from one plan to another encodes anew, and what else changes."""
    before, after = ({(str(p.item.path), p.geometry, p.item.dataset.background) for p in plan.cuts} for plan in (old, new))
    fresh, gone = after - before, before - after
    texts, dropped = set(new.texts) - set(old.texts), set(old.texts) - set(new.texts)
    known = {path for path, _, _ in before}
    recut = sum(path in known for path, _, _ in fresh)
    lines = [
        f"pictures to encode: {len(fresh):,} ({recut:,} of them cut otherwise than before); no longer needed: {len(gone):,}",
        f"texts to encode: {len(texts):,}; no longer needed: {len(dropped):,}",
    ]
    for name, was, is_now in (
        ("updates", old.steps, new.steps),
        ("updates per epoch", old.updates_per_epoch, new.updates_per_epoch),
        ("batch", old.batch_size * old.accumulation * old.processes, new.batch_size * new.accumulation * new.processes),
        ("images", len({p.item.path for p in old.train}), len({p.item.path for p in new.train})),
    ):
        if was != is_now:
            lines.append(f"{name}: {number(was)} before, {number(is_now)} now")
    return "\n".join(lines)
