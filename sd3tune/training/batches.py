"""Which pictures are in batch k: a pure function of (plan, seed, k).

Shapes: B images, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled text width.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sd3tune.cache.builder import Cache
from sd3tune.data.buckets import Placement
from sd3tune.data.planning import Plan


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket with their texts; ``ids`` says which they are."""

    ids: tuple[str, ...]
    latent_BCHW: Tensor
    joint_BLD: Tensor
    pooled_BP: Tensor


def fold(seed: int, *numbers: int) -> int:
    """A 63-bit seed that depends on every one of the numbers."""
    text = ":".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by ``fold``."""
    return torch.Generator().manual_seed(fold(seed, *numbers))


def epoch_order(plan: Plan, seed: int, epoch: int) -> tuple[tuple[Placement, ...], ...]:
    """The batches of one epoch: every placement once, each batch of one data set and size, in a random order.

    A data set's ``probability`` moves its batches forward; which random cut of a picture is used goes round with the epochs.
    """
    rng = random.Random(fold(seed, epoch, 0))
    batches: list[tuple[float, tuple[Placement, ...]]] = []
    for rows in plan.groups.values():
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

    def __init__(self, cache: Cache, *, seed: int, caption_dropout: float) -> None:
        self._cache, self._seed, self._dropout = cache, seed, caption_dropout
        self._length = cache.plan.batches_per_epoch
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_order(cache.plan, seed, epoch))

    def placements(self, k: int) -> tuple[Placement, ...]:
        """What batch ``k`` holds."""
        epoch, position = divmod(k, self._length)
        return self._epoch(epoch)[position]

    def dropped(self, k: int) -> tuple[bool, ...]:
        """Which images of batch ``k`` are seen without their caption."""
        placements = self.placements(k)
        draws = torch.rand(len(placements), generator=generator(self._seed, k, 1)).tolist()
        own = (p.item.dataset.caption_dropout for p in placements)
        return tuple(draw < (self._dropout if rate is None else rate) for draw, rate in zip(draws, own, strict=True))

    def captions(self, k: int) -> tuple[str, ...]:
        """The text of each image of batch ``k``: one of its captions, or the empty one."""
        draws = torch.rand(len(self.placements(k)), generator=generator(self._seed, k, 6)).tolist()
        return tuple(
            "" if drop or not p.item.captions else p.item.captions[int(draw * len(p.item.captions))]
            for p, drop, draw in zip(self.placements(k), self.dropped(k), draws, strict=True)
        )

    def __getitem__(self, k: int) -> Batch:
        """Batch ``k`` from the cache. Raises: CacheError."""
        return load(self._cache, list(zip(self.placements(k), self.captions(k), strict=True)))


def load(cache: Cache, rows: list[tuple[Placement, str]]) -> Batch:
    """A batch of given placements (of one bucket) under given captions. Raises: CacheError."""
    texts = [cache.text(caption) for _, caption in rows]
    return Batch(
        tuple(placement.item.id for placement, _ in rows), torch.stack([cache.latent(placement) for placement, _ in rows]),
        torch.stack([text.joint_LD for text in texts]), torch.stack([text.pooled_P for text in texts]),
    )  # fmt: skip


def noise(shape: torch.Size, *, seed: int, k: int) -> Tensor:
    """Noise B C H W of batch ``k``, drawn image by image on the CPU, so that splitting a batch does not change it."""
    return torch.stack([torch.randn(shape[1:], generator=generator(seed, k, 2, place)) for place in range(shape[0])])
