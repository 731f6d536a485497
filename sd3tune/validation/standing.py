"""The pictures that a run still stands on. What it drew before it went back to an earlier step stays on the disk, and counts no longer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sd3tune.history import follow_segments, rows_of
from sd3tune.records import ImageRecord, ScoreRecord, SegmentRecord
from sd3tune.run_folder import RunFolder, picture_folders, step_of
from sd3tune.validation.pictures import Found, drawn

KINDS = (ImageRecord.type, ScoreRecord.type, SegmentRecord.type)


def counting(folder: RunFolder) -> Sequence[dict[str, Any]]:
    """The history's lines of pictures and their scores that count, oldest first; the file is read anew when it has changed."""
    try:
        about = folder.history.stat()
    except FileNotFoundError:
        return ()
    return _counting(folder.history, about.st_ino, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=8)
def _counting(history: Path, *_identity: int) -> Sequence[dict[str, Any]]:
    """It reads no lines of other kinds: an update has a line each."""
    marks = [f'"{kind}"'.encode() for kind in KINDS]
    lines = [line for line in history.read_bytes().splitlines() if any(mark in line for mark in marks)]
    return follow_segments([row for row in rows_of(b"\n".join(lines)) if row["type"] in KINDS])


def steps_drawn(folder: RunFolder) -> list[int]:
    """The steps whose pictures count, in order; all that lie there when the history tells of none."""
    told = {row["step"] for row in counting(folder) if row["type"] == ImageRecord.type}
    return [step for step in map(step_of, picture_folders(folder)) if step in told or not told]


def standing(folder: RunFolder, step: int) -> list[Found]:
    """The pictures of a step that count, in the order they were drawn; all that lie there when the history tells of none."""
    rows = [row for row in counting(folder) if row["type"] == ImageRecord.type]
    told = {(row.get("kind"), _place(row)) for row in rows if row["step"] == step}
    return [one for one in drawn(folder, step) if (one.kind, one.shot.place) in told or not rows]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("name", "prompt", "width", "height", "seed"))
