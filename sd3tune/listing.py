"""The runs of a folder, one line each; and where one stands, by its history."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.reading import steered
from sd3tune.config.schema import RunConfig
from sd3tune.errors import FileError
from sd3tune.history import finished, reached, set_on_the_way
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
    made = [path for path in begun(wanted.parent) if named.fullmatch(path.name)]
    return made[-1] if made else None


def begun(root: Path) -> list[Path]:
    """Run folders, oldest first."""
    return sorted((p.parent for p in root.glob("*/config.yaml")), key=lambda p: (p / "config.yaml").stat().st_mtime)


def _summaries(root: Path) -> Iterator[RunSummary]:
    if not root.is_dir():
        return
    for path in begun(root):
        history = RunFolder(path).read_history()
        losses = [r["loss"] for r in history if r["type"] == "step" and isinstance(r.get("loss"), float)]
        evals = [r["loss"] for r in history if r["type"] == "eval" and isinstance(r.get("loss"), float)]
        mean = sum(losses[-20:]) / len(losses[-20:]) if losses else None
        yield RunSummary(path, reached(history), mean, evals[-1] if evals else None, at_its_end(RunFolder(path), history))


def at_its_end(folder: RunFolder, lines: list[dict[str, Any]]) -> bool:
    """Whether the run of a folder has its adapter and no updates left to do; ``lines`` is its history."""
    return folder.lora.exists() and finished(lines, folder.lora.name, planned(folder))


def planned(folder: RunFolder) -> int:
    """Updates of a run as it began; 0 when that cannot be read."""
    try:
        return int(json.loads(folder.manifest.read_text(encoding="utf-8"))["updates"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def as_set(folder: RunFolder) -> RunConfig:
    """The settings of a run as they are now: those that it began with, and what was changed on the way. Raises: ConfigError."""
    return steered(RunConfig.load(folder.config), set_on_the_way(folder.read_history()))
