"""The training panel: the settings that matter most, and the run they are for, in one cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as widgets

from sd3tune.config.advice import advice
from sd3tune.panels.forms import Form
from sd3tune.panels.looks import column, put, row, small
from sd3tune.panels.run import RunPanel

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.panels.draft import Draft
    from sd3tune.trainer import Trainer

NAMES = (
    "base_model_precision", "learning_rate", "max_grad_norm", "max_train_steps", "validation_guidance", "validation_guidance_skip_layers",
    "validation_guidance_skip_scale", "validation_guidance_skip_layers_start", "validation_guidance_skip_layers_stop",
)  # fmt: skip
"""Settings of the training panel."""


class TrainingPanel(RunPanel):
    """A run panel with a form of its most used settings; `panels.Studio` has all of them.

    ``config`` is the form as a configuration, ``runner`` the run. Fields that may change while training reach it at once.
    """

    def __init__(
        self, config: RunConfig | Draft, cache: Cache | None = None, *, data: str | Path = "datasets.yaml",
        make: Callable[[RunConfig, Cache], Trainer] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, cache, data=data, make=make)
        self.form, self.advice = Form(self.draft, NAMES), widgets.HTML()
        self.forms, self.fields = [self.form], self.form.fields
        self.draft.observe(lambda _: self._advise(), "config")
        self._advise()
        status, buttons, others, note, relief, curves, *rest = self.widget.children
        form = column(self.form.widget, self.advice)
        self.widget.children = (status, buttons, others, note, relief, row(form, column(curves, grow=2, least=420)), *rest)

    def _advise(self) -> None:
        put(self.advice, small(advice(self.config)))
