"""What a run is about to do, measured from what was really loaded; shown and saved before the first update."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd3tune.cache.reading import Cache
from sd3tune.shown import Shown

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, repr=False)
class Manifest(Shown):
    """Everything that answers "did it train on what I meant"."""

    sentence: str
    images_found: int
    images_used: int
    images_held_out: int
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

    def as_dict(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        cut = f", {len(self.captions_truncated)} truncated" if self.captions_truncated else ", none truncated"
        lines = [
            self.sentence,
            f"images    {self.images_found} found, {self.images_used} to train on, {self.images_held_out} held out, "
            f"{len(self.refused)} refused",
            f"captions  {self.captions_found} found, {self.captions_empty} empty{cut}",
            *(f'          "{caption}"' for caption in self.first_captions),
            "buckets   "
            + ", ".join(f"{name}: {count}" for name, count in self.buckets)
            + f"; {self.updates_per_epoch:.4g} updates per epoch",
            f"adapter   {self.trainable_tensors} tensors, {self.trainable_parameters:,} parameters on {self.device}",
            "numbers   " + ", ".join(f"{what}: {dtype}" for what, dtype in self.dtypes),
            f"cache     {self.cache_hits} entries reused, {self.cache_misses} encoded",
            *(f"refused   {path}: {reason}" for path, reason in self.refused),
            *(f"truncated {said}" for said in self.captions_truncated),
        ]
        return "\n".join(lines)


def count_dtypes(tensors: Iterable[Tensor]) -> str:
    """Formats of the tensors by number of values, such as "float32" or "qint8 94%, float32 6%"."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        kind = getattr(tensor, "qtype", None)
        sizes[kind.name if kind is not None else str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    total = sum(sizes.values())
    return " and ".join(name if len(sizes) == 1 else f"{name} {count / total:.0%}" for name, count in sizes.most_common())


def describe(
    cache: Cache, transformer: Any, weights: Mapping[str, nn.Parameter], *, truncated: tuple[str, ...], seconds_per_update: float
) -> Manifest:
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
    return Manifest(
        sentence=plan.sentence(seconds_per_update),
        images_found=len(catalog.items) + len(catalog.problems),
        images_used=len({p.item.path for p in plan.train}),
        images_held_out=len(plan.evaluation),
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
    )
