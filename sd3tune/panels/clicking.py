"""A picture whose parts can be clicked: clear buttons over an image, because core widgets have no image that takes a click."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from sd3tune.panels.looks import put, tip
from sd3tune.validation.grids import Grid

STYLE = (
    ".sd3tune-clicks{position:relative;width:fit-content;max-width:100%}"
    ".sd3tune-clicks>.widget-button.sd3tune-click{position:absolute;margin:0;padding:0;min-width:0;background:transparent;color:transparent;"
    "box-shadow:none;cursor:pointer}"
    ".sd3tune-clicks>.widget-button.sd3tune-click:is(:hover,:focus-visible){outline:3px solid #1976d2;outline-offset:-3px}"
)

KEPT = 64
"""Buttons that are kept although their parts are not shown; people go back and forth."""


@dataclass(frozen=True)
class Part:
    """A part of a picture, in shares of its width and height, and what a click on it does: in words, and for whom it tells."""

    name: str
    what: Hashable
    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0


def part_of(grid: Grid, row: int, column: int, name: str, what: Hashable) -> Part:
    """A cell of a grid of pictures."""
    (x, y), (wide, high), (width, height) = grid.corner(row, column), grid.cell, grid.size
    return Part(name, what, x / width, y / height, wide / width, high / height)


class Clickable:
    """An image with buttons over its parts; ``press`` gets what the part is for that was clicked. Tab and Enter reach them, too."""

    def __init__(self, press: Callable[[Any], object]) -> None:
        self._press = press
        self._made: dict[Part, Any] = {}
        """A button is that of one part for ever, so that a late click means what was seen."""
        self.image: Any = widgets.Image(format="jpeg", layout=widgets.Layout(max_width="100%", height="auto", align_self="flex-start"))
        self.widget: Any = widgets.VBox([widgets.HTML(f"<style>{STYLE}</style>", layout={"display": "none"}), self.image])
        self.widget.add_class("sd3tune-clicks")

    @property
    def buttons(self) -> tuple[Any, ...]:
        """The buttons that lie over the image, in the order of the parts."""
        return tuple(self.widget.children[2:])

    def show(self, picture: bytes, parts: Sequence[Part]) -> None:
        """Show a picture and lay buttons over its parts; what is as before is not sent again."""
        put(self.image, picture)
        for part in parts:
            if part not in self._made:
                self._made[part] = self._button(part)
        shown = [self._made[part] for part in parts]
        if list(self.buttons) != shown:
            self.widget.children = (*self.widget.children[:2], *shown)
        for old in [part for part in self._made if part not in parts][: max(0, len(self._made) - KEPT)]:
            gone = self._made.pop(old)
            for one in (gone.layout, gone.style, gone):
                one.close()

    def _button(self, part: Part) -> Any:
        sides = {side: f"{100 * getattr(part, side):.3f}%" for side in ("left", "top", "width", "height")}
        made = widgets.Button(description=part.name, layout=widgets.Layout(**sides))
        made.add_class("sd3tune-click")
        made.on_click(lambda _: self._press(part.what))
        return tip(made, part.name)
