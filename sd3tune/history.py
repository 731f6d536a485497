"""The history of a run: one record a line, segments that branch, and what is read back."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3tune.files import explained
from sd3tune.records import CheckpointRecord, CommandRecord, FailureRecord, Record, SegmentRecord, StepRecord


class History:
    """The one appended file of a run: flushed line by line, fsynced when asked."""

    def __init__(self, path: Path, *, segment: int = 0) -> None:
        self.segment = segment
        with explained(path):
            whole = path.read_bytes() if path.exists() else b""
            self._file = path.open("a", encoding="utf-8")
            if whole and not whole.endswith(b"\n"):
                self._file.write("\n")  # the torn last line of a killed run stays a line of its own
        self._path = path

    def append(self, record: Record) -> None:
        """Write one record. Raises: FileError."""
        line = {**record.as_dict(), "time": round(time.time(), 3), "segment": self.segment}
        with explained(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make everything so far survive a power cut. Raises: FileError."""
        with explained(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history; torn ones are left out."""
    return list(rows_of(path.read_bytes())) if path.exists() else []


def rows_of(data: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a piece of a history that are whole."""
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("type"), str) and isinstance(row.get("step"), int):
            yield row


def newest_segment(path: Path) -> int:
    """The number of the stretch that a history was branched into last; 0 when it never was."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [row for row in rows_of(b"\n".join(line for line in lines if b'"segment"' in line and b'"parent"' in line)) if "parent" in row]
    return int(rows[-1].get("segment", 0)) if rows else 0


def follow_segments(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a later segment has replaced, and commands at its very step that the state it goes on from had not seen yet."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["type"] == SegmentRecord.type:
            at = line["from_step"]
            kept = [row for row in kept if row["step"] < at or (row["step"] == at and not _unseen(row, line))]
        kept.append(line)
    return kept


def _unseen(row: Mapping[str, Any], segment: Mapping[str, Any]) -> bool:
    """Whether a row is a command that a segment does not begin with."""
    if "live" not in segment or row["type"] != CommandRecord.type:  # a history of before segments said what they begin with
        return False
    if segment.get("why") not in ("resume", "rewind"):  # the guard changes no settings but those that it tells
        return False
    if row.get("name") == "skip":
        return not {*row["value"]} <= {*segment["skipped"]}
    return any(segment["live"].get(name, value) != value for name, value in accepted(row).items())


def accepted(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a row changed; none when it is something else, or was refused."""
    value = row.get("value") if row["type"] == CommandRecord.type and row.get("name") == "set" and not row.get("refused") else None
    return value if isinstance(value, Mapping) else {}


def changed_since(lines: Iterable[Mapping[str, Any]], step: int) -> tuple[tuple[int, str, Any], ...]:
    """Step, name and value of each setting that was changed at ``step`` or later."""
    return tuple((row["step"], name, value) for row in lines if row["step"] >= step for name, value in accepted(row).items())


def newest_chain(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The segments that lead to where a run is now, each with its last step that counts: where the next one left it."""
    branches = {line.get("segment", 0): line for line in lines if line["type"] == SegmentRecord.type}
    segment, last = next(reversed(branches), 0), math.inf
    chain = {segment: last}
    while (branch := branches.get(segment)) is not None and branch["parent"] < segment:
        segment, last = branch["parent"], min(last, branch["from_step"])
        chain[segment] = last
    return chain


def written_at(lines: list[dict[str, Any]], name: str) -> int | None:
    """The step at which a file of this name was written last; nothing if it never was."""
    rows = [row for row in lines if row["type"] == CheckpointRecord.type and Path(str(row.get("path"))).name == name]
    return rows[-1]["step"] if rows else None


def finished(lines: list[dict[str, Any]], adapter: str, planned: int) -> bool:
    """Whether a run is at its end: its final adapter was written last where the run stands now, with no updates left to do.

    ``lines`` are those that count, ``planned`` the updates of the run as it began (0 when that is not known).
    """
    step = reached(lines)
    return written_at(lines, adapter) == step and step >= length_of(lines, planned)


ENDS = (StepRecord.type, SegmentRecord.type, CheckpointRecord.type, FailureRecord.type)
"""Of these kinds of lines the last one says whether an error was the end."""


def failure(lines: list[dict[str, Any]]) -> str:
    """The error that a run ended by, if nothing was done or saved since."""
    last: Mapping[str, Any] = next((line for line in reversed(lines) if line["type"] in ENDS), {})
    return str(last["text"]) if last.get("type") == FailureRecord.type else ""


def reached(lines: list[dict[str, Any]]) -> int:
    """Updates done."""
    return max((int(line["step"]) for line in lines if line["type"] == StepRecord.type), default=0)


def length_of(lines: list[dict[str, Any]], planned: int) -> int:
    """Updates of the whole run, as a person set it last."""
    wanted = [accepted(line).get("max_train_steps") for line in lines]
    return next((steps for steps in reversed(wanted) if isinstance(steps, int)), planned)


def set_on_the_way(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that were changed while the run went on, as they are now."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= accepted(line)
    return found


def smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average without the pull towards zero at its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out
