"""The runs that go on in this process: one for each output folder, and all of them saved when SIGTERM takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from sd3tune.control import TerminatedError
from sd3tune.errors import Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.runner import Runner

_LIVE: WeakValueDictionary[str, Runner] = WeakValueDictionary()
_REGISTER = threading.RLock()


def found(key: str) -> Runner | None:
    """The run that goes on for an output folder."""
    with _REGISTER:
        runner = _LIVE.get(key) if key else None
    return runner if runner is not None and runner.snapshot.live else None


def enter(runner: Runner) -> bool:
    """Whether nobody else runs for the folder of a run; then it is the one that does. One without a folder is known by itself."""
    with _REGISTER:
        free = found(runner.key) in (None, runner)
        if free:
            _LIVE[runner.key or str(id(runner))] = runner
    return free


def saved_on_sigterm() -> None:
    """Let SIGTERM save the runs of other threads before it ends the process, unless somebody else has taken it over.

    Nothing changes outside of the main thread, where Python allows no such change.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _save_and_end)


def _save_and_end(number: int, frame: FrameType | None) -> None:
    """What `control.interrupts_deferred` has put off comes without a frame: then this thread has a run of its own, which saves itself."""
    going_on = [runner for runner in list(_LIVE.values()) if runner.snapshot.live]
    for runner in going_on:
        runner.send("stop")
    for runner in going_on:
        with suppress(Sd3TuneError):  # it has ended by itself, and the run folder says how
            runner.wait()
    if frame is None:
        raise TerminatedError
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
