"""Skip-layer guidance over a grid of settings: what each does to the pictures of an adapter as it is now."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import ImageChops, ImageStat

from sd3tune.errors import ConfigError, TrainingError
from sd3tune.records import NoticeRecord, Record
from sd3tune.shown import duration
from sd3tune.trainer import Trainer
from sd3tune.validation.grids import Grid
from sd3tune.validation.painter import Failed
from sd3tune.validation.sampler import Guidance
from sd3tune.validation.shots import Shot, shots_of
from sd3tune.validation.validator import picture_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class CellRecord(Record):
    """One cell of the grid is drawn, or ``problem`` says why not."""

    type: ClassVar[str] = "cell"
    skip_layers: tuple[int, ...]
    """Empty for the row without skip-layer guidance."""
    skip_scale: float
    guidance: float
    difference: float | None
    """Mean difference from the picture without skip-layer guidance at the same scale, 0 to 1."""
    clip: float | None
    """How well prompt and picture agree, 0 to 1; nothing unless ``evaluation_type`` is clip."""
    seconds: float
    settings: dict[str, Any]
    """All that the cell was drawn with: ``trainer.set(**cell.settings)``."""
    problem: str = ""
    picture: Image | None = field(default=None, repr=False, compare=False)


class SlgGrid:
    """Rows of skipped blocks and scales under one without, columns of guidance scales. Iterate to draw it; it shows what is there.

    A cell that fails says why in its place, the others are drawn, and iterating again tries it again.
    Nothing of it touches the training or the run's settings.
    """

    def __init__(
        self, trainer: Trainer, rows: Sequence[tuple[tuple[int, ...], float]], cfgs: Sequence[float], shot: Shot, **settings: Any
    ) -> None:
        """``settings`` are those of validation that ``shot`` was made with beside the run's own."""
        self._trainer, self.rows, self.cfgs, self.shot, self._given = trainer, (((), 0.0), *rows), tuple(cfgs), shot, settings
        self.cells: dict[tuple[int, int], CellRecord] = {}
        """Row and column -> what was drawn there."""
        places = [(row, column) for row in range(len(self.rows)) for column in range(len(self.cfgs))]
        self.forwards = sum(self._shot(*place).forwards for place in places)
        """Pictures that go through the model, in all."""
        self._each: float | None = None

    def guidance(self, row: int, column: int) -> Guidance:
        """The guidance of a cell."""
        layers, scale = self.rows[row]
        own = self.shot.guidance
        return replace(own, scale=self.cfgs[column], skip_layers=layers, skip_scale=scale if layers else own.skip_scale)

    def _shot(self, row: int, column: int) -> Shot:
        return replace(self.shot, guidance=self.guidance(row, column))

    @property
    def price(self) -> str:
        """What drawing it costs, by the time that one step takes now."""
        if self._each is None:
            self._each = self._trainer.seconds_of_a_forward(self.shot)
        count = len(self.rows) * len(self.cfgs)
        active = self.guidance(1, 0).active_steps(self.shot.steps) if len(self.rows) > 1 else ()
        said = f"; skip-layer guidance is active in steps {active[0]} to {active[-1]} of {self.shot.steps}" if active else ""
        how_long = "" if self._each is None else f": about {duration(self.forwards * self._each)}"
        return f"{count} pictures, {self.forwards} forwards of the model{how_long}{said}"

    def __iter__(self) -> Iterator[Record]:
        """Draw what is not drawn yet; the price comes first, then a record per step of the sampler and per cell."""
        step = self._trainer.steps_done
        yield NoticeRecord(step=step, text=self.price)
        for row in range(len(self.rows)):
            for column in range(len(self.cfgs)):
                if (row, column) not in self.cells or self.cells[row, column].problem:
                    yield from self._draw(row, column)

    def _draw(self, row: int, column: int) -> Iterator[Record]:
        step, started = self._trainer.steps_done, time.perf_counter()
        found = yield from picture_of(self._trainer.painted([self._shot(row, column)]), step)
        picture, problem = (None, found.why) if isinstance(found, Failed) else (found.picture, "")
        plain = self.cells.get((0, column))
        apart = None if picture is None or plain is None or plain.picture is None else difference(picture, plain.picture)
        clip = None if picture is None else self._trainer.score(picture, self.shot.prompt)
        guidance = self.guidance(row, column)
        self.cells[row, column] = CellRecord(
            step=step, skip_layers=guidance.skip_layers, skip_scale=guidance.skip_scale, guidance=guidance.scale, difference=apart,
            clip=clip, seconds=time.perf_counter() - started, settings={**self._given, **settings_of(guidance)}, problem=problem,
            picture=picture,
        )  # fmt: skip
        yield self.cells[row, column]

    def choose(self, row: int, column: int) -> dict[str, Any]:
        """The settings of a cell, row 0 being the one without: ``trainer.set(**grid.choose(2, 1))``. Raises: TrainingError if not drawn."""
        cell = self.cells.get((row, column))
        if cell is None or cell.problem:
            why = "iterate over the grid first" if cell is None else f"it could not be drawn: {cell.problem}"
            raise TrainingError(f"there is no picture in row {row}, column {column}; {why}")
        return cell.settings

    def grid(self) -> Grid:
        """What is drawn so far."""
        rows = []
        for number, (layers, scale) in enumerate(self.rows):
            label = f"skip {', '.join(map(str, layers))} x {scale:g}" if layers else "without"
            found = [self.cells.get((number, column)) for column in range(len(self.cfgs))]
            scores = [f"{c.clip:.3f}" for c in found if c is not None and c.clip is not None]
            cells = tuple(None if cell is None else cell.picture or cell.problem for cell in found)
            rows.append((label + (f"\nCLIP {' '.join(scores)}" if scores else ""), cells))
        return Grid(tuple(rows), tuple(f"guidance {cfg:g}" for cfg in self.cfgs))

    def _repr_png_(self) -> bytes:
        return self.grid().png()

    def __str__(self) -> str:
        lines = [self.price] if not self.cells else []
        for (row, column), cell in sorted(self.cells.items()):
            layers = f"blocks {list(cell.skip_layers)} x {cell.skip_scale:g}" if cell.skip_layers else "none"
            apart = "" if cell.difference is None else f", {cell.difference:.1%} from none"
            clip = "" if cell.clip is None else f", CLIP {cell.clip:.3f}"
            problem = f", could not be drawn: {cell.problem}" if cell.problem else ""
            lines.append(f"[{row}, {column}] guidance {cell.guidance:g}, skipped: {layers}{apart}{clip}{problem}")
        return "\n".join(lines)


