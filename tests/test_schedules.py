"""The course of the learning rate: diffusers' values, ends, and that it is a function of the update alone."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from test_engine import engine

from sd3tune.training.schedules import learning_rate

WARMUP, TOTAL, PEAK = 7, 40, 2e-3


def of_diffusers(schedule: str, cycles: int, power: float, end: float) -> list[float]:
    """diffusers' rate at each step; in its warm-up it is one step behind ours, which never trains at rate zero."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if schedule == "polynomial":
        made = get_polynomial_decay_schedule_with_warmup(optimizer, WARMUP, TOTAL, lr_end=end, power=power)
    else:
        cosines = {"num_cycles": cycles} if schedule == "cosine_with_restarts" else {}
        made = get_scheduler(schedule, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, **cosines)
    rate = made.lr_lambdas[0]
    return [PEAK * rate(update + 1 if update < WARMUP and schedule != "constant" else update) for update in range(TOTAL + 3)]


@pytest.mark.parametrize(
    ("schedule", "cycles", "power", "end"),
    [
        ("constant", 1, 1.0, 0.0), ("constant_with_warmup", 1, 1.0, 0.0), ("linear", 1, 1.0, 0.0), ("cosine", 1, 1.0, 0.0),
        ("cosine_with_restarts", 1, 1.0, 0.0), ("cosine_with_restarts", 3, 1.0, 0.0), ("polynomial", 1, 0.8, 4e-7),
        ("polynomial", 1, 2.0, 1e-4),
    ],
)  # fmt: skip
def test_schedules_are_those_of_diffusers(schedule: str, cycles: int, power: float, end: float) -> None:
    """Every rate of 40 updates with a warm-up of 7, and beyond the end."""
    beyond = TOTAL if schedule == "cosine" else TOTAL + 3
    ours = [
        learning_rate(u, peak=PEAK, schedule=schedule, warmup=WARMUP, total=TOTAL, cycles=cycles, power=power, end=end)
        for u in range(beyond)
    ]
    assert ours == pytest.approx(of_diffusers(schedule, cycles, power, end)[:beyond], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_each_warms_up_to_its_peak(schedule: str) -> None:
    """The rate rises by equal steps to the peak, which is reached in the last update of the warm-up."""
    rates = [learning_rate(u, peak=1.0, schedule=schedule, warmup=4, total=20, cycles=2) for u in range(5)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)


def test_restarts_go_back_to_the_peak() -> None:
    """Two cosines over 20 updates: the second begins at the peak."""
    rates = [learning_rate(u, peak=1.0, schedule="cosine_with_restarts", warmup=0, total=20, cycles=2) for u in range(21)]
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[15] == pytest.approx(0.5)
    assert rates[20] == 0


def test_an_unknown_schedule_is_an_error() -> None:
    """No name falls through to another schedule."""
    with pytest.raises(ValueError, match="unknown schedule 'sine'"):
        learning_rate(9, peak=1.0, schedule="sine", warmup=0, total=10)


def test_an_update_follows_the_whole_schedule() -> None:
    """Power, end and cycles reach the update: its recorded rates are those of the schedule."""
    for changes in ({"schedule": "polynomial", "power": 2.0, "end": 1e-4}, {"schedule": "cosine_with_restarts", "cycles": 2}):
        made, _ = engine(warmup=1, total=6, **changes)
        rates = [made.update(peak_learning_rate=1e-2).learning_rate for _ in range(5)]
        assert rates == [learning_rate(u, peak=1e-2, warmup=1, total=6, **changes) for u in range(5)]  # type: ignore[arg-type]
