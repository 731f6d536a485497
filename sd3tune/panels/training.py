"""The training panel: a form, buttons, a loss curve, the newest pictures and a log."""

from __future__ import annotations

import threading
import time
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune import charts
from sd3tune.config.advice import advice
from sd3tune.config.reading import is_live
from sd3tune.errors import ConfigError
from sd3tune.panels import fields
from sd3tune.runner import Runner
from sd3tune.shown import duration
from sd3tune.snapshot import LEGAL, TERMINAL, Snapshot, Until

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.trainer import Trainer

BUTTONS = {
    "start": "Start", "pause": "Pause", "go_on": "Go on", "stop": "Stop and save", "validate": "Validate now", "save": "Save now",
}  # fmt: skip
"""Command -> what its button says."""

TICK, SLOW_TICK = 0.25, 1.0
"""Seconds between two looks at the run; the second when the curve is long."""


class TrainingPanel:
    """Start, watch and steer one run. A view: the run goes on without it, and a second panel attaches to it.

    ``config`` is the form as a configuration; ``runner`` the run. Fields that may change while training reach it at once.
    """

    def __init__(self, config: RunConfig, cache: Cache, *, make: Callable[[RunConfig, Cache], Trainer] | None = None) -> None:
        self._cache, self._make_trainer = cache, make or make_trainer
        self._key = Path(config.run.output_dir).absolute()
        self.runner = Runner.attach(self._key, self._maker(config))
        attached = self.runner.snapshot.live
        self.config: RunConfig = (self.runner.snapshot.config if attached else None) or config
        leaves = self.config.leaves()
        self.fields: dict[str, Any] = {name: fields.field(name, leaves[name]) for name in fields.LABELS}
        self.buttons: dict[str, Any] = {name: widgets.Button(description=text) for name, text in BUTTONS.items()}
        self.status, self.note, self.advice, self.chart, self.caption, self.log = (widgets.HTML() for _ in range(6))
        look = widgets.Layout(max_width="100%", height="auto", align_self="flex-start", display="none")
        self.picture = widgets.Image(format="png", layout=look)
        self.previews = widgets.HTML()
        self.widget = self._layout()
        self._record: Any = None
        self._drawing, self._told = threading.Lock(), self.runner.snapshot.refusals
        for name in BUTTONS:
            self.buttons[name].on_click(lambda _, name=name: self.press(name))
        for one in self.fields.values():
            one.observe(lambda _: self.apply(), "value")
        if attached:
            self._say("Attached to the run that is going on in this folder; the form shows its settings.")
            self._follow()
        self.refresh()

    # --- what a person does ------------------------------------------------------------------------------------------

    def press(self, name: str) -> None:
        """What a button does: ask the run, nothing else."""
        self._say("")
        if name == "start":
            self.start()
        else:
            self.runner.send(name)
        self.refresh()

    def start(self) -> None:
        """Start a run with the form's settings, or attach to the one that is going on in the same folder."""
        if not self.apply():
            return
        if not self.runner.snapshot.live:
            self.runner, self._told = Runner.attach(self._key, self._maker(self.config)), 0
        self.runner.start()
        self._show_record("")
        self._follow()

    def wait(self, timeout: float | None = None, until: Until = None) -> Snapshot:
        """Wait for the end, a state, a step, or a condition of the snapshot. Raises: what ended the run; TimeoutError."""
        try:
            return self.runner.wait(timeout, until)
        finally:
            self.refresh()

    def apply(self) -> bool:
        """Take the form over into ``config``, and into the run if it is live; false, with a sentence, when it cannot be."""
        values, problems = dict[str, Any](), list[str]()
        for name, one in self.fields.items():
            try:
                values[name] = fields.read(name, one.value)
            except ConfigError as error:
                problems += error.problems
        changed = self.config
        try:
            changed = self.config.replace(**values)
        except ConfigError as error:
            problems += error.problems
        if problems:
            self._say("Not applied: " + "; ".join(problems), bad=True)
            return False
        before, self.config = self.config.leaves(), changed
        new = {name: value for name, value in values.items() if value != before[name]}
        self._say("")
        if new and self.runner.snapshot.live:
            self.runner.send("set", **new)
        self.refresh()
        return True

    def _maker(self, config: RunConfig) -> Callable[[], Trainer]:
        build, cache = self._make_trainer, self._cache
        return lambda: build(config, cache)

    # --- what a person sees ------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Copy the snapshot into the widgets until the run ends or a newer panel shows it."""
        self.runner.viewer = self
        threading.Thread(target=self._pump, args=(self.runner,), name="sd3tune-panel", daemon=True).start()

    def _pump(self, runner: Runner) -> None:
        while runner is self.runner and runner.viewer is self and runner.snapshot.state not in TERMINAL:
            self.refresh()
            time.sleep(SLOW_TICK if runner.snapshot.count > charts.MOST else TICK)
        if runner is self.runner and runner.viewer is self:
            self.refresh()
            self._show_record(report(runner.snapshot))
        elif runner.viewer is not self:
            self._say("A newer panel shows this run.")

    def refresh(self) -> None:
        """Bring every widget up to date; only what changed is sent."""
        now = self.runner.snapshot
        with self._drawing:
            self.advice.value = advice_text(self.config)
            self.status.value = f'<div role="status" style="{_LOOK[now.state == "failed"]}">{escape(sentence(now))}</div>'
            self.chart.value = curve(now)
            self.log.value = log_text(now)
            self.caption.value = pictures_caption(now)
            self.previews.value = previews_text(now)
            if self.picture.value != now.grid:
                self.picture.value = now.grid
                self.picture.layout.display = "block" if now.grid else "none"
            for name, button in self.buttons.items():
                button.disabled = not (name in LEGAL[now.state] or (name == "start" and now.state in TERMINAL))
            for name, one in self.fields.items():
                one.disabled = now.live and not is_live(name)
            if now.refusals != self._told:
                self._told, self.config = now.refusals, now.config or self.config
                self._say(f"Not done: {now.refused}", bad=True)

    def _say(self, text: str, *, bad: bool = False) -> None:
        self.note.value = f'<div role="alert" style="{_LOOK[bad]}">{escape(text)}</div>' if text else ""

    def _layout(self) -> Any:
        row = {"flex_flow": "row wrap", "width": "100%", "overflow": "visible"}
        for button in self.buttons.values():
            button.layout = widgets.Layout(width="auto", min_width="90px")
        form = widgets.VBox(
            [*self.fields.values(), self.advice], layout=widgets.Layout(flex="1 1 290px", min_width="270px", overflow="visible")
        )
        right = widgets.VBox([self.chart], layout=widgets.Layout(flex="2 1 420px", min_width="280px", overflow="visible"))
        return widgets.VBox(
            [
                self.status,
                widgets.HBox([*self.buttons.values()], layout=widgets.Layout(**row)),
                self.note,
                widgets.HBox([form, right], layout=widgets.Layout(**row)),
                self.caption,
                self.previews,
                self.picture,
                self.log,
            ],
            layout=widgets.Layout(width="100%", max_width="1100px", overflow="visible"),
        )

    def _ipython_display_(self) -> None:
        from IPython import get_ipython
        from IPython.display import HTML, display

        display(self.widget)
        if get_ipython() is not None:
            self._record = display(HTML(""), display_id=True)

    def _show_record(self, html: str) -> None:
        """Leave a report in the notebook that needs no kernel; it takes the place of the curve and the pictures."""
        if self._record is None:
            return
        from IPython.display import HTML

        self._record.update(HTML(html))
        for one in (self.chart, self.caption, self.log):
            one.layout.display = "none" if html else ""
        self.picture.layout.display = "none" if html or not self.picture.value else "block"


