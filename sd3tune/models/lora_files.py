"""Adapter files: written, read back by another path, and compared name by name, value by value and in their effect.

In diffusers' layout alpha / rank is folded into B and alpha = rank declared, because a loader that misses the declaration then
still applies the right strength. The original alpha stands in our metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd3tune.errors import CheckpointError
from sd3tune.files import write_with
from sd3tune.models import lora_layouts
from sd3tune.models.adapters import Spec, file_name, lora_config
from sd3tune.models.lora_layouts import Layer, Layout, LoraFile

PREFIX = "transformer."
EFFECT = 1e-6
"""How far, relative to its norm, a layer's change may be from what is in memory: rounding, and nothing else."""


class Verified(NamedTuple):
    """What was compared when a file was read back."""

    tensors: int
    modules: int
    difference: float

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.modules}/{self.modules} modules, max difference {self.difference:.1g}"


def lora_of(weights: Mapping[str, Tensor], spec: Spec, notes: Mapping[str, str]) -> LoraFile:
    """A trained adapter, by the names of `adapters.add_lora`, in the form that files are written from."""
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    held = {name: tensor.detach().float().cpu().clone() for name, tensor in weights.items()}
    magnitudes = {m: held.get(f"{m}.lora_magnitude_vector") for m in modules}
    pairs = {m: (held[f"{m}.lora_A.weight"], held[f"{m}.lora_B.weight"]) for m in modules}
    layers = {m: Layer(down, up, spec.alpha / spec.rank * down.shape[0], magnitudes[m]) for m, (down, up) in pairs.items()}
    return LoraFile("memory", layers, (), {"sd3tune.rank": str(spec.rank), "sd3tune.alpha": repr(spec.alpha), **notes})


def save_lora(
    path: Path, weights: Mapping[str, Tensor], spec: Spec, *, skeleton: Any, notes: Mapping[str, str], layout: Layout = "diffusers"
) -> Verified:
    """Write an adapter and verify the file. Returns what was compared.

    Raises: CheckpointError when the file does not fit the model or does not hold what was written; FileError.
    """
    lora = lora_of(weights, spec, notes)
    return write(path, lora, layout, names=None if layout == "comfyui" else expected_names(skeleton, spec))


def expected_names(skeleton: Any, spec: Spec) -> dict[str, torch.Size]:
    """Names and shapes of an adapter's file in diffusers' layout, from the model alone."""
    skeleton.add_adapter(lora_config(spec))
    wanted = {PREFIX + file_name(n): p.shape for n, p in skeleton.named_parameters() if "lora_" in n}
    skeleton.delete_adapters("default")
    return wanted


def write(path: Path, lora: LoraFile, layout: Layout, names: Mapping[str, torch.Size] | None = None) -> Verified:
    """Write a LoRA in a layout, whole and verified or not at all. Raises: CheckpointError, FileError."""
    from safetensors.torch import save

    tensors, metadata = lora_layouts.as_tensors(lora, layout)
    found: list[Verified] = []

    def put(draft: Path) -> None:
        draft.write_bytes(save(tensors, metadata))  # save_file would hide a full disk
        found.append(verify(draft, tensors, lora, names))

    write_with(path, put)
    return found[0]


def verify(path: Path, expected: Mapping[str, Tensor], lora: LoraFile, names: Mapping[str, torch.Size] | None = None) -> Verified:
    """Compare a file with what was meant: its tensors one by one, with the model's names, and the change of each layer.

    Raises: CheckpointError naming the first differences.
    """
    from safetensors import safe_open

    compared, wanted = 0, names or {name: tensor.shape for name, tensor in expected.items()}
    with safe_open(path, framework="pt") as opened:
        there = set(opened.keys())
        if there != set(wanted):
            odd = sorted(there ^ set(wanted))
            raise CheckpointError(f"{path}: {len(odd)} names do not fit the model, e.g. {odd[0]}; this is a defect, please report it")
        for name in sorted(there):
            tensor = opened.get_tensor(name)
            if tensor.shape != wanted[name] or not torch.equal(tensor, expected[name]):
                raise CheckpointError(f"{path}: {name} does not read back as it was written; check the disk")
            compared += 1
    again = lora_layouts.read(path)
    difference = lora_layouts.largest_difference(lora, again)
    if not difference <= EFFECT:
        raise CheckpointError(f"{path}: the file's effect differs by {difference:.2g}; this is a defect, please report it")
    return Verified(compared, len(again.layers), difference)
