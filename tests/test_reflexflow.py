"""ReflexFlow: each term against what it should do, and only on rolled pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_rollout import ALWAYS, Sided, rolled
from torch import Tensor

from sd3tune.training import flow, reflexflow
from sd3tune.training.batches import noise
from sd3tune.training.reflexflow import Reflex, anti_drift, spectrum_weight, weighted


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(height: int, width: int, down: int, across: int) -> Tensor:
    """One frequency, in every channel."""
    y, x = torch.arange(height) / height, torch.arange(width) / width
    return torch.cos(2 * torch.pi * (down * y[:, None] + across * x[None])).expand(1, 4, height, width)


# --- anti-drift ------------------------------------------------------------------------------------------------------


def test_anti_drift_is_about_direction_alone() -> None:
    """Nothing for any positive multiple of the aim, the most for its opposite; the prediction's own size does not matter."""
    aim = randn(3, 4, 8, 6)
    square_B = aim.square().flatten(1).mean(1)
    assert torch.allclose(anti_drift(7.0 * aim, aim), torch.zeros(3), atol=1e-6)
    assert torch.allclose(anti_drift(-0.1 * aim, aim), 4 * square_B, rtol=1e-5)
    other = randn(3, 4, 8, 6, seed=1)
    assert torch.allclose(anti_drift(other, aim), anti_drift(100 * other, aim), rtol=1e-4)
    cosine_B = torch.nn.functional.cosine_similarity(other.flatten(1), aim.flatten(1))
    assert torch.allclose(anti_drift(other, aim), 2 * (1 - cosine_B) * square_B, rtol=1e-4)


def test_a_small_error_across_costs_what_it_costs_in_the_plain_loss() -> None:
    """At any size of picture: the ratio to the mean square of the error tends to 1 across the aim, and to 0 along it."""
    for side in (4, 32):
        aim, error = randn(2, 4, side, side), randn(2, 4, side, side, seed=1)
        flat, along = aim.flatten(1), error.flatten(1)
        across = along - (along * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True) * flat
        error = 0.01 * across.view_as(aim)
        assert torch.allclose(anti_drift(aim + error, aim), error.square().flatten(1).mean(1), rtol=1e-2)
        assert (anti_drift(1.01 * aim, aim) < 1e-6).all()


def test_the_gradient_turns_the_prediction_towards_the_aim() -> None:
    """A step against it raises the cosine, and the gradient has no part along the prediction."""
    predicted, aim = randn(1, 4, 6, 6).requires_grad_(), randn(1, 4, 6, 6, seed=1)
    (gradient,) = torch.autograd.grad(anti_drift(predicted, aim).sum(), predicted)
    assert float((gradient * predicted).sum().detach()) == pytest.approx(0, abs=1e-5)
    moved = predicted.detach() - 0.1 * gradient / gradient.norm()
    assert anti_drift(moved, aim) < anti_drift(predicted.detach(), aim)


# --- frequencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (5, 7), (16, 9)])
def test_weights_are_1_on_average_and_real(shape: tuple[int, int]) -> None:
    """Whatever the bias: an error that is alike in all frequencies costs what it costs without."""
    bias, error = randn(3, 4, *shape) + 5, randn(3, 400, *shape, seed=1)
    weight = spectrum_weight(bias, 3.0)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(3), atol=1e-5)
    assert (weight > 0).all()
    spread = torch.fft.ifft2(torch.fft.fft2(error) * weight.sqrt())
    assert spread.imag.abs().max() < 1e-5, "frequencies f and -f have one weight"
    assert torch.allclose(weighted(error, weight).square().mean((1, 2, 3)), error.square().mean((1, 2, 3)), rtol=0.05)


def test_a_frequency_counts_as_the_bias_has_it() -> None:
    """A bias of one slow wave: errors of that wave cost (1 + alpha N / ring) / (1 + alpha), of others 1 / (1 + alpha)."""
    alpha, count = 2.0, 16 * 16
    weight = spectrum_weight(0.3 * wave(16, 16, 0, 2), alpha)
    ring = 12  # frequencies whose distance from 0 rounds to 2
    for down, across, slow in ((0, 2, True), (2, 0, True), (0, 5, False), (7, 7, False), (0, 0, False)):
        error = wave(16, 16, down, across)
        cost = float(weighted(error, weight).square().mean() / error.square().mean())
        assert cost == pytest.approx((1 + alpha * slow * count / ring) / (1 + alpha), rel=1e-4), (down, across)
    louder = spectrum_weight(30 * wave(16, 16, 0, 2), alpha)
    assert torch.allclose(weight, louder, rtol=1e-4), "how strong the bias is as a whole does not matter"
    assert torch.equal(spectrum_weight(torch.zeros(1, 4, 8, 8), alpha), torch.ones(1, 1, 8, 8)), "no bias, no preference"


