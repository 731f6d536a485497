"""Which learning rate suits a run, from what a few updates at several rates have learned.

A few updates alone would mislead: the shorter a run, the higher its best rate. So the best rate is found after several numbers of
updates, and followed to the length of the run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from sd3tune.training.schedules import learning_rate
from sd3tune.validation.verdict import Change, change

Losses = tuple[float, ...]

EXPECTED, DOUBT = -0.5, 0.25
"""The best rate goes as a power of the number of updates: 0 where a limit of stability decides, -1 where a distance is to be gone.

What was measured over a few doublings counts as much as the middle of these.
"""

RESAMPLES = 200
"""Of the pictures, for the range."""


@dataclass(frozen=True)
class Trial:
    """One rate: the losses by picture after some numbers of updates; ``refused`` says why the guard ended it."""

    rate: float
    losses: Mapping[int, Losses]
    refused: str = ""


@dataclass(frozen=True)
class Advice:
    """A rate with its range, or neither; and the reason in words."""

    rate: float | None
    low: float
    high: float
    reason: str


def constant_updates(*, done: int, total: int, schedule: str, warmup: int, cycles: int, power: float, end: float) -> float:
    """The updates that are left, each counted by the share of the peak rate that its schedule gives it; ``end`` is such a share, too."""
    return math.fsum(
        learning_rate(u, peak=1.0, schedule=schedule, warmup=warmup, total=total, cycles=cycles, power=power, end=end)
        for u in range(done, total)
    )


def gain(base: Losses, losses: Losses | None, images: Sequence[int] | None = None) -> float:
    """The share of the loss that was taken away, over some of the pictures; none for a rate that ran away or made it worse."""
    if losses is None or not all(map(math.isfinite, losses)):
        return 0.0
    chosen = range(len(base)) if images is None else images
    return max(0.0, 1 - math.fsum(losses[i] for i in chosen) / math.fsum(base[i] for i in chosen))


def peak(points: Sequence[tuple[float, float]]) -> float:
    """Where a curve through (log rate, gain) is highest: the top of the parabola through the highest point and its neighbours."""
    rows = sorted(points)
    top = max(range(len(rows)), key=lambda i: rows[i][1])
    if top in (0, len(rows) - 1):
        return rows[top][0]
    (a, fa), (b, fb), (c, fc) = rows[top - 1 : top + 2]
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right) if left != right else b


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: the rise of y over x."""
    x0, y0 = mean(x for x, _ in points), mean(y for _, y in points)
    return math.fsum((x - x0) * (y - y0) for x, y in points) / math.fsum((x - x0) ** 2 for x, _ in points)


def followed(base: Losses, trials: Sequence[Trial], length: float, images: Sequence[int] | None = None) -> tuple[float, float]:
    """The log of the best rate for a run as long as ``length`` updates at a constant rate; and the power of the length it falls by.

    Never above the best rate after the most updates that were tried.
    """
    numbers = sorted({n for trial in trials for n in trial.losses})
    tops = [
        (math.log(n), peak([(math.log(t.rate), gain(base, t.losses.get(n), images)) for t in trials]))
        for n in numbers
    ]  # fmt: skip
    measured = slope(tops) if len(tops) > 1 else EXPECTED
    power = (min(0.0, max(-1.0, measured)) + EXPECTED) / 2
    centre, level = mean(x for x, _ in tops), mean(y for _, y in tops)
    return min(tops[-1][1], level + power * (math.log(max(length, numbers[-1])) - centre)), power


def advise(base: Losses, trials: Sequence[Trial], length: float) -> Advice:
    """A rate for a run as long as ``length`` updates at a constant rate, and its range: 90 % over pictures, wider the farther it is
    followed.
    """
    numbers = sorted({n for trial in trials for n in trial.losses})
    best = max(trials, key=lambda t: gain(base, t.losses.get(numbers[-1])) if numbers else 0.0)
    if not any(fall(base, losses).falls for trial in trials for losses in trial.losses.values()):
        many = f"{numbers[-1]} updates" if numbers else "the first updates"
        return Advice(
            None, 0, 0, f"no rate lowers the loss within {many} by more than the doubt; probe with more updates, or keep the rate"
        )
    found, power = followed(base, trials, length)
    rng, count = random.Random(0), len(base)
    drawn = sorted(followed(base, trials, length, rng.choices(range(count), k=count))[0] for _ in range(RESAMPLES))
    reach = DOUBT * math.log(max(1.0, length / math.exp(mean(map(math.log, numbers)))))
    top = peak([(math.log(t.rate), gain(base, t.losses.get(numbers[-1]))) for t in trials])
    low, high = drawn[RESAMPLES // 20] - reach, max(found, min(top, drawn[-1 - RESAMPLES // 20] + reach))
    tops = [math.exp(peak([(math.log(t.rate), gain(base, t.losses.get(n))) for t in trials])) for n in numbers]
    reason = (
        f"after {_listed([str(n) for n in numbers])} updates {_listed([f'{rate:.1e}' for rate in tops])} learned most; the longer a run, "
        f"the lower its best rate (here as updates^{power:.2f}), and the updates that are left go as far as {length:.0f} at a constant rate"
    )
    ends = {min(t.rate for t in trials): "lowest", max(t.rate for t in trials): "highest"}
    if best.rate in ends and len(trials) > 1:
        reason += f"; the {ends[best.rate]} rate tried is the best, so probe again with {ends[best.rate].replace('est', 'er')} ones"
    return Advice(_rounded(math.exp(found)), _rounded(math.exp(min(low, found))), _rounded(math.exp(high)), reason)


def fall(base: Losses, losses: Losses | None) -> Change:
    """The change of each picture's loss as a share of where it began, and its mean; unknown for a rate that ran away."""
    if losses is None:
        return Change(math.nan, math.nan)
    return change([1.0] * len(base), [after / before for before, after in zip(base, losses, strict=True)], 1.0)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
