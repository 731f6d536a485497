"""What every panel can do: stand alone in a cell, say its configuration as code, and say what differs."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from sd3tune.config.schema import RunConfig
from sd3tune.panels import codes
from sd3tune.panels.draft import Draft
from sd3tune.panels.looks import put, sentence


class Displayed:
    """Shows its ``widget`` when a cell ends with it."""

    widget: Any

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def insert(code: str) -> None:
    """Put code into a new cell below the one that runs."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        print(code)  # noqa: T201 (outside a notebook there are no cells)
    else:
        shell.set_next_input(code)


class Panel(Displayed):
    """A view of a draft. ``widget`` is what a cell shows; several panels of one draft follow each other."""

    def __init__(self, config: RunConfig | Draft) -> None:
        self.draft = Draft.of(config)
        self.note = widgets.HTML()
        self.widget: Any = widgets.VBox()

    @property
    def config(self) -> RunConfig:
        """The configuration as it is now: whole and legal, whatever stands in the fields."""
        config: RunConfig = self.draft.config
        return config

    def code(self) -> str:
        """The Python that makes this configuration again."""
        return f"import sd3tune as st\n\nconfig = {codes.config_code(self.config)}\n"

    def to_cell(self) -> None:
        """Put `code` into a new cell below. Call it in a cell: front ends ignore it from a button."""
        insert(self.code())

    def diff(self, other: RunConfig | str | None = None) -> str:
        """What differs, one setting a line: from where this began, a configuration, the nearest ``"preset"``, or the ``"last"`` other run
        beside this one's folder. Raises: ConfigError for another word."""
        if isinstance(other, str):
            return codes.difference_to(self.config, other, self.draft.folder)
        return codes.difference_text(self.config, other or self.draft.origin)

    def say(self, text: str, *, bad: bool = False) -> None:
        """Tell the person something, below the buttons."""
        put(self.note, sentence(text, bad=bad))
