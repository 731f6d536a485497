"""Any change of weights as a LoRA of a given rank, by singular values: LoKr, LoHa, full differences, and LoRA of a higher rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3tune.errors import CheckpointError
from sd3tune.models import lora_layouts
from sd3tune.models.lora_layouts import Layer, LoraFile

EXACT = 1024
"""Up to this many rows or columns all singular values are computed; above it, the leading ones alone."""

SPARE = 32
"""How many more singular values than asked for are followed there, so that those asked for are good."""


@dataclass(frozen=True)
class Decomposed:
    """A LoRA that stands for another change, how far it is off relative to that, and how many changes of biases it leaves out."""

    lora: LoraFile
    error: float
    biases: int = 0

    def __str__(self) -> str:
        left_out = f"; {self.biases} changes of biases are left out, which no LoRA has" if self.biases else ""
        return f"{1 - self.error**2:.2%} of the change is kept (relative error {self.error:.3g}){left_out}"


def as_lora(path: Path, rank: int) -> Decomposed:
    """The LoRA of a rank that comes nearest to a file's change.

    Raises: CheckpointError when the file's change is no plain sum of weights.
    """
    held, metadata = lora_layouts.read_tensors(path, f"{path}:")
    tensors = {name: tensor.float() for name, tensor in held.items()}
    changes = _lycoris_changes(tensors, str(path))
    if not changes:
        lora = lora_layouts.parse(tensors, metadata, str(path))
        if any(layer.magnitude is not None for layer in lora.layers.values()):
            raise CheckpointError(f"{path}: a DoRA, whose change is no sum of weights; it cannot be given another rank")
        changes = {name: layer.change.float() for name, layer in lora.layers.items()}
    layers, off, whole = {}, 0.0, 0.0
    for name, change in sorted(changes.items()):
        down, up = _factors(change, rank)
        layers[name] = Layer(down, up, float(down.shape[0]))
        off += float((change - up @ down).double().square().sum())
        whole += float(change.double().square().sum())
    kept = {key: value for key, value in metadata.items() if key not in ("lora_adapter_metadata", "lycoris_config")}
    biases = sum(name.endswith(".diff_b") and bool(tensor.any()) for name, tensor in tensors.items())
    return Decomposed(LoraFile("decomposed", layers, (), kept), (off / whole) ** 0.5 if whole else 0.0, biases)


def _factors(change_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors, R x I and O x R, of the nearest matrix of a rank, with the singular values shared between them."""
    small = min(change_OI.shape)
    rank = min(rank, small)
    if small <= EXACT:
        left, values, right = torch.linalg.svd(change_OI, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change_OI, q=min(rank + SPARE, small), niter=8)
    root = values[:rank].sqrt()
    return (right[:, :rank] * root).T.contiguous(), (left[:, :rank] * root).contiguous()


def _lycoris_changes(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Layer -> change of a file of LoKr, LoHa or full differences; empty when it is none of them."""
    rows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        rows.setdefault(module, {})[part] = tensor
    if not any(part == "diff" or part.startswith(("lokr_", "hada_")) for parts in rows.values() for part in parts):
        return {}
    changes = {}
    for module, parts in rows.items():
        known = lora_layouts.module_of(module)
        if known is None:
            raise CheckpointError(f"{where}: {module} is no layer of SD3")
        changes[known[1]] = _change(parts, f"{where}: {module}")
    return changes


def _change(parts: Mapping[str, Tensor], where: str) -> Tensor:
    """One layer's change. Source: LyCORIS' LokrModule, LohaModule and FullModule."""
    if "diff" in parts and "dora_scale" not in parts:
        return parts["diff"]
    loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    names = {re.sub(r"_[ab]$", "", part) for part in parts} - {"alpha"}
    if loha <= parts.keys() and names == {"hada_w1", "hada_w2"}:
        one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        rank = parts["hada_w1_b"].shape[0]
        return one * two * (_alpha(parts, rank) / rank)
    if names == {"lokr_w1", "lokr_w2"}:
        one, two = (parts[p] if (p := f"lokr_w{n}") in parts else parts[f"{p}_a"] @ parts[f"{p}_b"] for n in (1, 2))
        split = next((parts[f"lokr_w{n}_a"].shape[1] for n in (1, 2) if f"lokr_w{n}_a" in parts), None)
        return torch.kron(one, two) * (1.0 if split is None else _alpha(parts, split) / split)
    raise CheckpointError(f"{where}: its change is no plain sum of weights ({', '.join(sorted(parts))}); only lokr, loha and full are")


def _alpha(parts: Mapping[str, Tensor], rank: int) -> float:
    return float(parts["alpha"]) if "alpha" in parts else float(rank)
