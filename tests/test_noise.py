"""Noise levels: every distribution against its closed form, strata, shift by size, and what a run does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from test_engine import engine
from torch import Tensor

import sd3tune as st
from sd3tune.training import flow, sigmas
from sd3tune.training.batches import generator, noise
from sd3tune.training.spreads import Spread

CLOSED: dict[str, tuple[Spread, float, Callable[[Tensor], Tensor]]] = {
    "logit-normal": (Spread(), 0.0, lambda x: torch.special.ndtr(torch.logit(x))),
    "narrow and moved": (Spread(scale=0.5), -1.0, lambda x: torch.special.ndtr((torch.logit(x) + 1) / 0.5)),
    "uniform": (Spread("uniform"), 0.0, lambda x: x),
    "beta 2 2": (Spread("beta"), 0.0, lambda x: 3 * x**2 - 2 * x**3),
    "beta 2 5": (Spread("beta", alpha=2.0, beta=5.0), 0.0, lambda x: 1 - (1 - x) ** 5 * (1 + 5 * x)),
    "beta 1/2 1/2": (Spread("beta", alpha=0.5, beta=0.5), 0.0, lambda x: 2 / math.pi * torch.asin(x.sqrt())),
    "beta 1/10 1": (Spread("beta", alpha=0.1, beta=1.0), 0.0, lambda x: x**0.1),
    "a straight line": (Spread("cubic", weights=(1.0, 3.0)), 0.0, lambda x: (x + x**2) / 2),
    "a hill": (Spread("cubic", weights=(0.0, 1.0, 0.0)), 0.0, lambda x: torch.where(x < 0.5, hill(2 * x), 1 - hill(2 - 2 * x))),
}
"""Name -> spread, offset, its CDF."""


def hill(t: Tensor) -> Tensor:
    """Share below t, half way up a hill whose density is 2t - t^2 on each side."""
    return (t**2 - t**3 / 3) / (4 / 3)


def distance(drawn: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """The Kolmogorov-Smirnov statistic of draws against a CDF."""
    share = cdf(drawn.double().sort().values)
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / len(drawn)
    return float(torch.maximum(steps[1:] - share, share - steps[:-1]).max())


def unshifted(sigma: Tensor, factor: float) -> Tensor:
    """The level before the shift."""
    return sigma / (factor - (factor - 1) * sigma)


@pytest.mark.parametrize("name", CLOSED)
def test_each_distribution_is_its_closed_form(name: str) -> None:
    """The Kolmogorov-Smirnov statistic of 100,000 draws is below 0.0065, shifted or not."""
    spread, offset, cdf = CLOSED[name]
    for factor in (1.0, 3.0):
        drawn = sigmas.draw(100_000, spread=spread, offset=offset, factor=factor, stratified=False, rng=generator(11, 0))
        assert distance(unshifted(drawn.double(), factor), cdf) < 0.0065


@pytest.mark.parametrize("name", CLOSED)
def test_strata_hold_one_level_each(name: str) -> None:
    """A stratified batch of 8 has one level in each eighth of the distribution, whatever the distribution and the shift."""
    spread, offset, cdf = CLOSED[name]
    for k in range(40):
        drawn = sigmas.draw(8, spread=spread, offset=offset, factor=2.0, stratified=True, rng=generator(3, k)).double()
        shares = cdf(unshifted(drawn, 2.0))
        assert sorted((8 * shares).long().tolist()) == list(range(8))


@pytest.mark.parametrize("name", CLOSED)
def test_the_ladder_follows_the_distribution(name: str) -> None:
    """Its levels, unshifted, lie at the middles of equal parts."""
    spread, offset, cdf = CLOSED[name]
    if offset:
        return
    levels = torch.tensor(sigmas.ladder(5, spread=spread, factor=3.0), dtype=torch.float64)
    assert cdf(unshifted(levels, 3.0)).tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=1e-4)


def test_the_default_is_the_logit_normal_bit_for_bit() -> None:
    """Draws are those of the formula written out, and a spread by name changes nothing."""
    quantile = torch.rand(6, generator=generator(5, 1), dtype=torch.float64)
    rng = generator(5, 1)
    torch.rand(6, generator=rng, dtype=torch.float64)
    quantile = (torch.randperm(6, generator=rng) + quantile) / 6
    level = torch.sigmoid(0.25 + 1.5 * torch.special.ndtri(quantile))
    expected = (3.0 * level / (1 + 2.0 * level)).float()
    for how in ({"scale": 1.5}, {"spread": Spread(scale=1.5)}):
        assert torch.equal(sigmas.draw(6, factor=3.0, stratified=True, rng=generator(5, 1), offset=0.25, **how), expected)


def test_a_list_is_drawn_as_it_stands() -> None:
    """Fixed lists give their levels unshifted, each as often; in strata each batch of their length has every one."""
    spread = Spread("fixed-list", levels=(0.9, 0.25, 0.5))
    drawn = sigmas.draw(30_000, spread=spread, factor=3.0, stratified=False, rng=generator(1, 1))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == pytest.approx([0.25, 0.5, 0.9])
    assert counts.tolist() == pytest.approx([10_000] * 3, rel=0.03)
    batch = sigmas.draw(3, spread=spread, factor=3.0, stratified=True, rng=generator(1, 1))
    assert sorted(batch.tolist()) == pytest.approx([0.25, 0.5, 0.9])
    assert sigmas.ladder(28, spread=spread, factor=3.0) == (0.25, 0.5, 0.9)


def test_round_robin_goes_through_the_list() -> None:
    """Batches of two take a list of three in order: 1 2, 3 1, 2 3."""
    spread = Spread("round-robin", levels=(0.1, 0.2, 0.3))
    seen = [sigmas.draw(2, spread=spread, factor=3.0, stratified=True, rng=generator(1, k), k=k).tolist() for k in range(3)]
    assert [round(v, 4) for pair in seen for v in pair] == [0.1, 0.2, 0.3, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("width", "height", "mu", "factor"),
    [(512, 512, 0.630, 1.88), (768, 768, 0.847, 2.33), (1280, 768, 1.107, 3.02), (1024, 1024, 1.150, 3.16), (1440, 1440, 1.828, 6.22)],
)
def test_shift_by_size_has_the_published_values(width: int, height: int, mu: float, factor: float) -> None:
    """mu to 1e-3, k to its two decimals, and it is not clamped beyond 4096 tokens."""
    got = sigmas.auto_factor(height // 8, width // 8)
    assert math.log(got) == pytest.approx(mu, abs=1e-3)
    assert got == pytest.approx(factor, abs=5.1e-3)
    assert sigmas.factor_of(None, height // 8, width // 8) == got
    assert sigmas.factor_of(3.0, height // 8, width // 8) == 3.0


def test_one_shift_for_several_sizes_is_that_of_the_mean_size() -> None:
    """Two sizes: exp of the mean of their mu; a fixed shift stays."""
    wanted = math.exp((0.63 + 1.15) / 2)
    assert sigmas.common_factor(None, [(64, 64), (128, 128)]) == pytest.approx(wanted, rel=1e-3)
    assert sigmas.common_factor(2.0, [(64, 64), (128, 128)]) == 2.0


def test_shift_three_at_the_reference_steps() -> None:
    """28 levels from 1000 to 1, shifted by 3: the timesteps of SimpleTuner's evaluation."""
    plain = torch.linspace(1, 1 / 1000, 28, dtype=torch.float64)
    got = (1000 * sigmas.shift(plain, 3.0)).tolist()
    assert [got[i] for i in (0, 1, 2, 3, -5, -4, -3, -2, -1)] == pytest.approx(
        [1000, 987.4, 974.1, 960.0, 344.4, 274.5, 195.7, 105.9, 3.0], abs=0.06
    )