def test_the_weight_grows_with_alpha_and_is_not_lost_in_large_pictures() -> None:
    """At 128 x 128 as at 16 x 16 a bias of low frequencies makes them count several times as much as high ones."""
    for side in (16, 128):
        bias = wave(side, side, 1, 0) + wave(side, side, 0, 2) + 0.1 * randn(1, 4, side, side)
        ratios = [float((w := spectrum_weight(bias, alpha)[0, 0])[1, 0] / w[side // 2, side // 2]) for alpha in (0.0, 1.0, 10.0)]
        assert ratios[0] == 1
        assert ratios[2] > ratios[1] > 3


# --- together --------------------------------------------------------------------------------------------------------


def made_loss(reflex: Reflex, predicted: Tensor, wanted: Tensor, **changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "drift_BCHW": 0.5 * wanted, "sigma_B": torch.full((len(wanted),), 0.5), "bias_BCHW": None, "measure": flow.L2, "mask_BHW": None,
        "mask_normalise": True,
    }  # fmt: skip
    return reflexflow.loss(reflex, predicted, wanted, **{**given, **changes})


def test_a_rolled_picture_counts_as_much_as_another() -> None:
    """A small error across the aim, alike in all frequencies, costs its mean square whatever alpha, beta1 and beta2."""
    wanted = randn(2, 64, 16, 16)
    error = randn(2, 64, 16, 16, seed=1)
    flat = wanted.flatten(1)
    error = error - ((error.flatten(1) * flat).sum(1) / flat.square().sum(1)).view(-1, 1, 1, 1) * wanted
    plain = (0.01 * error).square().flatten(1).mean(1)
    for alpha, beta1, beta2 in ((1.0, 10.0, 1.0), (5.0, 0.0, 3.0), (1.0, 1.0, 0.0), (0.0, 1.0, 100.0)):
        bias = randn(2, 64, 16, 16, seed=2) if alpha else None
        found = made_loss(Reflex(alpha, beta1, beta2), wanted + 0.01 * error, wanted, bias_BCHW=bias)
        assert torch.allclose(found, plain, rtol=0.05)
    assert torch.allclose(made_loss(Reflex(1.0, 10.0, 1.0), wanted, wanted), torch.zeros(2), atol=1e-5)


def test_the_betas_are_shares() -> None:
    predicted, wanted = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8)
    velocity, direction = (made_loss(Reflex(0.0, *betas), predicted, wanted) for betas in ((0.0, 1.0), (1.0, 0.0)))
    assert torch.allclose(velocity, (predicted - wanted).square().flatten(1).mean(1))
    assert torch.allclose(direction, anti_drift(predicted, wanted))
    assert torch.allclose(made_loss(Reflex(0.0, 10.0, 1.0), predicted, wanted), (10 * direction + velocity) / 11)


def test_masks_hide_from_both_terms() -> None:
    """What stands under black changes nothing; white everywhere is no mask; the area is divided out, or not."""
    predicted, wanted, bias = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=2)
    mask = torch.ones(2, 8, 8)
    mask[:, :, 5:] = 0
    mask[:, 0] = 0.5
    reflex, hidden = Reflex(1.0, 3.0, 1.0), 9 * (mask == 0)[:, None]
    before = made_loss(reflex, predicted, wanted, bias_BCHW=bias, mask_BHW=mask)
    after = made_loss(reflex, predicted + hidden, wanted - hidden, bias_BCHW=bias + hidden, mask_BHW=mask)
    assert torch.allclose(before, after, rtol=1e-4)
    area = mask.flatten(1).mean(1)
    assert torch.allclose(
        made_loss(reflex, predicted, wanted, bias_BCHW=bias, mask_BHW=mask, mask_normalise=False), before * area, rtol=1e-4
    )
    white = made_loss(reflex, predicted, wanted, bias_BCHW=bias, mask_BHW=torch.ones(2, 8, 8))
    assert torch.allclose(white, made_loss(reflex, predicted, wanted, bias_BCHW=bias), rtol=1e-4)
    black = made_loss(reflex, predicted.requires_grad_(), wanted, bias_BCHW=bias, mask_BHW=torch.zeros(2, 8, 8))
    assert torch.equal(black, torch.zeros(2))
    black.sum().backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()


def test_only_rolled_pictures_and_only_the_gradient() -> None:
    """The recorded loss is the plain one; what is learned differs for rolled pictures alone, and each costs one pass more."""
    half = replace(ALWAYS, probability=0.5)
    made, _, spy = rolled(half)
    reflexive, _, seen = rolled(replace(half, reflex=Reflex(1.0, 10.0, 1.0)))
    cheap, *_ = rolled(replace(half, reflex=Reflex(0.0, 10.0, 1.0)))
    made.batches = reflexive.batches = cheap.batches = Sided()
    kinds = set()
    for k in range(12):
        walked = [o > 0 for o in half.offsets(seed=5, k=k, update=k // 2, places=range(2))]
        (plain, part), (learned, other), (_, third) = made._forward(k), reflexive._forward(k), cheap._forward(k)
        assert torch.equal(part.loss_B, other.loss_B)
        assert (not torch.equal(plain, learned)) == any(walked)
        assert other.extra_forwards == part.extra_forwards + sum(walked) == third.extra_forwards + sum(walked)
        kinds.add(tuple(walked))
    assert len(kinds) >= 3
    assert sum(map(len, seen.asked)) - sum(map(len, spy.asked)) > 0


def test_the_bias_is_that_of_the_same_noise_level() -> None:
    """The exact mixture at the image's own level is what the extra pass sees: a model without a bias has weight 1 everywhere."""
    made, toy, spy = rolled(replace(ALWAYS, sampler="euler", reflex=Reflex(4.0, 0.0, 1.0)))
    made.batches = Sided()
    _, part = made._forward(0)
    assert torch.equal(spy.asked[-1], part.sigma_B)
    latent = made.batches.part(0, range(2)).latent_BCHW
    assert torch.allclose(spy.points[-1], flow.mix(latent, noise(latent.shape, seed=5, k=0), part.sigma_B))
    made.velocity = made._walker = lambda noisy, sigma, *_: toy.b * torch.ones_like(noisy) + sigma.view(-1, 1, 1, 1)
    loss, part = made._forward(0)
    assert float(loss.detach()) == pytest.approx(float(part.loss_B.sum()), rel=1e-5)
