"""The rate that a few updates speak for: its mathematics, and models on which the best rate is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest

from sd3tune.training.schedules import learning_rate
from sd3tune.validation.rates import Trial, advise, constant_updates, followed, gain, peak, slope

GRID = [10 ** (-3 + i / 2) for i in range(9)]
NUMBERS = (4, 8, 16)


def test_the_top_of_a_parabola_is_found_exactly() -> None:
    """Evenly spaced or not; at an edge it is the edge."""
    assert peak([(x, 3 - 2 * (x - 0.3) ** 2) for x in (-1.0, 0.0, 1.0, 2.0)]) == pytest.approx(0.3)
    assert peak([(x, 3 - 2 * (x - 0.3) ** 2) for x in (-2.0, 0.1, 0.9, 3.0)]) == pytest.approx(0.3)
    assert peak([(x, x) for x in (1.0, 2.0, 3.0)]) == 3.0
    assert peak([(x, 1.0) for x in (1.0, 2.0, 3.0)]) == 1.0


def test_slope_is_least_squares() -> None:
    """Of a line with errors 1, -2, 1 that are orthogonal to it: the line's."""
    assert slope([(0, 1.0), (1, 0.5 - 2), (2, 2.0)]) == pytest.approx(0.5)


def test_gain_is_a_share_and_never_negative() -> None:
    """Over the chosen pictures; nothing for what ran away, got worse, or is no number."""
    assert gain((2.0, 4.0), (1.0, 2.0)) == 0.5
    assert gain((2.0, 4.0), (1.0, 4.0), [0, 0]) == 0.5
    assert gain((2.0, 4.0), None) == gain((2.0,), (3.0,)) == gain((2.0,), (math.nan,)) == 0.0


@pytest.mark.parametrize(("power", "expected"), [(-0.8, -0.65), (-0.2, -0.35), (0.3, -0.25), (-2.0, -0.75)])
def test_a_power_law_is_followed_half_way_to_what_is_expected(power: float, expected: float) -> None:
    """Best rates 0.01 (n / 8)^power: level at 8 updates, then by the mean of the power, within -1 to 0, and -1/2; never above the last."""
    best = {n: math.log(0.01 * (n / 8) ** power) for n in NUMBERS}
    rates = [10 ** (-4 + i / 2) for i in range(9)]
    trials = [Trial(r, {n: (1 - 0.5 + 0.05 * (math.log(r) - best[n]) ** 2,) * 2 for n in NUMBERS}) for r in rates]
    found, used = followed((1.0, 1.0), trials, 800)
    assert used == pytest.approx(expected)
    assert found == pytest.approx(math.log(0.01) + expected * math.log(100))
    assert followed((1.0, 1.0), trials, 1)[0] <= best[16] + 1e-9


def test_updates_at_a_constant_rate() -> None:
    """A constant schedule counts what is left; a cosine half of it after its warm-up; each equals the sum over the run."""
    rest = {"cycles": 1, "power": 1.0, "end": 0.0}
    assert constant_updates(done=50, total=200, schedule="constant", warmup=20, **rest) == 150
    whole = sum(learning_rate(u, peak=1e-3, schedule="cosine", warmup=20, total=200) for u in range(200)) / 1e-3
    assert constant_updates(done=0, total=200, schedule="cosine", warmup=20, **rest) == pytest.approx(whole)
    assert whole == pytest.approx(10.5 + 90.5)


def quadratic(rate: float, most: int, spectrum: Sequence[tuple[float, float]], noise: float) -> list[float]:
    """Expected loss after 0, 1, ... updates of gradient descent with noise on a quadratic: m' = (1 - r h)^2 m + r^2 h noise."""
    moments, losses = [weight for _, weight in spectrum], []
    for _ in range(most + 1):
        losses.append(1 + math.fsum(h * m for m, (h, _) in zip(moments, spectrum, strict=True)))
        moments = [min(1e9, (1 - rate * h) ** 2 * m + rate**2 * h * noise) for m, (h, _) in zip(moments, spectrum, strict=True)]
    return losses


def test_noisy_quadratics_of_many_kinds() -> None:
    """36 spectra, noises and lengths: at least 95 % of what the best rate of the grid takes away; the best rate of 16 updates does not."""
    shares, naive = [], []
    for steep, start, noise, length in product((0.5, 1, 2), (0, 1), (0.0, 0.01, 0.1), (200, 600)):
        spectrum = [(k**-steep, k**-start) for k in range(1, 20)]
        unit = math.fsum(h * w for h, w in spectrum)
        spectrum = [(h, w / unit) for h, w in spectrum]
        runs = {rate: quadratic(rate, length, spectrum, noise) for rate in GRID}
        trials = [Trial(rate, {n: (run[n],) * 4 for n in NUMBERS}) for rate, run in runs.items()]
        found = advise((2.0,) * 4, trials, length)
        assert found.rate is not None
        assert found.low <= found.rate <= found.high
        best = max(2 - run[-1] for run in runs.values())
        shares.append((2 - quadratic(found.rate, length, spectrum, noise)[-1]) / best)
        short = max(runs, key=lambda rate: 2 - runs[rate][16])
        naive.append((2 - runs[short][-1]) / best)
    assert min(shares) > 0.95
    assert min(naive) < 0.9
    assert sum(shares) > sum(naive)


def test_nothing_learned_is_no_recommendation() -> None:
    """A fall within the doubt, or only rates that ran away: no rate, and what to do."""
    base = (1.0, 1.2, 0.8, 1.0)
    within = [Trial(r, {4: tuple(v * (1 + d) for v, d in zip(base, (0.02, -0.03, 0.01, -0.02), strict=True))}) for r in GRID[:3]]
    assert advise(base, within, 100).rate is None
    assert "no rate lowers the loss within 4 updates by more than the doubt" in advise(base, within, 100).reason
    away = [Trial(r, {}, "the loss is 9") for r in GRID[:3]]
    assert advise(base, away, 100).rate is None


def test_the_range_is_wider_the_farther_it_is_followed_and_an_edge_is_said() -> None:
    """Ten times the length, a wider range; the highest rate tried being the best asks for higher ones."""
    base = (1.0, 1.1, 0.9, 1.0)
    trials = [
        Trial(r, {n: tuple(v * (0.5 + 0.05 * (math.log10(r) + 1 + 0.4 * math.log10(n)) ** 2) for v in base) for n in NUMBERS})
        for r in GRID
    ]  # fmt: skip
    near, far = advise(base, trials, 100), advise(base, trials, 1000)
    assert far.high / far.low > 1.5 * near.high / near.low
    rising = [Trial(r, {n: tuple(v * (1 - 0.1 * r) for v in base) for n in NUMBERS}) for r in GRID[:4]]
    assert "the highest rate tried is the best, so probe again with higher ones" in advise(base, rising, 100).reason
