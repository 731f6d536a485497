"""The update rules by name, and their state as tensors and plain numbers, without pickles."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.config.optimizers import OPTIMIZERS
from sd3tune.errors import CheckpointError, ConfigError
from sd3tune.training.adamw_bf16 import AdamWBF16

Weights = Mapping[str, nn.Parameter]
Betas = tuple[float, float]
GROUP = "all"
"""Where numbers stand that belong to no single weight; no weight's name is without a dot."""

FUSED = ("cpu", "cuda")
"""Devices with a kernel that does the whole of AdamW at once; it keeps its step counters beside the weights."""

CHOSEN = frozenset({"params", "lr"})
"""Entries of a group that are given anew before each update."""


def _adamw(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.0, betas=betas, fused=weights[0].device.type in FUSED, **options)


def _adamw_bf16(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
    for weight in weights:
        weight.data = weight.data.bfloat16()
    return AdamWBF16(weights, betas=betas, seed=seed, **options)


def _optimi(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
        import optimi

        compiled = weights[0].is_cuda and importlib.util.find_spec("triton") is not None
        made: torch.optim.Optimizer = getattr(optimi, name)(weights, lr=1.0, betas=betas, triton=compiled, **options)
        return made

    return make


def _adafactor(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(weights, lr=1.0, **options)


def _prodigy(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    made: torch.optim.Optimizer = Prodigy(weights, betas=betas, **options)
    return made


def _schedulefree(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(weights, betas=betas, **options)
    made.train()  # always: `averaged` makes copies
    return made  # type: ignore[no-any-return]


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(weights: list[nn.Parameter], betas: Betas, seed: int, **options: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(weights, betas=betas, **options)
        return made

    return make


BUILDERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw, "adamw_bf16": _adamw_bf16, "stableadamw": _optimi("StableAdamW"), "lion": _optimi("Lion"), "adafactor": _adafactor,
    "prodigy": _prodigy, "schedulefree": _schedulefree, "bnb-adamw8bit": _bitsandbytes("AdamW8bit"),
    "bnb-adamw8bit-paged": _bitsandbytes("PagedAdamW8bit"), "bnb-lion8bit": _bitsandbytes("Lion8bit"),
    "bnb-lion8bit-paged": _bitsandbytes("PagedLion8bit"),
}  # fmt: skip
"""Name -> how to build it; what it is told by default is in ``OPTIMIZERS``."""


@dataclass(frozen=True)
class Rule:
    """An update rule with its numbers; what is left out is as in ``OPTIMIZERS``."""

    name: str = "adamw"
    beta1: float | None = None
    beta2: float | None = None
    options: tuple[tuple[str, Any], ...] = ()


def new_optimizer(rule: Rule, weights: Weights, *, seed: int) -> torch.optim.Optimizer:
    """The rule over ``weights`` in one group; its learning rate is set before each update."""
    known = OPTIMIZERS[rule.name]
    own = known.betas or (0.0, 0.0)
    betas = own[0] if rule.beta1 is None else rule.beta1, own[1] if rule.beta2 is None else rule.beta2
    return BUILDERS[rule.name](list(weights.values()), betas, seed, **{**known.options, **dict(rule.options)})


def require(name: str, device: torch.device) -> None:
    """Raises: ConfigError when this machine cannot run the named rule, with what to install or to use instead."""
    if problem := unusable(name, device):
        raise ConfigError([f"optimizer {name} {problem}"], "this machine")


def unusable(name: str, device: torch.device) -> str:
    """Why the named rule cannot run here, found by one step of a small weight; the empty text when it can."""
    known = OPTIMIZERS[name]
    if known.package and importlib.util.find_spec(known.package) is None:
        return f"needs a package that is not installed ({known.package}); pip install 'sd3tune[optimizers]'"
    if known.paged and device.type != "cuda":
        return f"moves its state between GPU and memory, and this is no CUDA GPU; use {known.paged}"
    trial = nn.Parameter(torch.ones(4096, device=device))
    try:
        optimizer = new_optimizer(Rule(name), {"trial": trial}, seed=0)
        trial.grad = torch.ones_like(trial)
        optimizer.step()
    except (RuntimeError, NotImplementedError, ImportError, OSError, AttributeError, ValueError) as error:
        return f"does not work on this machine ({error}); use adamw"
    return ""


# --- weights that are an average -------------------------------------------------------------------------------------


def averaged(optimizer: torch.optim.Optimizer, weights: Weights) -> dict[str, Tensor]:
    """Copies of the weights that are to be judged and saved, where these are not the ones that train; else nothing.

    Schedule-free training evaluates gradients at y and judges x; x is what y was mixed from: y = beta1 x + (1 - beta1) z.
    """
    group = optimizer.param_groups[0]
    if "train_mode" not in group:
        return {}
    share = 1 - 1 / group["betas"][0]
    return {
        name: weight.detach().lerp(state["z"], share) if (state := optimizer.state.get(weight)) else weight.detach().clone()
        for name, weight in weights.items()
    }


AVERAGING = ("schedulefree",)
"""Rules whose weights to be judged are not the ones that train."""


def averaged_of(rule: Rule, adapter: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are to be judged, from the adapter and the optimizer's tensors of a checkpoint of such a rule; see `averaged`."""
    known = OPTIMIZERS[rule.name].betas or (0.0, 0.0)
    share = 1 - 1 / (known[0] if rule.beta1 is None else rule.beta1)
    moved = {name: moments.get(f"{name}/z") for name in adapter}
    return {name: weight if (z := moved[name]) is None else weight.lerp(z, share) for name, weight in adapter.items()}


# --- state without pickles -------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that the optimizer remembers: tensors, and plain numbers, each as ``weight/what`` or, for the group's own, ``all/what``.

    Raises: CheckpointError for what is neither.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for path, value in _entries(optimizer, weights):
        if isinstance(value, Tensor):
            tensors[path] = value.detach().clone()
        elif value is None or isinstance(value, bool | int | float | str):
            numbers[path] = value
        else:
            raise CheckpointError(f"{type(optimizer).__name__}: {path} is a {type(value).__name__}, which no checkpoint can hold")
    return tensors, numbers


def _entries(optimizer: torch.optim.Optimizer, weights: Weights) -> Iterator[tuple[str, Any]]:
    for name, weight in weights.items():
        yield from _leaves(name, optimizer.state.get(weight, {}))
    group, made = optimizer.param_groups[0], optimizer.defaults
    changed = {k: v for k, v in group.items() if k not in CHOSEN and (k not in made or isinstance(v, Tensor) or v != made[k])}
    yield from _leaves(GROUP, changed)


def _leaves(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for what, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(f"{path}/{what}", value)
        else:
            yield f"{path}/{what}", value


def restore_optimizer(
    optimizer: torch.optim.Optimizer, weights: Weights, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Undo `optimizer_state`; step counters stay where they are unless a fused kernel reads them. Raises: CheckpointError."""
    optimizer.state.clear()
    group = optimizer.param_groups[0]
    group.update({key: value for key, value in optimizer.defaults.items() if key not in CHOSEN})
    for path, value in {**numbers, **tensors}.items():
        name, *between, what = path.split("/")
        if name != GROUP and name not in weights:
            raise CheckpointError(f"the checkpoint's optimizer remembers {name}, which this adapter does not have")
        into: dict[str, Any] = group if name == GROUP else optimizer.state[weights[name]]
        for key in between:
            into = into.setdefault(key, {})
        into[what] = _placed(optimizer, None if name == GROUP else weights[name], what, value) if isinstance(value, Tensor) else value


def _placed(optimizer: Any, weight: nn.Parameter | None, what: str, value: Tensor) -> Tensor:
    """A saved tensor where the optimizer wants it; bitsandbytes' moments in memory of its own, which may be paged."""
    if weight is None or (what == "step" and not optimizer.defaults.get("fused")):
        return value.clone()
    if what in ("state1", "state2") and hasattr(optimizer, "get_state_buffer"):
        buffer: Tensor = optimizer.get_state_buffer(weight, dtype=value.dtype)
        return buffer.copy_(value)
    return value.clone().to(weight.device)


# --- clipping --------------------------------------------------------------------------------------------------------


def clip(weights: Weights, most: float, method: str) -> float:
    """Limit the gradient, as a whole (``norm``) or element by element (``value``); its norm before that."""
    if method == "norm":
        return float(nn.utils.clip_grad_norm_(weights.values(), most))
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if math.isfinite(norm):
        nn.utils.clip_grad_value_(weights.values(), most)
    return norm
