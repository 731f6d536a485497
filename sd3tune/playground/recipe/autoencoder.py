"""The playground's AutoencoderKL (16 channels, factor 8) and the AutoencoderTiny that previews with it.

Shapes: B images, C latent channels (16), H x W latent pixels (image pixels / 8).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

KL_WEIGHT = 5e-5
"""Per latent value. Just enough to keep the latents near unit scale and smooth."""


def new_vae() -> Any:
    """An untrained AutoencoderKL: cheap at full size, wide where the picture is small."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128), layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def new_tiny() -> Any:
    """An untrained AutoencoderTiny for the same latents, as small as previews allow."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 4, decoder_block_out_channels=(24,) * 4, num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1), latent_channels=16, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def cosine(step: int, steps: int, *, peak: float, warmup: int) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up, then half a cosine down to nothing."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw(sets: list[Tensor], k: int, count: int) -> Tensor:
    """Batch ``k``: pictures of one of the sets (one size each), in proportion to its size, half of them mirrored."""
    rng = torch.Generator().manual_seed(k)
    sizes = torch.tensor([float(len(s)) for s in sets])
    chosen = sets[int(torch.multinomial(sizes, 1, generator=rng))]
    batch = chosen[torch.randint(len(chosen), (count,), generator=rng)]
    mirrored = torch.rand(count, generator=rng) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(3), batch)


def train_vae(sets: list[Tensor], *, steps: int, batch: int = 16, peak: float = 1.2e-3) -> Any:
    """Train on pixel sets (B 3 H W in [-1, 1]); squared and absolute error plus a little KL."""
    torch.manual_seed(0)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    started = time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak=peak, warmup=150)
        x = draw(sets, step, batch)
        torch.manual_seed(step)  # the posterior's noise
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            psnr = -10 * math.log10(float(error.square().mean()) / 4)
            print(f"vae {step + 1}/{steps}  {psnr:.2f} dB  kl {float(kl):.2f}  {time.monotonic() - started:.0f} s", flush=True)
    return vae.eval()


@torch.no_grad()
def moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior, B C H W, unscaled."""
    parts = [vae.encode(chunk).latent_dist for chunk in torch.split(pixels, 64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def set_scale(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Write the scaling and shift factors that give sampled latents mean 0 and deviation 1."""
    centre = float(mean.mean())
    spread = float(((mean - centre).square() + std.square()).mean().sqrt())
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=centre)


@torch.no_grad()
def psnr(vae: Any, pixels: Tensor) -> float:
    """Mean over the pictures of the peak signal-to-noise ratio in dB, from the posterior's mean."""
    values = []
    for chunk in torch.split(pixels, 64):
        y = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        values += [-10 * math.log10(float(e) / 4) for e in (y - chunk).square().flatten(1).mean(1)]
    return sum(values) / len(values)


def train_tiny(vae: Any, pixels: Tensor, *, steps: int, batch: int = 16, peak: float = 2e-3) -> Any:
    """Train the tiny autoencoder: its decoder on the big one's scaled latents, its encoder to make them."""
    torch.manual_seed(1)
    tiny = new_tiny()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=peak, weight_decay=1e-3)
    mean, std = moments(vae, pixels)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak=peak, warmup=50)
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(pixels), (batch,), generator=rng)
        x = pixels[rows]
        raw = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=rng)
        z = (raw - vae.config.shift_factor) * vae.config.scaling_factor
        # AutoencoderTiny maps [-1, 1] in encode itself; decode returns [-1, 1].
        loss = (tiny.decode(z).sample - x).square().mean() + 0.2 * (tiny.encode(x).latents - z).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 199:
            print(f"tiny {step + 1}/{steps}  loss {float(loss):.4f}", flush=True)
    return tiny.eval()
