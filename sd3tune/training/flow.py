"""Rectified flow: the straight path from picture to noise, and the loss for following it.

Shapes: B images, C latent channels (16), H x W latent pixels (image pixels / 8), L text tokens, D joint text width,
P pooled text width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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


def loss(velocity: Velocity, latent_BCHW: Tensor, joint_BLD: Tensor, pooled_BP: Tensor, *, sigma_B: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, one number per image; the true velocity has loss 0.

    Noise and sigma come in as arguments, so that training, evaluation and tests share this function.

    Returns: loss_B, float32.
    """
    predicted_BCHW = velocity(mix(latent_BCHW, noise_BCHW, sigma_B), sigma_B, joint_BLD, pooled_BP)
    return (predicted_BCHW.float() - target(latent_BCHW, noise_BCHW).float()).square().flatten(1).mean(1)
