"""One thread, one command queue, one snapshot: a run that goes on while the notebook does something else."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sd3tune.errors import Sd3TuneError, TrainingError
from sd3tune.records import ImageRecord, PreviewRecord, StepRecord
from sd3tune.snapshot import LEGAL, Command, Snapshot, Until, after, reached, small_png

if TYPE_CHECKING:
    from sd3tune.records import Record
    from sd3tune.trainer import Trainer

_LIVE: WeakValueDictionary[str, Runner] = WeakValueDictionary()
_REGISTER = threading.Lock()

BEAT = 5.0
"""Seconds between two signs of life of a run that is paused."""


class Runner:
    """Runs one trainer in one worker thread. Anybody may read ``snapshot`` and ``send`` commands.

    The trainer lives in the worker only: when the run ends, whatever the end, its memory is free again.
    """

    def __init__(self, make: Callable[[], Trainer] | Trainer, *, key: str = "") -> None:
        self._make: Callable[[], Trainer] | Trainer | None = make
        self.key = key
        self.viewer: object = None
        self._queue: SimpleQueue[Command] = SimpleQueue()
        self._late: deque[Command] = deque()
        self._changed = threading.Condition()
        self._snapshot = Snapshot()
        self._log: deque[str] = deque(maxlen=200)
        self._points: list[tuple[int, float]] = []
        self._failure: tuple[type[Sd3TuneError], str, dict[str, Any]] | None = None

    @classmethod
    def attach(cls, key: str | Path, make: Callable[[], Trainer]) -> Runner:
        """The live runner of a wanted output folder, or a new one that has not started."""
        path = str(Path(key).absolute())
        with _REGISTER:
            found = _LIVE.get(path)
        return found if found is not None and found.snapshot.live else cls(make, key=path)

    @property
    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        return self._snapshot

    def start(self) -> None:
        """Start the worker: the same as ``send("start")``."""
        self.send("start")

    def send(self, name: str, **values: Any) -> None:
        """Ask for something; returns at once. The worker obeys between two records, or the log says why not."""
        command = Command(name, values)
        with self._changed:
            if self._snapshot.live:
                self._queue.put(command)
            elif name in LEGAL[self._snapshot.state]:
                self._start()
            else:
                self._refuse(command)

    def wait(self, timeout: float | None = None, until: Until = None) -> Snapshot:
        """Wait for the end, for a state, for a step, or until a function of the snapshot is true.

        Raises: the error that ended the run (TrainingError for one that is not ours); TimeoutError;
        TrainingError when the run ended, or has not started, and so will never get there.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: reached(self._snapshot, until) or not self._snapshot.live, timeout):
                now = self._snapshot
                raise TimeoutError(f"after {timeout:g} s the run is {now.state} at step {now.step} of {now.total_steps}")
        if self._failure is not None:
            kind, text, details = self._failure
            error = kind.__new__(kind, text)
            error.__dict__.update(details)
            raise error
        if not reached(self._snapshot, until):
            raise TrainingError(f"the run is {self._snapshot.state} at step {self._snapshot.step}, so this wait would never end")
        return self._snapshot

    # --- the worker --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with _REGISTER:
            other = _LIVE.get(self.key) if self.key else None
            taken = other is not None and other is not self and other.snapshot.live
            if taken:
                self._refuse(Command("start", {}), "another run into the same folder is going on")
                return
            self._put(state="preparing", message="loading the model")
            if self.key:
                _LIVE[self.key] = self
        make, self._make = self._make, None
        threading.Thread(target=self._main, args=(make,), name="sd3tune-trainer", daemon=True).start()

    def _main(self, make: Callable[[], Trainer] | Trainer) -> None:
        try:
            end, text = self._work(make() if callable(make) else make), ""
        # Nobody is above a thread: whatever is not caught here would leave a panel that says "training" for ever.
        except BaseException as error:  # noqa: BLE001
            end, text = "failed", self._explain(error)
            traceback.clear_frames(error.__traceback__)
        del make
        gc.collect()
        with self._changed:
            self._note(text or f"the run is {end}")
            self._put(state=end, error=text, message="")
            while (command := self._next()) is not None:
                self._refuse(command)

    def _explain(self, error: BaseException) -> str:
        """The failure in words; the traceback goes to the run's log."""
        ours = isinstance(error, Sd3TuneError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        self._failure = (type(error), text, dict(vars(error))) if isinstance(error, Sd3TuneError) else (TrainingError, text, {})
        if self._snapshot.folder:
            with suppress(OSError), (Path(self._snapshot.folder) / "train.log").open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)))
        return text

    def _work(self, trainer: Trainer) -> str:
        self._put(
            step=trainer.steps_done, total_steps=trainer.total, folder=str(trainer.folder.path), config=trainer.config,
            message="", noise_levels=trainer.noise_levels,
        )  # fmt: skip
        self._note(f"run folder {trainer.folder.path}")
        self._obey(trainer)
        if self._snapshot.state == "preparing":
            self._put(state="training")
        records = trainer.run()
        while self._snapshot.state != "stopping":
            record = next(records, None)
            if record is None:
                return "finished"
            self._take(record, trainer)
            self._put(state="validating" if isinstance(record, (PreviewRecord, ImageRecord)) else "training")
            self._obey(trainer)
        return "stopped"

    def _obey(self, trainer: Trainer) -> None:
        """Do all that was asked since the last record; stay here while paused."""
        while self._snapshot.state != "stopping" and (command := self._next(trainer)) is not None:
            if command.name not in LEGAL[self._snapshot.state]:
                self._refuse(command)
            elif self._snapshot.state == "validating" and command.name in ("pause", "stop"):
                self._late.append(command)
                self._put(message=f"{command.name} follows when the pictures are drawn")
            else:
                before = self._snapshot.state
                try:
                    self._apply(command, trainer)
                except Sd3TuneError as error:  # what a person asked cannot be done; the run itself is as it was
                    self._put(state=before, message="")
                    self._refuse(command, str(error))

    def _next(self, trainer: Trainer | None = None) -> Command | None:
        """What was asked; while paused, wait for it."""
        if self._late and self._snapshot.state != "validating":
            return self._late.popleft()
        while True:
            with suppress(Empty):
                return self._queue.get(block=self._snapshot.state == "paused", timeout=BEAT)
            if trainer is None or self._snapshot.state != "paused":
                return None
            trainer.beat()

    def _apply(self, command: Command, trainer: Trainer) -> None:
        name, state = command.name, self._snapshot.state
        if name == "set":
            self._set(command, trainer)
        elif name == "save":
            self._save(trainer)
        elif name == "validate":
            self._validate(trainer)
        elif name == "stop":
            self._put(state="stopping", message="saving")
            self._save(trainer)
            trainer.note(name)
        else:
            trainer.note(name)
            self._note(f"{name.replace('_', ' ')}, by you")
            self._put(state="paused" if name == "pause" else "training", message="", refused="")
        if name in ("validate", "save"):
            self._put(state=state, message="", refused="")

    def _set(self, command: Command, trainer: Trainer) -> None:
        record = trainer.set(**command.values)
        if record.refused:
            self._refuse(command, record.refused)
            return
        text = ", ".join(f"{name} = {value}" for name, value in command.values.items())
        self._note(f"{text}, by you")
        self._put(config=trainer.config, refused="", changes=(*self._snapshot.changes, (trainer.steps_done, text)))

    def _save(self, trainer: Trainer) -> None:
        written = trainer.checkpoint()
        path = trainer.folder.path / f"lora-step-{trainer.steps_done:06d}.safetensors"
        tensors = trainer.save(path)
        self._note(f"checkpoint {written.path}")
        if tensors:
            self._note(f"adapter saved to {path}")

    def _validate(self, trainer: Trainer) -> None:
        if not trainer.config.prompts:
            raise TrainingError("there is nothing to draw; set validation_prompt")
        self._put(state="validating")
        trainer.note("validate")
        for record in trainer.validation():
            self._take(record, trainer)
            self._obey(trainer)

    # --- what the snapshot is made of --------------------------------------------------------------------------------

    def _take(self, record: Record, trainer: Trainer) -> None:
        """Put a record into the snapshot."""
        if isinstance(record, StepRecord):
            if record.loss is not None:
                self._points.append((record.step, record.loss))
            self._put(points=self._points, count=len(self._points))
        elif isinstance(record, ImageRecord):
            self._put(grid=small_png(trainer.grid().image()), grid_step=record.step)
        changes, text = after(self._snapshot, record)
        self._put(**changes)
        if text:
            self._note(text)

    def _refuse(self, command: Command, why: str = "") -> None:
        why = why or f"not possible while the run is {self._snapshot.state}"
        text = f"{command.name.replace('_', ' ')}: {why}"
        self._note(text)
        self._put(refused=text, refusals=self._snapshot.refusals + 1)

    def _note(self, text: str) -> None:
        self._log.append(f"{time.strftime('%H:%M:%S')}  step {self._snapshot.step}: {text}")
        self._put(log=tuple(self._log))

    def _put(self, **changes: Any) -> None:
        with self._changed:
            self._snapshot = replace(self._snapshot, **changes)
            self._changed.notify_all()
