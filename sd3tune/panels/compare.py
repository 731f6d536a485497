"""Two runs side by side: what was set differently, how the losses went, and the same prompts drawn by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from sd3tune import charts
from sd3tune.config.schema import RunConfig
from sd3tune.curves import Curve, curve_of
from sd3tune.errors import Sd3TuneError
from sd3tune.listing import runs
from sd3tune.panels import codes
from sd3tune.panels.base import Displayed
from sd3tune.panels.looks import button, put, row, sentence, table, tip
from sd3tune.panels.pictures import SIDE, jpeg, shown_at, small
from sd3tune.run_folder import RunFolder
from sd3tune.validation.grids import Grid
from sd3tune.validation.pictures import title
from sd3tune.validation.standing import steps_drawn


class ComparePanel(Displayed):
    """Compares two runs of a folder."""

    def __init__(self, folder: str | Path = "runs") -> None:
        self.folder: Any = widgets.Text(
            value=str(folder), description="Runs in", continuous_update=False, layout={"width": "min(360px, 98%)"}
        )
        self.first: Any = tip(widgets.Dropdown(options=[("none", "")], description="First", layout={"width": "min(360px, 98%)"}), "a run")
        self.second: Any = tip(
            widgets.Dropdown(options=[("none", "")], description="Second", layout={"width": "min(360px, 98%)"}), "another run"
        )
        self.note, self.curves, self.settings = (widgets.HTML() for _ in range(3))
        self.image: Any = widgets.Image(
            format="jpeg", layout=widgets.Layout(max_width="100%", height="auto", align_self="flex-start", display="none")
        )
        self.widget: Any = widgets.VBox(
            [
                row(self.folder, button("List", self.list_runs, "read the folder again")),
                row(self.first, self.second),
                self.note,
                self.curves,
                self.settings,
                self.image,
            ],
            layout=widgets.Layout(width="100%", max_width="1100px"),
        )
        self.folder.observe(lambda _: self.list_runs(), "value")
        for one in (self.first, self.second):
            one.observe(lambda _: self.compare(), "value")
        self.list_runs()

    def list_runs(self) -> None:
        """Read which runs there are; the two newest are chosen at first."""
        try:
            found = [str(one.path) for one in runs(self.folder.value)]
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        options = [(Path(path).name, path) for path in found] or [("none", "")]
        for one, newest in ((self.first, -2), (self.second, -1)):
            if list(one.options) != options:
                one.options = options
                one.value = options[max(newest, -len(options))][1]
        self.compare()

    def compare(self) -> None:
        """Show both chosen runs."""
        paths = [self.first.value, self.second.value]
        if not all(paths) or paths[0] == paths[1]:
            put(self.note, sentence("Choose two runs."))
            return
        folders = [RunFolder(Path(path)) for path in paths]
        try:
            configs = [RunConfig.load(folder.config) for folder in folders]
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        names = [folder.path.name for folder in folders]
        histories = [folder.read_history() for folder in folders]
        losses = {
            name: curve_of((r["step"], r["loss"]) for r in rows if r["type"] == "step" and r["loss"] is not None)
            for name, rows in zip(names, histories, strict=True)
        }
        held = {name: [(r["step"], r["loss"]) for r in rows if r["type"] == "eval"] for name, rows in zip(names, histories, strict=True)}
        shown: dict[str, Curve | dict[str, Curve]] = {"loss, smoothed": losses}
        if all(held.values()):
            shown["loss on held-out pictures"] = {name: curve_of(points, 10_000) for name, points in held.items()}
        put(self.curves, charts.strip(shown))
        different = codes.differences(configs[1], configs[0])
        rows = [(name, repr(old), repr(new)) for name, (old, new) in different.items()]
        put(self.settings, table(rows, ("setting", *names)) if rows else sentence("Every setting is the same."))
        put(self.note, sentence(in_words(names, losses, held, len(rows))))
        self._show_pictures(folders, names)

    def _show_pictures(self, folders: list[RunFolder], names: list[str]) -> None:
        grid = pair_grid(folders, names)
        self.image.layout.display = "none" if grid is None else ""
        if grid is not None:
            put(self.image, jpeg(grid.image()))


def in_words(names: list[str], losses: dict[str, Curve], held: dict[str, list[tuple[int, float]]], different: int) -> str:
    """The comparison in a sentence or two."""
    said = [
        f"{name}: smoothed loss {curve.smooth:.3g}" + (f", held-out {held[name][-1][1]:.3g}" if held[name] else "")
        for name, curve in losses.items()
        if curve.smooth is not None
    ]
    last = [held[name][-1][1] for name in names if held[name]]
    better = f" On held-out pictures {names[last.index(min(last))]} is better." if len(last) == 2 and last[0] != last[1] else ""
    return f"{'; '.join(said)}. {different} settings differ.{better}"


def pair_grid(folders: list[RunFolder], names: list[str]) -> Grid | None:
    """The newest pictures of each run below each other, of the prompts that both have drawn; nothing when there are none."""
    newest = [steps_drawn(folder)[-1:] for folder in folders]
    if not all(newest):
        return None
    found = [{one.shot.place: one for one in shown_at(folder, steps[0])} for folder, steps in zip(folders, newest, strict=True)]
    both = [place for place in found[0] if place in found[1]]
    if not both:
        return None
    rows = []
    for name, steps, there in zip(names, newest, found, strict=True):
        rows.append((f"{name}\nstep {steps[0]}", tuple(small(there[place], SIDE) for place in both)))
    shots = [found[0][place].shot for place in both]
    return Grid(tuple(rows), tuple(title(shot, shots) for shot in shots))
