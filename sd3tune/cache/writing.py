"""Entries on their way to the disk: collected, and written as shards in a thread of their own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from sd3tune.cache.store import Entry, Store
from sd3tune.files import in_background

SHARD_BYTES = 64 * 2**20
"""A shard is written when it has so many bytes, or ``write_batch_size`` entries."""


class Writer:
    """Collects entries and writes them as shards in a thread of its own; at the end of the block all are in place."""

    def __init__(self, store: Store, entries: int) -> None:
        self._store, self._most = store, entries
        self._waiting: dict[str, list[Entry]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def put(self, kind: str, entry: Entry) -> None:
        """Take an entry. Raises: FileError, also for those that were put before."""
        rows = self._waiting.setdefault(kind, [])
        rows.append(entry)
        if len(rows) >= self._most or sum(t.nbytes for e in rows for t in e.tensors.values()) >= SHARD_BYTES:
            self._write(kind)

    def _write(self, kind: str) -> None:
        rows = self._waiting.pop(kind)
        if self._writing is not None:
            self._writing.result()
        self._writing = in_background(self._pool, self._store.write, kind, rows)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left, also when the iteration was stopped or failed."""
        try:
            for kind in list(self._waiting):
                self._write(kind)
            if self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown()
