"""When a checkpoint is due, whether there is room for it, and which one is the best."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.files import write_text
from sd3tune.records import EvalRecord
from sd3tune.shown import size_in_words

GIGABYTE = 1e9


@dataclass
class Keeper:
    """Remembers when this process last saved."""

    saved_step: int = -1
    saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int, *, interval: int, minutes: float) -> bool:
        """Whether a checkpoint is due after ``step`` updates: every so many of them, or every so many minutes."""
        if step == self.saved_step:
            return False
        return step % interval == 0 or (minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes)

    def saved(self, step: int) -> None:
        """A checkpoint of ``step`` is on disk."""
        self.saved_step, self.saved_at = step, time.monotonic()


def shortage(folder: Path, needed: int, spare_gb: float) -> str:
    """What is missing on the disk of ``folder`` for so many bytes, if ``spare_gb`` are to stay free; empty when there is room."""
    free = shutil.disk_usage(folder).free
    wanted = needed + int(spare_gb * GIGABYTE)
    if free >= wanted:
        return ""
    return f"{size_in_words(free)} are free where {folder} is, and {size_in_words(wanted)} are wanted for the next checkpoint"


def best_of(checkpoints: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the best checkpoint so far."""
    try:
        row = json.loads((checkpoints / "best.json").read_text())
        return int(row["step"]), float(row["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_best(checkpoints: Path, step: int, history: Iterable[Mapping[str, Any]]) -> None:
    """Of a run that goes on from before its best: that is now the best of those up to ``step`` that are still kept, if there is one.

    Raises: FileError.
    """
    losses = {row["step"]: float(row["loss"]) for row in history if row["type"] == EvalRecord.type and row["step"] <= step}
    there = [at for at in losses if (checkpoints / f"step-{at:06d}" / "state.json").exists()]
    if there:
        best = min(there, key=losses.__getitem__)
        mark_best(checkpoints, best, losses[best])
    else:
        (checkpoints / "best.json").unlink(missing_ok=True)


def mark_best(checkpoints: Path, step: int, loss: float) -> None:
    """Write down which checkpoint is the best. Raises: FileError."""
    write_text(checkpoints / "best.json", json.dumps({"step": step, "loss": loss}) + "\n")
