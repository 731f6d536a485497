"""The LoRA inside a transformer: put it in, and name its weights."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from torch import nn

from sd3tune.errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of ``lora_targets: attention``: the picture stream's attention, in both attentions of SD3.5."""

Targets = str | tuple[str, ...]
"""``"attention"``, or the name endings of the linear layers that get an adapter."""


def endings(targets: Targets) -> list[str]:
    """The name endings that peft looks for."""
    return list(ATTENTION if targets == "attention" else targets)


def lora_config(targets: Targets, *, rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """peft's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=endings(targets), init_lora_weights=True)


def check_targets(transformer: Any, targets: Targets) -> None:
    """Raises: ConfigError for each ending that no linear layer of the model has, with the nearest one."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    parts = [re.sub(r"^\w+\.\d+\.", "", name).split(".") for name in names]
    known = {".".join(part[i:]) for part in parts for i in range(len(part)) if part[i].isidentifier()}
    problems = []
    for ending in endings(targets):
        if not any(name == ending or name.endswith("." + ending) for name in names):
            close = difflib.get_close_matches(ending, sorted(known), n=1, cutoff=0.6)
            better = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted({'.'.join(part) for part in parts}))}"
            problems.append(f"lora_targets: no linear layer of this model is called {ending!r}; {better}")
    if problems:
        raise ConfigError(problems)


def add_lora(transformer: Any, targets: Targets, *, rank: int, alpha: float, dropout: float, seed: int) -> dict[str, nn.Parameter]:
    """Add a LoRA that changes nothing yet (B is zero) and return its fp32 weights by the name they have in files.

    Raises: ConfigError when the targets name no layer of this model.
    """
    check_targets(transformer, targets)
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