def test_an_update_draws_at_the_shift_of_its_size() -> None:
    """Without a fixed shift the engine takes that of the batch's latents (2 x 2 here)."""
    made, _ = engine(shift=None, accumulation=1)
    record = made.update(peak_learning_rate=0.01)
    wanted = sigmas.draw(2, scale=1.0, factor=sigmas.auto_factor(2, 2), stratified=True, rng=generator(5, 0, 4))
    assert record.sigmas == pytest.approx(wanted.tolist())
    made, _ = engine(spread=Spread("uniform"), shift=1.0, accumulation=1)
    uniform = sigmas.draw(2, spread=Spread("uniform"), factor=1.0, stratified=True, rng=generator(5, 0, 4))
    assert made.update(peak_learning_rate=0.01).sigmas == pytest.approx(uniform.tolist())


# --- what an error costs ---------------------------------------------------------------------------------------------


def costs(kind: Any, c: float, errors: list[float]) -> list[float]:
    return flow.Measure(kind, c).of(torch.tensor(errors)).tolist()  # type: ignore[no-any-return]


def test_costs_have_their_formulas() -> None:
    """Huber is 2c(sqrt(e^2 + c^2) - c), smooth L1 that over c; e^2 near zero, 2c|e| far away; small errors do not cancel."""
    for c in (0.1, 1.0):
        for error in (0.05, -0.3, 2.0):
            wanted = 2 * c * (math.sqrt(error**2 + c**2) - c)
            assert costs("huber", c, [error]) == pytest.approx([wanted], rel=1e-4)
            assert costs("smooth_l1", c, [error]) == pytest.approx([wanted / c], rel=1e-4)
    assert costs("l2", 0.1, [-0.5, 3.0]) == [0.25, 9.0]
    assert costs("huber", 0.1, [1e-4]) == pytest.approx([1e-8], rel=1e-5)
    assert costs("huber", 0.1, [1000.0]) == pytest.approx([200.0], rel=1e-3)
    latent, n, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([0.5])
    text, pooled = torch.zeros(1, 1, 1), torch.zeros(1, 1)
    for kind in ("l2", "huber", "smooth_l1"):
        exact = flow.loss(lambda *_: n, latent, text, pooled, sigma_B=sigma, noise_BCHW=n, measure=flow.Measure(kind))  # type: ignore[arg-type]
        assert exact.tolist() == [0]


