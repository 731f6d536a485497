"""The LoRA inside a transformer: put it in, and name its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sd3tune.errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of ``lora_targets: attention``: the picture stream's attention, in both attentions of SD3.5."""

CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The text stream's attention, which ``attention+context`` adds."""

FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
MODULATION = ("norm1.linear", "norm1_context.linear")
"""What ``all-linear`` adds beyond that: every linear layer of the blocks."""

PRESETS = {"attention": ATTENTION, "attention+context": ATTENTION + CONTEXT, "all-linear": ATTENTION + CONTEXT + FEED_FORWARD + MODULATION}

Targets = str | tuple[str, ...]
"""The name of a preset, or the name endings of the linear layers that get an adapter."""


@dataclass(frozen=True)
class Spec:
    """What a LoRA is made of."""

    targets: Targets
    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False
    init: str = "default"
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for layers whose name ends so; alpha / rank is the same everywhere."""


def endings(targets: Targets) -> list[str]:
    """The name endings that peft looks for."""
    return list(PRESETS[targets] if isinstance(targets, str) else targets)


def lora_config(spec: Spec) -> Any:
    """peft's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=endings(spec.targets), use_dora=spec.dora,
        rank_pattern=dict(spec.ranks), alpha_pattern={ending: spec.alpha / spec.rank * rank for ending, rank in spec.ranks.items()},
        init_lora_weights=True if spec.init == "default" else spec.init,
    )  # fmt: skip


def check_targets(transformer: Any, targets: Targets, ranks: Iterable[str] = ()) -> None:
    """Raises: ConfigError for each ending that no linear layer of the model has, with the nearest one, and for ranks of no adapter."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    parts = [re.sub(r"^\w+\.\d+\.", "", name).split(".") for name in names]
    known = {".".join(part[i:]) for part in parts for i in range(len(part)) if part[i].isidentifier()}
    problems = []
    for ending in endings(targets):
        if not any(name == ending or name.endswith("." + ending) for name in names):
            close = difflib.get_close_matches(ending, sorted(known), n=1, cutoff=0.6)
            better = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted({'.'.join(part) for part in parts}))}"
            problems.append(f"lora_targets: no linear layer of this model is called {ending!r}; {better}")
    chosen = [name for name in names if any(name == ending or name.endswith("." + ending) for ending in endings(targets))]
    for pattern in ranks:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in chosen):
            problems.append(f"lora_rank_pattern: no layer that gets an adapter has a name that ends with {pattern!r}; see lora_targets")
    if problems:
        raise ConfigError(problems)


def add_lora(transformer: Any, spec: Spec, *, seed: int) -> dict[str, nn.Parameter]:
    """Add a LoRA that changes nothing yet (B is zero) and return its fp32 weights by the name they have in files.

    Raises: ConfigError when the targets name no layer of this model.
    """
    check_targets(transformer, spec.targets, spec.ranks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(spec))
    weights = weights_in(transformer)
    for weight in weights.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    return weights


def weights_in(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the LoRA that a transformer holds, by the name they have in files."""
    return {file_name(name): p for name, p in transformer.named_parameters() if "lora_" in name}


@contextmanager
def switched_off(transformer: nn.Module) -> Iterator[None]:
    """The transformer without its LoRA, for the duration of the block; bit for bit what it was before `add_lora`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def scaled(transformer: nn.Module, strength: float) -> Iterator[None]:
    """A share of the LoRA's change, for the duration of the block; 1 is the whole, bit for bit."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)] if strength != 1 else []
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: strength * scale for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def file_name(name: str) -> str:
    """A weight's name without peft's adapter name: ``...to_q.lora_A.default.weight`` is ``...to_q.lora_A.weight``.

    A DoRA's magnitudes are called ``...to_q.lora_magnitude_vector``, as peft writes them.
    """
    plain = name.replace(".default.", ".")
    return plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain
