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
from weakref import WeakKeyDictionary, WeakValueDictionary

from sd3tune.control import TerminatedError
from sd3tune.errors import Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.runner import Runner

_LIVE: WeakValueDictionary[str, Runner] = WeakValueDictionary()
_THREADS: WeakKeyDictionary[threading.Thread, Runner] = WeakKeyDictionary()
_REGISTER, _ENDING = threading.RLock(), threading.Event()

LEAVE = 1.0
"""Seconds that each thread of another process's run has to end when Python does; what it is at then may be cut off."""


def ending() -> bool:
    """Whether Python is about to end."""
    return _ENDING.is_set()


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


def thread(runner: Runner, name: str, target: Callable[..., None], *args: Any) -> None:
    """Start a thread of a run. When Python ends, it waits for those of its own runs, once these are saved."""
    started = threading.Thread(target=target, args=args, name=name, daemon=True)
    with _REGISTER:
        _THREADS[started] = runner
        saved_first()
    started.start()


def saved_first() -> None:
    """Let the runs be saved, when Python ends, before what they report to is closed: what was registered last comes first."""
    atexit.unregister(_end)
    atexit.register(_end)


def _save_all() -> None:
    going_on = [runner for runner in list(_LIVE.values()) if runner.snapshot.live and runner.snapshot.own]
    for runner in going_on:
        runner.send("stop", ours=True)
    for runner in going_on:
        with suppress(Sd3TuneError):  # it has ended by itself, and the run folder says how
            runner.wait()


def _end() -> None:
    """A kernel that is restarted, or a script that is through, does not cut its runs off; those of other processes are left alone.

    The threads are daemons all the same: Python would wait for others before it comes here. One that is left in torch or in a chart while
    Python is taken down aborts the process.
    """
    _ENDING.set()
    _save_all()
    for one, runner in list(_THREADS.items()):
        one.join(None if runner.snapshot.own else LEAVE)


def _save_and_end(number: int, frame: FrameType | None) -> None:
    """What `control.interrupts_deferred` has put off comes without a frame: then this thread has a run of its own, which saves itself."""
    _save_all()
    if frame is None:
        raise TerminatedError
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
