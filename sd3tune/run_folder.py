"""One folder per run, and the names of everything in it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3tune.errors import CheckpointError, ConfigError, FileError
from sd3tune.files import digest_of, explained, file_digest, new_numbered_folder, write_folder, write_text, write_with
from sd3tune.keeping import best_of
from sd3tune.records import Record, SegmentRecord
from sd3tune.shown import Shown

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """The files of one run. Never overwrites another run's: a taken name gets a number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, wanted: Path) -> RunFolder:
        """Make a new folder at ``wanted``, or at ``wanted-2``, ``-3``, ... Raises: FileError."""
        return cls(new_numbered_folder(wanted))

    @property
    def config(self) -> Path:
        """Every setting of the run."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What was found, before the first update."""
        return self.path / "manifest.json"

    @property
    def history(self) -> Path:
        """One record a line; the only file that grows."""
        return self.path / "history.jsonl"

    @property
    def log(self) -> Path:
        """Messages in words."""
        return self.path / "train.log"

    @property
    def environment(self) -> Path:
        """Every installed package with its version."""
        return self.path / "environment.txt"

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def lora(self) -> Path:
        """The final adapter, diffusers layout."""
        return self.path / "lora.safetensors"

    @property
    def grid(self) -> Path:
        """Base, adapter and reference pictures side by side."""
        return self.path / "grid.png"

    @property
    def loss_chart(self) -> Path:
        """The loss over the updates."""
        return self.path / "loss.png"

    def images(self, step: int) -> Path:
        """Validation pictures drawn after ``step`` updates."""
        return self.path / "images" / f"step-{step:06d}"

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def write_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
    ) -> tuple[Path, int]:
        """Write ``adapter`` and ``optimizer`` tensors and ``state.json`` with their digests, read them back, then drop the oldest.

        Returns the checkpoint's folder and its number of tensors. Raises: FileError; CheckpointError when it does not read back.
        Older checkpoints are then untouched.
        """
        from safetensors.torch import save

        folder = self.checkpoint_folder / f"step-{step:06d}"
        with write_folder(folder) as draft:
            digests = {}
            for name, held in tensors.items():
                data = save({key: value.contiguous() for key, value in held.items()})  # save_file would hide a full disk
                (draft / f"{name}.safetensors").write_bytes(data)
                digests[f"{name}.safetensors"] = digest_of(data)
            (draft / "state.json").write_text(json.dumps({**state, "sha256": digests}, indent=1) + "\n")
            if folder.exists():  # from before a resume or a rollback; readable under its other name until the new one is there
                shutil.rmtree(folder.with_suffix(".old"), ignore_errors=True)
                folder.rename(folder.with_suffix(".old"))
        _, damage = read_state(folder)
        if damage:
            raise CheckpointError(f"{folder}: {damage}; the checkpoints before it are untouched, and the next one is tried elsewhere")
        self.point_at(step)
        self._rotate(step, keep)
        return folder, sum(len(held) for held in tensors.values())

    def point_at(self, step: int) -> None:
        """Make the checkpoint of ``step`` the newest that counts. Raises: FileError."""
        write_text(self.checkpoint_folder / "latest.json", json.dumps({"step": step, "folder": f"step-{step:06d}"}) + "\n")

    def _rotate(self, newest: int, keep: int) -> None:
        """Drop what is too old, and what a rollback has left behind; the best and those with a file PINNED stay."""
        best = best_of(self.checkpoint_folder)
        kept = [p for p in self.checkpoints() if step_of(p) <= newest and p.suffix != ".old"][-keep:]
        for folder in self.checkpoints():
            is_best = best is not None and step_of(folder) == best[0] and step_of(folder) <= newest and folder.suffix != ".old"
            if folder not in kept and not is_best and not (folder / PINNED).exists():
                shutil.rmtree(folder)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.checkpoint_folder.glob("step-*/state.json"))

    def read_checkpoint(self, step: int | None = None, *, before: int = 0) -> dict[str, Any]:
        """The newest checkpoint that reads back whole: its state with the tensors of ``adapter`` and ``optimizer``.

        ``folder`` is its path and ``passed_over`` says which newer ones are damaged. ``step`` asks for that one alone; ``before``
        leaves out so many whole ones, as long as there are others. Raises: CheckpointError when there is none.
        """
        from safetensors.torch import load_file

        damaged, found = [], None
        for folder in self._candidates(step):
            state, damage = read_state(folder)
            if damage:
                damaged.append(f"{folder.name}: {damage}")
                continue
            found, before = (folder, state), before - 1
            if before < 0:
                break
        if found is not None:
            folder, state = found
            tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["sha256"]}
            return {**state, **tensors, "folder": str(folder), "passed_over": damaged}
        why = "; damaged: " + "; ".join(damaged) if damaged else ""
        raise CheckpointError(f"{self.path}: there is no checkpoint to resume from{why}")

    def _candidates(self, step: int | None) -> list[Path]:
        """Checkpoints to try, newest first: none that a rollback has left behind."""
        newest = latest_step(self.checkpoint_folder)
        if step is not None:
            return [p for p in reversed(self.checkpoints()) if step_of(p) == step]
        return [p for p in reversed(self.checkpoints()) if newest is None or step_of(p) <= newest]

    # --- history -----------------------------------------------------------------------------------------------------

    def read_history(self) -> list[dict[str, Any]]:
        """The lines that count, oldest first: a later segment replaces what its parent did beyond the step it left from."""
        return follow_segments(read_lines(self.history))

    def save_loss_chart(self) -> None:
        """Draw the loss of every update, smoothed, with the evaluation losses. Raises: FileError."""
        from matplotlib.figure import Figure

        history = self.read_history()
        steps = [r for r in history if r["type"] == "step" and r["loss"] is not None]
        evals = [r for r in history if r["type"] == "eval"]
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        x, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
        axes.plot(x, losses, color="#b8c4d6", linewidth=0.8, label="each update")
        axes.plot(x, smooth(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o--", color="#c2410c", label="held-out pictures")
        axes.set(xlabel="update", ylabel="loss")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        write_with(self.loss_chart, lambda draft: figure.savefig(draft, format="png", dpi=130))


PINNED = "PINNED"
"""A file of this name in a checkpoint's folder keeps it."""


def step_of(checkpoint: Path) -> int:
    """Updates done at a checkpoint, by its folder's name; -1 for a name that is not ours."""
    digits = checkpoint.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def latest_step(checkpoints: Path) -> int | None:
    """The step that ``latest.json`` points at; ``None`` when it cannot be read."""
    try:
        return int(json.loads((checkpoints / "latest.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_state(folder: Path) -> tuple[dict[str, Any], str]:
    """``state.json`` of a checkpoint, and what is wrong with its files; empty when each is what was written."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        wrong = [name for name, mark in state["sha256"].items() if file_digest(folder / name) != mark]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, str(error)
    return state, f"{wrong[0]} is not what was written" if wrong else ""


class History:
    """The one appended file of a run: flushed line by line, fsynced when asked."""

    def __init__(self, folder: RunFolder, *, segment: int = 0) -> None:
        self.segment = segment
        with explained(folder.history):
            whole = folder.history.read_bytes() if folder.history.exists() else b""
            self._file = folder.history.open("a", encoding="utf-8")
            if whole and not whole.endswith(b"\n"):
                self._file.write("\n")  # the torn last line of a killed run stays a line of its own
        self._path = folder.history

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
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("type"), str) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def follow_segments(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a later segment has replaced."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["type"] == SegmentRecord.type:
            kept = [r for r in kept if r["step"] <= line["from_step"]]
        kept.append(line)
    return kept


def smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average without the pull towards zero at its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


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


def _summaries(root: Path) -> Iterator[RunSummary]:
    if not root.is_dir():
        return
    for path in sorted((p.parent for p in root.glob("*/config.yaml")), key=lambda p: (p / "config.yaml").stat().st_mtime):
        history = RunFolder(path).read_history()
        losses = [r["loss"] for r in history if r["type"] == "step" and isinstance(r.get("loss"), float)]
        evals = [r["loss"] for r in history if r["type"] == "eval" and isinstance(r.get("loss"), float)]
        step = max((r["step"] for r in history if r["type"] == "step"), default=0)
        mean = sum(losses[-20:]) / len(losses[-20:]) if losses else None
        yield RunSummary(path, step, mean, evals[-1] if evals else None, RunFolder(path).lora.exists())


def log_level() -> str:
    """``SD3TUNE_LOG_LEVEL``. Raises: ConfigError when it is not a level."""
    level = os.environ.get("SD3TUNE_LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError([f"SD3TUNE_LOG_LEVEL is {level!r}; use DEBUG, INFO, WARNING or ERROR"], "the environment")
    return level


def open_log(folder: RunFolder) -> logging.Logger:
    """The run's logger, writing to ``train.log`` at ``SD3TUNE_LOG_LEVEL`` (INFO). Raises: FileError."""
    logger = logging.Logger(f"sd3tune.{folder.path.name}", log_level())
    with explained(folder.log):
        handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger
