"""One thread, one command queue, one snapshot: a run that goes on while the notebook does something else."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sd3tune import live
from sd3tune.errors import ConfigError, Sd3TuneError, TrainingError
from sd3tune.failing import Failure
from sd3tune.inbox import Command, Inbox
from sd3tune.records import CacheRecord, ImageRecord, PreviewRecord, Record, SegmentRecord, StepRecord
from sd3tune.snapshot import LEGAL, Gauges, Snapshot, Until, after, begins_anew, in_words, kept, reached

if TYPE_CHECKING:
    from sd3tune.trainer import Trainer

    Made: TypeAlias = Trainer | Generator[Record, None, Any]

BEAT = 5.0
"""Seconds between two signs of life of a run that is paused."""


class Runner:
    """Runs one trainer in one worker thread. Anybody may read ``snapshot`` and ``send`` commands.

    ``make`` gives the trainer, at once or after records of what it takes (encoding). The trainer lives in the worker only: when the run
    ends, whatever the end, its memory is free again. ``left`` is a run that ended elsewhere, which such a runner only shows.
    """

    def __init__(self, make: Callable[[], Made] | Trainer, *, key: str = "", left: Snapshot | None = None) -> None:
        self._make: Callable[[], Made] | Trainer | None = make
        self.key = key
        self.viewer: object = None
        self._inbox = Inbox()
        self._changed = threading.Condition()
        self._snapshot = left or Snapshot()
        self._log: deque[str] = deque(maxlen=200)
        self._gauges = Gauges()
        self._failure: Failure | None = None

    @classmethod
    def attach(cls, key: str | Path, make: Callable[[], Made]) -> Runner:
        """The live runner of a wanted output folder, or a new one that has not started."""
        path = str(Path(key).absolute())
        return live.found(path) or cls(make, key=path)

    @property
    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        return self._snapshot

    def start(self, **settings: Any) -> None:
        """Start the worker, and tell it of settings before its first update."""
        with self._changed:  # without which the worker can say nothing, and so not begin
            self.send("start")
            if settings:
                self.send("set", **settings)

    def send(self, name: str, **values: Any) -> None:
        """Ask for something; returns at once. The worker obeys between two records, or the log says why not."""
        command = Command(name, values)
        with self._changed:
            self._inbox.sent += 1
            if self._snapshot.live:
                self._inbox.queue.put(command)
                return
            if name in LEGAL[self._snapshot.state]:
                self._start()
            else:
                self._refuse(command)
            self._answered()

    @property
    def answered(self) -> bool:
        """Whether everything that was asked so far is done or refused."""
        with self._changed:
            return self._inbox.sent == self._snapshot.answered

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
            raise self._failure.error()
        if not reached(self._snapshot, until):
            raise TrainingError(f"the run is {self._snapshot.state} at step {self._snapshot.step}, so this wait would never end")
        return self._snapshot

    # --- the worker --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if not live.enter(self):
            self._refuse(Command("start", {}), "another run into the same folder is going on")
            return
        self._put(state="preparing", message="loading the model")
        live.saved_on_sigterm()
        make, self._make = self._make, None
        live.thread(self, "sd3tune-trainer", self._main, make)

    def _main(self, make: Callable[[], Made] | Trainer) -> None:
        trainer: Trainer | None = None
        try:
            trainer = self._prepared(make() if callable(make) else make)
            end, text = "stopped" if trainer is None else self._work(trainer), ""
        # Nobody is above a thread: whatever is not caught here would leave a panel that says "training" for ever.
        except BaseException as error:  # noqa: BLE001
            self._failure = Failure.of(error, self._snapshot.folder)
            end, text = "failed", self._failure.text
            if trainer is not None:
                self._put(error=text)
                with suppress(Exception):  # the run has failed already
                    for record in trainer.parting():
                        self._take(record)
        trainer = None
        del make
        gc.collect()
        with self._changed:
            self._note(text or f"the run is {end}")
            self._put(state=end, error=text, message="", out_of_memory=self._failure is not None and self._failure.out_of_memory)
            while (command := self._next()) is not None:
                self._refuse(command)
                self._answered()

    def _prepared(self, made: Made) -> Trainer | None:
        """The trainer; nothing when it was stopped before there is one. Records on the way are what it takes."""
        if not isinstance(made, Generator):
            return made
        while True:
            try:
                self._take(next(made))
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if any(command.name == "stop" for command in self._inbox.look()):
                made.close()
                return None

    def _work(self, trainer: Trainer) -> str:
        self._put(
            own=trainer.own, step=trainer.steps_done, total_steps=trainer.total, folder=str(trainer.folder.path), config=trainer.config,
            began_with=trainer.config, began_at=trainer.steps_done, message="",
            noise_levels=trainer.noise_levels, total_memory_bytes=trainer.total_memory_bytes,
        )  # fmt: skip
        self._note(f"run folder {trainer.folder.path}")
        self._gauges.begin()
        live.saved_first()
        self._obey(trainer)
        if self._snapshot.state == "preparing":
            self._put(state="training")
        records = trainer.run()
        try:
            while self._snapshot.state != "stopping":
                record = next(records, None)
                if record is None:
                    return "finished" if trainer.done else "stopped"
                self._take(record)
                state = "paused" if trainer.held else "validating" if isinstance(record, (PreviewRecord, ImageRecord)) else "training"
                self._put(state=state, total_steps=trainer.total, config=trainer.config)
                self._obey(trainer)
        except BaseException as error:
            records.throw(error)  # one of a command: the run saves itself, as after one of its own
            raise
        return "finished" if trainer.done and not trainer.own else "stopped"

    def _obey(self, trainer: Trainer) -> None:
        """Do all that was asked since the last record; stay here while paused."""
        while self._snapshot.state != "stopping" and (command := self._next(trainer)) is not None:
            if self._snapshot.state == "validating" and command.name in ("pause", "stop"):
                self._inbox.later(command)
                self._put(message=f"{command.name} follows when the pictures are drawn")
                continue
            if command.name not in LEGAL[self._snapshot.state]:
                self._refuse(command)
            else:
                before = self._snapshot.state
                try:
                    self._apply(command, trainer)
                except Sd3TuneError as error:  # what a person asked cannot be done; the run itself is as it was
                    self._put(state=before, message="")
                    self._refuse(command, str(error))
            self._answered()

    def _next(self, trainer: Trainer | None = None) -> Command | None:
        """What was asked; while paused, wait for it, with a sign of life now and then."""
        while True:
            paused = self._snapshot.state == "paused" and trainer is not None
            command = self._inbox.next(late=self._snapshot.state != "validating", wait=BEAT if paused else None)
            if command is not None or not paused or trainer is None or not trainer.beat():
                return command

    def _apply(self, command: Command, trainer: Trainer) -> None:
        name, state = command.name, self._snapshot.state
        if name == "set":
            self._set(command, trainer)
        elif name == "save":
            self._save(trainer)
        elif name == "validate":
            self._validate(trainer)
        elif name == "look":
            self._look(trainer, **command.values)
        elif name == "rewind":
            self._rewind(trainer, **command.values)
        elif name == "stop":
            self._put(state="stopping", message="saving")
            if trainer.own or not command.values.get("ours"):  # `live` means those that end with this process
                self._save(trainer)
                trainer.note(name)
                for record in trainer.parting():
                    self._take(record)
        else:
            trainer.note(name)
            self._note(f"{name.replace('_', ' ')}, by you")
            self._put(state="paused" if name == "pause" else "training", message="", refused="")
        if name in ("validate", "save", "look"):
            self._put(state=state, message="", refused="")

    def _look(self, trainer: Trainer, work: Callable[[Trainer], Iterator[Record]]) -> None:
        """Lend the model to something that draws and changes nothing, such as a grid of settings."""
        self._put(state="validating", cells=())
        for record in work(trainer):
            self._take(record)
            self._obey(trainer)

    def _rewind(self, trainer: Trainer, step: int) -> None:
        self._take(trainer.rewind(step))
        steering = kept(self._snapshot.steering, step, trainer.config.leaves())
        self._put(step=trainer.steps_done, total_steps=trainer.total, config=trainer.config, refused="", steering=steering)
        self._note(f"back to step {trainer.steps_done}, by you; what was left is a checkpoint that stays")

    def _set(self, command: Command, trainer: Trainer) -> None:
        missing = list[str]()
        with suppress(ConfigError):  # what is wrong with it is said below
            missing = trainer.unread(command.values)
        for record in trainer.encode(missing) if missing else ():
            self._take(record)
        self._put(message="")
        record = trainer.set(**command.values)
        if record.refused:
            self._refuse(command, record.refused)
            return
        self._note(f"{in_words(command.values)}, by you")
        new = [(trainer.steps_done, dict(command.values))] if trainer.own else []  # what another process takes over is a record of it
        self._put(config=trainer.config, total_steps=trainer.total, refused="", steering=(*self._snapshot.steering, *new))

    def _save(self, trainer: Trainer) -> None:
        self._note(f"checkpoint {trainer.checkpoint().path}")
        if trainer.save(path := trainer.folder.path / f"lora-step-{trainer.steps_done:06d}.safetensors"):
            self._note(f"adapter saved to {path}")

    def _validate(self, trainer: Trainer) -> None:
        if not trainer.config.prompts:
            raise TrainingError("there is nothing to draw; set validation_prompt")
        self._put(state="validating")
        trainer.note("validate")
        for record in trainer.validation():
            self._take(record)
            self._obey(trainer)

    # --- what the snapshot is made of --------------------------------------------------------------------------------

    def _take(self, record: Record) -> None:
        """Put a record into the snapshot."""
        if isinstance(record, StepRecord):
            self._put(**self._gauges.take(record))
        if isinstance(record, SegmentRecord) and begins_anew(self._snapshot, record):
            self._gauges = Gauges(self._gauges.began)
        changes, text = after(self._snapshot, record)
        self._put(**changes)
        if text and (self._snapshot.state != "preparing" or isinstance(record, CacheRecord)):  # what lies before has its time in the log
            self._note(text)

    def _refuse(self, command: Command, why: str = "") -> None:
        text = f"{command.name.replace('_', ' ')}: " + (why or f"not possible while the run is {self._snapshot.state}")
        self._note(text)
        self._put(refused=text, refusals=self._snapshot.refusals + 1)

    def _answered(self) -> None:
        self._put(answered=self._snapshot.answered + 1)

    def _note(self, text: str) -> None:
        self._log.append(f"{time.strftime('%H:%M:%S')}  step {self._snapshot.step}: {text}")
        self._put(log=tuple(self._log))

    def _put(self, **changes: Any) -> None:
        with self._changed:
            self._snapshot = replace(self._snapshot, **changes)
            self._changed.notify_all()
