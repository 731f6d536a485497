"""Rollout (scheduled sampling): training on latents that the model itself has walked to, as a sampler will see them.

An image whose noise level is sigma starts as the exact mixture some sampler steps above, and the model as it is now walks it down to sigma.
Which images, and how far, is a function of (seed, k, place).

Shapes: B images, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from sd3tune.training import flow, reflexflow, solvers
from sd3tune.training.batches import generator
from sd3tune.training.sigmas import shift

STEPS = 28
"""Steps of the sampler on whose levels images walk: the default of validation."""

Strategy = Literal["uniform", "biased_early", "biased_late"]


@dataclass(frozen=True)
class Rollout:
    """The numbers of scheduled sampling."""

    max_offset: int
    """Most steps that an image walks."""
    strategy: Strategy = "uniform"
    """``biased_early`` favours few steps, ``biased_late`` many."""
    probability: float = 0.0
    prob_start: float = 0.0
    prob_end: float = 0.0
    ramp_steps: int = 0
    """Updates over which the probability goes from ``prob_start`` to ``prob_end``; it is ``probability`` when 0."""
    start_step: int = 0
    """Updates before which no image is rolled."""
    cosine: bool = False
    """Whether the ramp is half a cosine and not a straight line."""
    sampler: solvers.Sampler = "unipc"
    order: int = 2
    reaimed: bool = True
    """Whether the velocity to find leads from the rolled latent to the picture, (z - x) / sigma, and not from noise to picture, n - x."""
    reflex: reflexflow.Reflex | None = None

    def chance(self, update: int) -> float:
        """The probability that an image of this update (from 0) is rolled."""
        if update < self.start_step:
            return 0.0
        if not self.ramp_steps:
            return self.probability
        done = min((update - self.start_step) / self.ramp_steps, 1.0)
        if self.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return self.prob_start + (self.prob_end - self.prob_start) * done

    @property
    def shares(self) -> tuple[float, ...]:
        """How often a rolled image walks 1, 2, ... ``max_offset`` steps."""
        count = self.max_offset
        weights = {"uniform": [1] * count, "biased_early": range(count, 0, -1), "biased_late": range(1, count + 1)}[self.strategy]
        return tuple(weight / sum(weights) for weight in weights)

    def offsets(self, *, seed: int, k: int, update: int, places: Sequence[int]) -> tuple[int, ...]:
        """How many steps each image of batch ``k`` should walk; 0 for those that are not rolled."""
        chance, bounds = self.chance(update), list(accumulate(self.shares))
        if chance <= 0:
            return (0,) * len(places)
        found = []
        for place in places:
            rolled, far = torch.rand(2, generator=generator(seed, k, 11, place), dtype=torch.float64).tolist()
            found.append(1 + sum(far >= bound for bound in bounds[:-1]) if rolled < chance else 0)
        return tuple(found)

    def paths(
        self, sigmas: Sequence[float], factor: float, *, seed: int, k: int, update: int, places: Sequence[int]
    ) -> tuple[tuple[float, ...], ...]:
        """The noise levels that each image of batch ``k`` goes through, down to its own; that alone for those that are not rolled."""
        levels = grid(factor)
        offsets = self.offsets(seed=seed, k=k, update=update, places=places)
        return tuple(path(sigma, offset, levels) for sigma, offset in zip(sigmas, offsets, strict=True))

    def passes(self, steps: int) -> int:
        """Images that go through the model, besides the one that learns, when one of them walks so many steps."""
        return steps + (self.reflex is not None and self.reflex.needs_bias) if steps else 0

    def expected_passes(self, sigmas: Sequence[float], factor: float) -> float:
        """Mean passes of a rolled image at some noise levels: near pure noise there are fewer steps above than asked for."""
        levels = grid(factor)
        most = [len(path(sigma, self.max_offset, levels)) - 1 for sigma in sigmas]
        sums = [share * sum(self.passes(min(offset, far)) for far in most) for offset, share in enumerate(self.shares, start=1)]
        return sum(sums) / max(len(sigmas), 1)

    def __str__(self) -> str:
        rate = f"{self.probability:g} of the pictures"
        if self.ramp_steps:
            shape, last = "along a cosine" if self.cosine else "in a line", self.start_step + self.ramp_steps
            rate = f"{self.prob_start:g} of the pictures at update {self.start_step} to {self.prob_end:g} at {last} {shape}"
        elif self.start_step:
            rate += f" from update {self.start_step}"
        reflex = "" if self.reflex is None else ", ReflexFlow"
        order = "" if self.sampler == "euler" else f" of order {self.order}"
        aim = "the picture" if self.reaimed else "n - x"
        return (
            f"{rate}, up to {self.max_offset} of {STEPS} sampler steps ({self.strategy}) by {self.sampler}{order}, aimed at {aim}{reflex}"
        )


def grid(factor: float) -> tuple[float, ...]:
    """The noise levels of a sampler of 28 steps, falling, without the last 0. Source: diffusers' FlowMatchEulerDiscreteScheduler."""
    least = float(shift(torch.tensor(1e-3, dtype=torch.float64), factor))
    return tuple(shift(torch.linspace(1, least, STEPS, dtype=torch.float64), factor).tolist())


