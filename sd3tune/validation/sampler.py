"""Sampling on the live transformer, one yield per step, equal bit for bit to diffusers' `StableDiffusion3Pipeline`.

Shapes: B pictures, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled text width. With guidance
every forward has 2 B rows: the negatives, then the positives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd3tune.cache.states import Text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Guidance:
    """How the prompt is followed. ``skip_layers`` empty means no skip-layer guidance.

    guided = negative + scale (positive - negative) + skip_scale (positive - positive with the listed blocks left out),
    the last term in sampler steps i with start N < i < stop N. Source: Stability-AI/sd3.5, diffusers.
    """

    scale: float
    skip_layers: tuple[int, ...] = ()
    skip_start: float = 0.01
    skip_stop: float = 0.2
    skip_scale: float = 2.8

    def skips(self, step: int, steps: int) -> bool:
        """Whether sampler step ``step`` (from 0) of ``steps`` runs skip-layer guidance."""
        return bool(self.skip_layers) and self.scale > 1 and steps * self.skip_start < step < steps * self.skip_stop

    def active_steps(self, steps: int) -> tuple[int, ...]:
        """The sampler steps with skip-layer guidance."""
        return tuple(i for i in range(steps) if self.skips(i, steps))


def start_noise(shape: tuple[int, int, int], seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The noise B C H W that a stock pipeline draws from a list of ``torch.Generator("cpu").manual_seed(seed)``."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds])


def sample(
    transformer: Any, scheduler: Any, *, positives: Sequence[Text], negatives: Sequence[Text], noise_BCHW: Tensor, steps: int,
    guidance: Guidance,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Walk from noise to latents; yields the number of finished steps with the latents B C H W so far.

    A step is one forward (two with guidance, three with skip-layer guidance); Heun's scheduler makes 2 ``steps`` - 1 of them, and
    skip-layer guidance counts those, as the stock pipeline does.
    """
    device, dtype = noise_BCHW.device, noise_BCHW.dtype
    guided = guidance.scale > 1
    texts = [*negatives, *positives] if guided else positives
    joint_BLD = torch.stack([t.joint_LD for t in texts]).to(device, dtype)
    pooled_BP = torch.stack([t.pooled_P for t in texts]).to(device, dtype)
    count = len(positives)

    def predict(latents: Tensor, t: Tensor, joint: Tensor, pooled: Tensor, skip: list[int] | None = None) -> Tensor:
        return transformer(  # type: ignore[no-any-return]
            hidden_states=latents, timestep=t.expand(latents.shape[0]), encoder_hidden_states=joint, pooled_projections=pooled,
            return_dict=False, skip_layers=skip,
        )[0]  # fmt: skip

    scheduler.set_timesteps(steps, device=device)
    latent_BCHW = noise_BCHW
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            velocity = predict(torch.cat([latent_BCHW] * 2) if guided else latent_BCHW, t, joint_BLD, pooled_BP)
            if guided:
                without, with_text = velocity.chunk(2)
                velocity = without + guidance.scale * (with_text - without)
                if guidance.skips(step, steps):
                    skipped = predict(latent_BCHW, t, joint_BLD[count:], pooled_BP[count:], list(guidance.skip_layers))
                    velocity = velocity + (with_text - skipped) * guidance.skip_scale
            latent_BCHW = scheduler.step(velocity, t, latent_BCHW, return_dict=False)[0]
        yield step + 1, latent_BCHW


@torch.no_grad()
def decode(vae: Any, latent_BCHW: Tensor) -> list[Image]:
    """Pictures of scaled latents, rounded to 8 bits as diffusers rounds."""
    from PIL import Image

    raw = latent_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    pixels_BHWC = (vae.decode(raw, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()
    return [Image.fromarray((row * 255).round().to(torch.uint8).numpy()) for row in pixels_BHWC]
