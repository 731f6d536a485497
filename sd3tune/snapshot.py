"""What a run looks like at one moment, and what may be asked of it then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd3tune.curves import EMPTY, Curve, Series
from sd3tune.records import (
    CacheRecord,
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    ImageRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    ScoreRecord,
    SegmentRecord,
    StepRecord,
    WaitRecord,
)

if TYPE_CHECKING:
    from sd3tune.config import RunConfig

LEGAL: dict[str, frozenset[str]] = {
    "idle": frozenset({"start"}),
    "preparing": frozenset({"pause", "stop", "set"}),
    "training": frozenset({"pause", "stop", "validate", "set", "save", "rewind", "look"}),
    "paused": frozenset({"go_on", "stop", "validate", "set", "save", "rewind", "look"}),
    "validating": frozenset({"pause", "stop", "set", "save"}),
    "stopping": frozenset(),
    "stopped": frozenset(),
    "finished": frozenset(),
    "failed": frozenset(),
}
"""State -> what a person may ask in it."""

TERMINAL = frozenset({"stopped", "finished", "failed"})
"""States that a runner never leaves; another runner starts another run."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run looks like at one moment. Never changes; cheap to make."""

    state: str = "idle"
    own: bool = True
    """Whether the run ends with this process; one of another process is only shown and steered here."""
    step: int = 0
    total_steps: int = 0
    learning_rate: float | None = None
    seconds_per_update: float | None = None
    seconds_per_update_in_all: float | None = None
    """With pictures, evaluations and checkpoints, as far as there were some."""
    peak_memory_bytes: int = 0
    total_memory_bytes: int = 0
    """Of the GPU; 0 where there is none."""
    answered: int = 0
    """Commands that were done or refused."""
    evals: tuple[tuple[int, float], ...] = ()
    verdict: str = ""
    message: str = ""
    refused: str = ""
    refusals: int = 0
    pictures: int = 0
    """Validation pictures that were drawn, or could not be."""
    grid_step: int = 0
    """Of the newest of them."""
    went_back: int = 0
    """How often the run left an earlier step anew: what was drawn after that step counts no longer."""
    error: str = ""
    log: tuple[str, ...] = ()
    steering: tuple[tuple[int, dict[str, Any]], ...] = ()
    """Settings that were changed by hand, and after which update."""
    began_at: int = 0
    """Updates that were done when this process took the run up; 0 for a run of its own."""
    seconds: float = 0.0
    """From the first update of this process to its newest, with all that lay between them."""
    began_with: RunConfig | None = None
    """The configuration before any of that."""
    folder: str = ""
    config: RunConfig | None = None
    noise_levels: tuple[int, ...] = ()
    """How many of those drawn lie in each tenth of 0 to 1."""
    cells: tuple[Any, ...] = ()
    """Of the newest grid that was asked for, as far as they are drawn."""
    price: Any = None
    """What that grid costs, as its record says."""
    previews: tuple[bytes, ...] = ()
    """Pictures that are being drawn, as JPEG files, while previews are asked for."""
    count: int = 0
    """Updates that were seen."""
    loss: Curve = EMPTY
    bands: tuple[Curve, ...] = ()
    """The loss of single pictures, in quarters of the noise levels from picture to noise."""
    rates: Curve = EMPTY
    grad_norms: Curve = EMPTY
    out_of_memory: bool = False
    """Whether that is what the run failed of."""

    @property
    def changes(self) -> tuple[tuple[int, str], ...]:
        """What was changed by hand, in words, and after which update."""
        return tuple((step, in_words(settings)) for step, settings in self.steering)

    @property
    def live(self) -> bool:
        """Whether a worker is at it."""
        return self.state != "idle" and self.state not in TERMINAL

    @property
    def seconds_left(self) -> float | None:
        """Expected time for the updates that are left, without what falls due between them."""
        return None if self.seconds_per_update is None else self.seconds_per_update * (self.total_steps - self.step)

    @property
    def most_seconds_left(self) -> float | None:
        """The same if pictures, evaluations and checkpoints take the share that they took so far."""
        return None if self.seconds_per_update_in_all is None else self.seconds_per_update_in_all * (self.total_steps - self.step)


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings with their values, as a person reads them."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def kept(steering: Sequence[tuple[int, dict[str, Any]]], step: int, leaves: Mapping[str, Any]) -> tuple[tuple[int, dict[str, Any]], ...]:
    """What was changed by hand up to a checkpoint of ``step`` with these settings: of changes after that very update, those in it."""
    return tuple((at, new) for at, new in steering if at < step or (at == step and all(leaves.get(name) == new[name] for name in new)))


BAND = 0.25
"""Width of a band of noise levels."""


