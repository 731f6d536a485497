"""The noise level sigma: how it is drawn and shifted.

sigma runs from 0 (the picture) to 1 (pure noise) everywhere. The transformer's own unit, 1000 * sigma, appears only where it is called.

Shapes: B images in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift(sigma: Tensor, factor: float) -> Tensor:
    """Move noise levels towards 1: sigma' = k sigma / (1 + (k - 1) sigma), which fixes 0 and 1.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2; the released models use k = 3.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def logit_normal(quantile: Tensor, scale: float, offset: float = 0.0) -> Tensor:
    """The noise level below which a share ``quantile`` of a logit-normal of middle ``offset`` and spread ``scale`` lies."""
    return torch.sigmoid(offset + scale * torch.special.ndtri(quantile))


def draw(count: int, *, scale: float, factor: float, stratified: bool, rng: torch.Generator, offset: float = 0.0) -> Tensor:
    """Draw ``count`` training noise levels: logit-normal, then shifted.

    Stratified, the unit interval is split into ``count`` parts and each image takes one, so that even a batch of two
    sees a low and a high level; every single level still has the same distribution.

    Returns: sigma_B, float32 in (0, 1), on the generator's device.
    """
    quantile_B = torch.rand(count, generator=rng, dtype=torch.float64)
    if stratified:
        quantile_B = (torch.randperm(count, generator=rng) + quantile_B) / count
    return shift(logit_normal(quantile_B.clamp(1e-6, 1 - 1e-6), scale, offset), factor).float()


def ladder(count: int, *, scale: float, factor: float) -> tuple[float, ...]:
    """Fixed noise levels for evaluation: the middles of ``count`` equal parts of the training distribution."""
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return tuple(shift(logit_normal(quantile, scale), factor).tolist())
