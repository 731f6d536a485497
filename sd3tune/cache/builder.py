"""Encode what is missing, and hand out what is there.

Groups that are encoded together are a fixed function of the plan (sorted keys, in chunks), and a group with a missing
member is encoded whole: so a build that was killed ends bitwise as one that was not.

Shapes: B pictures or texts, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sd3tune.cache.keys import latent_key, text_key
from sd3tune.cache.store import Store
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.images import BROKEN, read_rgb
from sd3tune.data.planning import Plan
from sd3tune.records import CacheRecord

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Text(NamedTuple):
    """What the transformer reads of one text."""

    joint_LD: Tensor
    pooled_P: Tensor


class TextStates(NamedTuple):
    """What is stored of one text: D of CLIP is not padded yet."""

    clip_LD: Tensor
    t5_LD: Tensor
    pooled_P: Tensor

    def joined(self) -> Text:
        """CLIP padded to T5's width and put before it, as SD3 does."""
        import torch

        clip_LD = torch.nn.functional.pad(self.clip_LD, (0, self.t5_LD.shape[-1] - self.clip_LD.shape[-1]))
        return Text(torch.cat([clip_LD, self.t5_LD]), self.pooled_P)


class LoadedEncoders(Protocol):
    """Encoders in memory."""

    def encode_images(self, pictures: Sequence[Image]) -> Tensor:
        """Scaled latents B C H W of pictures of one size."""

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        """The states of each text."""


class Encoders(Protocol):
    """What the cache needs of the models: an identity without loading, and a scope in which they are loaded."""

    @property
    def latent_fingerprint(self) -> str:
        """Changes when the same picture would give another latent."""

    @property
    def text_fingerprint(self) -> str:
        """Changes when the same text would give other states."""

    def load(self) -> AbstractContextManager[LoadedEncoders]:
        """Encoders for the duration of the block."""


class Cache:
    """The encoded plan. Ask by placement or by text."""

    def __init__(self, plan: Plan, encoders: Encoders, *, store: Store | None = None, hits: int = 0, misses: int = 0) -> None:
        self.plan, self.hits, self.misses = plan, hits, misses
        self._store = store or Store(Path(plan.cache_dir))
        self._latent_mark, self._text_mark = encoders.latent_fingerprint, encoders.text_fingerprint

    def latent(self, placement: Placement) -> Tensor:
        """Scaled latent C H W. Raises: CacheError."""
        key = latent_key(placement.item.pixels, placement.geometry, self._latent_mark, placement.item.dataset.background)
        return self._store.read("latents", key, ["latent_CHW"])[0]

    def text(self, caption: str) -> Text:
        """Joint states L D and pooled P. Raises: CacheError."""
        return TextStates(*self._store.read("texts", text_key(caption, self._text_mark), TextStates._fields)).joined()


class Job(NamedTuple):
    """One entry that a plan needs: a cut of a picture, or a text."""

    key: str
    name: str
    placement: Placement | None
    text: str

    def belongs_to(self, picture: Path) -> bool:
        """Whether it is a cut of this picture."""
        return self.placement is not None and self.placement.item.path in (picture, picture.absolute(), picture.resolve())


