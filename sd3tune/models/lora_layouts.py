"""LoRA files of every layout that SD3 tools write: read into one form, described, and written again without loss."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sd3tune.errors import CheckpointError
from sd3tune.shown import Shown

Layout = Literal["diffusers", "comfyui"]

PREFIXES = {"transformer.": "diffusers", "base_model.model.": "peft", "diffusion_model.": "diffusion_model"}
"""Beginning of dotted names -> who writes them."""

UNDERSCORED = {"lora_transformer_": "comfyui", "lycoris_": "lycoris"}
"""Beginning of names with underscores -> who writes them."""

PARTS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    "norm1.linear", "norm1_context.linear",
)  # fmt: skip
OUTSIDE = (
    "proj_out", "norm_out.linear", "context_embedder", "pos_embed.proj", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2", "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2",
)  # fmt: skip
"""Linear layers of SD3 inside and outside its blocks, to find points again where a file has underscores."""

DOTTED = {part.replace(".", "_"): part for part in (*PARTS, *OUTSIDE)}

BASES = {(24, 1536, True): "SD3.5 Medium", (24, 1536, False): "SD3 Medium or SD3.5 Medium", (38, 2432, False): "SD3.5 Large"}
"""(blocks, width, second attention) -> the model that has them."""


@dataclass(frozen=True)
class Layer:
    """The change of one linear layer: ``alpha / rank * up @ down``."""

    down_RI: Tensor
    up_OR: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.down_RI.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank

    @property
    def change(self) -> Tensor:
        """The change itself, in fp64."""
        return self.scale * (self.up_OR.double() @ self.down_RI.double())


@dataclass(frozen=True, repr=False)
class LoraFile(Shown):
    """A LoRA, whatever file it came from."""

    layout: str
    layers: Mapping[str, Layer]
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Blocks that it reaches, at least."""
        return 1 + max((int(n) for name in self.layers for n in re.findall(r"transformer_blocks\.(\d+)\.", name)), default=-1)

    @property
    def base(self) -> str:
        """Which released model has these layers."""
        widths = {layer.down_RI.shape[1] for name, layer in self.layers.items() if name.endswith(".to_q")}
        second = any(".attn2." in name for name in self.layers)
        found = BASES.get((self.depth, next(iter(widths)), second)) if len(widths) == 1 else None
        return found or f"none of the released models ({self.depth} blocks, width {', '.join(map(str, sorted(widths))) or 'unknown'})"

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Layers with values that are not numbers."""
        return tuple(n for n, layer in self.layers.items() if not (layer.down_RI.isfinite().all() and layer.up_OR.isfinite().all()))

    def __str__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers.values()})
        scales = sorted({round(layer.scale, 6) for layer in self.layers.values()})
        norm = sum(float(layer.change.square().sum()) for layer in self.layers.values()) ** 0.5
        writer = "sd3tune" if any(key.startswith("sd3tune") for key in self.metadata) else self.layout
        dora = ", DoRA" if any(layer.magnitude is not None for layer in self.layers.values()) else ""
        lines = [
            f"layout    {self.layout}, written by {writer}{dora}",
            f"fits      {self.base}",
            f"layers    {len(self.layers)}, rank {', '.join(map(str, ranks))}, alpha / rank {', '.join(f'{s:g}' for s in scales)}",
            f"change    norm {norm:.4g} over all layers",
            *(f"metadata  {key}: {value[:100]}" for key, value in sorted(self.metadata.items())),
            *(f"NaN       {name}" for name in self.not_finite[:10]),
            *(f"unknown   {name}" for name in self.unknown[:10]),
        ]
        return "\n".join(lines + ([f"and {len(self.unknown) - 10} more unknown keys"] if len(self.unknown) > 10 else []))


def read_tensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises: CheckpointError that begins with ``where``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where} cannot be read as safetensors ({error})") from None


def read(path: Path) -> LoraFile:
    """Read a LoRA of any known layout. Raises: CheckpointError, naming what the file is if it is no LoRA of SD3."""
    tensors, metadata = read_tensors(path, f"{path}:")
    return parse(tensors, metadata, str(path))


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> LoraFile:
    """Sort tensors into layers. Raises: CheckpointError when there is not one layer of SD3 among them."""
    parts: dict[str, dict[str, Tensor]] = {}
    layouts: set[str] = set()
    unknown = []
    for name, tensor in tensors.items():
        found = _split(name)
        if found is None:
            unknown.append(name)
        else:
            layout, module, part = found
            layouts.add(layout)
            parts.setdefault(module, {})[part] = tensor
    declared, by_layer = _declared_alpha(metadata)
    whole = {module: rows for module, rows in sorted(parts.items()) if {"down", "up"} <= rows.keys()}
    layers = {module: _layer(rows, by_layer.get(module, declared), f"{where}: {module}") for module, rows in whole.items()}
    unknown += [f"{module} ({', '.join(rows)} alone)" for module, rows in parts.items() if module not in layers]
    if not layers:
        raise CheckpointError(f"{where}: no LoRA of SD3 was found in it ({_guess(tensors)})")
    return LoraFile("+".join(sorted(layouts)), layers, tuple(sorted(unknown)), metadata)


def _split(name: str) -> tuple[str, str, str] | None:
    """Layout, module and part (down, up, alpha, magnitude) of a tensor's name."""
    match = re.fullmatch(r"(.+?)\.(lora_A|lora_down|lora_B|lora_up|alpha|lora_magnitude_vector|dora_scale)(\.\w+)?(\.weight)?", name)
    if not match:
        return None
    module, word = match[1], match[2]
    part = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}.get(word, "magnitude")
    known = module_of(module)
    return (*known, part) if known else None


