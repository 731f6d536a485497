"""AdamW in 8 bytes a weight: all in bf16, with what rounding would lose kept or drawn for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamWBF16(torch.optim.Optimizer):
    """AdamW over bf16 weights: weight + ``rest`` is the exact weight, and moments are rounded up or down at random, right on average.

    The update itself is computed in fp32, as PyTorch's AdamW does. What is drawn in step t is a function of (seed, t).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        self._rng: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        self._rng.clear()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = 0
            state.update({name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq", "rest")})
        state["step"] += 1
        step, rng = state["step"], self._generator(weight.device, state["step"])
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = group["lr"] / (1 - beta1**step)
        divisor = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        exact = weight.float().add_(state["rest"].float())
        exact.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, divisor, value=-scale)
        weight.copy_(exact)
        state["rest"].copy_(randomly_rounded(exact - weight.float(), rng))
        state["exp_avg"].copy_(randomly_rounded(first, rng))
        state["exp_avg_sq"].copy_(randomly_rounded(second, rng))

    def _generator(self, device: torch.device, step: int) -> torch.Generator:
        """The generator of this step; all weights of a device draw from it in turn."""
        if device not in self._rng:
            self._rng[device] = torch.Generator(device).manual_seed((self._seed * 1_000_003 + step) % 2**63)
        return self._rng[device]


def randomly_rounded(value: Tensor, rng: torch.Generator) -> Tensor:
    """fp32 as bf16, up or down with odds by nearness, so that the mean is the value: 16 random bits are added below bf16's last."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, value.shape, generator=rng, device=value.device, dtype=torch.int32)
    return ((bits + noise) & -(2**16)).view(torch.float32).bfloat16()
