"""Beginning with the weights of another adapter's file (``init_lora``) instead of with none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sd3tune.errors import CheckpointError
from sd3tune.models import lora_layouts
from sd3tune.models.adapters import Spec


def begin_with(path: Path, weights: Mapping[str, nn.Parameter], spec: Spec) -> str:
    """Give a new LoRA the change that a file of any known layout makes; a smaller rank is filled up, which changes nothing.

    Returns what was read. Raises: CheckpointError, before anything is changed, when the file does not fit.
    """
    lora = lora_layouts.read(path)
    modules = {name.rsplit(".lora_", 1)[0] for name in weights}
    problems = [f"{name}: unknown key" for name in lora.unknown] + [f"{name}: not finite" for name in lora.not_finite]
    for name, layer in lora.layers.items():
        if name not in modules:
            problems.append(f"{name}: gets no adapter in this run; widen lora_targets")
            continue
        (rank, wide), high = weights[f"{name}.lora_A.weight"].shape, weights[f"{name}.lora_B.weight"].shape[0]
        if (layer.up_OR.shape[0], layer.down_RI.shape[1]) != (high, wide):
            problems.append(f"{name}: changes {layer.up_OR.shape[0]} x {layer.down_RI.shape[1]} values, and this model has {high} x {wide}")
        elif layer.rank > rank:
            problems.append(f"{name}: has rank {layer.rank}, and this run {rank}; set lora_rank: {layer.rank}")
        if (layer.magnitude is not None) != spec.dora:
            problems.append(f"{name}: {'a DoRA; set use_dora: true' if not spec.dora else 'no DoRA; set use_dora: false'}")
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(f"init_lora: {path} does not fit ({len(problems)} problems; it fits {lora.base}):\n  {shown}")
    with torch.no_grad():
        for name, layer in lora.layers.items():
            down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            down[: layer.rank] = layer.down_RI.to(down)
            up[:, : layer.rank] = layer.up_OR.to(up) * (layer.scale / (spec.alpha / spec.rank))
            if layer.magnitude is not None:
                length = weights[f"{name}.lora_magnitude_vector"]
                length.copy_(layer.magnitude.reshape(length.shape))
    return f"{path}: {len(lora.layers)} of {len(modules)} layers begin with what is in this file ({lora.layout})"


def exchange(where: str, weights: Mapping[str, nn.Parameter], held: Mapping[str, Tensor]) -> None:
    """Give an adapter the weights that ``where`` holds, bit for bit. Raises: CheckpointError, before anything is changed."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    odd = sorted({name for name, _ in {(name, value.shape) for name, value in held.items()} ^ set(shapes.items())})
    if odd:
        raise CheckpointError(f"{where}: is of another adapter than the run's settings describe; {len(odd)} weights differ, e.g. {odd[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(held[name])


def begin_lycoris(path: Path, weights: Mapping[str, nn.Parameter]) -> str:
    """Give a new LyCORIS network the weights of a file of the same kind. Raises: CheckpointError when it is of another."""
    held, _ = lora_layouts.read_tensors(path, f"init_lora: {path}")
    odd = sorted(name for name, weight in weights.items() if name not in held or held[name].shape != weight.shape)
    if odd:
        raise CheckpointError(
            f"init_lora: {path} is not of the kind that lycoris_config describes: {len(odd)} of {len(weights)} weights are missing or of "
            f"another shape, e.g. {odd[0]}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(held[name])
    return f"{path}: {len(weights)} weights begin with what is in this file (lycoris)"
