"""The LoRA inside a transformer: put it in, name its weights, switch it off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TARGETS = {"attention": ("to_q", "to_k", "to_v", "to_out.0")}
"""Linear layers of each choice of ``lora_targets``: the picture stream's attention, in both attentions of SD3.5."""


def lora_config(targets: str, *, rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """peft's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS[targets]), init_lora_weights=True)


def add_lora(transformer: Any, targets: str, *, rank: int, alpha: float, dropout: float, seed: int) -> dict[str, nn.Parameter]:
    """Add a LoRA that changes nothing yet (B is zero) and return its fp32 weights by the name they have in files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(targets, rank=rank, alpha=alpha, dropout=dropout))
    weights = {file_name(name): p for name, p in transformer.named_parameters() if "lora_" in name}
    for weight in weights.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    return weights


def file_name(name: str) -> str:
    """A weight's name without peft's adapter name: ``...to_q.lora_A.default.weight`` is ``...to_q.lora_A.weight``."""
    return name.replace(".default.", ".")


@contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """The base model for the duration of the block."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
