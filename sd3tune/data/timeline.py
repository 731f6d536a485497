"""Which data sets are seen when. Epochs are counted from 1; a data set that joins or leaves in the middle of one begins a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from sd3tune.data.datasets import Dataset


class Phase(NamedTuple):
    """A stretch of the run with the same data sets. ``start`` and ``length`` (of one epoch) are in batches."""

    start: int
    epoch: int
    length: int
    datasets: frozenset[str]


def phases(datasets: Sequence[Dataset], batches: Mapping[str, int], accumulation: int) -> tuple[Phase, ...]:
    """The stretches from the first batch on; the last one has no end, and one without data sets has length 0 and is the last.

    ``batches`` is the number of batches of each data set's epoch.
    """
    at, epoch, found = 0, 1, list[Phase]()
    while True:
        update = at // accumulation
        active = [d for d in datasets if batches.get(d.id) and _is_active(d, update, epoch)]
        length = sum(batches[d.id] for d in active)
        found.append(Phase(at, epoch, length, frozenset(d.id for d in active)))
        steps = (step * accumulation for d in datasets for step in (d.start_step, d.end_step) if step is not None)
        turns = (turn for d in datasets for turn in (d.start_epoch, d.end_epoch and d.end_epoch + 1) if turn)
        nexts = [step for step in steps if step > at] + [at + (turn - epoch) * length for turn in turns if turn > epoch]
        if not length or not nexts:
            return tuple(found)
        end = min(nexts)
        at, epoch = end, epoch + -(-(end - at) // length)


def _is_active(d: Dataset, update: int, epoch: int) -> bool:
    in_steps = d.start_step <= update and (d.end_step is None or update < d.end_step)
    return in_steps and d.start_epoch <= epoch and (d.end_epoch is None or epoch <= d.end_epoch)


def phase_of(found: Sequence[Phase], batch: int) -> Phase:
    """The stretch that holds a batch."""
    return next(phase for phase in reversed(found) if phase.start <= batch)


def start_of_epoch(found: Sequence[Phase], epoch: int) -> int:
    """The first batch of an epoch."""
    phase = next(phase for phase in reversed(found) if phase.epoch <= epoch)
    return phase.start + (epoch - phase.epoch) * phase.length


def epochs_done(found: Sequence[Phase], batches: int) -> Fraction:
    """Epochs that are over after so many batches, exactly; one that is cut short by a new stretch is over with it."""
    phase = phase_of(found, batches)
    return phase.epoch - 1 + Fraction(batches - phase.start, phase.length or 1) * bool(phase.length)


def passes(found: Sequence[Phase], before: int, after: int, share: float) -> bool:
    """Whether a whole multiple of ``share`` epochs is reached by the batches after ``before``, up to ``after``. 0.1 is a tenth here."""
    each = Fraction(repr(share))
    return epochs_done(found, after) // each > epochs_done(found, before) // each


def appearances(found: Sequence[Phase], batches: int) -> dict[str, tuple[int, int]]:
    """How often, at least and at most, each placement of a data set is seen in a run of so many batches."""
    seen: dict[str, tuple[int, int]] = {}
    for phase, after in zip(found, [*[p.start for p in found[1:]], batches], strict=True):
        count = min(after, batches) - phase.start
        if count > 0 and phase.length:
            for name in phase.datasets:
                least, most = seen.get(name, (0, 0))
                seen[name] = (least + count // phase.length, most + -(-count // phase.length))
    return seen
