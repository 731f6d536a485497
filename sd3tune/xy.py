"""A grid of pictures over two settings of the validation, for the adapter as it is now or as it was at checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from sd3tune.candidates import weights_of, whole_checkpoints
from sd3tune.config.sections import Validation
from sd3tune.errors import ConfigError
from sd3tune.records import Record
from sd3tune.shown import duration
from sd3tune.trainer import Trainer
from sd3tune.validation.grids import Grid
from sd3tune.validation.painter import Drawn
from sd3tune.validation.shots import Shot, shots_of
from sd3tune.validation.validator import picture_of
from sd3tune.validation.votes import Candidate

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd3tune.config import RunConfig


Axis: TypeAlias = tuple[str, Sequence[Any]]

CHECKPOINT = "checkpoint"
"""An axis that is no setting: steps of checkpoints, whose adapters draw in turn."""


@dataclass(frozen=True, kw_only=True)
class XYRecord(Record):
    """One cell of a grid is drawn, or ``problem`` says why not."""

    type: ClassVar[str] = "cell"
    row: int
    column: int
    settings: dict[str, Any]
    clip: float | None
    """How well prompt and picture agree, 0 to 1; nothing unless ``evaluation_type`` is clip."""
    seconds: float
    problem: str = ""
    picture: Image | None = field(default=None, repr=False, compare=False)
    x: Axis = field(default=("", ()), repr=False)
    """Setting and values of the columns of its grid."""
    y: Axis = field(default=("", ()), repr=False)
    """The same of the rows."""


@dataclass(frozen=True, kw_only=True)
class PriceRecord(Record):
    """What a grid costs, before it is drawn."""

    type: ClassVar[str] = "price"
    pictures: int
    forwards: int
    """Pictures that go through the model, in all."""
    seconds: float | None
    """By the time that one forward takes now; nothing if that is not known."""

    def __str__(self) -> str:
        how_long = "" if self.seconds is None else f": about {duration(self.seconds)}"
        return f"{self.pictures} pictures, {self.forwards} forwards of the model{how_long}"


class XYGrid:
    """Iterate to draw it, cheapest cells first; it touches neither the training nor the run's settings."""

    def __init__(
        self, trainer: Trainer, x: Axis, y: Axis, *, prompt: str | None = None
    ) -> None:  # fmt: skip
        """Raises: ConfigError for a setting that is not of the validation, or a value that this model cannot do; CheckpointError for a
        step without a whole checkpoint.
        """
        self._trainer, self.x, self.y = trainer, x, y
        self._shots: dict[tuple[int, int], Shot] = {}
        for place, config in _configs(trainer.config, x, y):
            trainer.check(config)
            self._shots[place] = _shot(config, prompt)
        steps = [step for name, values in (x, y) if name == CHECKPOINT for step in values]
        self._marks = whole_checkpoints(trainer.folder, steps) if steps else {}
        self.cells: dict[tuple[int, int], XYRecord] = {}

    @property
    def price(self) -> str:
        """What drawing it costs, by the time that one forward takes now."""
        return str(self.priced())

    def priced(self) -> PriceRecord:
        """The same as a record."""
        each = self._trainer.seconds_of_a_forward(self._shots[0, 0])
        return price_of(self._shots, each, self._trainer.steps_done)

    def __iter__(self) -> Iterator[Record]:
        """The price, then a record per step of the sampler and per cell."""
        yield self.priced()
        for place in sorted(self._shots, key=lambda at: (self._shots[at].forwards, at)):
            if place not in self.cells:
                yield from self._draw(place)

    def _draw(self, place: tuple[int, int]) -> Iterator[Record]:
        step, started, shot = self._trainer.steps_done, time.perf_counter(), self._shots[place]
        settings = {self.y[0]: self.y[1][place[0]], self.x[0]: self.x[1][place[1]]}
        with self._adapter(settings.get(CHECKPOINT)):
            found = yield from picture_of(self._trainer.painted([shot]), step)
        picture, problem = (found.picture, "") if isinstance(found, Drawn) else (None, found.why)
        clip = None if picture is None else self._trainer.score(picture, shot.prompt)
        self.cells[place] = XYRecord(
            step=step, row=place[0], column=place[1], settings=settings, clip=clip, seconds=time.perf_counter() - started,
            problem=problem, picture=picture, x=self.x, y=self.y,
        )  # fmt: skip
        yield self.cells[place]

    def _adapter(self, step: int | None) -> AbstractContextManager[None]:
        """The adapter of a checkpoint, or the one that trains."""
        if step is None:
            return nullcontext()
        trainer = self._trainer
        weights = weights_of(trainer.folder, trainer.config, Candidate(step, 1.0, self._marks[step]))
        return trainer.engine.judged(weights=weights)

    def grid(self) -> Grid:
        """What is drawn so far."""
        return grid_of(self.x, self.y, self.cells)


def planned(config: RunConfig, x: Axis, y: Axis, *, prompt: str | None = None) -> dict[tuple[int, int], Shot]:
    """What a grid would draw, by row and column, without a model. Raises: ConfigError."""
    return {place: _shot(one, prompt) for place, one in _configs(config, x, y)}


def price_of(shots: Mapping[tuple[int, int], Shot], each: float | None, step: int = 0) -> PriceRecord:
    """What drawing shots costs when a forward of the model takes ``each`` seconds."""
    forwards = sum(shot.forwards for shot in shots.values())
    return PriceRecord(step=step, pictures=len(shots), forwards=forwards, seconds=None if each is None else forwards * each)


def _configs(config: RunConfig, x: Axis, y: Axis) -> Iterator[tuple[tuple[int, int], RunConfig]]:
    """The settings of each cell. Raises: ConfigError."""
    known = {CHECKPOINT, *Validation.__pydantic_fields__}  # type: ignore[attr-defined]
    wrong = [name for name, _ in (x, y) if name not in known]
    if wrong:
        raise ConfigError([f"{name} is no setting of the validation; sd3tune settings validation lists them" for name in wrong], "the grid")
    for row, below in enumerate(y[1]):
        for column, beside in enumerate(x[1]):
            wanted = {y[0]: below, x[0]: beside}
            wanted.pop(CHECKPOINT, None)
            yield (row, column), config.replace(**wanted)


def _shot(config: RunConfig, prompt: str | None) -> Shot:
    shots = [shot for shot in shots_of(config) if prompt is None or shot.prompt == prompt]
    if not shots:
        raise ConfigError([f"{prompt!r} is none of the validation prompts"], "the grid")
    return shots[0]


def grid_of(x: Axis, y: Axis, cells: dict[tuple[int, int], XYRecord]) -> Grid:
    """Cells as a labelled grid; what is not drawn yet stays grey."""
    rows = []
    for row, below in enumerate(y[1]):
        found = [cells.get((row, column)) for column in range(len(x[1]))]
        pictures = tuple(None if one is None else one.picture or one.problem for one in found)
        scores = " ".join(f"{one.clip:.3f}" for one in found if one is not None and one.clip is not None)
        rows.append((label(y[0], below) + (f"\nCLIP {scores}" if scores else ""), pictures))
    return Grid(tuple(rows), tuple(label(x[0], beside) for beside in x[1]))


def label(name: str, value: Any) -> str:
    """A value of a setting, as it stands beside a grid."""
    short = name.removeprefix("validation_").removeprefix("guidance_").replace("_", " ")
    return f"{short} {', '.join(map(str, value)) if isinstance(value, tuple) else 'none' if value is None else value}"
