"""The panel of one run: start, steer and watch it. A view: the run goes on without it, and a second panel attaches to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune.config.reading import is_live
from sd3tune.panels import codes, record, showing
from sd3tune.panels.base import Panel
from sd3tune.panels.draft import Draft
from sd3tune.panels.forms import Form
from sd3tune.panels.looks import button, column, put, row, sentence, tip, visible
from sd3tune.panels.making import make_trainer, prepared, resumed
from sd3tune.panels.pictures import PicturesView
from sd3tune.panels.redrawn import Redrawn
from sd3tune.panels.relief import Relief
from sd3tune.run_folder import RunFolder, step_of
from sd3tune.runner import Runner
from sd3tune.snapshot import LEGAL, TERMINAL, Snapshot, Until

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.runner import Made
    from sd3tune.trainer import Trainer

BUTTONS = {
    "start": ("Start", "Starting", "load the model and begin; a new run never overwrites another"),
    "pause": ("Pause", "Pausing", "stop after this update and keep everything in memory"),
    "go_on": ("Go on", "Going on", "go on from where the run is; one that was stopped or failed resumes its newest checkpoint"),
    "stop": ("Stop and save", "Stopping", "finish the update, write a checkpoint and the adapter, and free the memory"),
    "validate": ("Sample now", "Sampling", "draw the validation prompts with the adapter as it is"),
    "save": ("Checkpoint now", "Saving", "write a checkpoint and the adapter, and go on"),
    "rewind": ("Rewind", "Rewinding", "go back to the chosen checkpoint; the state as it is stays as a checkpoint of its own"),
}  # fmt: skip
"""Command -> what its button says, what it says until the run answers, and what it does."""

TICK = 0.4
"""Seconds between two looks at the run."""


class RunPanel(Panel):
    """Buttons, status, curves, pictures and log of one run, ``runner``. Settings come from the draft; live ones reach the run at once.

    Without a cache, *Start* encodes what is missing first, from ``data``. ``make`` makes the trainer. ``price`` is what an hour costs.
    """

    def __init__(
        self, config: RunConfig | Draft, cache: Cache | None = None, *, data: str | Path = "datasets.yaml",
        make: Callable[[RunConfig, Cache], Trainer] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._cache, self._make_trainer, self._data = cache, make, data
        self.runner = Runner.attach(self._key, self._maker(self.config))
        self.buttons = {name: button(said, lambda name=name: self.press(name), about) for name, (said, _, about) in BUTTONS.items()}  # type: ignore[misc]
        self.checkpoint: Any = tip(
            widgets.Dropdown(options=[("no checkpoint", -1)], description="Checkpoint", layout={"width": "240px", "max_width": "98%"}),
            "to rewind to",
        )
        self.price: Any = tip(
            widgets.FloatText(
                value=0, description="Price per hour", style={"description_width": "100px"}, layout={"width": "190px", "max_width": "98%"}
            ),
            "what an hour of this machine costs, to show what is still to pay",
        )
        self.status, self.words, self.changed, self.previews, self.log = (widgets.HTML() for _ in range(5))
        self.chart, self.others, self.levels = (widgets.HTML() for _ in range(3))
        self.pictures, self.relief = PicturesView(), Relief(self._relieved)
        curves = ((showing.main_curve, self.chart), (showing.other_curves, self.others), (showing.spoken, self.words))
        self._drawings = (
            Redrawn(lambda now: (now.count, now.evals, now.changes, now.verdict), *curves),
            Redrawn(lambda now: now.noise_levels, (showing.levels, self.levels)),
            Redrawn(lambda now: now.log, (showing.log, self.log)),
        )
        self.forms: list[Form] = []
        """Without whose agreement no run starts."""
        self.watchers: list[Callable[[Snapshot], None]] = []
        """What else is to be brought up to date with the run, such as a grid lab."""
        self._record: Any = None
        self._busy = threading.RLock()
        self._told, self._seen, self._sent = self.runner.snapshot.refusals, 0, dict[str, tuple[str, float]]()
        self._agreed: RunConfig | None = None
        self._listed: tuple[str, ...] = ()
        self.widget = self._layout()
        self.draft.observe(self._steer, "config")
        if self.runner.snapshot.live:
            self._sync(self.runner.snapshot)
            self.say("Attached to the run that is going on in this folder; the form shows its settings.")
            self._follow()
        self.refresh()

    # --- what a person does ------------------------------------------------------------------------------------------

    def press(self, name: str) -> None:
        """What a button does: ask the run, nothing else; a run does not start while a field is wrong."""
        if name == "start" and any(form.wrong for form in self.forms):
            self.say("Not started: a field above holds what cannot be taken over.", bad=True)
            return
        self.say("")
        self._sent[name] = (self.runner.snapshot.state, time.monotonic())
        if name == "start":
            self.start()
        elif name == "go_on" and self.runner.snapshot.state in TERMINAL:
            self.resume()
        elif name == "rewind":
            self.runner.send(name, step=self.checkpoint.value)
        else:
            self.runner.send(name)
        self.refresh()

    def start(self) -> None:
        """Start a run with the draft's settings, or attach to the one that is going on in the same folder."""
        self._begin(self._maker(self.config))

    def resume(self, **changes: Any) -> None:
        """Go on with a run that was stopped or failed, from its newest checkpoint; ``changes`` as in ``Trainer.resume``."""
        folder, cache = self.runner.snapshot.folder, self._cache
        self._begin(lambda: resumed(folder, cache, changes))

    def wait(self, timeout: float | None = None, until: Until = None) -> Snapshot:
        """Wait for the end, a state, a step, or a condition of the snapshot. Raises: what ended the run; TimeoutError."""
        try:
            return self.runner.wait(timeout, until)
        finally:
            self.refresh()

    def watch(self) -> Snapshot:
        """Show the run from this cell until it ends, for front ends that show nothing in the background, such as Colab's.

        The interrupt button ends the watching; the run goes on.
        """
        self.say("Watched from this cell; the interrupt button ends the watching, not the run.")
        try:
            while self.runner.snapshot.live:
                self.refresh()
                time.sleep(TICK)
        except KeyboardInterrupt:
            self.say("Not watched any more; the run goes on. Run watch() again, or press Stop and save.")
        self.refresh()
        return self.runner.snapshot

    def code(self) -> str:
        """The Python that does this run again, with every change made on the way."""
        now = self.runner.snapshot
        if now.began_at:
            return f"import sd3tune as st\n\nst.replay({now.folder!r})  # it was resumed: its history holds all that was changed\n"
        return codes.run_code((now.began_with if now.steering else None) or self.config, now.steering, self._data)

    def _begin(self, make: Callable[[], Made]) -> None:
        if not self.runner.snapshot.live:
            self.runner = Runner.attach(self._key, make)
            self._told = 0
        self.runner.start()
        self._show_record("")
        self._follow()

    def _relieved(self, settings: dict[str, Any], goes_on: bool) -> None:
        """Try again with changed settings after the memory was too small."""
        problems = self.draft.change(**settings)
        if problems:
            self.say("; ".join(problems.values()), bad=True)
        elif goes_on and self.runner.snapshot.folder and RunFolder(Path(self.runner.snapshot.folder)).checkpoints():
            self.resume(**settings)
        else:
            self.start()

    def _steer(self, change: Any) -> None:
        """A setting was changed in a form: a live run is told."""
        if change["new"] is self._agreed or not self.runner.snapshot.live:
            return
        self._agreed = change["new"]
        new = {name: value for name, (_, value) in codes.differences(change["new"], change["old"]).items() if is_live(name)}
        if new:
            self.say("")
            self.runner.send("set", **new)
            self.refresh()

    @property
    def _key(self) -> Path:
        return Path(self.config.run.output_dir).absolute()

    def _maker(self, config: RunConfig) -> Callable[[], Made]:
        build, cache, data = self._make_trainer, self._cache, self._data
        if cache is None and build is None:
            return lambda: prepared(config, data)
        return lambda: (build or make_trainer)(config, cache)  # type: ignore[arg-type]

    # --- what a person sees ------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Copy the snapshot into the widgets until the run ends or a newer panel shows it."""
        self.runner.viewer = self
        self._agreed, self.draft.live = self.config, True
        threading.Thread(target=self._pump, args=(self.runner,), name="sd3tune-panel", daemon=True).start()

    def _pump(self, runner: Runner) -> None:
        while runner is self.runner and runner.viewer is self and runner.snapshot.live:
            self.refresh()
            time.sleep(TICK)
        if runner is self.runner and runner.viewer is self:
            self.refresh()
            self._show_record(record.report(runner.snapshot, self.code(), self.diff()))
        elif runner.viewer is not self:
            self.say("A newer panel shows this run.")

    def refresh(self, clock: float | None = None) -> None:
        """Bring every widget up to date; only what changed is sent."""
        now, clock = self.runner.snapshot, time.monotonic() if clock is None else clock
        with self._busy:
            said = sentence(showing.status(now, self.price.value), bad=now.state == "failed", role="status")
            put(self.status, said + showing.bar(now))
            for drawing in self._drawings:
                drawing.look(now, clock)
            put(self.changed, showing.changes(now))
            put(self.previews, showing.previews(now))
            if now.folder and now.pictures != self._seen and now.state != "validating":
                self._seen = now.pictures
                self.pictures.look(now.folder)
            for look in self.watchers:
                look(now)
            self._buttons(now, clock)
            self.draft.live = now.live
            self.relief.offer(now)
            if now.refusals != self._told:
                self._told = now.refusals
                self.say(f"Not done: {now.refused}", bad=True)
            if now.live and self.runner.answered:
                self._sync(self.runner.snapshot)

    def _sync(self, now: Snapshot) -> None:
        """The form shows what the run uses, unless a change of the form is on its way to the run."""
        if now.config is not None and now.config != self.config and (self.config is self._agreed or self._agreed is None):
            self._agreed = now.config
            self.draft.config = now.config

    def _buttons(self, now: Snapshot, clock: float) -> None:
        if now.log != self._listed:  # whatever writes a checkpoint says so
            self._listed = now.log
            found = [step_of(path) for path in RunFolder(Path(now.folder)).checkpoints()] if now.folder else []
            options = [(f"step {step}", step) for step in found] or [("no checkpoint", -1)]
            if list(self.checkpoint.options) != options:
                self.checkpoint.options = options
        checkpoints = self.checkpoint.value >= 0
        for name, one in self.buttons.items():
            again = name == "start" or (name == "go_on" and now.state != "finished" and checkpoints)
            legal = name in LEGAL[now.state] or (now.state in TERMINAL and again)
            state, since = self._sent.get(name, ("", 0.0))
            pending = state == now.state and not self.runner.answered and clock - since < 30
            one.disabled = not legal or pending or (name == "rewind" and not checkpoints)
            said, waiting, _ = BUTTONS[name]
            one.description = f"{waiting} ..." if pending else said

    def _layout(self) -> Any:
        pressed = [one for name, one in self.buttons.items() if name != "rewind"]
        return widgets.VBox(
            [
                self.status, row(*pressed), row(self.checkpoint, self.buttons["rewind"], self.price), self.note, self.relief.widget,
                row(column(self.chart, self.words, self.changed, grow=2, least=420), column(self.others, self.levels, least=280)),
                self.previews, self.pictures.widget, self.log,
            ],
            layout=widgets.Layout(width="100%", max_width="1100px", overflow="visible"),
        )  # fmt: skip

    def _ipython_display_(self) -> None:
        from IPython import get_ipython
        from IPython.display import HTML, display

        display(self.widget)
        if get_ipython() is not None:
            self._record = display(HTML(""), display_id=True)

    def _show_record(self, html: str) -> None:
        """Leave a report in the notebook that needs no kernel; it takes the place of the curves and the log."""
        if self._record is None:
            return
        from IPython.display import HTML

        self._record.update(HTML(html))
        for one in (self.chart, self.others, self.words, self.changed, self.levels, self.log):
            visible(one, not html)
