"""Whether a LoRA fits a model, and a model with a LoRA merged into its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError
from sd3tune.files import write_folder
from sd3tune.models.components import model_folder, skeleton, transformer_weights
from sd3tune.models.lora_layouts import LoraFile


def check_fit(lora: LoraFile, config: RunConfig, where: str) -> str:
    """What was compared, when every layer is one of the model's, of its size, and finite. Raises: CheckpointError, ModelError."""
    weights = {name.removesuffix(".weight"): p.shape for name, p in skeleton(config).named_parameters() if name.endswith(".weight")}
    problems = [f"{name}: unknown key" for name in lora.unknown] + [f"{name}: not finite" for name in lora.not_finite]
    for name, layer in lora.layers.items():
        if name not in weights:
            problems.append(f"{name}: this model has no such layer")
        elif tuple(weights[name]) != (layer.up_OR.shape[0], layer.down_RI.shape[1]):
            wanted, found = tuple(weights[name]), (layer.up_OR.shape[0], layer.down_RI.shape[1])
            problems.append(f"{name}: changes {found}, and the model has {wanted}")
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(f"{where} does not fit {model_folder(config)} ({len(problems)} problems; it fits {lora.base}):\n  {shown}")
    return f"{where} fits {model_folder(config)}: {len(lora.layers)}/{len(lora.layers)} layers, all values finite"


def merge(lora: LoraFile, config: RunConfig, out: Path, *, strength: float) -> str:
    """Write the transformer with ``strength`` of the change added, as diffusers reads it. Raises: CheckpointError, FileError."""
    from safetensors.torch import save_file

    check_fit(lora, config, "the adapter")
    if any(layer.magnitude is not None for layer in lora.layers.values()):
        raise CheckpointError("this is a DoRA, whose change is no sum of weights; load it in diffusers instead of merging it")
    source = model_folder(config) / "transformer"
    weights = transformer_weights(config)
    tensors = {name: weights.read(name).clone() for name in sorted(weights.names)}
    for name, layer in lora.layers.items():
        base = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = (base.double() + strength * layer.change).to(base.dtype)
    with write_folder(out) as draft:
        shutil.copy(source / "config.json", draft / "config.json")
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(held, draft / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    changed = torch.tensor([float(layer.change.norm()) for layer in lora.layers.values()]).norm()
    return f"{out}: {len(lora.layers)} layers changed at strength {strength:g} (norm {strength * float(changed):.4g})"
