"""How a run is steered from outside: files in its folder, Ctrl-C, and SIGTERM. All of it takes effect between two updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

FILES = ("STOP", "PAUSE", "SET", "SAVE", "SAMPLE")
"""Files that a person may create in the run folder; SET holds settings as YAML, such as ``learning_rate: 5e-5``.

All but PAUSE, which lasts as long as its file, are taken away when obeyed.
"""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: somebody is about to take this machine away."""


def asked(folder: Path) -> list[str]:
    """The control files that are there, in the order in which they are obeyed."""
    there = [name for name in FILES if (folder / name).exists()]
    return [name for name in there if name != "SET" or (folder / name).stat().st_size]  # an empty one is still being written


def take(folder: Path, name: str) -> str:
    """Remove a control file, to obey it; what was in it."""
    try:
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    (folder / name).unlink(missing_ok=True)
    return text


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise for the duration of the block, so that it can be saved before; in other threads, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # a generator may be closed elsewhere
            signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C, a notebook's stop button or SIGTERM take effect at the end of the block, also of one that fails, and not in it.

    Inside another such block they take effect at the end of that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.signal(number, lambda got, frame: came.append(got)) for number in both}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in sorted(set(came), reverse=True):  # SIGTERM first
            outer = before[number]
            if not callable(outer):
                raise TerminatedError
            outer(number, None)  # raises, or takes note where it is another block's


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Leave Ctrl-C and SIGTERM to the main process, which tells the others when to stop, for the duration of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
