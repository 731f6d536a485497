"""What was found out about picture files, remembered between sessions as a hint: their sizes in pixels and their digests.

A row counts while the file has the same number of bytes and the same time of its last change. It lies in the user's cache
folder, never beside the pictures; without it everything is found out again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sd3tune.errors import FileError
from sd3tune.files import digest, file_digest, write_text

FRESH = 2.0
"""Seconds within which a file may change again without a new time stamp: so young ones are not remembered."""


class Stamped(Protocol):
    """A file with its number of bytes and its time of change in nanoseconds."""

    @property
    def name(self) -> str:
        """Its name inside the folder."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def time(self) -> int:
        """Nanoseconds since 1970; 0 when it is not known."""


Known = tuple[int, int, str, tuple[float, float] | None]
"""Width and height in pixels, the digest (empty: not known yet), and where a face is (shares of width and height)."""


class Seen:
    """The memory of one folder."""

    def __init__(self, folder: str) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = root / "sd3tune" / "seen" / f"{digest(folder)[:32]}.json"
        self._rows = self._read()
        self._new = False

    def _read(self) -> dict[str, list[object]]:
        try:
            rows = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return rows if isinstance(rows, dict) else {}

    def get(self, file: Stamped) -> Known | None:
        """What is known of a file that has not changed since."""
        match self._rows.get(file.name):
            case [size, stamp, int(width), int(height), str(pixels), None] if (size, stamp) == (file.size, file.time):
                return width, height, pixels, None
            case [size, stamp, int(width), int(height), str(pixels), [float(x), float(y)]] if (size, stamp) == (file.size, file.time):
                return width, height, pixels, (x, y)
        return None

    def put(self, file: Stamped, known: Known) -> None:
        """Remember what was found out, unless the file is so young that it could change unseen."""
        if file.time and time.time() - file.time / 1e9 > FRESH:
            self._rows[file.name] = [file.size, file.time, *known]
            self._new = True

    def save(self, names: Iterable[str]) -> None:
        """Keep the rows of these files. A place that cannot be written to only means that nothing is remembered."""
        if self._new:
            kept = {name: self._rows[name] for name in names if name in self._rows}
            try:
                write_text(self._path, json.dumps(kept))
            except (FileError, OSError):
                return


def digests(paths: Iterable[Path]) -> Iterator[tuple[Path, str, str]]:
    """Path, SHA-256 and problem (one of the two is empty) of each file, read by a few threads at once, in the order of the paths."""
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
        yield from pool.map(_digest, paths)


def _digest(path: Path) -> tuple[Path, str, str]:
    try:
        return path, file_digest(path), ""
    except OSError as error:
        return path, "", f"cannot be read ({error})"
