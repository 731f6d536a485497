"""A quantised base, written once and read back: quantising a large model takes minutes, reading it seconds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.files import digest, write_with
from sd3tune.models.loading import Weights, hold
from sd3tune.models.quantize import QUANTO, empty_nf4, is_quantised, put

FORMAT = "1"
"""Raised when what these files hold changes its meaning."""


def key(weights: Weights, precision: str, modulation: str, dtype: torch.dtype) -> str:
    """Name of the file for some weights in some format."""
    from importlib.metadata import version

    library = "bitsandbytes" if precision == "nf4-bnb" else "optimum-quanto"
    return digest(FORMAT, weights.stamp, precision, modulation, str(dtype), version(library))


def write(path: Path, model: nn.Module) -> None:
    """Write every tensor of a quantised model with its checksum. Raises: FileError."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    sums = json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})
    write_with(path, lambda draft: save_file(tensors, draft, {"format": "pt", "checksums": sums}))


def read(path: Path, model: nn.Module, *, precision: str, modulation: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Fill a model on the meta device from such a file, layer by layer. False when there is none, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            sums: dict[str, int] = json.loads(opened.metadata()["checksums"])
            for name in [name for name, _ in model.named_modules()]:
                module = model.get_submodule(name)
                inside = f"{name}." if name else ""
                if is_quantised(name, module, modulation):
                    assert isinstance(module, nn.Linear)
                    held = {full.removeprefix(inside): _checked(opened, full, sums) for full in sums if full.startswith(inside)}
                    put(model, name, _restored(module, held, precision, dtype, device))
                else:
                    for leaf in (*module._parameters, *module._buffers):
                        if inside + leaf in sums:
                            hold(module, leaf, _checked(opened, inside + leaf, sums), device=device)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False
    return not any(parameter.is_meta for parameter in model.parameters())


def _checked(opened: Any, name: str, sums: Mapping[str, int]) -> Tensor:
    """A copy of a tensor. Raises: ValueError when its bytes are not those that were written."""
    tensor: Tensor = opened.get_tensor(name).clone()  # quantised weights that lie in the memory map end the process
    if _checksum(tensor) != sums[name]:
        raise ValueError(name)
    return tensor


def _checksum(tensor: Tensor) -> int:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data)


def _restored(linear: nn.Linear, held: Mapping[str, Tensor], precision: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The smaller layer that ``quantize.smaller`` made, from its tensors."""
    if precision == "nf4-bnb":
        from bitsandbytes.nn.modules import Params4bit

        made: Any = empty_nf4(linear, dtype)
        state = {leaf.removeprefix("weight."): tensor for leaf, tensor in held.items() if leaf.startswith("weight.")}
        made.weight = Params4bit.from_prequantized(held["weight"], state, requires_grad=False, device=str(device))
        if "bias" in held:
            made.bias = nn.Parameter(held["bias"].to(device))
    else:
        from optimum import quanto

        made = quanto.nn.QLinear.qcreate(linear, getattr(quanto, QUANTO[precision]), device="meta")
        made.load_state_dict({leaf: tensor.to(device) for leaf, tensor in held.items()}, assign=True)
    return made.requires_grad_(False)  # type: ignore[no-any-return]
