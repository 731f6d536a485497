"""Numbers over the updates, in a memory that does not grow: neighbours are merged when there are too many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

MOST = 400
"""Most stretches of one curve; at twice as many updates each covers two, and so on."""

DECAY = 0.95
"""Of the exponential average that is drawn bold."""


class Stretch(NamedTuple):
    """Some updates in a row."""

    first: int
    last: int
    low: float
    high: float
    smooth: float
    """The exponential average at the last of them."""


@dataclass(frozen=True)
class Curve:
    """What a series looks like at one moment. Values that are not finite are left out, and counted."""

    stretches: tuple[Stretch, ...] = ()
    latest: tuple[int, float] | None = None
    not_finite: int = 0

    @property
    def smooth(self) -> float | None:
        """The exponential average now."""
        return self.stretches[-1].smooth if self.stretches else None


EMPTY = Curve()


class Series:
    """Takes values one by one. The exponential average has no pull towards zero at its start, and knows every value."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._stride, self._inside = most, 1, 0
        self._closed: list[Stretch] = []
        self._open: Stretch | None = None
        self._total, self._weight, self._not_finite = 0.0, 0.0, 0
        self._latest: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Take in the value of an update."""
        self._latest = (step, value)
        if not math.isfinite(value):
            self._not_finite += 1
            return
        self._total, self._weight = DECAY * self._total + (1 - DECAY) * value, DECAY * self._weight + (1 - DECAY)
        new = Stretch(step, step, value, value, self._total / self._weight)
        self._open = new if self._open is None else merged(self._open, new)
        self._inside += 1
        if self._inside == self._stride:
            self._close()

    def _close(self) -> None:
        assert self._open is not None
        self._closed.append(self._open)
        self._open, self._inside = None, 0
        if len(self._closed) >= self._most:
            pairs = zip(self._closed[::2], self._closed[1::2], strict=True)
            self._closed, self._stride = [merged(one, other) for one, other in pairs], 2 * self._stride

    @property
    def curve(self) -> Curve:
        """The values so far."""
        return Curve((*self._closed, *([self._open] if self._open else [])), self._latest, self._not_finite)


def merged(one: Stretch, other: Stretch) -> Stretch:
    """Two neighbours as one."""
    return Stretch(one.first, other.last, min(one.low, other.low), max(one.high, other.high), other.smooth)


def curve_of(points: Iterable[tuple[int, float]], most: int = MOST) -> Curve:
    """(step, value) pairs as a curve."""
    series = Series(most)
    for step, value in points:
        series.add(step, value)
    return series.curve
