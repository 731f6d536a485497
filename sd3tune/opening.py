"""A run folder as it lies there, whatever became of the process that wrote it: read, and never changed."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd3tune import charts
from sd3tune.config.schema import RunConfig
from sd3tune.curves import curve_of
from sd3tune.history import accepted, failure, finished, follow_segments, length_of, reached, read_lines
from sd3tune.keeping import best_of
from sd3tune.locking import Holder, holder
from sd3tune.records import CommandRecord, EvalRecord, Record, records_of
from sd3tune.run_folder import PINNED, RunFolder, latest_step, picture_folders, step_of
from sd3tune.shown import Shown, duration

if TYPE_CHECKING:
    from sd3tune.trainer import Trainer

Status = Literal["finished", "running", "stopped", "lost", "not begun"]
"""``lost``: it ended without a word, as after ``kill -9`` or a power cut; what it left behind is its lock."""

QUIET = 30.0
"""Seconds without a sign of life after which that is said."""

GRID_PIXELS = (1200, 900)


@dataclass(frozen=True)
class Kept:
    """One checkpoint that a run can go on from."""

    step: int
    path: Path
    newest: bool
    best: bool
    pinned: bool

    def __str__(self) -> str:
        marks = [word for word, is_so in (("newest", self.newest), ("best", self.best), ("pinned", self.pinned)) if is_so]
        return f"step {self.step}" + (f" ({', '.join(marks)})" if marks else "")


@dataclass(frozen=True, repr=False)
class OpenedRun(Shown):
    """What a run folder says at one moment. `refresh` looks again; `resume` goes on with the run."""

    folder: RunFolder
    history: tuple[dict[str, Any], ...]
    """The lines that count, oldest first; a torn last line is left out."""
    holder: Holder | None
    """Whose lock lies in the folder, alive or not."""

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run began with; `commands` are what a person changed. Raises: ConfigError."""
        return RunConfig.load(self.folder.config)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was found before the first update; empty when that cannot be read."""
        try:
            found = json.loads(self.folder.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def step(self) -> int:
        """Updates done."""
        return reached(list(self.history))

    @property
    def total(self) -> int:
        """Updates of the whole run, as it was set last; 0 when that is not known."""
        return length_of(list(self.history), int(self.manifest.get("updates") or 0))

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """Step and loss of each update that learned something."""
        return tuple((row["step"], row["loss"]) for row in self.history if row["type"] == "step" and _number(row.get("loss")))

    @property
    def records(self) -> tuple[Record, ...]:
        """The history as records; lines of other versions that lack something are left out."""
        return tuple(records_of(self.history))

    @property
    def evals(self) -> tuple[EvalRecord, ...]:
        """Every evaluation on held-out pictures."""
        return tuple(one for one in self.records if isinstance(one, EvalRecord))

    @property
    def commands(self) -> tuple[CommandRecord, ...]:
        """What a person asked for on the way, and what was refused."""
        return tuple(one for one in self.records if isinstance(one, CommandRecord))

    @property
    def paused(self) -> bool:
        """Whether the last that it was asked of pause and go on is pause."""
        asked = [row.get("name") for row in self.history if row["type"] == "command" and row.get("name") in ("pause", "go_on")]
        return asked[-1:] == ["pause"]

    @property
    def _settings(self) -> list[dict[str, Any]]:
        return [row for row in self.history if accepted(row)]

    @cached_property
    def checkpoints(self) -> tuple[Kept, ...]:
        """Complete checkpoints, oldest first, none that a rollback has left behind. `resume` compares their digests."""
        best, newest = best_of(self.folder.checkpoint_folder), latest_step(self.folder.checkpoint_folder)
        there = [path for path in self.folder.checkpoints() if path.suffix != ".old" and (newest is None or step_of(path) <= newest)]
        last = step_of(there[-1]) if there else -1
        return tuple(
            Kept(step_of(p), p, step_of(p) == last, best is not None and best[0] == step_of(p), (p / PINNED).exists()) for p in there
        )

    @property
    def grid(self) -> Path | None:
        """The newest grid of pictures, or the newest picture; ``None`` when nothing was drawn."""
        if self.folder.grid.exists():
            return self.folder.grid
        drawn = [path for at in picture_folders(self.folder) for path in sorted(at.glob("*.png"))]
        return drawn[-1] if drawn else None

    @cached_property
    def status(self) -> Status:
        """What became of the run, in a word."""
        if self.holder is not None and self.holder.alive:
            return "running"
        if finished(list(self.history), self.folder.lora.name, self.total):
            return "finished"
        if self.holder is not None:
            return "lost"
        return "stopped" if self.history else "not begun"

    @property
    def state(self) -> str:
        """The same as a sentence."""
        at = f"step {self.step}" + (f" of {self.total}" if self.total else "")
        newest = f"newest checkpoint: step {self.checkpoints[-1].step}" if self.checkpoints else "there is no checkpoint"
        if self.status == "running":
            assert self.holder is not None
            quiet = f"; no sign of life for {duration(self.holder.age)}" if self.holder.age > QUIET else ""
            return f"still running in {self.holder}, at {at}{', paused' if self.paused else ''}{quiet}; {newest}"
        if self.status == "finished":
            gone = "" if self.folder.lora.exists() else f"; {self.folder.lora.name} is no longer there"
            return f"finished after {self.step} updates{gone}"
        if self.status == "lost":
            return f"ended without saying why, at {at} ({self.holder} is gone); {newest}"
        failed = failure(list(self.history))
        by = f" by {failed}" if failed else ""
        return f"stopped at {at}{by}; {newest}" if self.status == "stopped" else "prepared, and not begun"

    def refresh(self) -> OpenedRun:
        """The folder as it is now."""
        return open_run(self.path)

    def resume(self, **changes: Any) -> Trainer:
        """The trainer of this run at its newest whole checkpoint, as `Trainer.resume` gives it.

        Raises: TrainingError while a process runs it; CheckpointError when there is no whole checkpoint; ConfigError.
        """
        from sd3tune.trainer import Trainer

        return Trainer.resume(self.path, **changes)

    def __str__(self) -> str:
        lines = [f"{self.path}", self.state]
        if self.losses:
            recent = [loss for _, loss in self.losses[-20:]]
            lines.append(f"loss of the last {len(recent)} updates: {sum(recent) / len(recent):.4f}")
        if evals := self.evals:
            lines.append(
                f"held-out loss {evals[-1].loss:.4f} at step {evals[-1].step}" + (f"; {evals[-1].verdict}" * bool(evals[-1].verdict))
            )
        lines += [f"step {one.step}: {one.name} {one.value if one.value is not None else ''}".rstrip() for one in self.commands[-5:]]
        if self.checkpoints:
            lines.append(f"checkpoints: {', '.join(map(str, self.checkpoints))}")
        if self.grid:
            lines.append(f"pictures: {self.grid}")
        if self.status in ("stopped", "lost") and self.checkpoints:
            lines.append(f"go on with: sd3tune train --resume {self.path}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        marks = [row["step"] for row in self._settings]
        held = [(one.step, one.loss) for one in self.evals]
        parts = [f"<pre>{escape(str(self))}</pre>", charts.line(curve_of(self.losses), held, total=self.total, marks=marks)]
        if len(held) > 1:
            parts.append(charts.held_out(held))
        if self.grid and (picture := _thumbnail(self.grid)):
            parts.append(f'<img alt="the newest pictures" style="max-width:100%" src="data:image/png;base64,{picture}">')
        return f'<div style="max-width:900px">{"".join(parts)}</div>'


def open_run(folder: str | Path) -> OpenedRun:
    """Read a run folder, of a run that goes on, that ended, or whose process was killed. Nothing in it is changed.

    Raises: CheckpointError when it is none.
    """
    there = RunFolder.of(folder)
    found = holder(there.lock)  # first: what is then read is at least as new
    return OpenedRun(there, tuple(follow_segments(read_lines(there.history))), found)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _thumbnail(path: Path) -> str:
    """A picture as base64 of a small PNG; empty when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            shown = file.convert("RGB")
    except OSError:
        return ""
    shown.thumbnail(GRID_PIXELS)
    stream = io.BytesIO()
    shown.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
