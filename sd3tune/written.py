"""A run that another process writes: its records as they come, how it is asked to stop, and its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from sd3tune.errors import TrainingError
from sd3tune.files import write_text
from sd3tune.history import failure, follow_segments, length_of, reached, rows_of
from sd3tune.locking import holder
from sd3tune.records import Record, SegmentRecord, StepRecord, of_row
from sd3tune.run_folder import RunFolder

POLL = 0.25
"""Seconds between two looks at a history."""

LOOKS = 3
"""So often in a row a run has to be seen to be over: one that is taken up changes hands."""


class Written:
    """A run in another process, read from its folder: iterate over its records, ``stop`` it, ``wait`` for it. It outlives this one.

    It has what a progress line asks of a trainer: ``run``, ``steps_done``, ``total``.
    """

    def __init__(self, folder: RunFolder | None, *, updates: int = 0) -> None:
        self._folder, self.steps_done, self.total = folder, 0, updates
        self._waiting: deque[dict[str, Any]] = deque()
        self._read = 0

    @property
    def folder(self) -> RunFolder | None:
        """The run folder, once there is one."""
        return self._folder

    @property
    def running(self) -> bool:
        """Whether a process is at it."""
        found = holder(self.folder.lock) if self.folder else None
        return found is not None and found.alive

    def __iter__(self) -> Iterator[Record]:
        return self.run()

    def so_far(self) -> list[dict[str, Any]]:
        """The lines that stand there already and count; the records go on behind them."""
        rows = follow_segments(self._written())
        self.steps_done, self.total = reached(rows), length_of(rows, self.total)
        return rows

    def run(self, n: int | None = None) -> Iterator[Record]:
        """Every record as it is written (up to ``n`` updates), until the run ends. Raises: as ``wait``."""
        last = None if n is None else self.steps_done + n
        pulse = self.pulse()
        while last is None or self.steps_done < last:
            try:
                record = next(pulse)
            except StopIteration:
                return
            if record is not None:
                yield record

    def pulse(self) -> Iterator[Record | None]:
        """The same, and nothing now and then while there is nothing new."""
        gone = 0
        while True:
            gone = 0 if self.running else gone + 1
            self._waiting += self._written()
            while self._waiting:
                row = self._waiting.popleft()
                record = of_row(row)
                if isinstance(record, (StepRecord, SegmentRecord)):
                    self.steps_done = record.step
                if isinstance(record, SegmentRecord):  # it goes on with the length that it had there
                    self.total = record.live.get("max_train_steps") or self.total
                self.total = length_of([row], self.total)
                if record is not None:
                    yield record
            if gone >= LOOKS and not self.running:
                self.wait()
                return
            time.sleep(POLL)
            yield None

    def stop(self) -> None:
        """Ask it to save and stop before its next update."""
        if self.running and self.folder:
            write_text(self.folder.path / "STOP", "")

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end. Raises: TrainingError when it failed, or ended without a word; TimeoutError."""
        began = time.monotonic()
        while self.running:
            if timeout is not None and time.monotonic() - began > timeout:
                raise TimeoutError(f"after {timeout:g} s the run still goes on")
            time.sleep(POLL)
        if self.folder and (left := holder(self.folder.lock)) and not left.alive:
            raise TrainingError(f"{self.folder.path}: {left} is gone without a word; its newest checkpoint can be gone on with")
        if self.folder and (said := failure(self.folder.read_history())):
            raise TrainingError(f"{self.folder.path} ended by {said}")

    def _written(self) -> list[dict[str, Any]]:
        """Whole lines of the history that are new, as they were written."""
        if self.folder is None or not self.folder.history.exists():
            return []
        with self.folder.history.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole + end)
        return list(rows_of(whole))