def make_trainer(config: RunConfig, cache: Cache) -> Trainer:
    """The trainer of a panel's run; called in the worker."""
    from sd3tune.trainer import Trainer

    return Trainer(config, cache)


_LOOK = {False: "line-height:1.5;font-size:14px", True: "line-height:1.5;font-size:14px;font-weight:600;color:#d32f2f;white-space:pre-wrap"}


def sentence(now: Snapshot) -> str:
    """The state of a run in one line."""
    parts = [now.state]
    if now.total_steps:
        parts.append(f"step {now.step}/{now.total_steps}")
    if now.count:
        parts.append(f"loss {now.points[now.count - 1][1]:.3g}")
    if now.learning_rate is not None:
        parts.append(f"lr {now.learning_rate:.3g}")
    if now.live and now.seconds_left is not None:
        parts.append(f"{duration(now.seconds_left)} left")
    return " · ".join([*parts, *filter(None, [now.error or now.message])])


def advice_text(config: RunConfig) -> str:
    """What should be thought of, under the form."""
    rows = "<br>".join(escape(str(one)) for one in advice(config))
    return f'<div style="line-height:1.35;font-size:12px">{rows}</div>' if rows else ""


def curve(now: Snapshot) -> str:
    """The loss so far, over the newest verdict and the noise levels that are drawn."""
    said = f'<div role="status" style="{_LOOK[False]}">{escape(now.verdict)}</div>' if now.verdict else ""
    drawn = charts.levels(now.noise_levels) if now.noise_levels else ""
    return charts.line(now.losses, now.evals, total=now.total_steps, marks=[step for step, _ in now.changes]) + said + drawn


def previews_text(now: Snapshot) -> str:
    """The pictures that are being drawn, small."""
    drawn = (b64encode(preview).decode() for preview in now.previews[:8])
    return "".join(f'<img style="max-width:24%" alt="a picture that is being drawn" src="data:image/jpeg;base64,{data}">' for data in drawn)


def pictures_caption(now: Snapshot) -> str:
    """What the grid shows."""
    return f"<b>Validation pictures at step {now.grid_step}</b>" if now.grid else ""


def log_text(now: Snapshot) -> str:
    """The log, newest line first."""
    style = "max-height:11em;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0;line-height:1.35;font-size:12px"
    return f'<pre tabindex="0" aria-label="log" style="{style}">{escape(chr(10).join(reversed(now.log)))}</pre>' if now.log else ""


def report(now: Snapshot) -> str:
    """A run that ended, as HTML that needs no kernel."""
    grid = f'<img style="max-width:100%" alt="pictures" src="data:image/png;base64,{b64encode(now.grid).decode()}">'
    status = f'<p style="{_LOOK[now.state == "failed"]}">{escape(sentence(now))}</p>'
    pictures = f"{pictures_caption(now)}<div>{grid}</div>" if now.grid else ""
    return f'<div style="max-width:1100px">{status}<div style="max-width:760px">{curve(now)}</div>{pictures}{log_text(now)}</div>'
