"""Encode groups with one encoder in memory at a time: each text encoder over a stretch of texts, then the autoencoder, none for masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sd3tune.cache.decoding import Decoded, decode
from sd3tune.cache.masking import decode_mask
from sd3tune.cache.memory import Halving
from sd3tune.cache.states import Encoders, LoadedEncoders, PartStates, whole
from sd3tune.cache.store import Entry, Store
from sd3tune.cache.writing import Writer
from sd3tune.data.buckets import Placement

WORKERS = max(1, min(8, os.cpu_count() or 1))
"""Threads that decode pictures; Pillow frees the interpreter while it works."""

AHEAD = 2
"""Groups that are decoded before they are needed."""

HELD_BYTES = 512 * 2**20
"""What the other text encoders gave is held until the last one has run: at most so many bytes, or those of one group."""

STATES = "states"
"""The kind of what one text encoder gave of a text that is not an entry yet."""


class Job(NamedTuple):
    """One entry that a plan needs: a cut of a picture, or a text."""

    key: str
    name: str
    placement: Placement | None
    text: str

    def belongs_to(self, picture: Path) -> bool:
        """Whether it is a cut of this picture."""
        return self.placement is not None and self.placement.item.path in (picture, picture.absolute(), picture.resolve())


class Group(NamedTuple):
    """Jobs that are encoded together, those of them whose entry is missing, and what should be said of each."""

    kind: str
    jobs: list[Job]
    wanted: Mapping[str, str]

    def done(self, store: Store) -> bool:
        """Whether another process has encoded it meanwhile."""
        return not any(self.wanted.values()) and all(store.has(self.kind, key) for key in self.wanted)


class Outcome(NamedTuple):
    """What became of a job: what should be said of it, and whether its entry was there. ``name`` is an encoder's, of its states."""

    kind: str
    key: str
    name: str
    problem: str = ""
    reused: bool = False


class Given(NamedTuple):
    """What one encoder gave of one text, how many were encoded together, and what should be said."""

    states: PartStates
    size: int
    said: str


def encoded(missing: Sequence[Group], encoders: Encoders, store: Store, writer: Writer) -> Iterator[Outcome]:
    """Encode groups and put their wanted members in place. Raises: CacheError, FileError, and what the encoders raise."""
    by_kind = {kind: [group for group in missing if group.kind == kind] for kind in ("texts", "latents", "masks")}
    if by_kind["texts"]:
        with encoders.load() as loaded:
            yield from _texts(by_kind["texts"], loaded, store, writer)
    if by_kind["latents"]:
        with encoders.load() as loaded:
            yield from _latents(by_kind["latents"], loaded, store, writer)
    yield from _masks(by_kind["masks"], store, writer)


def _texts(groups: Sequence[Group], loaded: LoadedEncoders, store: Store, writer: Writer) -> Iterator[Outcome]:
    """A sweep of each encoder over every stretch; the last one's states are written as they come."""
    *first, last = loaded.text_parts
    calls = {part: Halving(partial(_encode_part, loaded, part), can_tile=False) for part in loaded.text_parts}
    for stretch in _stretches(groups, loaded.held_bytes):
        store.refresh()
        held: dict[int, list[list[Given]]] = {place: [] for place, group in enumerate(stretch) if not group.done(store)}
        for part in first:
            for place, rows in held.items():
                rows.append(list(_given(calls[part], stretch[place])))
                yield from (Outcome(STATES, job.key, part) for job in stretch[place].jobs)
        for place, group in enumerate(stretch):
            store.refresh()
            if group.done(store) or place not in held:
                yield from _reused(group)
                continue
            for job, *given in zip(group.jobs, *held.pop(place), _given(calls[last], group), strict=True):
                entry = Entry(job.key, whole([g.states for g in given])._asdict(), min(g.size for g in given))
                yield from _put(group, job, entry, "; ".join(dict.fromkeys(g.said for g in given if g.said)), writer)


def _encode_part(loaded: LoadedEncoders, part: str, texts: Sequence[str], *, tiled: bool) -> list[PartStates]:
    return loaded.encode_part(part, texts)


def _given(call: Halving, group: Group) -> Iterator[Given]:
    return (Given(*row) for row in call([job.text for job in group.jobs]))


def _stretches(groups: Sequence[Group], held_bytes: int) -> Iterator[list[Group]]:
    """Whole groups whose held states have at most ``HELD_BYTES``, at least one."""
    stretch: list[Group] = []
    texts = 0
    for group in groups:
        texts += len(group.jobs)
        if stretch and held_bytes * texts > HELD_BYTES:
            yield stretch
            stretch, texts = [], len(group.jobs)
        stretch.append(group)
    yield stretch


def _latents(groups: Sequence[Group], loaded: LoadedEncoders, store: Store, writer: Writer) -> Iterator[Outcome]:
    call = Halving(loaded.encode_images, can_tile=True)
    for group, decoded in _decoded_ahead(groups):
        store.refresh()
        if group.done(store):
            yield from _reused(group)
            continue
        pairs = list(zip(group.jobs, decoded, strict=True))
        yield from (Outcome("latents", job.key, job.name, r.problem) for job, r in pairs if r.picture is None and job.key in group.wanted)
        rows = [(job, r, r.picture) for job, r in pairs if r.picture is not None]
        for (job, r, _), ((mean, deviation), size, said) in zip(rows, call([picture for *_, picture in rows]), strict=True):
            entry = Entry(job.key, {"mean_CHW": mean, "deviation_CHW": deviation}, size, r.facts)
            yield from _put(group, job, entry, said, writer)


def _masks(groups: Sequence[Group], store: Store, writer: Writer) -> Iterator[Outcome]:
    import torch

    for group, decoded in _decoded_ahead(groups):
        store.refresh()
        if group.done(store):
            yield from _reused(group)
            continue
        for job, r in zip(group.jobs, decoded, strict=True):
            if r.weights_HW is not None:
                entry = Entry(job.key, {"mask_HW": torch.from_numpy(r.weights_HW)}, 1, r.facts)
                yield from _put(group, job, entry, "", writer)
            elif job.key in group.wanted:
                yield Outcome("masks", job.key, job.name, r.problem)


def _put(group: Group, job: Job, entry: Entry, said: str, writer: Writer) -> Iterator[Outcome]:
    if job.key in group.wanted:
        writer.put(group.kind, entry)
        yield Outcome(group.kind, job.key, job.name, "; ".join(filter(None, (group.wanted[job.key], said))))


def _reused(group: Group) -> Iterator[Outcome]:
    return (Outcome(group.kind, job.key, job.name, reused=True) for job in group.jobs if job.key in group.wanted)


def _decoded_ahead(groups: Iterable[Group]) -> Iterator[tuple[Group, list[Decoded]]]:
    """Groups with their pictures, decoded by threads while the groups before them are encoded."""
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        waiting: list[tuple[Group, list[Future[Decoded]]]] = []
        for group in groups:
            read = decode_mask if group.kind == "masks" else decode
            waiting.append((group, [pool.submit(read, job.placement) for job in group.jobs if job.placement]))
            if len(waiting) > AHEAD:
                first, futures = waiting.pop(0)
                yield first, [future.result() for future in futures]
        for group, futures in waiting:
            yield group, [future.result() for future in futures]
