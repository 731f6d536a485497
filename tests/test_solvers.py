"""Walking down a path: laws of the solvers, and diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from sd3tune.training import flow, solvers
from sd3tune.training.rollout import grid, path

KINDS: list[tuple[Any, int]] = [("euler", 1), ("dpm", 1), ("dpm", 2), ("unipc", 1), ("unipc", 2)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walk(velocity: Callable[..., Tensor], start: Tensor, paths: list[tuple[float, ...]], kind: tuple[Any, int] = ("euler", 1)) -> Tensor:
    text = torch.arange(float(len(start))).view(-1, 1, 1)
    return solvers.walk(velocity, start, text, text[:, 0], paths=paths, sampler=kind[0], order=kind[1])


def bent(noisy: Tensor, sigma: Tensor, *_: Tensor) -> Tensor:
    """A velocity that no solver follows exactly."""
    return torch.tanh(noisy) + torch.sin(3 * sigma).view(-1, 1, 1, 1) * noisy


@pytest.mark.parametrize("kind", KINDS)
def test_on_straight_lines_all_land_on_the_mixture(kind: tuple[Any, int]) -> None:
    """A model that knows picture and noise: whatever the levels and however many, the end is (1 - sigma) x + sigma n."""
    latent, noise = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    paths = [(1.0, 0.9, 0.7, 0.2), (0.95, 0.9, 0.4), (0.5, 0.3)]
    start = flow.mix(latent, noise, torch.tensor([p[0] for p in paths]))
    wanted = flow.mix(latent, noise, torch.tensor([p[-1] for p in paths]))
    row = torch.arange(3)

    def straight(noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return (noise - latent)[row[text.flatten().long()]]

    assert torch.allclose(walk(straight, start, paths, kind), wanted, atol=2e-6)
    assert (start - wanted).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "order"), [(("euler", 1), 1), (("dpm", 1), 1), (("dpm", 2), 2), (("unipc", 1), 2), (("unipc", 2), 3)])
def test_order_of_convergence(kind: tuple[Any, int], order: int) -> None:
    """dz / d sigma = 2 z from 0.8 to 0.2: halving the steps divides the error by 2^order; the corrector adds one to unipc's."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = math.exp(2 * (0.2 - 0.8))

    def error(steps: int) -> float:
        levels = tuple(torch.linspace(0.8, 0.2, steps + 1, dtype=torch.float64).tolist())
        doubled = solvers.walk(Linear(), start, start[:, 0], start[:, 0, 0], paths=[levels], sampler=kind[0], order=kind[1])
        return abs(float(doubled) - exact)

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.2)


class Linear:
    """Twice the point, with all the digits that float64 has."""

    def __call__(self, noisy: Tensor, *_: Tensor) -> Tensor:
        return Wide(2 * noisy)


class Wide(Tensor):
    """A tensor that stays float64 when a solver asks for float32."""

    def float(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor)


STOCK: list[tuple[Any, int, Any, dict[str, Any]]] = [
    ("unipc", 1, UniPCMultistepScheduler, {}), ("unipc", 2, UniPCMultistepScheduler, {}),
    ("dpm", 1, DPMSolverMultistepScheduler, {}), ("dpm", 2, DPMSolverMultistepScheduler, {"euler_at_final": False}),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "order", "stock", "more"), STOCK)
def test_diffusers_walks_the_same(sampler: Any, order: int, stock: Any, more: dict[str, Any]) -> None:
    """Step for step on the stock scheduler's own levels, from pure noise on, short of its last step to 0."""
    scheduler = stock(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order, lower_order_final=False, **more
    )
    scheduler.set_timesteps(12)
    levels = [float(level) for level in scheduler.sigmas]
    here = start = randn(2, 4, 5, 6)
    for step, t in enumerate(scheduler.timesteps[:-1]):
        here = scheduler.step(bent(here, torch.full((2,), levels[step])), t, here, return_dict=False)[0]
        ours = walk(bent, start, [tuple(levels[: step + 2])] * 2, (sampler, order))
        assert torch.allclose(ours, here, atol=2e-5, rtol=1e-4), step
    assert step == 10


def test_the_grid_is_that_of_the_stock_sampler() -> None:
    """28 levels with shifts 1, 3 and by size, to the digits that float32 has."""
    for shift in (1.0, 3.0, 1.88):
        stock = FlowMatchEulerDiscreteScheduler(shift=shift)
        stock.set_timesteps(28)
        assert grid(shift) == pytest.approx(stock.sigmas[:-1].tolist(), abs=1e-6)


def test_a_path_is_the_levels_above_and_the_level_itself() -> None:
    levels = grid(3.0)
    assert path(0.5, 2, (1.0, 0.8, 0.6, 0.4)) == (0.8, 0.6, 0.5)
    assert path(0.6, 2, (1.0, 0.8, 0.6, 0.4)) == (1.0, 0.8, 0.6), "a level of the grid is not above itself"
    assert path(0.9, 3, (1.0, 0.8, 0.6, 0.4)) == (1.0, 0.9), "there is no more to walk"
    assert path(0.5, 0, levels) == (0.5,)
    assert path(1.0, 3, levels) == (1.0,), "pure noise is where a sampler begins"
    assert path(0.0, 3, levels) == (0.0,), "a picture is where it ends"


@pytest.mark.parametrize("kind", KINDS)
def test_images_walk_together_as_they_walk_alone(kind: tuple[Any, int]) -> None:
    """Paths of 0 to 4 steps in any order; step j of all of them is one call, with each image's own level and text."""
    paths = [(0.9, 0.6), (0.95, 0.8, 0.7, 0.5, 0.45), (0.3,), (1.0, 0.8, 0.4, 0.1), (0.9, 0.7, 0.2)]
    start, calls = randn(5, 2, 3, 3), list[tuple[list[float], list[float]]]()

    def velocity(noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        calls.append((sigma.tolist(), pooled.flatten().tolist()))
        return bent(noisy, sigma) + text.view(-1, 1, 1, 1)

    together = walk(velocity, start, paths, kind)
    assert [sorted(texts) for _, texts in calls] == [[0, 1, 3, 4], [1, 3, 4], [1, 3], [1]]
    for step, (levels, texts) in enumerate(calls):
        assert levels == pytest.approx([paths[int(text)][step] for text in texts])
    for place in range(5):
        text = torch.full((1, 1, 1), float(place))
        alone = solvers.walk(velocity, start[place : place + 1], text, text[:, 0], paths=[paths[place]], sampler=kind[0], order=kind[1])
        assert torch.allclose(together[place], alone[0], atol=1e-6)
    assert torch.equal(together[2], start[2])


def test_samplers_and_orders_walk_differently() -> None:
    """After one step all are Euler's; dpm of order 1 is Euler; the others differ from the second step, or where they are corrected."""
    start = randn(1, 4, 5, 6)
    one = [walk(bent, start, [(0.9, 0.7)], kind) for kind in KINDS]
    assert all(torch.equal(ends, one[0]) for ends in one)
    ends = {kind: walk(bent, start, [(0.9, 0.7, 0.5, 0.3)], kind) for kind in KINDS}
    assert torch.equal(ends["euler", 1], ends["dpm", 1])
    different = [ends[kind] for kind in KINDS[1:]]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(different) for b in different[:i])


def test_a_walk_leaves_no_gradient() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    assert not walk(lambda z, *_: weight * z, randn(1, 1, 2, 2), [(0.9, 0.5)]).requires_grad
