"""What a run looks like at one moment, and what may be asked of it then."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sd3tune.records import (
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    ImageRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    ScoreRecord,
    StepRecord,
)

if TYPE_CHECKING:
    from sd3tune.config import RunConfig

LEGAL: dict[str, frozenset[str]] = {
    "idle": frozenset({"start"}),
    "preparing": frozenset({"pause", "stop", "set"}),
    "training": frozenset({"pause", "stop", "validate", "set", "save"}),
    "paused": frozenset({"go_on", "stop", "validate", "set", "save"}),
    "validating": frozenset({"pause", "stop", "set", "save"}),
    "stopping": frozenset(),
    "stopped": frozenset(),
    "finished": frozenset(),
    "failed": frozenset(),
}
"""State -> what a person may ask in it."""

TERMINAL = frozenset({"stopped", "finished", "failed"})
"""States that a runner never leaves; another runner starts another run."""


GRID_PIXELS = (1600, 4800)
"""The grid is sent over the wire at most this large; the file in the run folder is whole."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run looks like at one moment. Never changes; cheap to make."""

    state: str = "idle"
    step: int = 0
    total_steps: int = 0
    learning_rate: float | None = None
    seconds_per_update: float | None = None
    evals: tuple[tuple[int, float], ...] = ()
    verdict: str = ""
    message: str = ""
    refused: str = ""
    refusals: int = 0
    grid: bytes = b""
    grid_step: int = 0
    error: str = ""
    log: tuple[str, ...] = ()
    changes: tuple[tuple[int, str], ...] = ()
    folder: str = ""
    config: RunConfig | None = None
    noise_levels: tuple[int, ...] = ()
    """How many of those drawn lie in each tenth of 0 to 1."""
    previews: tuple[bytes, ...] = ()
    """Pictures that are being drawn, as JPEG files, while previews are asked for."""
    points: list[tuple[int, float]] | tuple[()] = ()
    count: int = 0

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(step, loss) of every update so far."""
        return tuple(islice(self.points, self.count))  # the worker only appends, so the first ``count`` never change

    @property
    def live(self) -> bool:
        """Whether a worker is at it."""
        return self.state != "idle" and self.state not in TERMINAL

    @property
    def seconds_left(self) -> float | None:
        """Expected time for the updates that are left."""
        return None if self.seconds_per_update is None else self.seconds_per_update * (self.total_steps - self.step)


@dataclass(frozen=True)
class Command:
    """What a person asked."""

    name: str
    values: dict[str, Any]


def after(now: Snapshot, record: Record) -> tuple[dict[str, Any], str]:
    """What a record changes in the snapshot, and what it says to the log."""
    if isinstance(record, StepRecord):
        known = now.seconds_per_update
        pace = record.seconds if known is None else 0.9 * known + 0.1 * record.seconds
        return {"step": record.step, "learning_rate": record.learning_rate, "seconds_per_update": pace, "message": ""}, ""
    if isinstance(record, PreviewRecord):
        others = f" and {record.count - 1} more" if record.count > 1 else ""
        said = f"drawing {record.prompt!r}{others}, sampler step {record.sampler_step} of {record.sampler_steps}"
        return {"message": said, **({"previews": record.previews} if record.previews else {})}, ""
    if isinstance(record, ImageRecord):
        said = f"the picture of {record.prompt!r} could not be drawn: {record.problem}" if record.problem else ""
        return {"previews": ()}, said
    if isinstance(record, ScoreRecord):
        return {}, said_of(record)
    if isinstance(record, EvalRecord):
        said = f"loss on held-out pictures {record.loss:.4g}" + f"; {record.verdict}" * bool(record.verdict)
        return {"evals": (*now.evals, (record.step, record.loss)), "verdict": record.verdict}, said
    if isinstance(record, CheckpointRecord):
        return {}, f"saved {record.path}"
    if isinstance(record, CommandRecord):
        return {}, f"{record.name}: not done: {record.refused}" if record.refused else ""
    return {}, record.text if isinstance(record, NoticeRecord) else ""


def said_of(record: ScoreRecord) -> str:
    """A score in words, beside what it may be compared with."""
    beside = [f"base model {record.base:.3f}"] if record.base is not None and record.kind != "base" else []
    beside += [f"real pictures {record.reference:.3f}"] if record.reference is not None else []
    cut = f"; of {record.truncated} prompts CLIP sees only the beginning" if record.truncated else ""
    error = record.std / max(1, len(record.scores) - 1) ** 0.5
    return f"CLIP score {record.mean:.3f} +- {error:.3f}" + (f" ({', '.join(beside)})" if beside else "") + cut


def small_png(picture: Any) -> bytes:
    """A picture as PNG, small enough to send."""
    picture.thumbnail(GRID_PIXELS)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def reached(now: Snapshot, until: Until) -> bool:
    """Whether a run is where somebody waits for it: the end, a state, a step, or a condition."""
    if until is None:
        return now.state in TERMINAL
    if isinstance(until, str):
        return now.state == until
    return now.step >= until if isinstance(until, int) else until(now)


Until = str | int | Callable[[Snapshot], bool] | None
