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
from sd3tune.data.buckets import Bucket, Placement, Plan


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
    """The batches of one epoch: every placement once, each batch of one bucket, all in a random order."""
    rng = random.Random(fold(seed, epoch, 0))
    by_bucket: dict[Bucket, list[Placement]] = {}
    for placement in plan.train:
        by_bucket.setdefault(placement.bucket, []).append(placement)
    batches: list[tuple[Placement, ...]] = []
    for bucket in sorted(by_bucket):
        rows = by_bucket[bucket]
        rng.shuffle(rows)
        batches += [tuple(rows[i : i + plan.batch_size]) for i in range(0, len(rows), plan.batch_size)]
    rng.shuffle(batches)
    return tuple(batches)


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
        draws = torch.rand(len(self.placements(k)), generator=generator(self._seed, k, 1))
        return tuple((draws < self._dropout).tolist())

    def __getitem__(self, k: int) -> Batch:
        """Batch ``k`` from the cache. Raises: CacheError."""
        pairs = zip(self.placements(k), self.dropped(k), strict=True)
        return load(self._cache, [(p, "" if drop else p.item.caption) for p, drop in pairs])


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
