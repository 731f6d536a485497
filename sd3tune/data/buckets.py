"""How one picture is resized, cut and mirrored. Pure arithmetic on sizes; nothing is opened."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from sd3tune.data.catalog import Item, Problem
from sd3tune.data.datasets import Dataset
from sd3tune.data.images import measure
from sd3tune.errors import DataError

LATENT_FACTOR = 8
"""Pixels of a latent pixel's side, in every SD3."""


class Bucket(NamedTuple):
    """A size in pixels that pictures are brought to."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Geometry(NamedTuple):
    """Resize to ``resized``, cut ``bucket`` at ``left``, ``top`` (all in pixels), then mirror."""

    resized: tuple[int, int]
    left: int
    top: int
    bucket: Bucket
    mirrored: bool = False


@dataclass(frozen=True)
class Placement:
    """One appearance of an item in an epoch: ``copy`` counts its repeats from 0, ``variant`` its random cuts."""

    item: Item
    bucket: Bucket
    copy: int = 0
    mirrored: bool = False
    variant: int = 0

    @cached_property
    def geometry(self) -> Geometry:
        """One resize that covers the bucket, then one cut. Variant j is a function of (the picture's bytes, j)."""
        dataset, (width, height) = self.item.dataset, (self.item.width, self.item.height)
        scale = max(enlargement(width, height, self.bucket), _reduction(dataset, width, height))
        resized = max(self.bucket.width, round(width * scale)), max(self.bucket.height, round(height * scale))
        room = resized[0] - self.bucket.width, resized[1] - self.bucket.height
        left, top = room[0] // 2, room[1] // 2
        if dataset.crop and dataset.crop_style == "corner":
            left, top = room
        elif dataset.crop and dataset.crop_style == "random":
            rng = random.Random(f"{self.item.pixels} {self.variant}")
            left, top = rng.randint(0, room[0]), rng.randint(0, room[1])
        elif dataset.crop and dataset.crop_style == "face" and self.item.focus is not None:
            left, top = (
                min(max(0, round(share * side - cut / 2)), space)
                for share, side, cut, space in zip(self.item.focus, resized, self.bucket, room, strict=True)
            )
        return Geometry(resized, left, top, self.bucket, self.mirrored)

    @property
    def cropped(self) -> float:
        """Share of the picture's area that is cut away, 0 to 1."""
        width, height = self.geometry.resized
        return 1 - self.bucket.width * self.bucket.height / (width * height)

    @cached_property
    def variants(self) -> tuple[Placement, ...]:
        """Every cut of this appearance; an epoch uses one of them."""
        count = self.item.dataset.crop_variants
        return tuple(replace(self, variant=j) for j in range(count)) if count > 1 else (self,)


def enlargement(width: int, height: int, bucket: Bucket) -> float:
    """Factor at which a picture just covers a bucket; above 1 it is enlarged."""
    return max(bucket.width / width, bucket.height / height)


def _reduction(dataset: Dataset, width: int, height: int) -> float:
    """Factor to ``target_downsample_size`` for pictures above ``maximum_image_size`` that are cut; 0 for all others."""
    most, target = dataset.maximum_image_size, dataset.target_downsample_size
    size = measure(width, height, dataset.resolution_type)
    if not dataset.crop or most is None or target is None or size <= most:
        return 0.0
    ratio = target / size
    return math.sqrt(ratio) if dataset.resolution_type == "area" else ratio


def rounded(value: float, alignment: int) -> int:
    """The nearest multiple of ``alignment``, at least one of it."""
    return max(1, math.floor(value / alignment + 0.5)) * alignment


def bucket_of(dataset: Dataset, shape: float, alignment: int) -> Bucket:
    """The size for a shape (width / height), which counts to two decimals, as in SimpleTuner's tables."""
    shape = max(round(shape, 2), 0.01)
    if dataset.resolution_type == "pixel":
        side = rounded(dataset.resolution, alignment)
        return Bucket(rounded(side * max(shape, 1), alignment), rounded(side / min(shape, 1), alignment))
    edge = math.sqrt(dataset.resolution * 1e6) if dataset.resolution_type == "area" else dataset.resolution
    side = rounded(edge, alignment)
    return Bucket(rounded(side * math.sqrt(shape), alignment), rounded(side / math.sqrt(shape), alignment))


def choices(item: Item, alignment: int) -> list[Bucket]:
    """The sizes that the item may be cut to, best first."""
    dataset, shape = item.dataset, item.width / item.height
    if dataset.crop and dataset.crop_aspect == "square":
        return [bucket_of(dataset, 1, alignment)]
    if dataset.crop and dataset.crop_aspect in ("closest", "random"):
        shapes = sorted(dataset.crop_aspect_buckets, key=lambda s: abs(math.log(s / shape)))
        return [bucket_of(dataset, s, alignment) for s in shapes]
    return [bucket_of(dataset, shape, alignment)]


def place(item: Item, alignment: int) -> list[Placement] | Problem:
    """The item's appearances in one epoch, or why it has none. Raises: DataError for a resolution that is too small."""
    dataset, limit = item.dataset, item.dataset.max_upscale_threshold
    if dataset.resolution_type != "area" and dataset.resolution < alignment:
        raise DataError(
            f"data set {dataset.id!r}: resolution {dataset.resolution:g} px is below aspect_bucket_alignment ({alignment} px); raise "
            "the one or lower the other"
        )
    allowed = [b for b in choices(item, alignment) if limit is None or enlargement(item.width, item.height, b) <= 1 + limit]
    if not allowed:
        side = min(bucket_of(dataset, 1, alignment))
        return Problem(
            item.path, f"{item.width}x{item.height} px would be enlarged by more than max_upscale_threshold ({limit:.0%}) for {side} px"
        )
    made = []
    for copy in range(dataset.repeats + 1):
        bucket = allowed[0]
        if dataset.crop and dataset.crop_aspect == "random":
            bucket = random.Random(f"{item.pixels} {copy}").choice(sorted(allowed))
        made += [Placement(item, bucket, copy, mirrored) for mirrored in ([False, True] if dataset.flip == "horizontal" else [False])]
    return made
