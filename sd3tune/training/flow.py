"""Rectified flow: the straight path from picture to noise, and the loss for following it.

Shapes: B images, C latent channels (16), H x W latent pixels (image pixels / 8), L text tokens, D joint text width,
P pooled text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

MODE_SCALE = 1.29
"""The scale of ``mode`` with which Esser et al. had their best results of that kind."""


@dataclass(frozen=True)
class Measure:
    """What an error costs: ``l2`` is its square e^2.

    ``huber`` is 2 c (sqrt(e^2 + c^2) - c): e^2 near zero, 2 c |e| far away. ``smooth_l1`` is that divided by c: e^2 / c, then 2 |e|.
    """

    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    huber_c: float = 0.1

    def of(self, error: Tensor) -> Tensor:
        """The cost of each element."""
        square = error.square()
        if self.loss_type == "l2":
            return square
        cost = 2 * square / ((square + self.huber_c**2).sqrt() + self.huber_c)  # the same without cancellation near zero
        return self.huber_c * cost if self.loss_type == "huber" else cost


L2 = Measure()
"""The default."""


class Velocity(Protocol):
    """Anything that predicts d(latent) / d(sigma): the transformer, or a stand-in in a test."""

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        """The velocity B C H W at these points."""


def mix(latent_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The point at sigma on the straight line from latent to noise: (1 - sigma) x + sigma n."""
    sigma_B111 = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma_B111) * latent_BCHW + sigma_B111 * noise_BCHW


def target(latent_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity of that line: n - x."""
    return noise_BCHW - latent_BCHW


def loss(
    velocity: Velocity, latent_BCHW: Tensor, joint_BLD: Tensor, pooled_BP: Tensor, *, sigma_B: Tensor, noise_BCHW: Tensor,
    measure: Measure = L2, extra_BCHW: Tensor | None = None, mask_BHW: Tensor | None = None, mask_normalise: bool = True,
    prior: Velocity | None = None,
) -> Tensor:  # fmt: skip
    """Mean cost of the predicted velocity's error, one number per image; the true velocity has loss 0.

    Noise and sigma come in as arguments, so that training, evaluation and tests share this function. ``extra_BCHW`` is added
    to the noise that the model sees and not to the noise that it should find. With a ``prior`` the true velocity is what that
    predicts of the same points, without a gradient.

    Returns: loss_B, float32.
    """
    seen_BCHW = noise_BCHW if extra_BCHW is None else noise_BCHW + extra_BCHW
    noisy_BCHW = mix(latent_BCHW, seen_BCHW, sigma_B)
    if prior is None:
        wanted_BCHW = target(latent_BCHW, noise_BCHW)
    else:
        with torch.no_grad():
            wanted_BCHW = prior(noisy_BCHW, sigma_B, joint_BLD, pooled_BP)
    predicted_BCHW = velocity(noisy_BCHW, sigma_B, joint_BLD, pooled_BP)
    return mean(measure.of(predicted_BCHW.float() - wanted_BCHW.float()), mask_BHW, normalise=mask_normalise)


def mean(cost_BCHW: Tensor, mask_BHW: Tensor | None = None, *, normalise: bool = True) -> Tensor:
    """Mean cost of each image, its pixels weighed by a mask of 0 to 1.

    Normalised, it is the mean over what the mask counts, whatever its area; else that times the mask's mean weight. Under a black
    mask it is 0, and so is its gradient.
    """
    if mask_BHW is None:
        return cost_BCHW.flatten(1).mean(1)
    loss_B = (cost_BCHW * mask_BHW[:, None]).flatten(1).mean(1)
    if not normalise:
        return loss_B
    share_B = mask_BHW.flatten(1).mean(1)
    return loss_B / torch.where(share_B > 0, share_B, 1)


def weight(sigma_B: Tensor, scheme: str) -> Tensor:
    """How much an image counts by its noise level, 1 on average over uniform levels; ``none`` is 1 throughout.

    ``cosmap`` is 2 / (pi (1 - 2 sigma + 2 sigma^2)), ``mode`` the density of f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) for uniform u.
    ``sigma_squared`` is 3 sigma^2: the error of the picture that a velocity implies. Source: Esser et al. 2024 (arXiv:2403.03206),
    section 3.1, where the first two are densities to draw from; diffusers' train_dreambooth_lora_sd3.py. Raises: ValueError.
    """
    if scheme == "none":
        return torch.ones_like(sigma_B)
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))
    if scheme == "mode":
        return 1 / (1 + MODE_SCALE * (1 - math.pi / 2 * torch.sin(math.pi * _mode_inverse(sigma_B))))
    if scheme == "sigma_squared":
        return 3 * sigma_B.square()
    raise ValueError(f"unknown weighting {scheme!r}")


def _mode_inverse(sigma_B: Tensor) -> Tensor:
    """The u whose f(u) is sigma: f falls from 1 to 0, so the interval is halved until float32 is exact."""
    low_B, high_B = torch.zeros_like(sigma_B), torch.ones_like(sigma_B)
    for _ in range(26):
        u_B = (low_B + high_B) / 2
        above = 1 - u_B - MODE_SCALE * (torch.cos(math.pi / 2 * u_B).square() - 1 + u_B) > sigma_B
        low_B, high_B = torch.where(above, u_B, low_B), torch.where(above, high_B, u_B)
    return (low_B + high_B) / 2