def test_weights_are_the_papers() -> None:
    """cosmap is diffusers' formula; mode is 1 / |f'|, high in the middle; both are 1 on average and the same for sigma and 1 - sigma."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    levels = (torch.arange(20_000) + 0.5) / 20_000
    assert torch.allclose(flow.weight(levels, "cosmap"), compute_loss_weighting_for_sd3("cosmap", levels), rtol=1e-5)
    for scheme in ("cosmap", "mode"):
        weights = flow.weight(levels, scheme)
        assert float(weights.mean()) == pytest.approx(1.0, abs=1e-3)
        assert torch.allclose(weights, weights.flip(0), rtol=2e-3)
    middle, end = flow.weight(torch.tensor([0.5, 1e-6]), "mode").tolist()
    assert (middle, end) == pytest.approx((1 / (1 + 1.29 * (1 - math.pi / 2)), 1 / 2.29), rel=1e-3)
    assert torch.equal(flow.weight(levels, "none"), torch.ones_like(levels))
    assert float(flow.weight(levels, "sigma_squared").mean()) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match="unknown weighting 'cos'"):
        flow.weight(levels, "cos")


def test_sigma_squared_is_the_error_of_the_picture() -> None:
    """A third of the weighted error of a velocity v is that of the picture z - sigma v, which diffusers' example trains."""
    g = torch.Generator().manual_seed(0)
    x, n, v = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    sigma = torch.tensor([0.1, 0.5, 0.9])
    picture = flow.mix(x, n, sigma) - sigma.view(-1, 1, 1, 1) * v
    weighted = flow.weight(sigma, "sigma_squared") * (v - flow.target(x, n)).square().flatten(1).mean(1)
    assert torch.allclose(weighted / 3, (picture - x).square().flatten(1).mean(1), rtol=1e-4)


