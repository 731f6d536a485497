"""A small CLIPModel that scores how well a picture fits its caption, style included.

It sees every Noto picture and the Fluent pictures outside the fine-tuning set, so its opinion of that set is not learnt by heart.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.playground.recipe.autoencoder import cosine
from sd3tune.playground.recipe.texts import LENGTH

STYLES = ("noto style", "fluent 3d style")

SIDE = 64
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
"""What it is shown: 64 px in [-1, 1], as in training."""


def new_scorer(tokenizer: Any) -> Any:
    """An untrained CLIPModel for 64 px pictures."""
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=LENGTH, hidden_act="gelu", projection_dim=96,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8,
        hidden_act="gelu", projection_dim=96,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def train(pixels: Tensor, captions: list[str], tokenizer: Any, *, steps: int, batch: int = 128, peak: float = 1e-3) -> Any:
    """Train by contrast within batches; pictures (B 3 H W in [-1, 1]) are mirrored and shifted a little."""
    torch.manual_seed(2)
    model = new_scorer(tokenizer)
    ids = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    started = time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak=peak, warmup=100)
        rng = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(pixels), generator=rng)[:batch]
        x = pixels[rows]
        flip, *move = torch.randint(0, 7, (3,), generator=rng).tolist()
        x = torch.roll(x.flip(3) if flip % 2 else x, [m - 3 for m in move], dims=(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids[rows], pixel_values=x)
        logits, target = out.logits_per_image.float(), torch.arange(batch)
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            print(f"scorer {step + 1}/{steps}  loss {float(loss.detach()):.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()