def slg_grid(
    trainer: Trainer, *, layers: Sequence[Any] = ((7, 8, 9),), scales: Sequence[float] = (1.4, 2.8, 5.6), cfgs: Sequence[float] = (4.0,),
    prompt: str | None = None, **settings: Any,
) -> SlgGrid:  # fmt: skip
    """A grid of skip-layer guidance for the adapter as it is now: which blocks, how strong, at which guidance.

    ``layers`` holds one list of blocks, or several. Other settings of validation may be given, such as ``validation_seed``. It does not
    draw yet: show it for its price, iterate over it to draw. Raises: ConfigError for blocks that the model has not, guidance of 1 or less,
    or a prompt that the text encoders have not read.
    """
    sets = tuple(tuple(found) for found in (layers if layers and not isinstance(layers[0], int) else (layers,)))
    config = trainer.config.replace(**{"validation_guidance_skip_layers": None, **settings})
    for found in sets:
        for cfg in cfgs:
            own = {"validation_guidance": float(cfg), "validation_guidance_skip_layers": found}
            trainer.check(config.replace(**own, user_prompt_library=None))  # whose prompts have no guidance of their own here
    shots = [shot for shot in shots_of(config) if prompt is None or shot.prompt == prompt]
    if not shots:
        known = "none is set" if not config.prompts else f"there are {', '.join(repr(one.prompt) for one in config.prompts)}"
        raise ConfigError(
            [f"prompt {prompt!r} is none of the validation prompts ({known}); trainer.set(validation_prompt=...)"], "slg_grid"
        )
    rows = [(found, float(scale)) for found in sets for scale in scales]
    return SlgGrid(trainer, rows, [float(cfg) for cfg in cfgs], shots[0], **settings)


def settings_of(guidance: Guidance) -> dict[str, Any]:
    """Guidance as settings."""
    return {
        "validation_guidance": guidance.scale, "validation_guidance_skip_layers": guidance.skip_layers or None,
        "validation_guidance_skip_layers_start": guidance.skip_start, "validation_guidance_skip_layers_stop": guidance.skip_stop,
        "validation_guidance_skip_scale": guidance.skip_scale,
    }  # fmt: skip


def difference(one: Image, other: Image) -> float:
    """Mean absolute difference of two pictures, 0 to 1."""
    return float(sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3 / 255)
