"""The loss of one batch: noise, sigmas and all else that is a function of (seed, k).

Shapes: B images, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd3tune.errors import TrainingError
from sd3tune.processes import Processes
from sd3tune.training import flow, rollout, sigmas
from sd3tune.training.batches import Batch, Batches, generator, noise
from sd3tune.training.rules import Rules

ALONE = Processes()
"""One process."""


@dataclass(frozen=True)
class Part:
    """What was measured of one batch; ``loss_B`` and ``nothing_B`` are 0 for images of other processes until all are summed."""

    ids: tuple[str, ...]
    sigma_B: Tensor
    loss_B: Tensor
    nothing_B: Tensor
    """The loss of predicting zero."""
    regularisation: bool = False
    extra_forwards: int = 0
    """Images that went through the model for a rollout."""


def mean_loss(parts: Sequence[Part], *, regularisation: bool) -> float | None:
    """Mean loss of the pictures of one kind; nothing when there is none."""
    losses = [value for part in parts if part.regularisation == regularisation for value in part.loss_B.tolist()]
    return sum(losses) / len(losses) if losses else None


def share_of_nothing(parts: Sequence[Part]) -> tuple[float, float]:
    """Mean loss over some batches' images, and that of predicting nothing."""
    loss_B, nothing_B = torch.cat([part.loss_B for part in parts]), torch.cat([part.nothing_B for part in parts])
    return float(loss_B.mean()), float(nothing_B.mean())


def forward(
    k: int, batches: Batches, rules: Rules, *, velocity: flow.Velocity, prior: flow.Velocity | None, device: torch.device,
    walker: flow.Velocity | None = None, processes: Processes = ALONE,
) -> tuple[Tensor, Part]:  # fmt: skip
    """The sum of the weighted losses of this process's images of batch ``k``, and what was measured of it. Raises: TrainingError.

    ``walker`` is the velocity as a sampler calls it, for rollouts.
    """
    ids = batches.ids(k)
    places = processes.places(len(ids))
    batch = batches.part(k, places or range(1))
    factor = sigmas.factor_of(rules.shift, *batch.latent_BCHW.shape[2:])
    whole_B = sigmas.draw(
        len(ids), scale=rules.sigmoid_scale, factor=factor, stratified=rules.stratified, rng=generator(rules.seed, k, 4),
        offset=batch.sigma_offset, spread=rules.spread, k=k,
    )  # fmt: skip
    zero_B = torch.zeros(len(ids), device=device)
    part = Part(ids, whole_B, zero_B, zero_B, batch.regularisation)
    if not places:
        return torch.zeros((), device=device), part
    sigma_B, shape = whole_B[list(places)], batch.latent_BCHW.shape
    points = rollout.Points(
        batch.latent_BCHW.float().to(device), noise(shape, seed=rules.seed, k=k, places=places).to(device), sigma_B.to(device),
        batch.joint_BLD.to(device), batch.pooled_BP.to(device),
    )  # fmt: skip
    extra_BCHW = None
    if rules.perturbation:
        extra_BCHW = rules.perturbation * noise(shape, seed=rules.seed, k=k, purpose=8, places=places).to(device)
    paths: tuple[tuple[float, ...], ...] = ()
    if rules.rollout is not None:
        update = k // rules.accumulation
        paths = rules.rollout.paths(sigma_B.tolist(), factor, seed=rules.seed, k=k, update=update, places=places)
    found = _losses(batch, rules, points, extra_BCHW, paths, velocity=velocity, prior=_prior_of(batch, prior), walker=walker or velocity)
    weighted_B = found.learned_B
    if rules.weighting != "none":
        weighted_B = weighted_B * flow.weight(sigma_B, rules.weighting).to(device)
    if batch.regularisation:
        weighted_B = rules.regularisation_weight * weighted_B
    nothing_B, loss_B = rules.measure.of(found.target_BCHW).flatten(1).mean(1), found.loss_B.detach()
    if len(places) < len(ids):
        at = torch.tensor(list(places), device=device)
        loss_B, nothing_B = zero_B.index_copy(0, at, loss_B), zero_B.index_copy(0, at, nothing_B)
    return weighted_B.sum(), replace(part, loss_B=loss_B, nothing_B=nothing_B, extra_forwards=found.passes)


def _losses(
    batch: Batch, rules: Rules, points: rollout.Points, extra_BCHW: Tensor | None, paths: Sequence[Sequence[float]], *,
    velocity: flow.Velocity, prior: flow.Velocity | None, walker: flow.Velocity,
) -> rollout.Losses:  # fmt: skip
    """The losses of a batch, some of whose images may have walked; those are not perturbed."""
    mask_BHW = None if batch.mask_BHW is None else batch.mask_BHW.to(points.latent_BCHW.device)
    rolled = None if rules.rollout is None else rollout.roll(rules.rollout, walker, points, extra_BCHW, paths)
    if rules.rollout is not None and rolled is not None:
        return rollout.loss(
            rules.rollout, rolled, points, velocity, walker, measure=rules.measure, mask_BHW=mask_BHW, mask_normalise=rules.mask_normalise,
            prior=prior,
        )  # fmt: skip
    loss_B = flow.loss(
        velocity, points.latent_BCHW, points.joint_BLD, points.pooled_BP, sigma_B=points.sigma_B, noise_BCHW=points.noise_BCHW,
        measure=rules.measure, extra_BCHW=extra_BCHW, mask_BHW=mask_BHW, mask_normalise=rules.mask_normalise, prior=prior,
    )  # fmt: skip
    return rollout.Losses(loss_B, loss_B, flow.target(points.latent_BCHW, points.noise_BCHW))


def _prior_of(batch: Batch, prior: flow.Velocity | None) -> flow.Velocity | None:
    """What says where the model should stay; nothing for pictures to learn from."""
    if batch.regularisation and prior is None:
        raise TrainingError("a batch is regularisation data, but the engine was not given the base model's velocity (prior)")
    return prior if batch.regularisation else None
