"""The base model: a 12-block SD3.5 with its text encoders, trained by flow matching on Noto emoji.

Shapes: B images, C latent channels (16), H x W latent pixels, L text tokens, D joint width, P pooled width.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sd3tune.playground.recipe.autoencoder import cosine
from sd3tune.playground.recipe.texts import CLIP_WIDTHS, LENGTH, T5_WIDTH, Encoders

BLOCKS, HEADS, HEAD_DIM = 12, 5, 32
DROPOUT = 0.1
LONG_TEXT = 0.05
"""Share of batches in which T5 runs at 256 tokens, so that a stock call without max_sequence_length draws too."""
OBLONG = 0.08
"""Share of batches of oblong pictures, so that the model has seen its other buckets."""


@dataclass(frozen=True)
class Shape:
    """All pictures of one size: posterior moments B C H W (scaled) and their captions."""

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]


def new_transformer() -> Any:
    """An untrained SD3Transformer2DModel: SD3.5-Medium in miniature, dual attention in its first half."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=BLOCKS, num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM, caption_projection_dim=HEADS * HEAD_DIM, joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(BLOCKS // 2)),
    )  # fmt: skip


def sigmas(count: int, rng: torch.Generator) -> Tensor:
    """Noise levels in strata over the batch: logit-normal, every other one shifted by 3 as in sampling."""
    quantile = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
    sigma = torch.sigmoid(1.2 * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
    return torch.where(torch.arange(count) % 2 == 0, sigma, 3 * sigma / (1 + 2 * sigma))


def rows(shape: Shape, batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers; every picture comes once per pass."""
    rng, queue = random.Random(seed), list[int]()
    while True:
        while len(queue) < batch:
            order = list(range(len(shape.captions)))
            rng.shuffle(order)
            queue += order
        yield queue[:batch]
        del queue[:batch]


def train(shapes: list[Shape], encoders: Encoders, out: Path, *, steps: int, batch: int = 32, peak: float = 1e-3) -> Any:
    """Train on ``shapes[0]`` (square) and now and then on the others; writes the averaged weights to ``out``."""
    torch.manual_seed(0)
    transformer = new_transformer()
    model = nn.ModuleList([transformer, encoders.encoders])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    queues = [rows(s, batch, seed) for seed, s in enumerate(shapes)]
    started = time.monotonic()
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        odd, long, *_ = torch.rand(2, generator=rng).tolist()
        which = 0 if odd >= OBLONG else 1 + step % (len(shapes) - 1)
        shape, chosen = shapes[which], next(queues[which])
        is_long = long < LONG_TEXT
        if is_long:  # 17 times the text: a quarter of the pictures keeps the step affordable
            chosen = chosen[: batch // 4]
        dropped = (torch.rand(len(chosen), generator=rng) < DROPOUT).tolist()
        captions = ["" if drop else shape.captions[i] for i, drop in zip(chosen, dropped, strict=True)]
        ids = encoders.ids(captions, t5_length=256 if is_long else LENGTH)
        mean_BCHW = shape.mean[chosen]
        latent_BCHW = mean_BCHW + shape.std[chosen] * torch.randn(mean_BCHW.shape, generator=rng)
        noise_BCHW = torch.randn(mean_BCHW.shape, generator=rng)
        sigma_B = sigmas(len(chosen), rng)
        sigma_B111 = sigma_B.view(-1, 1, 1, 1)
        noisy_BCHW = (1 - sigma_B111) * latent_BCHW + sigma_B111 * noise_BCHW

        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak=peak, warmup=200)
        # On a CPU the plain kernel is twice as fast as the fused one at 48 tokens, and the reverse at 288.
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if is_long else [SDPBackend.MATH]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernels):
            joint_BLD, pooled_BP = encoders(ids)
            velocity_BCHW = transformer(
                hidden_states=noisy_BCHW, timestep=1000 * sigma_B, encoder_hidden_states=joint_BLD, pooled_projections=pooled_BP
            ).sample
        loss = (velocity_BCHW.float() - (noise_BCHW - latent_BCHW)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        if step % 100 == 99:
            print(f"base {step + 1}/{steps}  loss {float(loss.detach()):.4f}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save(average.module, encoders, out)
    model.load_state_dict(average.module.state_dict())
    return transformer.eval()


def save(model: Any, encoders: Encoders, out: Path) -> None:
    """Write transformer and encoders of ``model`` in the diffusers layout, in single precision."""
    model[0].save_pretrained(out / "transformer")
    Encoders(encoders.tokenizers, model[1]).save(out)
