"""A picture whose parts can be clicked: clear buttons over an image, because core widgets have no image that takes a click."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Part:
    """A part of a picture, in shares of its width and height, and what a click on it does, in words."""

    name: str
    left: float
    top: float
    width: float
    height: float


def part_of(grid: Grid, row: int, column: int, name: str) -> Part:
    """A cell of a grid of pictures."""
    (x, y), (wide, high), (width, height) = grid.corner(row, column), grid.cell, grid.size
    return Part(name, x / width, y / height, wide / width, high / height)


class Clickable:
    """An image with buttons over its parts; ``press`` gets the place of the part that was clicked. Tab and Enter reach them, too."""

    def __init__(self, press: Callable[[int], object]) -> None:
        self._press, self._made, self._parts = press, list[Any](), tuple[Part, ...]()
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
        if tuple(parts) == self._parts:
            return
        self._parts = tuple(parts)
        while len(self._made) < len(parts):
            self._made.append(self._button(len(self._made)))
        for made, part in zip(self._made, parts, strict=False):
            put_on(made, part)
        self.widget.children = (*self.widget.children[:2], *self._made[: len(parts)])

    def _button(self, place: int) -> Any:
        made = widgets.Button()
        made.add_class("sd3tune-click")
        made.on_click(lambda _: self._press(place))
        return made


def put_on(button: Any, part: Part) -> None:
    """Lay a button over a part of the picture that it stands in."""
    with button.layout.hold_sync(), button.hold_sync():
        for side in ("left", "top", "width", "height"):
            setattr(button.layout, side, f"{100 * getattr(part, side):.3f}%")
        button.description = part.name
        tip(button, part.name)
