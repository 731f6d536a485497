"""Looking after a cache folder: how full it is, whether it is whole, what nobody needs, and why an entry is reused or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3tune.cache.builder import CacheBuilder, Job
from sd3tune.cache.store import KINDS, Store
from sd3tune.errors import CacheError
from sd3tune.shown import Shown


@dataclass(frozen=True, repr=False)
class Stats(Shown):
    """Entries, files and bytes of each kind in a cache folder."""

    root: Path
    entries: dict[str, int]
    files: dict[str, int]
    size: dict[str, int]

    def __str__(self) -> str:
        rows = [
            f"{kind:8} {self.entries[kind]:8,} entries in {self.files[kind]:4,} files  {self.size[kind] / 1e6:10,.1f} MB"
            for kind in self.entries
        ]
        return "\n".join([f"{self.root.absolute()}", *rows])


def stats(root: str | Path) -> Stats:
    """What lies in a cache folder. Raises: CacheError when there is none."""
    store = opened(root)
    shards = {kind: store.shards(kind) for kind in KINDS}
    models = list((store.root / "models").glob("*.safetensors"))  # bases that were quantised once
    sizes = {kind: sum(shard.stamp.size for shard in rows) for kind, rows in shards.items()}
    return Stats(
        store.root,
        {kind: sum(1 for _ in store.entries(kind)) for kind in KINDS} | {"models": len(models)},
        {kind: len(rows) for kind, rows in shards.items()} | {"models": len(models)},
        sizes | {"models": sum(file.stat().st_size for file in models)},
    )


def verify(root: str | Path) -> Iterator[tuple[str, str]]:
    """Each entry's key with what is wrong with it (the empty text when nothing is), and each unreadable file.

    Changes nothing. Raises: CacheError when there is no cache.
    """
    store = opened(root)
    for kind in KINDS:
        for key, _ in store.entries(kind):
            yield key, store.damage(kind, key)
    yield from ((path.name, said) for path, said in store.unreadable.items())


def unused(root: str | Path, builders: list[CacheBuilder]) -> dict[str, dict[str, int]]:
    """Kind -> key -> bytes of the entries that none of the plans needs. Raises: CacheError when there is no cache."""
    store = opened(root)
    needed = {(kind, key) for builder in builders for kind, key, _ in builder.wanted()}
    return {kind: {key: shard.size(key) for key, shard in store.entries(kind) if (kind, key) not in needed} for kind in KINDS}


def remove(root: str | Path, keys: dict[str, set[str]]) -> int:
    """Delete entries of a cache and return the bytes freed. Raises: CacheError for a key that is not one; FileError."""
    store = opened(root)
    strangers = [key for kind, rows in keys.items() for key in sorted(rows) if not store.has(kind, key)]
    if strangers:
        raise CacheError(f"{strangers[0]}: not an entry of the cache {store.root}; nothing was deleted")
    return store.remove(keys)


def explain(builder: CacheBuilder, picture: str | Path) -> str:
    """What a picture needs of the cache: its cuts and captions, the entries' keys, and which of them are there.

    Raises: CacheError when the picture is not in the plan.
    """
    wanted = Path(picture)
    jobs = list(builder.wanted())
    cuts = [(kind, key, job) for kind, key, job in jobs if job.belongs_to(wanted)]
    captions = {caption for _, _, job in cuts if job.placement for caption in job.placement.item.captions}
    if not cuts:
        left = next((p for p in builder.plan.problems if p.path == wanted.absolute() or p.path.name == wanted.name), None)
        raise CacheError(f"{wanted}: not in the plan" + (f" ({left.reason})" if left else "; give the path that `sd3tune plan` knows"))
    lines = [f"{wanted}"]
    for kind, key, job in cuts + [(kind, key, job) for kind, key, job in jobs if job.placement is None and job.text in captions]:
        lines += [f"{kind[:-1]}: {_what(job)}", *_why(builder.store, kind, key, job)]
    return "\n".join(lines)


def _what(job: Job) -> str:
    if job.placement is None:
        return f"caption {job.text!r}"
    (width, height), left, top, bucket, mirrored = job.placement.geometry
    return f"resized to {width}x{height}, cut {bucket} at {left}, {top}" + ", mirrored" * mirrored


def _why(store: Store, kind: str, key: str, job: Job) -> Iterator[str]:
    of = "text" if job.placement is None else "picture's bytes, of its cut and background"
    encoded = f"{of}, and of the encoders that read it with their settings"
    yield f"  key {key}: a digest of the {'bytes of its file and of the cut' if kind == 'masks' else encoded}"
    if not store.has(kind, key):
        yield "  not there: it will be encoded, because no entry has this key"
    elif damage := store.damage(kind, key):
        yield f"  there, but damaged: {damage}"
    else:
        shard = next(shard for known, shard in store.entries(kind) if known == key)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(shard.stamp.time / 1e9))
        formats = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in store.entry(kind, key).tensors.items())
        yield f"  there since {made}, {shard.size(key):,} bytes ({formats}), encoded in a group of {shard.about[key][0]}: it will be reused"


def opened(root: str | Path) -> Store:
    """The store of a cache folder. Raises: CacheError when there is none."""
    folder = Path(root)
    if not folder.is_dir():
        raise CacheError(f"{folder.absolute()}: there is no cache folder; name one with --cache, or build one with sd3tune cache build")
    return Store(folder)
