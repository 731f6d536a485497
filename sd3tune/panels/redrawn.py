"""When a drawing is made anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sd3tune.panels.looks import put
from sd3tune.snapshot import Snapshot

LEAST, SHARE = 1.0, 100
"""A drawing is made anew at most once a second, and takes at most one part in a hundred of the time."""


class Redrawn:
    """Drawings of a snapshot: made anew only when something in them changed, and seldom enough to cost next to nothing."""

    def __init__(self, key: Callable[[Snapshot], object], *drawings: tuple[Callable[[Snapshot], str], Any]) -> None:
        self._key, self._drawings = key, drawings
        self._drawn: object = None
        self._next = 0.0

    def look(self, now: Snapshot, clock: float) -> None:
        """Draw if it is time, or if the run just ended."""
        key = (self._key(now), now.live)
        if key == self._drawn or (clock < self._next and now.live):
            return
        started, first = time.thread_time(), self._drawn is None
        for draw, widget in self._drawings:
            put(widget, draw(now))
        took = 0.0 if first else time.thread_time() - started  # the first one loads the library
        self._drawn, self._next = key, clock + max(LEAST, SHARE * took)