def module_of(name: str) -> tuple[str, str] | None:
    """Layout and dotted name of a layer of SD3, from what a file calls it."""
    for prefix, layout in PREFIXES.items():
        if name.startswith(prefix) and (plain := name.removeprefix(prefix)).startswith(("transformer_blocks.", *OUTSIDE)):
            return layout, plain
    for prefix, layout in UNDERSCORED.items():
        if name.startswith(prefix) and (dotted := _dotted(name.removeprefix(prefix))):
            return layout, dotted
    return None


def _dotted(name: str) -> str | None:
    """``transformer_blocks_3_attn_to_q`` as ``transformer_blocks.3.attn.to_q``."""
    match = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", name)
    if match:
        return f"transformer_blocks.{match[1]}.{DOTTED[match[2]]}" if match[2] in DOTTED else None
    return DOTTED.get(name)


def _layer(rows: Mapping[str, Tensor], declared: float | None, where: str) -> Layer:
    down, up = rows["down"], rows["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(f"{where}: its two parts do not fit together ({tuple(down.shape)} and {tuple(up.shape)})")
    alpha = float(rows["alpha"]) if "alpha" in rows else declared
    return Layer(down, up, float(down.shape[0]) if alpha is None else alpha, rows.get("magnitude"))


def _declared_alpha(metadata: Mapping[str, str]) -> tuple[float | None, dict[str, float]]:
    """Alpha as diffusers declares it in the metadata, for all layers and for some; tensors go before it."""
    try:
        rows: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        some = {str(name): float(alpha) for name, alpha in (rows.get("transformer.alpha_pattern") or {}).items()}
        return float(rows["transformer.lora_alpha"]), some
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}


def _guess(tensors: Mapping[str, Tensor]) -> str:
    """What a file without LoRA layers of SD3 seems to be."""
    names = list(tensors)
    for mark, what in (
        ("lokr_", "a LyCORIS LoKr; convert it with --rank"), ("hada_", "a LyCORIS LoHa; convert it with --rank"),
        ("joint_blocks", "the names of Stability's own layout, with query, key and value in one layer"),
        ("lora_unet_", "an adapter of Stable Diffusion 1, 2 or XL"), ("double_blocks", "an adapter of Flux"),
        ("single_transformer_blocks", "an adapter of Flux"), ("lora_", "an adapter of another model"),
    ):  # fmt: skip
        if any(mark in name for name in names):
            return f"it looks like {what}"
    return f"it holds {len(names)} tensors, the first is {names[0]}" if names else "it is empty"


def as_tensors(lora: LoraFile, layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata in another layout. In diffusers' alpha / rank is folded into ``up``; ComfyUI's has alpha as tensors."""
    import torch

    tensors: dict[str, Tensor] = {}
    kept = {key: value for key, value in lora.metadata.items() if key != "lora_adapter_metadata"}
    for module, layer in lora.layers.items():
        if layout == "comfyui":
            name = "lora_transformer_" + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = layer.down_RI
            tensors[f"{name}.lora_up.weight"] = layer.up_OR
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
            if layer.magnitude is not None:
                tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, 1)
        else:
            tensors[f"transformer.{module}.lora_A.weight"] = layer.down_RI
            tensors[f"transformer.{module}.lora_B.weight"] = layer.up_OR if layer.scale == 1 else (layer.up_OR.float() * layer.scale)
            if layer.magnitude is not None:
                tensors[f"transformer.{module}.lora_magnitude_vector"] = layer.magnitude.reshape(-1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, kept | _declaration(lora, layout)


def _declaration(lora: LoraFile, layout: Layout) -> dict[str, str]:
    """What the metadata says of rank and alpha, and for whom the file is."""
    ranks = {module: layer.rank for module, layer in lora.layers.items()}
    if layout == "comfyui":
        return {"format": "pt", "sd3tune.layout": "comfyui; not for diffusers, which loads these names with no error and no effect"}
    most = max(ranks.values())
    rows: dict[str, Any] = {"r": most, "lora_alpha": most, "target_modules": sorted(ranks)}
    if len(set(ranks.values())) > 1:
        rows["rank_pattern"] = rows["alpha_pattern"] = {module: rank for module, rank in ranks.items() if rank != most}
    if any(layer.magnitude is not None for layer in lora.layers.values()):
        rows["use_dora"] = True
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in rows.items()})}


def largest_difference(one: LoraFile, two: LoraFile) -> float:
    """The largest relative difference of the changes of all layers. Raises: CheckpointError when the layers are not the same."""
    if one.layers.keys() != two.layers.keys():
        odd = sorted(one.layers.keys() ^ two.layers.keys())
        raise CheckpointError(f"the two adapters do not change the same layers: {len(odd)} differ, e.g. {odd[0]}")
    worst = 0.0
    for name, layer in one.layers.items():
        mine, other = layer.change, two.layers[name].change
        worst = max(worst, float((mine - other).norm() / mine.norm().clamp_min(1e-30)))
    return worst
