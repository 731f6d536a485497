"""The grid lab: pictures over two settings of the validation, with their price first; a cell's settings are taken over by a click."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune.errors import ConfigError
from sd3tune.panels import fields
from sd3tune.panels.base import Displayed
from sd3tune.panels.clicking import Clickable, part_of
from sd3tune.panels.looks import button, offer, put, row, sentence, tip, visible
from sd3tune.panels.pictures import jpeg
from sd3tune.panels.run import RunPanel
from sd3tune.snapshot import LEGAL, TERMINAL
from sd3tune.xy import CHECKPOINT, Axis, PriceRecord, XYGrid, XYRecord, grid_of, label, planned, price_of

if TYPE_CHECKING:
    from sd3tune.records import Record
    from sd3tune.snapshot import Snapshot
    from sd3tune.trainer import Trainer

AXES = {
    "validation_guidance": "1, 2.5, 4, 6", "validation_guidance_skip_scale": "0, 1.4, 2.8, 5.6",
    "validation_guidance_skip_layers": "none; 7, 8, 9; 6, 7, 8", "validation_guidance_skip_layers_stop": "0.1, 0.2, 0.4",
    "validation_adapter_strength": "0, 0.5, 1, 1.3", "validation_num_inference_steps": "14, 28, 50", "validation_seed": "1, 2, 3",
    "validation_shift": "1.5, 3, 5", "validation_noise_scheduler": "euler, heun, dpm, unipc",
}  # fmt: skip
"""Settings that an axis may have, with values to begin with. Another axis is the run's checkpoints."""

WHOLE = (CHECKPOINT, "validation_num_inference_steps", "validation_seed")


