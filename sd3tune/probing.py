"""The learning-rate probe: a few updates at several rates, none of which count, and the rate that they speak for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sd3tune.control import interrupts_deferred
from sd3tune.errors import ConfigError, TrainingError
from sd3tune.records import ProbeRecord
from sd3tune.shown import Shown, duration
from sd3tune.training.guard import GuardError
from sd3tune.validation.evaluate import evaluation_levels, spread, training_pictures
from sd3tune.validation.probed import Probed, probed
from sd3tune.validation.rates import constant_updates, gain

if TYPE_CHECKING:
    from sd3tune.data.buckets import Placement
    from sd3tune.trainer import Trainer

UPDATES, STEP, SIDE = 16, math.sqrt(10), 4
"""Updates at each rate; the factor between two rates; most rates on either side of the configured one."""

PICTURES, LEAST, LEVELS = 16, 4, 4
"""Pictures and noise levels that judge each rate; with fewer held-out pictures than ``LEAST``, training pictures do."""

HOPELESS = 1 / 3
"""A rate that has learned less than this share of the best has no better ones beyond it."""


def lr_probe(trainer: Trainer, *, rates: Sequence[float] | None = None, updates: int = UPDATES) -> LrProbe:
    """Try learning rates from where a trainer is, and put everything back; shows what it will cost, ``run()`` does it.

    Every rate sees the same batches with the same noise. Without ``rates`` they go up and down from the configured one in factors of
    3.16, as far as is worth while. Raises: ConfigError for an optimizer that finds its rate itself, and for rates or updates that
    cannot be tried.
    """
    if trainer.config.optimizer.optimizer == "prodigy":
        raise ConfigError(
            ["prodigy finds its rate itself over many updates, so there is nothing to probe; leave learning_rate at 1"], "probe"
        )
    if updates < 4:
        raise ConfigError([f"updates: {updates} is too few to see how the best rate changes; try {UPDATES}"], "lr_probe")
    if rates is not None and (len(rates) < 3 or len(set(rates)) < len(rates) or not all(0 < r < math.inf for r in rates)):
        raise ConfigError([f"rates: {list(rates)} are not three or more different positive numbers"], "lr_probe")
    return LrProbe(trainer, None if rates is None else tuple(rates), updates)


class LrProbe(Shown):
    """The records of a probe. Between two of them, and after the last, the trainer is as it was, bit for bit."""

    def __init__(self, trainer: Trainer, rates: tuple[float, ...] | None, updates: int) -> None:
        self._trainer, self._rates = trainer, rates
        self._numbers = (updates // 4, updates // 2, updates)
        self._placements, kind = _judges(trainer)
        self._judges = f"{len(self._placements)} {kind}"
        self._levels = evaluation_levels(trainer.engine.rules, self._placements, LEVELS)
        self.most = 2 * SIDE + 1 if rates is None else len(rates)
        """Rates that are tried at most."""
        self.seconds = self._seconds()
        """How long it takes at most, by a measured update."""

    def __str__(self) -> str:
        bound = "at most " if self._rates is None else ""
        return (
            f"learning-rate probe: {bound}{self.most} rates x {self._numbers[-1]} updates, judged by {self._judges} at {LEVELS} noise "
            f"levels after {', '.join(map(str, self._numbers))}: {bound}{duration(self.seconds)}. run() does it, and the trainer is then "
            "as it was"
        )

    def _seconds(self) -> float:
        """An update is three forward passes of its pictures."""
        engine = self._trainer.engine
        update = engine.seconds_per_update()
        images = sum(len(engine.batches.ids(k)) for k in range(engine.rules.accumulation))
        judging = len(self._placements) * LEVELS * update / (3 * images)
        return self.most * self._numbers[-1] * update + (1 + self.most * len(self._numbers)) * judging

    def run(self) -> Probed:
        """Do it and say what was found. Raises: CacheError, TrainingError; the trainer is as it was then, too."""
        return self.found(tuple(self))

    def found(self, records: Sequence[ProbeRecord]) -> Probed:
        """The result of all its records."""
        rules, rate = self._trainer.engine.rules, self._trainer.config.optimizer.learning_rate
        length = constant_updates(
            done=self._trainer.steps_done, total=rules.total, schedule=rules.schedule, warmup=rules.warmup, cycles=rules.cycles,
            power=rules.power, end=rules.end / rate,
        )  # fmt: skip
        return probed(records, configured=rate, length=length, judges=self._judges)

    def __iter__(self) -> Iterator[ProbeRecord]:
        """One record for the beginning, then one for each rate and number of updates; the history says so at the end."""
        records = [self._record(0.0, 0, self._trainer.losses(self._placements, self._levels))]
        yield records[0]
        base, best, began = records[0].losses_by_image, 0.0, None
        for upwards, side in self._sides():
            for rate in side:
                state: dict[str, Any] | None = None
                for number in self._numbers:
                    record, state = self._stretch(rate, number, state, began)
                    records.append(record)
                    yield record
                    began = state["guard"]["began"]
                    if record.last:
                        break
                share = gain(base, records[-1].losses_by_image or None)
                best = max(best, share)
                if self._rates is None and (share < HOPELESS * best or (upwards and records[-1].refused)):
                    break
        self._trainer.notice(f"learning-rate probe, after which everything is as it was: {self.found(records).sentence}")

    def _sides(self) -> Iterator[tuple[bool, tuple[float, ...]]]:
        """The rates, upwards from the configured one, then downwards."""
        if self._rates is not None:
            yield True, tuple(sorted(self._rates))
            return
        middle = self._trainer.config.optimizer.learning_rate
        yield True, tuple(middle * STEP**i for i in range(SIDE + 1))
        yield False, tuple(middle / STEP**i for i in range(1, SIDE + 1))

    def _stretch(
        self, rate: float, number: int, state: Mapping[str, Any] | None, began: float | None
    ) -> tuple[ProbeRecord, dict[str, Any]]:
        """Go on at a rate, from where it was left or from where the trainer is, to so many updates, and judge."""
        trainer, engine, refused = self._trainer, self._trainer.engine, ""
        start = engine.updates
        with engine.rehearsal():
            if state is not None:
                engine.load_state_dict(state)
            elif engine.guard.began is None:
                engine.guard.began = began  # every rate begins alike, so this need not be measured again
            engine.rules = replace(engine.rules, schedule="constant", warmup=0)
            try:
                while engine.updates < start + number:
                    with interrupts_deferred():
                        engine.update(peak_learning_rate=rate, max_grad_norm=trainer.config.optimizer.max_grad_norm)
            except GuardError as error:
                refused = error.refusal.why
            losses = () if refused else trainer.losses(self._placements, self._levels)
            reached = engine.state_dict()
        return self._record(rate, number, losses, refused), reached

    def _record(self, rate: float, number: int, losses: tuple[float, ...], refused: str = "") -> ProbeRecord:
        return ProbeRecord(
            step=self._trainer.steps_done, learning_rate=rate, updates=number, losses_by_image=losses, refused=refused,
            last=bool(refused) or number == self._numbers[-1],
        )  # fmt: skip


def _judges(trainer: Trainer) -> tuple[list[Placement], str]:
    """The pictures that judge a rate, and of what kind they are. Raises: TrainingError when there are none."""
    held = trainer.cache.plan.evaluation
    if len(held) >= LEAST:
        return [held[i] for i in spread(len(held), PICTURES)], "held-out pictures"
    found = training_pictures(trainer.cache.plan, PICTURES)
    if not found:
        raise TrainingError("there is no picture to judge a learning rate by: all of them are regularisation data")
    return found, "training pictures"
