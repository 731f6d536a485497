"""A run panel's code and what differs, folded away below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune.errors import ConfigError
from sd3tune.panels.looks import folded, put
from sd3tune.snapshot import Snapshot

if TYPE_CHECKING:
    from sd3tune.panels.run import RunPanel


class Retold:
    """Shows what `RunPanel.code` and `Panel.diff` say; made anew when a setting, the run, or what was changed by hand is another."""

    def __init__(self, panel: RunPanel) -> None:
        self._panel, self._of = panel, tuple[object, ...]()
        self.widget: Any = widgets.HTML()
        panel.draft.observe(lambda _: self.look(panel.runner.snapshot), "config")

    def look(self, now: Snapshot) -> None:
        """Bring it up to date."""
        of = (self._panel.config, now.folder, now.began_at, now.steering)
        if of != self._of:
            self._of = of
            parts = {
                "What differs from the preset": self._diff("preset"), "What differs from the last run": self._diff("last"),
                "The code that does this": self._panel.code(),
            }  # fmt: skip
            put(self.widget, "".join(folded(name, text) for name, text in parts.items()))

    def _diff(self, what: str) -> str:
        try:
            return self._panel.diff(what)
        except ConfigError as error:
            return str(error)
