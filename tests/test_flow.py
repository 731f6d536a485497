"""Noise level, path, target and loss: reference values, diffusers' own, and laws."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sd3tune.training import flow, sigmas
from sd3tune.training.batches import generator
from sd3tune.training.velocity import TransformerVelocity


@pytest.mark.parametrize(("sigma", "shifted"), [(0.5, 0.75), (0.1, 0.25), (0.9, 0.9643), (0.0, 0.0), (1.0, 1.0)])
def test_shift_three_has_the_published_values(sigma: float, shifted: float) -> None:
    """shift 3 of 0.5 / 0.1 / 0.9 is 0.75 / 0.25 / 0.9643; 0 and 1 stay."""
    assert float(sigmas.shift(torch.tensor(sigma), 3.0)) == pytest.approx(shifted, abs=5e-5)


def test_shift_agrees_with_diffusers() -> None:
    """diffusers' timesteps for shift 3 and 6 steps are 1000 times our shift of its unshifted ladder."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 923.3, 818.9, 668.3, 432.2, 8.9], abs=0.06)
    plain = torch.linspace(1.0, scheduler.sigma_min, 6, dtype=torch.float64)
    assert torch.allclose(1000 * sigmas.shift(plain, 3.0).float(), scheduler.timesteps, rtol=1e-6)


def test_path_agrees_with_diffusers() -> None:
    """The noisy latent is diffusers' ``scale_noise`` of the same picture, noise and level."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latent, noise = torch.randn(3, 16, 8, 6), torch.randn(3, 16, 8, 6)
    timesteps = scheduler.timesteps[[10, 500, 900]]
    expected = scheduler.scale_noise(latent, timesteps, noise)
    assert torch.allclose(flow.mix(latent, noise, timesteps / 1000), expected, atol=1e-6)


def test_path_ends_at_picture_and_noise() -> None:
    """sigma 0 is the picture, sigma 1 the noise."""
    latent, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    assert torch.equal(flow.mix(latent, noise, torch.zeros(2)), latent)
    assert torch.equal(flow.mix(latent, noise, torch.ones(2)), noise)


def test_target_is_the_slope_of_the_path() -> None:
    """(z(0.7) - z(0.2)) / 0.5 is the target, for every picture."""
    latent, noise = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    slope = (flow.mix(latent, noise, torch.full((2,), 0.7).double()) - flow.mix(latent, noise, torch.full((2,), 0.2).double())) / 0.5
    assert torch.allclose(slope, flow.target(latent, noise))


def test_true_velocity_has_no_loss_and_an_offset_its_square() -> None:
    """The true velocity has loss exactly 0; being wrong by 0.5 everywhere costs 0.25, image by image."""
    latent, noise, sigma = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    offsets = torch.tensor([0.0, 0.5, 2.0]).view(-1, 1, 1, 1)
    text, pooled = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    exact = flow.loss(lambda *_: noise - latent, latent, text, pooled, sigma_B=sigma, noise_BCHW=noise)
    assert exact.tolist() == [0, 0, 0]
    wrong = flow.loss(lambda *_: noise - latent + offsets, latent, text, pooled, sigma_B=sigma, noise_BCHW=noise)
    assert wrong.tolist() == pytest.approx([0, 0.25, 4], rel=1e-5)


def test_loss_by_hand() -> None:
    """One channel, two pixels, sigma 0.25, a model that answers with what it sees: (0.25 - 0)**2 and (1.75 + 1)**2 on average."""
    latent, noise = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    got = flow.loss(lambda z, *_: z, latent, torch.zeros(1, 1, 1), torch.zeros(1, 1), sigma_B=torch.tensor([0.25]), noise_BCHW=noise)
    assert float(got) == pytest.approx(((0.25 - 1.0) ** 2 + (1.75 - (-1.0)) ** 2) / 2)


def test_transformer_is_told_a_thousand_sigma_in_float32() -> None:
    """Even with bf16 latents the timestep is 1000 sigma to seven digits; bf16 would round 987.4 to 988."""
    seen = {}

    def transformer(**given: torch.Tensor) -> tuple[torch.Tensor]:
        seen.update(given)
        return (given["hidden_states"],)

    velocity = TransformerVelocity(transformer, torch.bfloat16)
    velocity(torch.zeros(1, 16, 2, 2), torch.tensor([0.9874]), torch.zeros(1, 2, 4), torch.zeros(1, 4))
    assert seen["timestep"].dtype == torch.float32
    assert float(seen["timestep"]) == pytest.approx(987.4, abs=1e-3)
    assert seen["hidden_states"].dtype == torch.bfloat16


def test_draws_have_the_logit_normal_distribution() -> None:
    """Unshifted quartiles are sigmoid(-0.674), 1/2, sigmoid(0.674), stratified or not."""
    for stratified in (False, True):
        values = [
            v for k in range(2000) for v in sigmas.draw(4, scale=1.0, factor=1.0, stratified=stratified, rng=generator(1, k)).tolist()
        ]
        expected = [1 / (1 + math.exp(0.6745)), 0.5, 1 / (1 + math.exp(-0.6745))]
        assert statistics.quantiles(values, n=4) == pytest.approx(expected, abs=0.012)


def test_strata_give_each_batch_one_level_of_every_part() -> None:
    """A stratified batch of 4 has exactly one level in each quarter of the distribution, and any place may hold any quarter."""
    places = set()
    for k in range(50):
        drawn = sigmas.draw(4, scale=1.0, factor=3.0, stratified=True, rng=generator(7, k)).double()
        quantiles = torch.special.ndtr(torch.logit(drawn / (3 - 2 * drawn)))
        assert sorted((quantiles * 4).long().tolist()) == [0, 1, 2, 3]
        places.add(int(drawn.argmax()))
    assert places == {0, 1, 2, 3}


def test_ladder_is_the_distribution_in_equal_parts() -> None:
    """The middle of an odd ladder is the shifted median, 0.75 at shift 3; it rises; one level alone is the median."""
    levels = sigmas.ladder(5, scale=1.0, factor=3.0)
    assert levels[2] == pytest.approx(0.75)
    assert list(levels) == sorted(levels)
    assert sigmas.ladder(1, scale=2.0, factor=1.0) == pytest.approx((0.5,))