class Gauges:
    """The numbers of the updates so far, in bounded memory; ``began`` is when the first began, where some lie before these."""

    def __init__(self, began: float | None = None) -> None:
        self.count, self.began = 0, began
        self._loss, self._rates, self._norms = Series(), Series(), Series()
        self._bands = tuple(Series() for _ in range(round(1 / BAND)))
        self._first: tuple[int, float] | None = None

    def begin(self) -> None:
        """Time counts from the next update on: those before it were done elsewhere, or earlier."""
        self._first = self.began = None

    def take(self, record: StepRecord) -> dict[str, Any]:
        """What an update changes in the snapshot."""
        self.count += 1
        now = time.monotonic()
        self._first = self._first or (record.step - 1, now - record.seconds)
        self.began = self._first[1] if self.began is None else self.began
        if record.loss is not None:
            self._loss.add(record.step, record.loss)
        self._rates.add(record.step, record.learning_rate)
        self._norms.add(record.step, record.grad_norm)
        for sigma, loss in zip(record.sigmas, record.losses, strict=False):
            self._bands[min(int(sigma / BAND), len(self._bands) - 1)].add(record.step, loss)
        updates = max(1, record.step - self._first[0])
        return {
            "count": self.count, "loss": self._loss.curve, "rates": self._rates.curve, "grad_norms": self._norms.curve,
            "bands": tuple(one.curve for one in self._bands), "peak_memory_bytes": record.peak_memory_bytes,
            "seconds_per_update_in_all": (now - self._first[1]) / updates, "seconds": now - self.began,
        }  # fmt: skip


def after(now: Snapshot, record: Record) -> tuple[dict[str, Any], str]:
    """What a record changes in the snapshot, and what it says to the log."""
    if isinstance(record, StepRecord):
        known = now.seconds_per_update
        pace = record.seconds if known is None else 0.9 * known + 0.1 * record.seconds
        return {"step": record.step, "learning_rate": record.learning_rate, "seconds_per_update": pace, "message": ""}, ""
    if isinstance(record, CacheRecord):
        what = {"pictures": "reading pictures", "states": "reading texts"}.get(record.kind, "encoding")
        return {"message": f"{what}, {record.step} of {record.total}"}, f"{record.name}: {record.problem}" if record.problem else ""
    if isinstance(record, PreviewRecord):
        others = f" and {record.count - 1} more" if record.count > 1 else ""
        said = f"drawing {record.prompt!r}{others}, sampler step {record.sampler_step} of {record.sampler_steps}"
        return {"message": said, **({"previews": record.previews} if record.previews else {})}, ""
    if isinstance(record, ImageRecord):
        said = f"the picture of {record.prompt!r} could not be drawn: {record.problem}" if record.problem else ""
        return {"previews": (), "pictures": now.pictures + 1, "grid_step": record.step}, said
    if isinstance(record, ScoreRecord):
        return {}, said_of(record)
    if record.type == "cell":
        return {"cells": (*now.cells, record), "previews": ()}, ""
    if record.type == "price":
        return {"price": record}, str(record)
    if isinstance(record, EvalRecord):
        said = f"loss on held-out pictures {record.loss:.4g}" + f"; {record.verdict}" * bool(record.verdict)
        return {"evals": (*now.evals, (record.step, record.loss)), "verdict": record.verdict}, said
    if isinstance(record, CheckpointRecord):
        return {}, f"saved {record.path}"
    if isinstance(record, SegmentRecord):
        return _back(now, record), ""
    if isinstance(record, CommandRecord):
        if record.refused:
            return {}, f"{record.name}: not done: {record.refused}"
        taken_up = not now.own or now.state == "preparing"  # what is asked of a run of our own is known before it is a record
        if record.name == "set" and taken_up and isinstance(record.value, Mapping):
            return {"steering": (*now.steering, (record.step, dict(record.value)))}, ""
        return {"message": "paused where it runs"} if record.name == "pause" and not now.own else {}, ""
    if isinstance(record, WaitRecord):
        return {"message": record.why} if record.why else {}, ""
    return {}, record.text if isinstance(record, NoticeRecord) else ""


def begins_anew(now: Snapshot, record: SegmentRecord) -> bool:
    """Whether curves begin anew where a run goes back: of what is read of a history, all that this leaves behind is left out already."""
    return now.state != "preparing" and (record.why == "rewind" or not now.own)


def _back(now: Snapshot, record: SegmentRecord) -> dict[str, Any]:
    """The run goes on from an earlier step."""
    again: dict[str, Any] = {"went_back": now.went_back + 1}
    if begins_anew(now, record):
        again |= {"verdict": "", "seconds_per_update": None, "loss": EMPTY, "rates": EMPTY, "grad_norms": EMPTY, "bands": ()}
        again |= {"step": record.from_step, "evals": tuple(one for one in now.evals if one[0] <= record.from_step)}
    if not now.own:
        again |= {"steering": kept(now.steering, record.from_step, record.live)}
    return again


def said_of(record: ScoreRecord) -> str:
    """A score in words, beside what it may be compared with."""
    beside = [f"base model {record.base:.3f}"] if record.base is not None and record.kind != "base" else []
    beside += [f"real pictures {record.reference:.3f}"] if record.reference is not None else []
    cut = f"; of {record.truncated} prompts CLIP sees only the beginning" if record.truncated else ""
    error = record.std / max(1, len(record.scores) - 1) ** 0.5
    return f"CLIP score {record.mean:.3f} +- {error:.3f}" + (f" ({', '.join(beside)})" if beside else "") + cut


def reached(now: Snapshot, until: Until) -> bool:
    """Whether a run is where somebody waits for it: the end, a state, a step, or a condition."""
    if until is None:
        return now.state in TERMINAL
    if isinstance(until, str):
        return now.state == until
    return now.step >= until if isinstance(until, int) else until(now)


Until = str | int | Callable[[Snapshot], bool] | None
