"""What a run is about to do, measured from what was really loaded; shown and saved before the first update."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd3tune.cache.reading import Cache
from sd3tune.data.datasets import Dataset
from sd3tune.data.planning import Plan
from sd3tune.shown import Shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sd3tune.training.batches import Batches
    from sd3tune.training.rules import Rules

DRAWS = 10_000
"""Noise levels drawn for the manifest's histogram."""

FORWARD = 1 / 3
"""Time of a forward pass beside that of a forward and a backward pass."""


@dataclass(frozen=True, repr=False)
class Manifest(Shown):
    """Everything that answers "did it train on what I meant"."""

    sentence: str
    updates: int
    images_found: int
    images_used: int
    images_held_out: int
    """Never trained on."""
    images_judged: int
    """Those of them that the evaluation loss is measured on."""
    refused: tuple[tuple[str, str], ...]
    captions_found: int
    captions_empty: int
    captions_truncated: tuple[str, ...]
    first_captions: tuple[str, ...]
    buckets: tuple[tuple[str, int], ...]
    updates_per_epoch: float
    trainable_tensors: int
    trainable_parameters: int
    device: str
    dtypes: tuple[tuple[str, str], ...]
    cache_hits: int
    cache_misses: int
    datasets: tuple[dict[str, Any], ...]
    source: str = ""
    """Where they were read from: a file, a folder or an address."""
    advice: tuple[str, ...] = ()
    pictures: str = ""
    """What is drawn on the way, and in which steps skip-layer guidance is active."""
    levels: tuple[int, ...] = ()
    """Of 10,000 noise levels drawn as in the run, how many lie in each tenth of 0 to 1."""
    shifts: tuple[tuple[str, float], ...] = ()
    """The shift of noise levels for each size."""
    masks: tuple[tuple[str, int, float, float], ...] = ()
    """Data set, pictures with a mask, and the mean and the smallest share of a picture that its mask counts."""
    regularisation: tuple[tuple[str, int, float], ...] = ()
    """Data set, pictures on which the model should stay as it is, and their weight."""
    texts: str = ""
    """How texts reach the transformer."""
    dropout: tuple[tuple[str, int, float, float], ...] = ()
    """Data set, its pictures, and the share of the times seen that all encoders, and that each of them, are without the caption."""
    rollout: str = ""
    """Which pictures are rolled out, and how; empty when none is."""
    extra_forwards: float = 0.0
    """Pictures of an update that go through the model besides the ones that learn, expected as a mean over the run."""

    def as_dict(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        cut = f", {len(self.captions_truncated)} truncated" if self.captions_truncated else ", none truncated"
        lines = [
            self.sentence,
            f"images    {self.images_found} found, {self.images_used} to train on, {self.images_held_out} held out "
            f"({self.images_judged} of them judged), {len(self.refused)} refused",
            f"captions  {self.captions_found} found, {self.captions_empty} empty{cut}",
            *(f'          "{caption}"' for caption in self.first_captions),
            *([f"texts     {self.texts}"] if self.texts else []),
            *(
                f"dropout   {name}: {count} pictures, {rate:.1%} of the times seen without their caption "
                + ("(joint)" if each == rate else f"(per_encoder, each encoder {each:.1%})")
                for name, count, rate, each in self.dropout
            ),
            "buckets   "
            + ", ".join(f"{name}: {count}" for name, count in self.buckets)
            + f"; {self.updates_per_epoch:.4g} updates per epoch",
            f"adapter   {self.trainable_tensors} tensors, {self.trainable_parameters:,} parameters on {self.device}",
            "numbers   " + ", ".join(f"{what}: {dtype}" for what, dtype in self.dtypes),
            *self._noise(),
            *([f"rollout   {self.rollout}"] if self.rollout else []),
            *(
                f"masks     {name}: {count} pictures with a mask; on average {mean:.1%} of a picture counts, at least {least:.1%}"
                for name, count, mean, least in self.masks
            ),
            *(
                f"stays     {name}: {count} pictures whose target is the base model's own prediction, weight {weight:g}"
                for name, count, weight in self.regularisation
            ),
            *([f"pictures  {self.pictures}"] if self.pictures else []),
            f"cache     {self.cache_hits} entries reused, {self.cache_misses} encoded",
            *(f"refused   {path}: {reason}" for path, reason in self.refused),
            *(f"truncated {said}" for said in self.captions_truncated),
            *(f"advice    {said}" for said in self.advice),
        ]
        return "\n".join(lines)

    def _noise(self) -> list[str]:
        """What is drawn."""
        if not self.levels:
            return []
        shares = " ".join(f"{100 * count / sum(self.levels):.0f}" for count in self.levels)
        factors = sorted({factor for _, factor in self.shifts})
        shift = ", ".join(f"{name}: {factor:.3g}" for name, factor in self.shifts) if len(factors) > 1 else f"{factors[0]:.3g}"
        return [f"noise     % of levels in each tenth from picture to noise: {shares}; shift {shift}"]


def drawn_levels(plan: Plan, rules: Rules) -> tuple[int, ...]:
    """How many of 10,000 noise levels lie in each tenth."""
    import torch

    from sd3tune.training import sigmas

    return sigmas.tenths(torch.cat([sigma_B for *_, sigma_B in _drawn(plan, rules)]))


def _drawn(plan: Plan, rules: Rules) -> Iterator[tuple[Dataset, float, Tensor]]:
    """10,000 noise levels in parts, each with its data set and shift, drawn for every size in proportion to its pictures."""
    from sd3tune.training import sigmas
    from sd3tune.training.batches import generator

    for number, (group, rows) in enumerate(plan.groups.items()):
        dataset, count = rows[0].item.dataset, round(DRAWS * len(rows) / len(plan.train))
        factor = sigmas.factor_of(rules.shift, group.bucket.height // 8, group.bucket.width // 8)
        sigma_B = sigmas.draw(
            count, scale=rules.sigmoid_scale, factor=factor, stratified=rules.stratified, rng=generator(rules.seed, number, 9),
            offset=dataset.timestep_sampling_offset, spread=rules.spread,
        )  # fmt: skip
        yield dataset, factor, sigma_B


def rollouts_of(plan: Plan, rules: Rules) -> tuple[str, float]:
    """Which pictures are rolled out and what that costs; and how many more go through the model in an update, as a mean over the run."""
    if rules.rollout is None:
        return "", 0.0
    parts = []
    for dataset, factor, sigma_B in _drawn(plan, rules):
        rollout = replace(rules.rollout, reflex=None) if dataset.is_regularisation_data else rules.rollout
        parts.append((len(sigma_B), rollout.expected_passes(sigma_B.tolist(), factor)))
    images = len(plan.train) / plan.updates_per_epoch
    each = images * sum(count * passes for count, passes in parts) / sum(count for count, _ in parts)
    chances = [rules.rollout.chance(update) for update in range(rules.total)]
    mean, most = each * sum(chances) / len(chances), each * max(chances)
    cost = f"beside the {images:.3g} pictures that learn, {mean:.3g} go through the model in a mean update, at most {most:.3g}"
    return f"{rules.rollout}; {cost}", mean


def shifts_of(plan: Plan, rules: Rules) -> tuple[tuple[str, float], ...]:
    """Each size of the training pictures with its shift."""
    from sd3tune.training.sigmas import factor_of

    return tuple((str(b), factor_of(rules.shift, b.height // 8, b.width // 8)) for b in sorted({p.bucket for p in plan.train}))


def masks_of(cache: Cache) -> tuple[tuple[str, int, float, float], ...]:
    """For each data set with masks: pictures, and mean and smallest share of a cut that counts."""
    shares: dict[str, list[float]] = {}
    pictures: dict[str, set[Any]] = {}
    for cut in cache.plan.cuts:
        if cut.item.mask is not None:
            shares.setdefault(cut.item.dataset.id, []).append(cache.mask_share(cut))
            pictures.setdefault(cut.item.dataset.id, set()).add(cut.item.path)
    return tuple((name, len(pictures[name]), sum(found) / len(found), min(found)) for name, found in shares.items())


def dropout_of(plan: Plan, batches: Batches) -> tuple[tuple[str, int, float, float], ...]:
    """For each data set to train on: its pictures, and how often all encoders, and each of them, are without the caption."""
    pictures: dict[str, set[Any]] = {}
    datasets = {placement.item.dataset.id: placement.item.dataset for placement in plan.train}
    for placement in plan.train:
        pictures.setdefault(placement.item.dataset.id, set()).add(placement.item.path)
    return tuple((name, len(found), *batches.dropout_rates(datasets[name])) for name, found in pictures.items())


def regularisation_of(plan: Plan, weight: float) -> tuple[tuple[str, int, float], ...]:
    """For each regularisation data set: its pictures, and their weight."""
    pictures: dict[str, set[Any]] = {}
    for placement in plan.train:
        if placement.item.dataset.is_regularisation_data:
            pictures.setdefault(placement.item.dataset.id, set()).add(placement.item.path)
    return tuple((name, len(found), weight) for name, found in pictures.items())


def count_dtypes(tensors: Iterable[Tensor]) -> str:
    """Formats of the tensors by number of values, such as "float32" or "qint8 94%, float32 6%"."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        kind = getattr(tensor, "qtype", None)
        sizes[kind.name if kind is not None else str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    total = sum(sizes.values())
    return " and ".join(name if len(sizes) == 1 else f"{name} {count / total:.0%}" for name, count in sizes.most_common())


def describe(
    cache: Cache, transformer: Any, weights: Mapping[str, nn.Parameter], rules: Rules, batches: Batches, *, truncated: tuple[str, ...],
    seconds_per_update: float, pictures: str = "", advice: tuple[str, ...] = (),
) -> Manifest:  # fmt: skip
    """Gather the manifest of a run from its cache and its loaded model."""
    plan = cache.plan
    catalog, first = plan.catalog, plan.train[0]
    captions = [caption for item in catalog.items for caption in item.captions]
    text = cache.text(first.item.caption)
    dtypes = (
        ("base", count_dtypes(p for p in transformer.parameters() if not p.requires_grad)),
        ("adapter", count_dtypes(weights.values())),
        ("latents", count_dtypes([cache.latent(first)])),
        ("texts", count_dtypes([text.joint_LD, text.pooled_P])),
    )
    rollouts, extra = rollouts_of(plan, rules)
    images = len(plan.train) / plan.updates_per_epoch
    return Manifest(
        sentence=plan.sentence(seconds_per_update * (1 + FORWARD * extra / images)),
        updates=plan.steps,
        images_found=len(catalog.items) + len(catalog.problems),
        images_used=len({p.item.path for p in plan.train}),
        images_held_out=plan.held_out,
        images_judged=len(plan.evaluation),
        refused=tuple((str(p.path), p.reason) for p in plan.problems),
        captions_found=len(captions),
        captions_empty=len(catalog.missing_captions),
        captions_truncated=truncated,
        first_captions=tuple(captions[:3]),
        buckets=tuple((str(bucket), count) for bucket, count in plan.buckets.items()),
        updates_per_epoch=plan.updates_per_epoch,
        trainable_tensors=len(weights),
        trainable_parameters=sum(w.numel() for w in weights.values()),
        device=str(next(iter(weights.values())).device),
        dtypes=dtypes,
        cache_hits=cache.hits,
        cache_misses=cache.misses,
        datasets=tuple(dataclasses.asdict(d) for d in catalog.datasets),
        source=catalog.source,
        pictures=pictures,
        advice=advice,
        levels=drawn_levels(plan, rules),
        shifts=shifts_of(plan, rules),
        masks=masks_of(cache),
        regularisation=regularisation_of(plan, rules.regularisation_weight),
        texts=str(cache.conditioning),
        dropout=dropout_of(plan, batches),
        rollout=rollouts,
        extra_forwards=extra,
    )
