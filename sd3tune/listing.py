"""The runs of a folder, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3tune.errors import FileError
from sd3tune.run_folder import RunFolder
from sd3tune.shown import Shown


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs."""

    path: Path
    step: int
    loss: float | None
    eval_loss: float | None
    finished: bool

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        held = "" if self.eval_loss is None else f"  held-out {self.eval_loss:.4f}"
        return f"{self.path}  step {self.step}{loss}{held}  {'finished' if self.finished else 'not finished'}"


class RunList(Shown, tuple[RunSummary, ...]):
    """Runs, oldest first; shows itself as a list."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no runs yet"


def runs(folder: str | Path = "runs") -> RunList:
    """The runs in a folder. Raises: FileError when the folder is a file."""
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise FileError(f"{root.resolve()}: is a file, not a folder of runs")
    return RunList(_summaries(root))


def newest_of(wanted: Path) -> Path | None:
    """The run that was begun last of those into an output folder and its numbered namesakes (``-2``, ``-3``)."""
    named = re.compile(re.escape(wanted.name) + r"(-\d+)?")
    made = [path for path in _made(wanted.parent) if named.fullmatch(path.name)]
    return made[-1] if made else None


def _made(root: Path) -> list[Path]:
    """Run folders, oldest first."""
    return sorted((p.parent for p in root.glob("*/config.yaml")), key=lambda p: (p / "config.yaml").stat().st_mtime)


def _summaries(root: Path) -> Iterator[RunSummary]:
    if not root.is_dir():
        return
    for path in _made(root):
        history = RunFolder(path).read_history()
        losses = [r["loss"] for r in history if r["type"] == "step" and isinstance(r.get("loss"), float)]
        evals = [r["loss"] for r in history if r["type"] == "eval" and isinstance(r.get("loss"), float)]
        step = max((r["step"] for r in history if r["type"] == "step"), default=0)
        mean = sum(losses[-20:]) / len(losses[-20:]) if losses else None
        yield RunSummary(path, step, mean, evals[-1] if evals else None, RunFolder(path).lora.exists())
