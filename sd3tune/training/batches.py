"""Which pictures are in batch k: a pure function of (plan, seed, k).

Shapes: B images, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled text width.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sd3tune.cache.conditioning import Words
from sd3tune.cache.reading import Cache
from sd3tune.data.buckets import Placement
from sd3tune.data.datasets import Dataset
from sd3tune.data.planning import Plan
from sd3tune.data.timeline import phase_of


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket with their texts; ``ids`` says which they are."""

    ids: tuple[str, ...]
    latent_BCHW: Tensor
    joint_BLD: Tensor
    pooled_BP: Tensor
    sigma_offset: float = 0.0
    """What its data set adds to the logit of its noise levels."""
    mask_BHW: Tensor | None = None
    """Weights of the latent pixels, 0 to 1; all count when left out."""
    regularisation: bool = False
    """Whether the model should stay as it is on these."""


def fold(seed: int, *numbers: int) -> int:
    """A 63-bit seed that depends on every one of the numbers."""
    text = ":".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by ``fold``."""
    return torch.Generator().manual_seed(fold(seed, *numbers))


def epoch_order(plan: Plan, seed: int, epoch: int, datasets: frozenset[str] | None = None) -> tuple[tuple[Placement, ...], ...]:
    """The batches of one epoch (from 0): every placement of the data sets (all, if left out) once, each batch of one data set
    and size, in a random order.

    A data set's ``probability`` moves its batches forward; which random cut of a picture is used goes round with the epochs.
    """
    rng = random.Random(fold(seed, epoch, 0))
    batches: list[tuple[float, tuple[Placement, ...]]] = []
    for group, rows in plan.groups.items():
        if datasets is not None and group.dataset not in datasets:
            continue
        dataset = rows[0].item.dataset
        shown = [_variant(placement, seed, epoch) for placement in rows]
        rng.shuffle(shown)
        size = plan.batch_size_of(dataset)
        for i in range(0, len(shown), size):
            # Efraimidis and Spirakis 2006: sorted by u ** (1 / weight), a random order in which heavier ones tend to come first.
            batches.append((rng.random() ** (1 / dataset.probability), tuple(shown[i : i + size])))
    return tuple(batch for _, batch in sorted(batches, key=lambda pair: -pair[0]))


def _variant(placement: Placement, seed: int, epoch: int) -> Placement:
    """The random cut of this epoch; all of them come in turn."""
    cuts = placement.variants
    return cuts[(fold(seed, 5) + placement.copy + epoch) % len(cuts)]


class Batches:
    """An endless sequence with random access: ``batches[k]`` depends on the plan, the seed and k, and on nothing before it."""

    def __init__(
        self, cache: Cache, *, seed: int, caption_dropout: float, latent_draw: str = "mean", masked_probability: float = 1.0,
        dropout_mode: Literal["joint", "per_encoder"] = "joint",
    ) -> None:  # fmt: skip
        self._cache, self._seed, self._dropout, self._sampled = cache, seed, caption_dropout, latent_draw == "sample"
        self._masked, self._apart = masked_probability, dropout_mode == "per_encoder"
        self._epoch = lru_cache(maxsize=2)(lambda epoch, datasets: epoch_order(cache.plan, seed, epoch, datasets))

    def placements(self, k: int) -> tuple[Placement, ...]:
        """What batch ``k`` holds."""
        phase = phase_of(self._cache.plan.phases, k)
        epoch, position = divmod(k - phase.start, phase.length)
        return self._epoch(phase.epoch - 1 + epoch, phase.datasets)[position]

    def ids(self, k: int) -> tuple[str, ...]:
        """The pictures of batch ``k``."""
        return tuple(placement.item.id for placement in self.placements(k))

    def dropout_rates(self, dataset: Dataset) -> tuple[float, float]:
        """The share of a data set's captions that no encoder reads, and that a single one does not read.

        Apart, the second is the cube root of the first. Source: Esser et al. 2024 (arXiv:2403.03206), 46.4 % for each encoder.
        """
        rate = self._dropout if dataset.caption_dropout is None else dataset.caption_dropout
        return rate, rate ** (1 / 3) if self._apart else rate

    def dropped(self, k: int) -> tuple[bool, ...]:
        """Which images of batch ``k`` are seen without their caption by every encoder."""
        return tuple(map(all, self.dropped_by_encoder(k)))

    def dropped_by_encoder(self, k: int) -> tuple[tuple[bool, bool, bool], ...]:
        """For each image of batch ``k`` whether CLIP-L, CLIP-G and T5 are without its caption: all or none of them, or each by itself."""
        placements = self.placements(k)
        if self._apart:
            draws_B3 = torch.stack([torch.rand(3, generator=generator(self._seed, k, 20, place)) for place in range(len(placements))])
        else:
            draws_B3 = torch.rand(len(placements), generator=generator(self._seed, k, 1))[:, None].expand(-1, 3)
        rate_B = torch.tensor([self.dropout_rates(p.item.dataset)[1] for p in placements], dtype=torch.float64)
        return tuple((of_l, of_g, of_t5) for of_l, of_g, of_t5 in (draws_B3 < rate_B[:, None]).tolist())

    def captions(self, k: int) -> tuple[Words, ...]:
        """The text of each image of batch ``k``: one of its captions, the empty one, or one for each encoder where some are without."""
        draws = torch.rand(len(self.placements(k)), generator=generator(self._seed, k, 6)).tolist()
        return tuple(
            "" if not p.item.captions else _without(p.item.captions[int(draw * len(p.item.captions))], drop)
            for p, drop, draw in zip(self.placements(k), self.dropped_by_encoder(k), draws, strict=True)
        )

    def __getitem__(self, k: int) -> Batch:
        """Batch ``k`` from the cache. Raises: CacheError."""
        return self.part(k, range(len(self.placements(k))))

    def part(self, k: int, places: range) -> Batch:
        """The images at some places (at least one) of batch ``k``: the same rows as those of the whole. Raises: CacheError."""
        placements, captions = self.placements(k), self.captions(k)
        batch = load(self._cache, [(placements[place], captions[place]) for place in places])
        if batch.mask_BHW is not None and self._masked < 1:
            draws_B = torch.stack([torch.rand((), generator=generator(self._seed, k, 10, place)) for place in places])
            batch = replace(batch, mask_BHW=torch.where((draws_B < self._masked)[:, None, None], batch.mask_BHW, 1))
        if not self._sampled:
            return batch
        deviation_BCHW = torch.stack([self._cache.moments(placements[place])[1] for place in places])
        drawn_BCHW = noise(batch.latent_BCHW.shape, seed=self._seed, k=k, purpose=7, places=places).to(deviation_BCHW.dtype)
        return replace(batch, latent_BCHW=batch.latent_BCHW + deviation_BCHW * drawn_BCHW)


def _without(caption: str, dropped: tuple[bool, bool, bool]) -> Words:
    """A caption as the encoders read it."""
    if len(set(dropped)) == 1:
        return "" if dropped[0] else caption
    of_l, of_g, of_t5 = ("" if drop else caption for drop in dropped)
    return of_l, of_g, of_t5


def load(cache: Cache, rows: Sequence[tuple[Placement, Words]]) -> Batch:
    """A batch of given placements (of one bucket) under given captions. Raises: CacheError."""
    joint_BLD, pooled_BP = cache.texts([caption for _, caption in rows])
    latent_BCHW = torch.stack([cache.latent(placement) for placement, _ in rows])
    ids = tuple(placement.item.id for placement, _ in rows)
    dataset = rows[0][0].item.dataset
    mask_BHW = None
    if any(placement.item.mask for placement, _ in rows):
        whole_HW = torch.ones(latent_BCHW.shape[2:])
        mask_BHW = torch.stack([cache.mask(placement) if placement.item.mask else whole_HW for placement, _ in rows])
    return Batch(
        ids, latent_BCHW, joint_BLD, pooled_BP, dataset.timestep_sampling_offset, mask_BHW, dataset.is_regularisation_data
    )  # fmt: skip


def noise(shape: torch.Size, *, seed: int, k: int, purpose: int = 2, places: range | None = None) -> Tensor:
    """Noise B C H W of batch ``k`` (of the images at some places of it), drawn image by image on the CPU, so that splitting a batch
    does not change it."""
    rows = range(shape[0]) if places is None else places
    return torch.stack([torch.randn(shape[1:], generator=generator(seed, k, purpose, place)) for place in rows])
