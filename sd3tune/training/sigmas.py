"""The noise level sigma: how it is drawn and shifted.

sigma runs from 0 (the picture) to 1 (pure noise) everywhere. The transformer's own unit, 1000 * sigma, appears only where it is called.

Shapes: B images in a batch; H x W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sd3tune.training.spreads import Spread


def shift(sigma: Tensor, factor: float) -> Tensor:
    """Move noise levels towards 1: sigma' = k sigma / (1 + (k - 1) sigma), which fixes 0 and 1.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2; the released models use k = 3.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def auto_factor(height: int, width: int) -> float:
    """The shift of a latent of H x W: exp(mu), mu linear in its tokens from 256 -> 0.5 to 4096 -> 1.15 and beyond.

    Source: the schedulers of the released models (base_shift, max_shift, base_image_seq_len, max_image_seq_len).
    """
    tokens = (height / 2) * (width / 2)
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def factor_of(fixed: float | None, height: int, width: int) -> float:
    """The shift of a latent of H x W: ``fixed``, or by its size when that is ``None``."""
    return auto_factor(height, width) if fixed is None else fixed


def common_factor(fixed: float | None, sizes: Iterable[tuple[int, int]]) -> float:
    """One shift for latents of several sizes H x W: the geometric mean of theirs, that of the mean number of tokens."""
    if fixed is not None:
        return fixed
    exponents = [math.log(auto_factor(height, width)) for height, width in sizes]
    return math.exp(math.fsum(exponents) / len(exponents))


def draw(
    count: int, *, factor: float, stratified: bool, rng: torch.Generator, scale: float = 1.0, offset: float = 0.0,
    spread: Spread | None = None, k: int = 0,
) -> Tensor:  # fmt: skip
    """Draw ``count`` training noise levels: of ``spread`` (a logit-normal of ``scale`` when left out), then shifted.

    Stratified, the unit interval is split into ``count`` parts and each image takes one, so that even a batch of two
    sees a low and a high level; every single level still has the same distribution. Levels of a list are not shifted.

    Returns: sigma_B, float32 in (0, 1), on the generator's device.
    """
    spread = spread or Spread(scale=scale)
    if spread.kind == "round-robin":
        return spread.turn(count, k).float()
    quantile_B = torch.rand(count, generator=rng, dtype=torch.float64)
    if stratified:
        quantile_B = (torch.randperm(count, generator=rng) + quantile_B) / count
    level_B = spread.at(quantile_B.clamp(1e-6, 1 - 1e-6), offset)
    return (level_B if spread.listed else shift(level_B, factor)).float()


def ladder(count: int, *, factor: float, scale: float = 1.0, spread: Spread | None = None) -> tuple[float, ...]:
    """Fixed noise levels for evaluation: the middles of ``count`` equal parts of the training distribution, or the levels of a list."""
    spread = spread or Spread(scale=scale)
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if spread.listed:
        return tuple(dict.fromkeys(sorted(spread.at(quantile).tolist())))
    return tuple(shift(spread.at(quantile), factor).tolist())


def tenths(sigma_B: Tensor) -> tuple[int, ...]:
    """How many levels lie in each tenth of 0 to 1."""
    return tuple(torch.histc(sigma_B.double(), bins=10, min=0, max=1).long().tolist())
