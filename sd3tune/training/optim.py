"""The learning rate as a function of the update, and the optimizer's state without pickles."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def learning_rate(update: int, *, peak: float, schedule: str, warmup: int, total: int) -> float:
    """Rate of ``update`` (from 0): linear warm-up (not for ``constant``), then flat or half a cosine that ends near zero."""
    if schedule == "constant":
        return peak
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant_with_warmup":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup)))


def new_adamw(weights: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with PyTorch's defaults over fp32 weights."""
    return torch.optim.AdamW(list(weights.values()), lr=0.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Every tensor the optimizer remembers, as ``name/what``."""
    return {
        f"{name}/{what}": value.detach().clone()
        for name, weight in weights.items()
        for what, value in optimizer.state.get(weight, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`; on the weights' devices, the step counters stay where they are."""
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        weight = weights[name]
        optimizer.state[weight][what] = value.clone() if what == "step" else value.clone().to(weight.device)
