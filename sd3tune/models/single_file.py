"""A transformer in one file, in the layout of Stability and ComfyUI: which of its rows are which layer of diffusers' model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd3tune.errors import ModelError
from sd3tune.models.loading import Piece, Weights

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""What may stand before a name: whole checkpoints, those of some tools, and the transformer alone."""

BLOCK = {
    "attn.to_q": ("x_block.attn.qkv", 0), "attn.to_k": ("x_block.attn.qkv", 1), "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0), "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", None), "attn.to_add_out": ("context_block.attn.proj", None),
    "attn.norm_q": ("x_block.attn.ln_q", None), "attn.norm_k": ("x_block.attn.ln_k", None),
    "attn.norm_added_q": ("context_block.attn.ln_q", None), "attn.norm_added_k": ("context_block.attn.ln_k", None),
    "attn2.to_q": ("x_block.attn2.qkv", 0), "attn2.to_k": ("x_block.attn2.qkv", 1), "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn2.to_out.0": ("x_block.attn2.proj", None),
    "attn2.norm_q": ("x_block.attn2.ln_q", None), "attn2.norm_k": ("x_block.attn2.ln_k", None),
    "norm1.linear": ("x_block.adaLN_modulation.1", None), "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
    "ff.net.0.proj": ("x_block.mlp.fc1", None), "ff.net.2": ("x_block.mlp.fc2", None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", None), "ff_context.net.2": ("context_block.mlp.fc2", None),
}  # fmt: skip
"""Layer of a block -> layer of the file, and which third of its rows. Source: Stability's sd3.5 ``mmditx.py``."""

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj", "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
}  # fmt: skip


def piece_of(name: str, depth: int) -> Piece:
    """Where a tensor of diffusers' model is in the file. Raises: KeyError for a name that SD3 does not have.

    diffusers keeps scale before shift in the last layer, and in the last block's text stream, whose norm is of the same kind.
    """
    if name == "pos_embed.pos_embed":
        return Piece("pos_embed")
    layer, _, leaf = name.rpartition(".")
    inside = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if inside is None:
        return Piece(f"{OUTSIDE[layer]}.{leaf}", swapped=layer == "norm_out.linear")
    source, third = BLOCK[inside[2]]
    last = int(inside[1]) == depth - 1
    return Piece(f"joint_blocks.{inside[1]}.{source}.{leaf}", third, swapped=last and inside[2] == "norm1_context.linear")


def open_single(path: Path, wanted: Iterable[str], depth: int) -> Weights:
    """The transformer's tensors in a single file, under the names of diffusers' model; encoders in it are left alone.

    Raises: ModelError that says what the file is when it holds no transformer of SD3.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            there: dict[str, Any] = dict.fromkeys(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); download or copy the file again") from None
    prefix = next((p for p in PREFIXES if any(name.startswith(f"{p}joint_blocks.") for name in there)), None)
    if prefix is None or any(".lora_" in name for name in there):
        raise ModelError(f"{path}: no transformer of SD3 was found in it ({guess(there)})")
    scaled = next((name for name in there if name.endswith((".scale_weight", "scaled_fp8"))), None)
    if scaled:
        raise ModelError(f"{path}: its weights are fp8 with scales of their own ({scaled}), which only ComfyUI reads; use the bf16 file")
    pieces = {name: piece_of(name, depth) for name in wanted}
    full = {name: Piece(prefix + piece.name, piece.third, piece.swapped) for name, piece in pieces.items()}
    found = {name: piece for name, piece in full.items() if piece.name in there}
    blocks = {int(m[1]) for name in there if (m := re.match(rf"{re.escape(prefix)}joint_blocks\.(\d+)\.", name))}
    unread = {name for name in there if name.startswith(f"{prefix}joint_blocks.")} - {piece.name for piece in full.values()}
    if unread or len(blocks) != depth:
        raise ModelError(
            f"{path}: not the model that model_flavour names: {len(blocks)} blocks instead of {depth}, {len(unread)} tensors too many"
            + (f", e.g. {min(unread)}" if unread else "")
        )
    return Weights(dict.fromkeys(found, path), found)


def guess(names: Mapping[str, Any]) -> str:
    """What a file without a transformer of SD3 seems to be."""
    for mark, what in (
        (".lora_", "a LoRA; name it as init_lora"), ("lokr_", "a LyCORIS adapter"), ("double_blocks", "a model of Flux"),
        ("input_blocks", "a model of Stable Diffusion 1, 2 or XL"), ("transformer_blocks", "diffusers' own layout; name its folder"),
        ("first_stage_model", "an autoencoder alone"), ("text_model", "a text encoder"),
    ):  # fmt: skip
        if any(mark in name for name in names):
            return f"it looks like {what}"
    return f"it holds {len(names)} tensors, the first is {min(names)}" if names else "it is empty"
