"""What a run's evaluations say, in one word with its evidence: still learning, flat, over-fitting, drifting, or unclear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sd3tune.records import EvalRecord

Row = Mapping[str, Any]

STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 30 degrees of freedom: a band of 95 % on both sides."""

RECENT = 0.75
"""What is new is what happened after this share of the updates."""

MEMORY, KNOWN = 13, 5
"""The newest evaluations that say how much the loss goes to and fro by itself, and how many it takes to know."""

SURE = 6.0
"""How many times that is within what happens by itself, between the newest and the best of many evaluations, too.

Of constants with independent noise 3 % then seem worse than their best of 13, and 6 % than that of 8.
"""

COARSE = 0.05
"""A band of more than this on either side is too wide to call a loss flat."""

MATTERS = 0.01
"""Distance from the base, as a share of its error, below which no word is made of it."""


@dataclass(frozen=True)
class Verdict:
    """A word, and a sentence that begins with it and has the numbers."""

    word: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Change:
    """A mean over pictures with half the width of its 95 % band, widened by how much the mean goes to and fro by itself."""

    mean: float
    band: float

    @property
    def rises(self) -> bool:
        """Whether all of the band is above zero."""
        return self.mean - self.band > 0

    @property
    def falls(self) -> bool:
        """Whether all of the band is below zero."""
        return self.mean + self.band < 0

    def __str__(self) -> str:
        direction = "up" if self.rises else "down" if self.falls else "unchanged"
        return f"{direction} ({self.mean:+.2%} ± {self.band:.2%})"


def student(count: int) -> float:
    """Student's t of a 95 % band of a mean over ``count`` values; infinite for one."""
    if count < 2:
        return math.inf
    return STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96 + 2.5 / (count - 1)


def change(before: Sequence[float], after: Sequence[float], unit: float) -> Change:
    """The mean change of paired values, in units of ``unit``."""
    differences = [(b - a) / unit for a, b in zip(before, after, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return Change(mean, math.inf)
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
    return Change(mean, student(count) * spread / math.sqrt(count))


def jitter(values: Sequence[float]) -> float:
    """How much a series goes to and fro: nothing for a smooth rise or fall, about 0.8 deviations of independent noise.

    Neighbouring differences of independent noise of variance v have the covariance -v (Roll 1984, of prices between bid and ask).
    Of each pair of opposite differences only the smaller one counts, so that a sharp bend is hardly any; fewer than `KNOWN` values
    cannot tell noise from a bend, and then it is nothing.
    """
    if len(values) < KNOWN:
        return 0.0
    steps = [b - a for a, b in pairwise(values[-MEMORY:])]
    squares = [min(abs(a), abs(b)) ** 2 if a * b < 0 else 0.0 for a, b in pairwise(steps)]
    return math.sqrt(math.fsum(squares) / len(squares))


def verdict(rows: Sequence[Row]) -> Verdict | None:
    """What the evaluations of a run say about the newest; nothing when there is none before it to compare with.

    ``rows`` are the history's ``eval`` lines, oldest first, with their losses by picture. Changes are paired over pictures, and only
    one whose whole 95 % band lies on one side is called a rise or a fall. The newest is compared with the last one of the first three
    quarters of the updates, and with the best one.
    """
    newest = rows[-1]
    usable = [row for row in rows[:-1] if row["step"] < newest["step"] and _alike(row, newest)]
    if not usable:
        return None
    if not all(math.isfinite(row["loss"]) for row in (*usable, newest)):
        return Verdict("drifting", "drifting: an evaluation is not a finite number; go back to a checkpoint, with a lower learning_rate")
    if len(newest["losses_by_image"]) < 2:
        return Verdict("unclear", "unclear: one held-out picture cannot tell noise from a trend; hold out more of them")
    before = max((row for row in usable if row["step"] <= RECENT * newest["step"]), key=lambda row: row["step"], default=usable[0])
    best = min((*usable, newest), key=lambda row: row["loss"])
    since = _Since(before, newest, [*usable, newest])
    falls = since.held.falls and not before["step"] < best["step"] < newest["step"]
    if best is not newest and not falls and (risen := _Since(best, newest, [*usable, newest])).held.rises:
        return risen.worse()
    if falls:
        return since.said("still learning")
    if since.moved is not None and since.moved.mean - since.moved.band > max(MATTERS, since.held.band - since.held.mean):
        return since.said("drifting", "; it moves away from the base without a gain: stop here, or lower learning_rate")
    if since.held.band > COARSE:
        return since.said("unclear", "; more held-out pictures (num_eval_images) would narrow that down")
    return since.said("flat")


def judged(record: EvalRecord, history: Sequence[Row]) -> EvalRecord:
    """An evaluation with its verdict, after all that the run's history holds."""
    rows = [row for row in history if row["type"] == EvalRecord.type]
    found = verdict([*rows, record.as_dict()])
    return record if found is None else replace(record, verdict=found.sentence)


def _alike(row: Row, newest: Row) -> bool:
    """Whether two evaluations are of the same pictures and levels; those of older versions do not say which pictures they are of."""
    if any(row.get(key) and list(row[key]) != list(newest.get(key, ())) for key in ("items", "train_items")):
        return False
    return (
        all(len(row.get(key, ())) == len(newest[key]) for key in ("losses_by_image", "train_losses_by_image", "drifts_by_image"))
        and bool(newest["losses_by_image"])
        and list(row["sigmas"]) == list(newest["sigmas"])
    )


class _Since:
    """What has changed from one evaluation to the newest."""

    def __init__(self, before: Row, newest: Row, rows: Sequence[Row]) -> None:
        self._before, self._newest, self._rows = before, newest, rows
        self.held = self._change("losses_by_image")
        looked, there = len(newest["train_losses_by_image"]), newest.get("train_images", 0)
        unseen = math.sqrt(1 - looked / there) if there else 1.0  # a sample of so few knows the rest that much better
        self.trained = self._change("train_losses_by_image", part=unseen) if looked else None
        self.moved = self._change("drifts_by_image", share=False) if newest["drifts_by_image"] else None
        """How much farther the predictions are from the base's, as a share of the base's error."""

    def _change(self, key: str, *, share: bool = True, part: float = 1.0) -> Change:
        """Relative to the mean before, unless the values are shares already; ``part`` of the band over pictures counts."""
        means = [math.fsum(row[key]) / len(row[key]) for row in self._rows]
        unit = math.fsum(self._before[key]) / len(self._before[key]) if share else 1.0
        paired = change(self._before[key], self._newest[key], unit)
        return Change(paired.mean, math.hypot(paired.band * part, SURE * jitter(means) / unit) if part else SURE * jitter(means) / unit)

    def worse(self) -> Verdict:
        """The held-out loss has risen since its best: because of the training pictures, or of nothing at all."""
        best = f"; the adapter of step {self._before['step']} is the best so far"
        if self.trained is not None and self.trained.mean < 0:
            return self.said("over-fitting", best)
        return self.said("drifting", f"; it gets worse without learning anything: lower learning_rate{best}")

    def said(self, word: str, hint: str = "") -> Verdict:
        """The word with its evidence."""
        parts = [f"held-out pictures {self.held}"]
        if self.trained is not None:
            parts.append(f"training pictures {self.trained}")
        if drifts := self._newest["drifts_by_image"]:
            parts.append(f"distance from the base {math.fsum(drifts) / len(drifts):.1%} of its error")
        return Verdict(word, f"{word}: since step {self._before['step']}, {', '.join(parts)}{hint}")