def test_mode_weights_uniform_levels_like_mode_sampling() -> None:
    """The weighted share of levels below 0.3 is that of f(u) for uniform u, which diffusers draws."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    drawn = compute_density_for_timestep_sampling("mode", 400_000, mode_scale=flow.MODE_SCALE, generator=generator(3, 3))
    levels = (torch.arange(10_000) + 0.5) / 10_000
    weights = flow.weight(levels, "mode")
    for limit in (0.1, 0.3, 0.5):
        assert float(weights[levels < limit].sum() / weights.sum()) == pytest.approx(float((drawn < limit).float().mean()), abs=4e-3)


def test_a_weight_scales_the_gradient_and_not_the_record() -> None:
    """With cosmap the gradient is that of the weighted losses; the recorded losses are the plain ones."""
    plain, _ = engine(accumulation=1)
    made, toy = engine(accumulation=1, weighting="cosmap")
    part = made._gradient(range(0, 1), 2, 1e9)[0][0]
    weighted = toy.a.grad.clone()  # type: ignore[union-attr]
    assert part.loss_B.tolist() == list(plain.update(peak_learning_rate=0.01).losses)
    for weight in made.weights.values():
        weight.grad = None
    batch = made.batches[0]
    loss_B = flow.loss(
        toy,
        batch.latent_BCHW,
        batch.joint_BLD,
        batch.pooled_BP,
        sigma_B=part.sigma_B,
        noise_BCHW=noise(batch.latent_BCHW.shape, seed=5, k=0),
    )
    (loss_B * 2 / (math.pi * (1 - 2 * part.sigma_B + 2 * part.sigma_B**2))).mean().backward()
    assert torch.allclose(weighted, toy.a.grad)  # type: ignore[arg-type]


def test_a_perturbed_input_keeps_its_target() -> None:
    """The model sees noise + extra; the right answer is the noise without it; what is added follows (seed, k)."""
    latent, n, extra, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5), torch.tensor([0.5])
    seen: list[Tensor] = []

    def model(noisy: Tensor, *_: Tensor) -> Tensor:
        seen.append(noisy)
        return n - latent

    loss = flow.loss(model, latent, torch.zeros(1, 1, 1), torch.zeros(1, 1), sigma_B=sigma, noise_BCHW=n, extra_BCHW=extra)
    assert float(loss) == 0
    assert torch.equal(seen[0], torch.full((1, 1, 2, 2), 0.75))
    records = [engine(perturbation=p)[0].update(peak_learning_rate=0.01).losses for p in (0.0, 0.1, 0.1)]
    assert records[1] == records[2] != records[0]


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_the_manifest_shows_what_is_drawn(bench: Workbench) -> None:
    """Its histogram of 10,000 levels is that of the settings; shifts by size are named; with one shift for all it says what could be."""
    uniform = bench.trainer(flow_use_uniform_schedule=True, flow_schedule_shift=1.0).manifest
    assert sum(uniform.levels) == 10_000
    assert uniform.levels == pytest.approx((1000,) * 10, abs=20)
    assert "tenth from picture to noise: 10 10 10 10 10 10 10 10 10 10; shift 1" in str(uniform)
    shifted = bench.trainer().manifest
    share = torch.special.ndtr(torch.logit(unshifted(torch.tensor(0.5).double(), 3.0)))
    assert sum(shifted.levels[:5]) == pytest.approx(10_000 * float(share), abs=20)
    auto = bench.trainer(flow_schedule_auto_shift=True).manifest
    assert dict(auto.shifts) == {"64x64": sigmas.auto_factor(8, 8), "80x48": sigmas.auto_factor(6, 10)}
    assert "2 sizes share one shift; flow_schedule_auto_shift: true gives each its own" in str(shifted)
    assert "sizes share" not in str(auto)
    assert "shift 64x64: 1.58, 80x48: 1.58" in str(auto)


def test_an_offset_that_would_be_ignored_is_refused(bench: Workbench, tmp_path: Path) -> None:
    """It moves the logit-normal alone: with a uniform draw the plan says so and names both."""
    data = tmp_path / "datasets.yaml"
    data.write_text(
        f"- {{id: some, instance_data_dir: {bench.datasets.parent / 'train'}, resolution: 64, timestep_sampling_offset: 1.5}}\n"
    )
    assert st.plan(st.discover(data), bench.config()).train
    with pytest.raises(st.DataError, match=r"some: timestep_sampling_offset .* and flow_use_uniform_schedule draws otherwise"):
        st.plan(st.discover(data), bench.config(flow_use_uniform_schedule=True))


def test_evaluation_looks_where_training_does(bench: Workbench) -> None:
    """The levels of an evaluation are the ladder of the chosen distribution with the chosen shift."""
    beta = bench.trainer(flow_use_beta_schedule=True, flow_beta_schedule_beta=5.0, flow_schedule_auto_shift=True)
    wanted = sigmas.ladder(2, spread=Spread("beta", beta=5.0), factor=sigmas.auto_factor(8, 8))
    assert beta.evaluate().sigmas == pytest.approx(wanted)
    listed = bench.trainer(flow_custom_timesteps=(250, 750), flow_timesteps_mode="round-robin")
    assert listed.evaluate().sigmas == (0.25, 0.75)
    assert listed.step().sigmas == (0.25, 0.75)
