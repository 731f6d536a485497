"""The panel of one run: start, steer and watch it. A view: the run goes on without it, and a second panel attaches to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from sd3tune import live
from sd3tune.config.reading import is_live
from sd3tune.errors import ConfigError
from sd3tune.following import attached
from sd3tune.panels import codes, record, showing, taking
from sd3tune.panels.base import Panel
from sd3tune.panels.draft import Draft
from sd3tune.panels.forms import Form
from sd3tune.panels.looks import column, put, row, sentence, visible
from sd3tune.panels.making import make_trainer, prepared, resumed
from sd3tune.panels.pictures import PicturesView
from sd3tune.panels.pressing import Controls
from sd3tune.panels.redrawn import Redrawn
from sd3tune.panels.relief import Relief
from sd3tune.panels.retold import Retold
from sd3tune.panels.spending import Spending
from sd3tune.run_folder import RunFolder
from sd3tune.runner import Runner
from sd3tune.snapshot import TERMINAL, Snapshot, Until

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.runner import Made
    from sd3tune.trainer import Trainer

TICK = 0.4
"""Seconds between two looks at the run."""


class RunPanel(Panel):
    """Buttons, status, curves, pictures and log of one run, ``runner``. Settings come from the draft; live ones reach the run at once.

    Without a cache, *Start* encodes what is missing first, from ``data``; a cache knows its data. ``make`` makes the trainer.
    """

    def __init__(
        self, config: RunConfig | Draft, cache: Cache | None = None, *, data: str | Path = "datasets.yaml",
        make: Callable[[RunConfig, Cache], Trainer] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._cache, self._make_trainer, self._data = cache, make, (cache.plan.catalog.source if cache is not None else "") or data
        self.runner = Runner.attach(self._key, self._maker(self.config))
        self._controls = Controls(self.press)
        self.buttons, self.checkpoint = self._controls.buttons, self._controls.checkpoint
        self.status, self.words, self.changed, self.previews, self.log = (widgets.HTML() for _ in range(5))
        self.chart, self.others, self.levels = (widgets.HTML() for _ in range(3))
        self.pictures, self.relief, self.retold, self.spending = PicturesView(), Relief(self._relieved), Retold(self), Spending()
        self.price = self.spending.price
        curves = ((showing.main_curve, self.chart), (showing.other_curves, self.others), (showing.spoken, self.words))
        self._drawings = (
            Redrawn(lambda now: (now.count, now.evals, now.changes, now.verdict), *curves),
            Redrawn(lambda now: now.noise_levels, (showing.levels, self.levels)),
            Redrawn(lambda now: now.log, (showing.log, self.log)),
        )
        self.forms: list[Form] = []
        """Without whose agreement no run starts."""
        self.watchers: list[Callable[[Snapshot], None]] = [self.retold.look]
        """What else is to be brought up to date with the run, such as a grid lab."""
        self._record: Any = None
        self._busy = threading.RLock()
        self._told, self._seen = self.runner.snapshot.refusals, (0, 0)
        self._agreed: RunConfig | None = None
        """The settings that form and run had in common last."""
        self.widget = self._layout()
        self.draft.observe(self._steer, "config")
        if self.runner.snapshot.live:
            self._sync(self.runner.snapshot)
            self.say("Attached to the run that is going on in this folder; the form shows its settings.")
            self._follow()
        else:
            self._take_up()
        self.refresh()

    # --- what a person does ------------------------------------------------------------------------------------------

    def press(self, name: str) -> None:
        """What a button does: ask the run, nothing else; a run does not start while something hinders it."""
        begins = name == "start" or (name == "go_on" and self.runner.snapshot.state in TERMINAL)
        self.say("")
        self._controls.asked(name, self.runner.snapshot.state)
        if name == "start":
            self.start()
        elif begins:
            self._go_on()
        elif name == "rewind":
            with self._busy:  # not while other checkpoints are offered
                step = self.checkpoint.value
            self.runner.send(name, step=step)
        else:
            self.runner.send(name)
        self.refresh()

    def start(self) -> None:
        """Start a run with the draft's settings, or attach to the one that is going on in the same folder; or say what hinders it."""
        self._begin(self._maker(self.config))

    @property
    def hindrance(self) -> str:
        """Why no run starts now: what a person typed and it would not have."""
        return "a field above holds what cannot be taken over" if any(form.wrong for form in self.forms) else ""

    def resume(self, **changes: Any) -> None:
        """Go on with a run that was stopped, failed or killed, from its newest checkpoint, with what was changed in the form since.

        ``changes`` as in ``Trainer.resume``. Raises: ConfigError when the form holds what needs a new run.
        """
        now, cache, agreed = self.runner.snapshot, self._cache, self._agreed or self.config
        taking.changed(self.config, agreed).require_possible()
        new = taking.changed(self.config, now.config or agreed, taking.undone(now))
        live = {name: value for name, value in new.live.items() if name not in changes}
        self._begin(lambda: resumed(now.folder, cache, new.how | changes), live)

    def _go_on(self, **changes: Any) -> None:
        try:
            self.resume(**changes)
        except ConfigError as error:
            self.say(f"Not gone on: {'; '.join(error.problems)}.", bad=True)

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
        if now.began_at or not now.own:
            return f"import sd3tune as st\n\nst.replay({now.folder!r})  # its history holds all that was changed\n"
        if now.steering and now.began_with:
            return codes.run_code(now.began_with, now.steering, codes.source_of(now.folder) or self._data)
        return codes.run_code(self.config, data=self._data)

    def _begin(self, make: Callable[[], Made], settings: dict[str, Any] | None = None) -> None:
        """Start, and tell the run of settings before its first update; or say what hinders it."""
        if hindrance := self.hindrance:
            self.say(f"Not started: {hindrance}.", bad=True)
            return
        if not self.runner.snapshot.live:
            self.runner, self._told = Runner.attach(self._key, make), 0
        self.runner.start(**(settings or {}))
        self._show_record("")
        self._follow()

    def _take_up(self) -> None:
        """What the newest run of this name is: shown, and gone on with if a person wants, when nobody runs it."""
        found = taking.newest_run(self._key)
        if found is not None and taking.elsewhere(found):
            self._begin(lambda: attached(found.folder))
        elif found is not None and taking.unfinished(found):
            self.runner = Runner(self._maker(self.config), key=str(self._key), left=taking.as_left(found))
            self._agreed = self.config
        self.say(taking.in_words(found))

    def _relieved(self, settings: dict[str, Any], goes_on: bool) -> None:
        """Try again with changed settings after the memory was too small."""
        problems = self.draft.change(**settings)
        if problems:
            self.say("; ".join(problems.values()), bad=True)
        elif goes_on and self.runner.snapshot.folder and RunFolder(Path(self.runner.snapshot.folder)).checkpoints():
            self._go_on(**settings)
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
        self.spending.take_over(self.runner.viewer)
        self.runner.viewer, self._agreed, self.draft.live = self, self.config, True
        live.thread(self.runner, "sd3tune-panel", self._pump, self.runner)

    def _pump(self, runner: Runner) -> None:
        while runner is self.runner and runner.viewer is self and runner.snapshot.live and (runner.snapshot.own or not live.ending()):
            self.refresh()
            time.sleep(TICK)
        if runner is self.runner and runner.viewer is self and not runner.snapshot.live:
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
            drawn = (now.pictures, now.went_back)
            if now.folder and drawn != self._seen and now.state != "validating":
                self._seen = drawn
                self.pictures.look(now.folder)
            for look in self.watchers:
                look(now)
            self._controls.look(now, self.runner.answered, clock)
            self.draft.live, self.draft.folder = now.live, now.folder
            self.relief.offer(now)
            if now.refusals != self._told:
                self._told = now.refusals
                self.say(f"Not done: {now.refused}", bad=True)
            said, over = self.spending.look(now) if self.runner.viewer is self else ("", False)
            if over:
                self.runner.send("stop")
            if said:
                self.say(said, bad=True)
            if now.live and self.runner.answered:
                self._sync(self.runner.snapshot)

    def _sync(self, now: Snapshot) -> None:
        """The form shows what the run uses, unless a change of the form is on its way to the run."""
        if now.config is not None and now.config != self.config and (self.config is self._agreed or self._agreed is None):
            self._agreed = now.config
            self.draft.config = now.config

    def _layout(self) -> Any:
        pressed = [one for name, one in self.buttons.items() if name != "rewind"]
        return widgets.VBox(
            [
                self.status, row(*pressed), row(self.checkpoint, self.buttons["rewind"], self.price, self.spending.most),
                self.note, self.relief.widget,
                row(column(self.chart, self.words, self.changed, grow=2, least=420), column(self.others, self.levels, least=280)),
                self.previews, self.pictures.widget, self.log, self.retold.widget,
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
