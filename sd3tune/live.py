"""The runs that go on in this process: one for each output folder, and all of them saved when the process ends or SIGTERM comes."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from sd3tune.control import TerminatedError
from sd3tune.errors import Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.runner import Runner

_LIVE: WeakValueDictionary[str, Runner] = WeakValueDictionary()
_THREADS: WeakSet[threading.Thread] = WeakSet()
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


def thread(name: str, target: Callable[..., None], *args: Any) -> None:
    """Start a thread of a run. Python waits for it when it ends, once all runs are saved."""
    with _REGISTER:
        _THREADS.add(started := threading.Thread(target=target, args=args, name=name, daemon=True))
    started.start()


def _save_all() -> None:
    going_on = [runner for runner in list(_LIVE.values()) if runner.snapshot.live]
    for runner in going_on:
        runner.send("stop", ours=True)
    for runner in going_on:
        with suppress(Sd3TuneError):  # it has ended by itself, and the run folder says how
            runner.wait()


@atexit.register
def _end() -> None:
    """A kernel that is restarted, or a script that is through, does not cut its runs off.

    The threads are daemons all the same: Python would wait for others before it comes here. One that is left in torch or in a chart while
    Python is taken down aborts the process.
    """
    _save_all()
    for one in list(_THREADS):
        one.join()


def _save_and_end(number: int, frame: FrameType | None) -> None:
    """What `control.interrupts_deferred` has put off comes without a frame: then this thread has a run of its own, which saves itself."""
    _save_all()
    if frame is None:
        raise TerminatedError
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
