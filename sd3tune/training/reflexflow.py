"""ReflexFlow: what a rolled image teaches besides its velocity error.

After arXiv:2512.04904 (its authors go on with it as arXiv:2606.28226), which adds two terms: anti-drift rectification turns the
prediction towards the picture, seen from where the walk ended, and frequency compensation weighs the error by the exposure bias, that is
by how much the prediction changes between the exact point and the rolled one. Both are scaled here so that a rolled image counts as
much as another one; the scales are ours.

Shapes: B images, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd3tune.training import flow


@dataclass(frozen=True)
class Reflex:
    """How much of each term."""

    alpha: float
    """How much more a frequency counts that the bias is made of."""
    beta1: float
    """Share of anti-drift rectification,"""
    beta2: float
    """beside this share of the velocity error."""

    @property
    def needs_bias(self) -> bool:
        """Whether the prediction at the exact point is needed, which is one more pass of the model."""
        return self.alpha > 0 and self.beta2 > 0


def loss(
    reflex: Reflex, predicted_BCHW: Tensor, wanted_BCHW: Tensor, *, drift_BCHW: Tensor, sigma_B: Tensor, bias_BCHW: Tensor | None,
    measure: flow.Measure, mask_BHW: Tensor | None, mask_normalise: bool,
) -> Tensor:  # fmt: skip
    """(beta2 x frequency-weighted velocity error + beta1 x anti-drift error) / (beta1 + beta2), one number per image.

    ``drift_BCHW`` leads from the picture to the rolled latent, ``bias_BCHW`` is the prediction at the exact point minus that at the rolled.
    """
    error_BCHW = counted(predicted_BCHW - wanted_BCHW, mask_BHW)
    if bias_BCHW is not None:
        error_BCHW = weighted(error_BCHW, spectrum_weight(counted(bias_BCHW, mask_BHW), reflex.alpha))
    velocity_B = flow.mean(measure.of(error_BCHW), mask_BHW, normalise=mask_normalise)
    aim_BCHW = drift_BCHW / sigma_B.view(-1, 1, 1, 1)
    anti_drift_B = anti_drift(predicted_BCHW, aim_BCHW, mask_BHW, normalise=mask_normalise)
    return (reflex.beta2 * velocity_B + reflex.beta1 * anti_drift_B) / (reflex.beta1 + reflex.beta2)


def anti_drift(predicted_BCHW: Tensor, aim_BCHW: Tensor, mask_BHW: Tensor | None = None, *, normalise: bool = True) -> Tensor:
    """|v / |v| - a / |a||^2 for each image, times the mean square of ``a``: what a small error across ``a`` costs in the plain loss.

    An error along ``a`` costs nothing.
    """
    predicted, aim = counted(predicted_BCHW, mask_BHW), counted(aim_BCHW, mask_BHW)
    if mask_BHW is not None:
        predicted, aim = predicted * mask_BHW[:, None].sqrt(), aim * mask_BHW[:, None].sqrt()
    predicted, aim = predicted.flatten(1), aim.flatten(1)
    apart_B = (_unit(predicted) - _unit(aim)).square().sum(1)
    return apart_B * flow.mean(aim_BCHW.square(), mask_BHW, normalise=normalise)


def spectrum_weight(bias_BCHW: Tensor, alpha: float) -> Tensor:
    """The weight B 1 H W of each frequency: (1 + alpha a / mean a) / (1 + alpha), ``a`` the bias' amplitude there; 1 on average.

    The amplitude is the root mean square over the channels and over a ring of one cycle per longer side, since that of a single
    frequency of a single image is mostly chance.
    """
    power_BHW = torch.fft.fft2(bias_BCHW, norm="ortho").abs().square().mean(1)
    rings = _rings(*power_BHW.shape[1:])
    sizes_R = torch.bincount(rings.flatten()).to(power_BHW)
    ring_HW = rings.to(power_BHW.device)
    sums_BR = power_BHW.new_zeros(len(power_BHW), len(sizes_R)).index_add_(1, ring_HW.flatten(), power_BHW.flatten(1))
    amplitude_BHW = (sums_BR / sizes_R).sqrt()[:, ring_HW]
    mean_B11 = amplitude_BHW.mean((1, 2), keepdim=True)
    relative_BHW = torch.where(mean_B11 > 0, amplitude_BHW / torch.where(mean_B11 > 0, mean_B11, 1), 1)
    weight_BHW: Tensor = (1 + alpha * relative_BHW) / (1 + alpha)
    return weight_BHW[:, None]


def weighted(error_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """The error whose square sums to that of each frequency times its weight."""
    weighted_BCHW: Tensor = torch.fft.ifft2(torch.fft.fft2(error_BCHW) * weight_B1HW.sqrt()).real
    return weighted_BCHW


def counted(value_BCHW: Tensor, mask_BHW: Tensor | None) -> Tensor:
    """Zero where a mask is black, so that nothing of it spreads over its frequencies."""
    return value_BCHW if mask_BHW is None else torch.where(mask_BHW[:, None] > 0, value_BCHW, 0)


def _rings(height: int, width: int) -> Tensor:
    """How many cycles each frequency of H x W has over the longer side, rounded."""
    longer = max(height, width)
    down, across = torch.fft.fftfreq(height, dtype=torch.float64) * longer, torch.fft.fftfreq(width, dtype=torch.float64) * longer
    rings = torch.hypot(down[:, None], across[None, :]).round().long()
    numbered: Tensor = torch.unique(rings, return_inverse=True)[1]
    return numbered


def _unit(vector_BN: Tensor) -> Tensor:
    length_B1: Tensor = torch.linalg.vector_norm(vector_BN, dim=1, keepdim=True)
    return vector_BN / length_B1.clamp(min=1e-12)