class CacheBuilder:
    """Iterate to encode a plan: one record per entry. `build` does it in one call."""

    def __init__(self, plan: Plan, encoders: Encoders) -> None:
        self.plan, self._encoders = plan, encoders
        self.store = Store(Path(plan.cache_dir))

    def build(self) -> Cache:
        """Encode what is missing. Pictures that cannot be decoded are rows of the cache's plan. Raises: DataError when none is left."""
        return self.cache(list(self))

    def cache(self, records: Sequence[CacheRecord]) -> Cache:
        """The cache of a finished iteration, which yielded ``records``. Raises: DataError when no picture is left to train on."""
        reused = sum(record.reused for record in records)
        broken = {record.key: record.problem for record in records if record.problem and not self.store.has(record.kind, record.key)}
        found = len(records) - len(broken)
        # By key and not by name: the same bytes may lie in several files.
        paths = (
            {str(cut.item.path): broken[self._latent_key(cut)] for cut in self._cuts() if self._latent_key(cut) in broken} if broken else {}
        )
        return Cache(self.plan.without(paths), self._encoders, store=self.store, hits=reused, misses=found - reused)

    def wanted(self) -> Iterator[tuple[str, str, Job]]:
        """Kind, key and job of every entry that the plan needs."""
        yield from ((kind, job.key, job) for kind, jobs in self._groups() for job in jobs)

    def __len__(self) -> int:
        """Entries of the plan, whether encoded or not."""
        return sum(len(jobs) for _, jobs in self._groups())

    def __iter__(self) -> Iterator[CacheRecord]:
        groups = self._groups()
        total, done = sum(len(jobs) for _, jobs in groups), 0
        missing: list[tuple[str, list[Job], dict[str, str]]] = []
        for kind, jobs in groups:
            wanted: dict[str, str] = {}
            for job in jobs:
                if not self.store.has(kind, job.key):
                    wanted[job.key] = ""
                elif damage := self.store.damage(kind, job.key):
                    wanted[job.key] = f"encoded again: {damage}"
                else:
                    done += 1
                    yield CacheRecord(step=done, total=total, kind=kind, key=job.key, name=job.name, reused=True)
            if wanted:
                missing.append((kind, jobs, wanted))
        if not missing:
            return
        with self._encoders.load() as loaded:
            for kind, jobs, wanted in missing:
                for job, problem in self._encode(loaded, kind, jobs, wanted):
                    done += 1
                    yield CacheRecord(step=done, total=total, kind=kind, key=job.key, name=job.name, reused=False, problem=problem)

    def _encode(self, loaded: LoadedEncoders, kind: str, jobs: list[Job], wanted: Mapping[str, str]) -> Iterator[tuple[Job, str]]:
        """Encode a group and put its ``wanted`` members in place; yields each of them with what should be said of it."""
        if kind == "texts":
            tensors = [states._asdict() for states in loaded.encode_texts([job.text for job in jobs])]
        else:
            jobs, pictures, broken = _decode(jobs)
            yield from ((job, reason) for job, reason in broken if job.key in wanted)
            tensors = [{"latent_CHW": z} for z in loaded.encode_images(pictures)] if pictures else []
        for job, values in zip(jobs, tensors, strict=True):
            if job.key in wanted:
                self.store.write(kind, job.key, values, group=len(jobs))
                yield job, wanted[job.key]

    def _groups(self) -> list[tuple[str, list[Job]]]:
        return [*self._text_groups(), *self._latent_groups()]

    def _text_groups(self) -> list[tuple[str, list[Job]]]:
        mark = self._encoders.text_fingerprint
        jobs = sorted(Job(text_key(text, mark), text, None, text) for text in self.plan.texts)
        return [("texts", chunk) for chunk in _chunks(jobs, self.plan.text_batch_size)]

    def _cuts(self) -> Iterator[Placement]:
        """Every cut of every picture of the plan."""
        return (variant for placement in (*self.plan.train, *self.plan.evaluation) for variant in placement.variants)

    def _latent_key(self, cut: Placement) -> str:
        return latent_key(cut.item.pixels, cut.geometry, self._encoders.latent_fingerprint, cut.item.dataset.background)

    def _latent_groups(self) -> list[tuple[str, list[Job]]]:
        by_bucket: dict[Bucket, dict[str, Job]] = {}
        for placement in self._cuts():
            key = self._latent_key(placement)
            by_bucket.setdefault(placement.bucket, {})[key] = Job(key, str(placement.item.path), placement, "")
        return [
            ("latents", chunk)
            for bucket in sorted(by_bucket)
            for chunk in _chunks([by_bucket[bucket][key] for key in sorted(by_bucket[bucket])], self.plan.vae_batch_size)
        ]


def _decode(jobs: list[Job]) -> tuple[list[Job], list[Image], list[tuple[Job, str]]]:
    """The jobs whose pictures can be decoded, those pictures, and the other jobs with the reason."""
    pairs: list[tuple[Job, Image]] = []
    broken: list[tuple[Job, str]] = []
    for job in jobs:
        assert job.placement is not None
        try:
            pairs.append((job, cut(job.placement)))
        except BROKEN as error:
            broken.append((job, f"cannot be decoded, though its header could be read ({error})"))
    return [job for job, _ in pairs], [picture for _, picture in pairs], broken


def cut(placement: Placement) -> Image:
    """The picture as it is encoded: upright, on white, resized once with Lanczos, cut to its bucket, mirrored if asked."""
    from PIL.Image import Resampling, Transpose

    resized, left, top, bucket, mirrored = placement.geometry
    picture = read_rgb(placement.item.path, background=placement.item.dataset.background, wanted=resized).resize(
        resized, Resampling.LANCZOS
    )
    picture = picture.crop((left, top, left + bucket.width, top + bucket.height))
    return picture.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def _chunks(jobs: list[Job], size: int) -> list[list[Job]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]
