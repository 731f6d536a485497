"""How each picture is resized and cut, and what an epoch holds: pure data, shown before anything is encoded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from sd3tune.config.schema import RunConfig
from sd3tune.data.catalog import Catalog, Item
from sd3tune.errors import DataError
from sd3tune.shown import Shown, duration

MAX_ASPECT = 2.0


class Bucket(NamedTuple):
    """A size in pixels that pictures are brought to."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Geometry(NamedTuple):
    """Resize to ``resized``, then cut ``bucket`` at ``left``, ``top``. All in pixels."""

    resized: tuple[int, int]
    left: int
    top: int
    bucket: Bucket


@dataclass(frozen=True)
class Placement:
    """One appearance of an item in an epoch; ``copy`` counts its repeats from 0."""

    item: Item
    bucket: Bucket
    copy: int = 0

    @property
    def geometry(self) -> Geometry:
        """Resize to cover the bucket, then cut the centre."""
        scale = max(self.bucket.width / self.item.width, self.bucket.height / self.item.height)
        width = max(self.bucket.width, round(self.item.width * scale))
        height = max(self.bucket.height, round(self.item.height * scale))
        return Geometry((width, height), (width - self.bucket.width) // 2, (height - self.bucket.height) // 2, self.bucket)

    @property
    def cropped(self) -> float:
        """Share of the picture's area that is cut away, 0 to 1."""
        width, height = self.geometry.resized
        return 1 - self.bucket.width * self.bucket.height / (width * height)


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

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Placements of each bucket, largest first."""
        return dict(Counter(p.bucket for p in self.train).most_common())

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes of one epoch: a batch is of one bucket, and the last of a bucket may be short."""
        return sum(math.ceil(count / self.batch_size) for count in self.buckets.values())

    @property
    def updates_per_epoch(self) -> float:
        """Updates of one epoch; not always a whole number."""
        return self.batches_per_epoch / self.accumulation

    def sentence(self, seconds_per_update: float | None = None) -> str:
        """What the run will do, in one sentence."""
        pictures = len({p.item.path for p in self.train})
        times = self.steps / self.updates_per_epoch * len(self.train) / pictures
        batch = f"batch {self.batch_size}" + (f" x {self.accumulation}" if self.accumulation > 1 else "")
        text = (
            f"{pictures} images, {batch}: {_number(self.updates_per_epoch)} updates per epoch, {self.steps:,} updates = "
            f"each image {_number(times)} times"
        )
        if seconds_per_update is None:
            return text
        return f"{text}, about {duration(self.steps * seconds_per_update)}"

    def __str__(self) -> str:
        lines = [
            self.sentence(),
            f"held out: {len(self.evaluation)} images; texts to encode: {len(self.texts)}",
            "bucket     images  cut away",
        ]
        for bucket, count in self.buckets.items():
            cut = [p.cropped for p in self.train if p.bucket == bucket]
            lines.append(f"{bucket!s:10} {count:6}  {sum(cut) / len(cut):7.1%}")
        lines += [f"refused: {p.path}: {p.reason}" for p in self.catalog.problems]
        return "\n".join(lines)


def _number(value: float) -> str:
    """One decimal place where there is something to show, two below one."""
    return f"{value:,.{2 if value < 1 else 1}f}".removesuffix(".0")


def buckets(resolution: int, alignment: int, *, max_aspect: float = MAX_ASPECT) -> tuple[Bucket, ...]:
    """All sizes of at most ``resolution``² pixels whose sides are multiples of ``alignment`` and at most 2 : 1."""
    side = resolution // alignment * alignment
    found = {Bucket(side, side)} if side else set()
    for width in range(alignment, int(resolution * math.sqrt(max_aspect)) + 1, alignment):
        height = resolution * resolution // width // alignment * alignment
        if height and max(width, height) <= max_aspect * min(width, height):
            found |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(found))


def nearest_bucket(width: int, height: int, choices: tuple[Bucket, ...]) -> Bucket:
    """The bucket of the nearest shape; 2:1 and 1:2 are equally far from a square."""
    shape = math.log(width / height)
    return min(choices, key=lambda b: (abs(math.log(b.width / b.height) - shape), -b.width * b.height))


def place(item: Item, alignment: int) -> list[Placement]:
    """The item's appearances in one epoch. Raises: DataError when no bucket fits its data set's resolution."""
    side = item.dataset.resolution // alignment * alignment
    choices = (Bucket(side, side),) if item.dataset.crop else buckets(item.dataset.resolution, alignment)
    if not side or not choices:
        raise DataError(
            f"data set {item.dataset.id!r}: resolution {item.dataset.resolution} px is below aspect_bucket_alignment "
            f"({alignment} px); raise the one or lower the other"
        )
    bucket = nearest_bucket(item.width, item.height, choices)
    return [Placement(item, bucket, copy) for copy in range(item.dataset.repeats + 1)]


def plan(catalog: Catalog, config: RunConfig) -> Plan:
    """Decide size, cut and repeats of every picture, and list every text. Raises: DataError."""
    if catalog.missing_captions and not config.data.allow_missing_captions:
        count, total = len(catalog.missing_captions), len(catalog.items)
        raise DataError(
            f"{count} of {total} pictures have no caption, the first is {catalog.missing_captions[0]}; write a .txt file beside "
            "each, set caption_strategy: filename in datasets.yaml, or set allow_missing_captions: true"
        )
    alignment = config.data.aspect_bucket_alignment
    train = [p for i in catalog.items if i.dataset.dataset_type == "image" for p in place(i, alignment)]
    evaluation = [place(i, alignment)[0] for i in catalog.items if i.dataset.dataset_type == "eval"]
    evaluation = [] if config.evaluation.eval_loss_disable else evaluation[: config.evaluation.num_eval_images]
    texts = {p.item.caption for p in (*train, *evaluation)} | {*config.prompts, config.validation.validation_negative_prompt, ""}
    made = Plan(
        train=tuple(train), evaluation=tuple(evaluation), texts=tuple(sorted(texts)), catalog=catalog,
        batch_size=config.data.train_batch_size, accumulation=config.data.gradient_accumulation_steps, steps=0,
        cache_dir=config.run.cache_dir, vae_batch_size=config.data.vae_batch_size, text_batch_size=config.data.text_encoder_batch_size,
    )  # fmt: skip
    epochs = config.schedule.num_train_epochs
    steps = config.max_train_steps or math.ceil((epochs or 1) * made.updates_per_epoch)
    return Plan(**{**made.__dict__, "steps": steps})
