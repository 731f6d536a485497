"""The SD3 transformer as the function that training and sampling need.

Shapes: B images, C latent channels, H x W latent pixels, L tokens, D their width, P pooled width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class TransformerVelocity:
    """The SD3 transformer as a function of sigma; the one place where sigma becomes the transformer's 1000 * sigma."""

    def __init__(self, transformer: Any, dtype: torch.dtype) -> None:
        self.transformer, self._dtype = transformer, dtype

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        """Predicted velocity B C H W. The timestep stays float32: bf16 would tell the model another noise level."""
        device = noisy_BCHW.device
        mixed = self._dtype != torch.float32
        with torch.autocast(device.type, self._dtype) if mixed else nullcontext():
            return self.transformer(  # type: ignore[no-any-return]
                hidden_states=noisy_BCHW.to(self._dtype), timestep=1000 * sigma_B, encoder_hidden_states=joint_BLD.to(self._dtype),
                pooled_projections=pooled_BP.to(self._dtype), return_dict=False,
            )[0]  # fmt: skip


class SamplerVelocity:
    """A velocity as a sampler calls it, without dropout and without a gradient; modes of training and evaluation come back."""

    def __init__(self, velocity: TransformerVelocity, network: Any = None) -> None:
        self._velocity, self._models = velocity, [velocity.transformer, *([] if network is None else [network])]

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        """The velocity B C H W at these points."""
        training = [model.training for model in self._models]
        try:
            for model in self._models:
                model.eval()
            with torch.no_grad():
                return self._velocity(noisy_BCHW, sigma_B, joint_BLD, pooled_BP)
        finally:
            for model, was in zip(self._models, training, strict=True):
                model.train(was)
