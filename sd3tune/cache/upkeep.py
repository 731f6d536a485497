"""Looking after a cache folder: how full it is, whether it is whole, what nobody needs, and why an entry is reused or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3tune.cache.builder import CacheBuilder
from sd3tune.cache.store import KINDS, Store
from sd3tune.errors import CacheError
from sd3tune.files import explained
from sd3tune.shown import Shown


@dataclass(frozen=True, repr=False)
class Stats(Shown):
    """Entries and bytes of each kind in a cache folder."""

    root: Path
    entries: dict[str, int]
    size: dict[str, int]

    def __str__(self) -> str:
        rows = [f"{kind:8} {self.entries[kind]:8,} entries  {self.size[kind] / 1e6:10,.1f} MB" for kind in self.entries]
        return "\n".join([f"{self.root.absolute()}", *rows])


def stats(root: str | Path) -> Stats:
    """What lies in a cache folder. Raises: CacheError when there is none."""
    store = opened(root)
    files = {kind: [path.stat().st_size for _, path in store.files(kind)] for kind in KINDS}
    return Stats(store.root, {k: len(v) for k, v in files.items()}, {k: sum(v) for k, v in files.items()})


def verify(root: str | Path) -> Iterator[tuple[Path, str]]:
    """Each entry's file with what is wrong with it (the empty text when nothing is). Changes nothing. Raises: CacheError."""
    store = opened(root)
    for kind in KINDS:
        for key, path in store.files(kind):
            yield path, store.damage(kind, key)


def unused(root: str | Path, builders: list[CacheBuilder]) -> list[Path]:
    """Entries that none of the plans needs. Raises: CacheError when there is no cache."""
    store = opened(root)
    needed = {(kind, key) for builder in builders for kind, key, _ in builder.wanted()}
    return [path for kind in KINDS for key, path in store.files(kind) if (kind, key) not in needed]


def remove(root: str | Path, paths: list[Path]) -> int:
    """Delete entries of a cache and return their bytes. Raises: CacheError for a path that is not one; FileError."""
    store, freed = opened(root), 0
    known = {path for kind in KINDS for _, path in store.files(kind)}
    strangers = [path for path in paths if path not in known]
    if strangers:
        raise CacheError(f"{strangers[0]}: not an entry of the cache {store.root}; nothing was deleted")
    for path in paths:
        freed += path.stat().st_size
        with explained(path):
            path.unlink()
    return freed


def explain(builder: CacheBuilder, picture: str | Path) -> str:
    """What a picture needs of the cache: its cuts and captions, the entries' keys, and which of them are there.

    Raises: CacheError when the picture is not in the plan.
    """
    wanted = Path(picture)
    cuts = [(kind, key, job) for kind, key, job in builder.wanted() if job.belongs_to(wanted)]
    captions = {caption for _, _, job in cuts if job.placement for caption in job.placement.item.captions}
    jobs = cuts + [(kind, key, job) for kind, key, job in builder.wanted() if job.placement is None and job.text in captions]
    if not cuts:
        left = next((p for p in builder.plan.problems if p.path == wanted.absolute() or p.path.name == wanted.name), None)
        raise CacheError(f"{wanted}: not in the plan" + (f" ({left.reason})" if left else "; give the path that `sd3tune plan` knows"))
    lines = [f"{wanted}"]
    for kind, key, job in jobs:
        path = builder.store.path(kind, key)
        what = (
            f"caption {job.text!r}" if job.placement is None else f"resized to {job.placement.geometry.resized}, cut {job.placement.bucket}"
        )
        lines.append(f"{kind[:-1]}: {what}")
        lines.append(
            f"  key {key}: a digest of the {'text' if job.placement is None else 'picture and its cut'} and of the encoders that read it"
        )
        if not path.is_file():
            lines.append("  not there: it will be encoded, because no entry has this key")
        else:
            made, damage = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)), builder.store.damage(kind, key)
            lines.append(f"  there since {made}, {path.stat().st_size:,} bytes: " + (damage or "it will be reused"))
    return "\n".join(lines)


def opened(root: str | Path) -> Store:
    """The store of a cache folder. Raises: CacheError when there is none."""
    folder = Path(root)
    if not folder.is_dir():
        raise CacheError(f"{folder.absolute()}: there is no cache folder; name one with --cache, or build one with sd3tune cache build")
    return Store(folder)
