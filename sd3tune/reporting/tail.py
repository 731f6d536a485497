"""What follows a run at its own pace: a bounded queue, one thread, and trouble that is told and never raised."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from pathlib import PurePath
from typing import NamedTuple, Protocol

from sd3tune.errors import Sd3TuneError
from sd3tune.records import ImageRecord, PreviewRecord, Record, StepRecord
from sd3tune.reporting.cleaning import without_secrets, without_tokens

IDLE = 5.0
"""Seconds without work after which a thread ends; the next record starts another."""

LAST = 3
"""Previews and numbers that are still sent when the run has ended, where newer ones pass older ones."""

AT_EXIT = 10.0
"""Seconds that the end of a process waits for what a run that did not come to its end has left."""

GRACE = 1.0
"""Seconds beyond the limit after which a sender that does not answer is left alone."""

PREVIEW, NUMBERS, PICTURE, OTHER = range(4)
"""What is dropped first when a queue is full, and what last."""


class RefusedError(Exception):
    """The other side says no, and would say so again: there is no use in another try."""


class Sender(Protocol):
    """What a tail feeds; called from its thread alone, and may be slow and raise whatever it likes."""

    name: str

    def wants(self, record: Record) -> bool:
        """Whether a record is for this one; asked by the run itself, so it returns at once."""

    def send(self, record: Record) -> None:
        """Bring a record to where it belongs."""

    def finish(self) -> str:
        """Do what remains when there are no more records; what a person should know of it."""


class Patience(NamedTuple):
    """How often and how long something is tried."""

    pauses: tuple[float, ...] = ()
    """Seconds between two tries of what matters (pictures and all that is not a number); nothing else is tried twice."""
    failures: int | None = None
    """After so many losses in a row nothing more is tried."""
    limit: float = 20.0
    """Seconds that the end of a run waits for what is left."""
    passing: int | None = None
    """So many previews and numbers may wait, and at the end but a few of them; no limit when left out."""


def rank_of(record: Record) -> int:
    """How much a record matters in a full queue."""
    if isinstance(record, PreviewRecord):
        return PREVIEW
    return NUMBERS if isinstance(record, StepRecord) else PICTURE if isinstance(record, ImageRecord) else OTHER


class Tail:
    """Feeds one sender. ``take`` returns at once; what is lost is in ``news``.

    A full queue drops the oldest previews, then the oldest numbers, then the oldest pictures, and never the newest picture.
    Previews and numbers that are passed by newer ones (``passing``) are no loss.
    """

    def __init__(self, sender: Sender, patience: Patience, *, most: int = 500) -> None:
        self._sender, self._patience, self._most = sender, patience, most
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._news: list[str] = []
        self._sending: Record | None = None
        self._lost = self._in_a_row = 0
        self._used = self._finished = False
        self._turn = 0
        atexit.register(_close, weakref.ref(self))

    def take(self, record: Record) -> None:
        """Put a record into the queue."""
        with self._changed:
            if self._deadline is not None or not self._sender.wants(record) or self._given_up:
                return
            self._used = True
            self._waiting.append(record)
            self._make_room()
            self._wake()

    def news(self) -> list[str]:
        """What was lost since the last call, in sentences."""
        with self._changed:
            said, self._news = self._news, []
        return said

    def stop(self) -> None:
        """Take no more records; what is left has the patience's limit from now on."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._patience.limit
                while self._patience.passing is not None and len(passing := self._passing()) > LAST:
                    self._drop(min(passing, key=rank_of))
                self._wake()

    def go_on(self) -> None:
        """Take records again, if it was stopped: the run goes on, and will stop once more."""
        with self._changed:
            if self._deadline is not None:
                self._deadline, self._finished, self._lost = None, False, 0
                self._used = bool(self._waiting) or self._sending is not None
                self._turn += 1

    @property
    def ended(self) -> bool:
        """Whether everything is done; after the limit, what is not done is given up and told."""
        with self._changed:
            if not self._finished and self._deadline is not None and time.monotonic() > self._deadline + GRACE:
                self._give_up()
            return self._finished

    def close(self, limit: float | None = None) -> None:
        """Stop, and wait for the end, for so many seconds at most (the patience's limit)."""
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: self._finished, (self._patience.limit if limit is None else limit) + GRACE)

    def _give_up(self) -> None:
        """Tell what is not done, and be done."""
        for record in (*([self._sending] if self._sending else ()), *self._waiting):
            self._lose(record, "there was no time left")
        self._waiting.clear()
        self._sending, self._finished = None, True

    # --- the queue -------------------------------------------------------------------------------------------------------

    @property
    def _given_up(self) -> bool:
        return self._patience.failures is not None and self._in_a_row >= self._patience.failures

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"sd3tune-{self._sender.name}", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # Python is being taken down, and starts no thread any more
                self._thread, self._deadline = None, time.monotonic()
                self._give_up()
        self._changed.notify_all()

    def _make_room(self) -> None:
        """Drop one record if there are too many."""
        limit = self._patience.passing
        if limit is not None and len(passing := self._passing()) > limit:
            self._drop(min(passing, key=rank_of))  # the first of the least is the oldest
        elif len(self._waiting) > self._most:
            newest = next((r for r in reversed(self._waiting) if isinstance(r, ImageRecord)), None)
            victim = min((r for r in self._waiting if r is not newest), key=rank_of)
            self._drop(victim)
            self._lose(victim, "too many were waiting")

    def _passing(self) -> list[Record]:
        return [r for r in self._waiting if rank_of(r) < PICTURE]

    def _drop(self, victim: Record) -> None:
        self._waiting = deque(r for r in self._waiting if r is not victim)

    def _lose(self, record: Record, why: str) -> None:
        """Tell each picture; of all else the first, the tenth, the hundredth."""
        name = self._sender.name
        if isinstance(record, ImageRecord):
            picture = "/".join(PurePath(record.path).parts[-2:])
            self._news.append(f"{name}: the picture {picture} was not delivered ({why}); it is in the run folder")
            return
        self._lost += 1
        if str(self._lost).strip("0") == "1":
            more = "" if self._lost == 1 else f"; {self._lost} records so far"
            self._news.append(f"{name}: a {record.type} record was not delivered ({why}){more}; the history has it")

    # --- the thread ------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._deadline is not None, IDLE)
                if self._finished or (not self._waiting and self._deadline is None):
                    self._thread = None
                    return
                record = self._sending = self._waiting.popleft() if self._waiting else None
                turn = self._turn
            if record is None:
                self._end(turn)
            else:
                self._bring(record)

    def _bring(self, record: Record) -> None:
        why = "it was given up before" if self._given_up else self._delivered(record)
        with self._changed:
            if self._sending is not record:
                return  # it took so long that it was told as lost
            self._sending = None
            self._in_a_row = self._in_a_row + 1 if why else 0
            if why:
                self._lose(record, why)
            if why and self._in_a_row == self._patience.failures:
                self._news.append(f"{self._sender.name}: it failed {self._in_a_row} times in a row; nothing more is sent there")

    def _delivered(self, record: Record) -> str:
        """Try to send a record; why it is lost, if it is."""
        pauses = iter(self._patience.pauses if rank_of(record) >= PICTURE else ())
        while not self._overdue:
            try:
                self._sender.send(record)
                return ""
            # Whatever another place answers is news, and never the end of the training.
            except Exception as error:  # noqa: BLE001
                pause = None if isinstance(error, RefusedError) else next(pauses, None)
                if pause is None or not self._paused(pause):
                    return explained(error)
        return "there was no time left"

    @property
    def _overdue(self) -> bool:
        deadline = self._deadline  # the run may go on, and take it away
        return deadline is not None and time.monotonic() >= deadline

    def _paused(self, seconds: float) -> bool:
        """Wait between two tries, shorter at the end of a run; whether there is time for another."""
        until = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._deadline is not None, seconds)
            if self._deadline is not None and (left := min(until - time.monotonic(), 0.5)) > 0:
                self._changed.wait(left)
        return not self._overdue

    def _end(self, turn: int) -> None:
        said = ""
        if not self._given_up:
            try:
                said = self._sender.finish()
            except Exception as error:  # noqa: BLE001 (as above)
                said = explained(error)
        with self._changed:
            if said:
                self._news.append(f"{self._sender.name}: {said}")
            if turn != self._turn:
                return  # the run goes on, and what it tells from now on has an end of its own
            if self._lost > 1:
                self._news.append(f"{self._sender.name}: {self._lost} records were not delivered in all; the history has them")
            self._finished = True
            self._changed.notify_all()


def explained(error: BaseException) -> str:
    """An error in one line, without what looks like an address or a token."""
    text = " ".join(str(error).split())
    if isinstance(error, (Sd3TuneError, RefusedError)):
        return without_tokens(text)
    return without_secrets(f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__)


def _close(reference: weakref.ref[Tail]) -> None:
    """At the end of the process: what is still waiting has one more chance."""
    tail = reference()
    if tail is not None and tail._used and not tail._finished:
        tail.close(limit=AT_EXIT)
