"""Every panel over one draft, behind tabs: from the machine to the file that works elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune.panels.compare import ComparePanel
from sd3tune.panels.data import DataPanel
from sd3tune.panels.doctor import DoctorPanel
from sd3tune.panels.export import ExportPanel
from sd3tune.panels.lab import GridLab
from sd3tune.panels.looks import tabs
from sd3tune.panels.run import RunPanel
from sd3tune.panels.settings import LearningPanel, ModelPanel, ValidationPanel

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.panels.draft import Draft
    from sd3tune.snapshot import Snapshot
    from sd3tune.trainer import Trainer


class Studio(RunPanel):
    """The run with all other panels over it. Each of them is an attribute, and may be shown alone."""

    def __init__(
        self, config: RunConfig | Draft, cache: Cache | None = None, *, data: str | Path = "datasets.yaml",
        make: Callable[[RunConfig, Cache], Trainer] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, cache, data=data, make=make)
        runs = Path(self.config.run.output_dir)
        self.machine, self.data = DoctorPanel(self.draft), DataPanel(self.draft, self._data)
        self.model, self.learning, self.drawing = ModelPanel(self.draft), LearningPanel(self.draft), ValidationPanel(self.draft)
        self.lab, self.compared, self.export = GridLab(self), ComparePanel(runs.parent), ExportPanel(runs)
        parts: dict[str, Any] = {
            "Machine": self.machine.widget, "Model": self.model.widget, "Data": self.data.widget, "Training": self.learning.widget,
            "Validation": self.drawing.widget, "Grid lab": self.lab.widget, "Compare": self.compared.widget, "Export": self.export.widget,
        }  # fmt: skip
        self.forms = [*self.model.forms, *self.learning.forms, *self.drawing.forms]
        self.fields: dict[str, Any] = {**self.model.fields, **self.learning.fields, **self.drawing.fields}
        self.tabs: Any = tabs(parts)
        self.widget = widgets.VBox([self.tabs, self.widget], layout=widgets.Layout(width="100%", max_width="1100px"))
        self._shown, self._offered = "", self.checkpoint.options
        self.watchers.append(self._export)
        self.data.source.observe(lambda change: self._from(change["new"]), "value")
        self.data.saved.observe(lambda _: self._from(self.data.source.value), "times")

    @property
    def hindrance(self) -> str:
        """Why no run starts now; captions that are not saved are a reason, too."""
        count = len(self.data.edits)
        edited = f"{count} captions are edited and not saved; under Data, Captions, press Save edits or Undo edits" if count else ""
        return super().hindrance or edited

    def _from(self, data: str) -> None:
        """Train on other data, or other captions, from the next run on."""
        self._data, self._cache = data, None

    def _export(self, now: Snapshot) -> None:
        """The export begins with the run that is shown, until a person names another."""
        if now.folder and now.folder != self._shown:
            self._shown = self.export.source.value = now.folder
        if self._offered != self.checkpoint.options:
            self._offered = self.checkpoint.options
            self.export.offer_steps()