class GridLab(Displayed):
    """Draws with the live model of a run panel: pause it, or let it train on and lend the model in between."""

    def __init__(self, panel: RunPanel) -> None:
        self.panel = panel
        options = [*((fields.label(name), name) for name in AXES), ("Checkpoint", CHECKPOINT)]
        narrow, wide = {"width": "min(300px, 98%)"}, {"width": "min(420px, 98%)"}
        self.x: Any = widgets.Dropdown(options=options, value="validation_guidance", description="Across", layout=narrow)
        self.y: Any = widgets.Dropdown(options=options, value="validation_guidance_skip_scale", description="Down", layout=narrow)
        self.xs: Any = tip(
            widgets.Text(description="Values", continuous_update=False, layout=wide), "of the columns; lists of blocks are parted by ;"
        )
        self.ys: Any = tip(widgets.Text(description="Values", continuous_update=False, layout=wide), "of the rows")
        self.prompt: Any = widgets.Dropdown(options=[("first prompt", None)], description="Prompt", layout=wide)
        self.cell: Any = tip(
            widgets.Dropdown(options=[("no cell yet", "")], description="Cell", layout=wide), "whose settings are taken over"
        )
        self.cost, self.note = widgets.HTML(), widgets.HTML()
        self.shown = Clickable(self._clicked)
        self.image = self.shown.image
        visible(self.shown.widget, False)
        self._seen: tuple[XYRecord, ...] = ()
        self._price: PriceRecord | None = None
        self._told = panel.runner.snapshot.refusals
        ask = button("Price", self.price, "lends the model for one forward, to say how long the grid takes; draws nothing")
        go = button("Draw", self.draw, "pause and stop are obeyed when the grid is drawn; Price says before how long that takes")
        self.widget: Any = widgets.VBox(
            [
                row(self.x, self.xs),
                row(self.y, self.ys),
                row(self.prompt, ask, go),
                self.cost,
                self.note,
                self.shown.widget,
                row(self.cell, button("Use this cell", self.use, "its settings go into the form, and into a live run")),
            ],
            layout=widgets.Layout(width="100%", max_width="1100px"),
        )
        for axis, values in ((self.x, self.xs), (self.y, self.ys)):
            axis.observe(lambda change, values=values: setattr(values, "value", self._first(change["new"])), "value")
            values.value = AXES[axis.value]
        for one in (self.x, self.y, self.xs, self.ys, self.prompt, panel.price):
            one.observe(lambda _: self._say_price(), "value")
        panel.draft.observe(lambda _: self._prompts(), "config")
        panel.watchers.append(self.look)
        self._prompts()

    def draw(self) -> None:
        """Ask the run to draw the grid."""
        self._ask(XYGrid.__iter__, "Asked; the run draws it after this update.")

    def price(self) -> None:
        """Ask the run how long the grid takes."""
        self._ask(lambda grid: iter([grid.priced()]), "Asked; the run measures one forward after this update.")

    def _ask(self, what: Callable[[XYGrid], Iterator[Record]], said: str) -> None:
        """Lend the model to a grid, when it can be lent."""
        try:
            axes = self._axes()
        except ConfigError as error:
            put(self.note, sentence("; ".join(error.problems), bad=True))
            return
        state, prompt = self.panel.runner.snapshot.state, self.prompt.value
        if axes[0][0] == axes[1][0]:
            put(self.note, sentence("Across and Down are the same setting; choose two.", bad=True))
        elif state == "idle" or state in TERMINAL:
            put(self.note, sentence("No model is loaded: press Start or Go on, and Pause, in the run panel.", bad=True))
        elif "look" not in LEGAL[state]:
            put(self.note, sentence(f"Not asked: the run is {state}; press again when it trains or is paused.", bad=True))
        else:

            def work(trainer: Trainer) -> Iterator[Record]:
                yield from what(XYGrid(trainer, *axes, prompt=prompt))

            put(self.note, sentence(said))
            self._told = self.panel.runner.snapshot.refusals
            self.panel.runner.send("look", work=work)

    def _axes(self) -> tuple[Axis, Axis]:
        """Across and down, as they are typed. Raises: ConfigError."""
        return (self.x.value, values_of(self.x.value, self.xs.value)), (self.y.value, values_of(self.y.value, self.ys.value))

    def _say_price(self) -> None:
        """What the grid that stands in the fields costs, as far as that is known without drawing it."""
        try:
            shots = planned(self.panel.config, *self._axes(), prompt=self.prompt.value)
        except ConfigError:
            put(self.cost, "")  # what is wrong is said when it is asked for
            return
        known = self._price
        each = None if known is None or known.seconds is None else known.seconds / known.forwards
        price = price_of(shots, each)
        hourly = self.panel.price.value
        money = f", {price.seconds / 3600 * hourly:.2f} to pay" if price.seconds is not None and hourly > 0 else ""
        put(self.cost, sentence(f"{price}{money}." if each is not None else f"{price}; Price says how long that takes."))

    def look(self, now: Snapshot) -> None:
        """Show the price, the cells that came since, and why there are none."""
        if now.price is not None and now.price is not self._price:
            self._price = now.price
            self._say_price()
            put(self.note, sentence(f"{now.price}."))
        if now.refusals != self._told:
            self._told = now.refusals
            if now.refused.startswith("look: "):
                put(self.note, sentence(f"Not done: {now.refused.removeprefix('look: ')}", bad=True))
        if now.cells and now.cells != self._seen:
            self._show(now.cells)

    def _show(self, found: tuple[XYRecord, ...]) -> None:
        x, y = found[-1].x, found[-1].y
        another = not self._seen or (self._seen[-1].x, self._seen[-1].y) != (x, y)
        self._seen = found
        cells = {(one.row, one.column): one for one in found}
        grid = grid_of(x, y, cells)
        self.shown.show(jpeg(grid.image()), [part_of(grid, one.row, one.column, f"use {_words(one)}", _key(one)) for one in found])
        visible(self.shown.widget, True)
        count = len(x[1]) * len(y[1])
        best = max((one for one in found if one.clip is not None), key=lambda one: one.clip or 0.0, default=None)
        score = f" The highest CLIP score, {best.clip:.3f}, has {_words(best)}." if best is not None else ""
        put(self.note, sentence(f"{len(cells)} of {count} cells are drawn.{score}"))
        options = [(_words(one), f"{one.row},{one.column}") for one in found]
        offer(self.cell, options, chosen=options[0][1] if another else None)

    def _clicked(self, key: tuple[int, int, str]) -> None:
        """Take over the cell that was clicked, unless another grid has come since."""
        if key in map(_key, self._seen):
            put(self.cell, f"{key[0]},{key[1]}")
            self.use()

    def use(self) -> None:
        """Take the chosen cell's settings over."""
        found = next((one for one in self._seen if f"{one.row},{one.column}" == self.cell.value), None)
        if found is None:
            put(self.note, sentence("Draw a grid first.", bad=True))
            return
        settings = {name: value for name, value in found.settings.items() if name != CHECKPOINT}
        problems = self.panel.draft.change(**settings)
        said = "; ".join(problems.values()) or f"Taken over: {_words(found)}."
        step = found.settings.get(CHECKPOINT)
        if step is not None and not problems:
            said += f" The run stays where it is: Rewind goes back to step {step}, and Export can write that step's adapter."
            if step in [value for _, value in self.panel.checkpoint.options]:
                self.panel.checkpoint.value = step
        put(self.note, sentence(said, bad=bool(problems)))

    def _first(self, axis: str) -> str:
        """Values to begin with."""
        if axis == CHECKPOINT:
            return ", ".join(str(step) for _, step in self.panel.checkpoint.options if step >= 0)
        return AXES[axis]

    def _prompts(self) -> None:
        options = [("first prompt", None), *((one.name or "no prompt", one.prompt) for one in self.panel.config.prompts)]
        offer(self.prompt, options)
        self._say_price()


def _key(cell: XYRecord) -> tuple[int, int, str]:
    """What tells a cell from others, also of other grids."""
    return cell.row, cell.column, repr(cell.settings)


def _words(cell: XYRecord) -> str:
    return ", ".join(label(name, value) for name, value in cell.settings.items())


def values_of(name: str, typed: str) -> list[Any]:
    """The values of an axis as they were typed. Raises: ConfigError."""
    called = "Checkpoint" if name == CHECKPOINT else fields.label(name)
    parts = typed.split(";") if name == "validation_guidance_skip_layers" else re.split(r"[,;]", typed)
    found = []
    for part in parts:
        text = part.strip()
        if not text:
            continue
        if name == "validation_guidance_skip_layers":
            found.append(None if text in ("none", "off") else fields.read(name, text))
        elif name == "validation_noise_scheduler":
            found.append(text)
        else:
            try:
                found.append(int(text) if name in WHOLE else float(text))
            except ValueError:
                raise ConfigError([f"{called}: {text!r} is not a {'whole ' if name in WHOLE else ''}number"], "the grid") from None
    if not found:
        raise ConfigError([f"{called} has no values"], "the grid")
    return found
