"""What helps when the memory was too small: changes with what each saves, and a button that tries again with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from sd3tune.panels.looks import button, sentence, small
from sd3tune.snapshot import Snapshot

MOST = 5


class Relief:
    """Shows itself when a run failed for want of memory. ``act(settings, goes_on)`` tries again."""

    def __init__(self, act: Callable[[dict[str, Any], bool], None]) -> None:
        self._act = act
        self.widget: Any = widgets.VBox([], layout=widgets.Layout(width="100%"))

    def offer(self, now: Snapshot) -> None:
        """Offer what would help, once; nothing for a run that did not fail so."""
        if not now.out_of_memory or now.config is None:
            if self.widget.children:
                self.widget.children = ()
            return
        if self.widget.children:
            return
        from sd3tune.models.savings import savings

        side = max(max(size) for size in now.config.validation_sizes)
        found = savings(now.config, side=side)[:MOST]
        said = (
            "The memory was too small; it is free again, and nothing before the last checkpoint is lost. What saves how much (predicted):"
        )
        rows = [widgets.HTML(sentence(said))]
        for one in found:
            name = ", ".join(f"{key} = {value}" for key, value in one.settings.items())
            pressed = button(name, lambda one=one: self._act(one.settings, one.goes_on), str(one))  # type: ignore[misc]
            rows.append(widgets.VBox([pressed, widgets.HTML(small([str(one).split(": ", 1)[1]]))]))
        self.widget.children = tuple(rows)
