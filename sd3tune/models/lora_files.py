"""Adapter files in diffusers' layout: written, read back, and compared name by name and value by value.

Alpha / rank is folded into B and alpha = rank declared, because a loader that misses the declaration then still applies the
right strength. The original alpha stands in our metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.errors import CheckpointError
from sd3tune.files import write_with
from sd3tune.models.adapters import Targets, endings, file_name, lora_config

PREFIX = "transformer."


def save_lora(
    path: Path, weights: Mapping[str, Tensor], *, targets: Targets, rank: int, alpha: float, skeleton: Any, notes: Mapping[str, str]
) -> int:
    """Write an adapter and verify the file. Returns the number of tensors, all of them compared.

    Raises: CheckpointError when the file does not fit the model or does not hold what was written; FileError.
    """
    from safetensors.torch import save

    folded = {PREFIX + name: _folded(name, tensor, alpha / rank) for name, tensor in weights.items()}
    declared = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": endings(targets)}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(declared),
        "sd3tune.rank": str(rank),
        "sd3tune.alpha": repr(alpha),
        **notes,
    }

    compared: list[int] = []

    def write(draft: Path) -> None:
        draft.write_bytes(save(folded, metadata))  # save_file would hide a full disk
        compared.append(verify_lora(draft, folded, skeleton, targets=targets, rank=rank))

    write_with(path, write)
    return compared[0]


def verify_lora(path: Path, expected: Mapping[str, Tensor], skeleton: Any, *, targets: Targets, rank: int) -> int:
    """Compare a file with what was meant, and with the model it is for. Returns how many tensors were compared.

    Raises: CheckpointError naming the first differences.
    """
    from safetensors import safe_open

    skeleton.add_adapter(lora_config(targets, rank=rank, alpha=rank))
    wanted = {PREFIX + file_name(n): p.shape for n, p in skeleton.named_parameters() if "lora_" in n}
    skeleton.delete_adapters("default")
    compared = 0
    with safe_open(path, framework="pt") as opened:
        names = set(opened.keys())
        if names != set(wanted):
            odd = sorted(names ^ set(wanted))
            raise CheckpointError(f"{path}: {len(odd)} names do not fit the model, e.g. {odd[0]}; this is a defect, please report it")
        for name in sorted(names):
            tensor = opened.get_tensor(name)
            if tensor.shape != wanted[name] or not torch.equal(tensor, expected[name]):
                raise CheckpointError(f"{path}: {name} does not read back as it was written; check the disk")
            compared += 1
    return compared


def _folded(name: str, tensor: Tensor, scale: float) -> Tensor:
    held = tensor.detach().float().cpu()
    return (held * scale if ".lora_B." in name else held).contiguous().clone()
