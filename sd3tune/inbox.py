"""What a run was asked and has not done yet."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any


@dataclass(frozen=True)
class Command:
    """What a person asked."""

    name: str
    values: dict[str, Any]


class Inbox:
    """Filled from any thread, emptied by the worker alone. ``sent`` counts all that was ever asked."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Command] = SimpleQueue()
        self.sent = 0
        self._late: deque[Command] = deque()

    def later(self, command: Command) -> None:
        """Keep a command for when it is possible."""
        self._late.append(command)

    def next(self, *, late: bool, wait: float | None = None) -> Command | None:
        """What is next, those that were kept first if ``late``; nothing when nothing was asked within ``wait`` seconds."""
        if late and self._late:
            return self._late.popleft()
        with suppress(Empty):
            return self.queue.get(block=wait is not None, timeout=wait)
        return None

    def look(self) -> list[Command]:
        """All that was asked and is not done, in order."""
        with suppress(Empty):
            while True:
                self._late.append(self.queue.get(block=False))
        return list(self._late)
