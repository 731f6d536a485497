"""The doctor's panel: what this machine has, and what stands in the way of the draft."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune.checkup import Finding, Report, doctor
from sd3tune.panels.base import Panel
from sd3tune.panels.draft import Draft
from sd3tune.panels.looks import button, put, row, sentence, table
from sd3tune.secrets import without_secrets

if TYPE_CHECKING:
    from sd3tune.config import RunConfig

WORDS = {"ok": "well", "note": "to know", "bad": "in the way"}


class DoctorPanel(Panel):
    """Asks `doctor` in a thread of its own, because kernels are tried out in another process; ``report`` is what it found."""

    def __init__(self, config: RunConfig | Draft) -> None:
        super().__init__(config)
        self.report: Report | None = None
        self.table = widgets.HTML()
        self.ask: Any = button("Examine this machine", self.look, "versions, GPU, disks, kernels, login; nothing is downloaded")
        self.widget = widgets.VBox([row(self.ask), self.note, self.table], layout=widgets.Layout(width="100%", max_width="1100px"))
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Ask, and show the answers when they are there."""
        self.say("Examining: a minute or so the first time, because every kind of kernel is tried out.")
        self.ask.disabled = True
        self._thread = threading.Thread(target=self._look, args=(self.config,), name="sd3tune-doctor", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> Report:
        """Wait for the answers."""
        if self._thread is not None:
            self._thread.join(timeout)
        assert self.report is not None
        return self.report

    def _look(self, config: RunConfig) -> None:
        try:
            self.report = doctor(config)
        finally:
            self.ask.disabled = False
        bad = [finding for finding in self.report.findings if finding.state == "bad"]
        self.say(f"{len(bad)} things stand in the way." if bad else "Nothing stands in the way.", bad=bool(bad))
        put(self.table, findings(self.report.findings))


def findings(found: tuple[Finding, ...]) -> str:
    """The answers as a table, what stands in the way first; nothing of a token."""
    order = {"bad": 0, "note": 1, "ok": 2}
    rows = sorted(found, key=lambda one: order[one.state])
    return table([(WORDS[one.state], one.what, without_secrets(one.text)) for one in rows], ("", "what", "found")) or sentence("nothing")