def path(sigma: float, offset: int, levels: Sequence[float]) -> tuple[float, ...]:
    """``offset`` levels above ``sigma`` (as many as there are), then ``sigma`` itself. A picture and pure noise stay where they are."""
    above = [level for level in levels if level > sigma] if sigma > 0 else []
    return (*above[max(len(above) - offset, 0) :], sigma)


@dataclass(frozen=True)
class Points:
    """Pictures, the noise that they are mixed with, how much of it, and their texts."""

    latent_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    joint_BLD: Tensor
    pooled_BP: Tensor

    def at(self, places: Tensor) -> Points:
        """Some of them."""
        return Points(*(value[places] for value in vars(self).values()))


@dataclass(frozen=True)
class Rolled:
    """What the model sees of a batch when some of its images have walked."""

    noisy_BCHW: Tensor
    places_R: Tensor
    """Which of them."""
    steps: int
    """How many all of them together."""


def roll(
    rollout: Rollout, walker: flow.Velocity, points: Points, extra_BCHW: Tensor | None, paths: Sequence[Sequence[float]]
) -> Rolled | None:
    """Let images walk down their paths; ``extra_BCHW`` is added to the noise of the others. Nothing when none walks."""
    walking = [place for place, path_S in enumerate(paths) if len(path_S) > 1]
    if not walking:
        return None
    seen_BCHW = points.noise_BCHW if extra_BCHW is None else points.noise_BCHW + extra_BCHW
    places_R = torch.tensor(walking, device=seen_BCHW.device)
    some = points.at(places_R)
    source_R = torch.tensor([paths[place][0] for place in walking]).to(some.sigma_B)
    walked_RCHW = solvers.walk(
        walker, flow.mix(some.latent_BCHW, some.noise_BCHW, source_R), some.joint_BLD, some.pooled_BP,
        paths=[paths[place] for place in walking], sampler=rollout.sampler, order=rollout.order,
    )  # fmt: skip
    noisy_BCHW = flow.mix(points.latent_BCHW, seen_BCHW, points.sigma_B).index_copy(0, places_R, walked_RCHW)
    return Rolled(noisy_BCHW, places_R, sum(len(paths[place]) - 1 for place in walking))


@dataclass(frozen=True)
class Losses:
    """The loss of a batch with rolled images, one number per image."""

    loss_B: Tensor
    """The plain error, for the records."""
    learned_B: Tensor
    """What the gradient is of."""
    target_BCHW: Tensor
    """What the plain error is measured against, unless a prior says otherwise."""
    passes: int = 0
    """Images that went through the model besides the ones that learn."""


def loss(
    rollout: Rollout, rolled: Rolled, points: Points, velocity: flow.Velocity, walker: flow.Velocity, *, measure: flow.Measure,
    mask_BHW: Tensor | None, mask_normalise: bool, prior: flow.Velocity | None,
) -> Losses:  # fmt: skip
    """The counterpart of ``flow.loss``. With a ``prior`` the velocity to find is what that predicts of the same points, and that alone."""
    given = rolled.noisy_BCHW, points.sigma_B, points.joint_BLD, points.pooled_BP
    some, here_R = points.at(rolled.places_R), rolled.places_R
    drift_RCHW = rolled.noisy_BCHW[here_R] - some.latent_BCHW
    target_BCHW = flow.target(points.latent_BCHW, points.noise_BCHW)
    if rollout.reaimed and prior is None:
        target_BCHW = target_BCHW.index_copy(0, here_R, drift_RCHW / some.sigma_B.view(-1, 1, 1, 1))
    wanted_BCHW = target_BCHW
    if prior is not None:
        with torch.no_grad():
            wanted_BCHW = prior(*given).float()
    predicted_BCHW = velocity(*given).float()
    loss_B = flow.mean(measure.of(predicted_BCHW - wanted_BCHW), mask_BHW, normalise=mask_normalise)
    if rollout.reflex is None or prior is not None:
        return Losses(loss_B, loss_B, target_BCHW, rolled.steps)
    bias_RCHW, passes = None, rolled.steps
    if rollout.reflex.needs_bias:
        with torch.no_grad():
            exact_RCHW = flow.mix(some.latent_BCHW, some.noise_BCHW, some.sigma_B)
            bias_RCHW = walker(exact_RCHW, some.sigma_B, some.joint_BLD, some.pooled_BP).float() - predicted_BCHW.detach()[here_R]
        passes += len(here_R)
    refined_R = reflexflow.loss(
        rollout.reflex, predicted_BCHW[here_R], wanted_BCHW[here_R], drift_BCHW=drift_RCHW, sigma_B=some.sigma_B, bias_BCHW=bias_RCHW,
        measure=measure, mask_BHW=None if mask_BHW is None else mask_BHW[here_R], mask_normalise=mask_normalise,
    )  # fmt: skip
    return Losses(loss_B, loss_B.index_copy(0, here_R, refined_R), target_BCHW, passes)
