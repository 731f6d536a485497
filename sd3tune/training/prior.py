"""What the base model predicts without its adapter: the target of regularisation pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.models import adapters, lycoris_adapters
from sd3tune.training import flow


class Prior:
    """A velocity with the adapter switched off while it answers; modes of training and evaluation stay as they are."""

    def __init__(self, velocity: flow.Velocity, transformer: nn.Module, network: Any = None) -> None:
        self._velocity, self._transformer, self._network = velocity, transformer, network

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        """The base model's velocity B C H W at these points, without a gradient."""
        with torch.no_grad(), self.base():
            return self._velocity(noisy_BCHW, sigma_B, joint_BLD, pooled_BP)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The model without its adapter, for the duration of the block."""
        with adapters.switched_off(self._transformer) if self._network is None else lycoris_adapters.switched_off(self._network):
            yield
