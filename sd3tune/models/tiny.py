"""Previews: a latent in mid-sampling as a picture, by a Tiny AutoEncoder of a few million weights.

Shapes: B pictures, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd3tune import playground
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ModelError
from sd3tune.models import hub
from sd3tune.models.components import named

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "madebyollin/taesd3"
"""The Tiny AutoEncoder of SD3 and SD3.5."""
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin")
INSTEAD = "set validation_preview: false"
"""What else can be done when it cannot be loaded."""

JPEG_QUALITY = 80


def load_tiny(config_or_name: RunConfig | str | Path, device: torch.device) -> Any:
    """The Tiny AutoEncoder of a configuration's model, or of a folder or the hub: fp16 on CUDA, else fp32. Raises: ModelError."""
    from diffusers import AutoencoderTiny

    folder = hub.folder_of(str(_named(config_or_name)), weights=WEIGHTS, instead=INSTEAD)
    found = hub.table(folder / "config.json", INSTEAD).get("_class_name")
    if found != "AutoencoderTiny":
        raise ModelError(f"{folder}: no Tiny AutoEncoder, but {found}; {INSTEAD}")
    with named(folder):
        made = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float16 if device.type == "cuda" else torch.float32)
    return made.requires_grad_(False).eval().to(device)


def _named(config_or_name: RunConfig | str | Path) -> str | Path:
    if not isinstance(config_or_name, RunConfig):
        return config_or_name
    return playground.PREVIEWER if config_or_name.model.model_flavour == "playground" else NAME


def due(step: int, every: int, steps: int) -> bool:
    """Whether a preview is shown after sampler step ``step`` (from 1) of ``steps``: every ``every``-th, the last only if it is one."""
    return 0 < step <= steps and step % every == 0


@torch.no_grad()
def previews(tiny: Any, latent_BCHW: Tensor) -> list[Image]:
    """Pictures of latents as the sampler holds them: a Tiny AutoEncoder reads them scaled, so no scale and no shift is undone."""
    from PIL import Image

    pixels_BHWC = (tiny.decode(latent_BCHW.to(tiny.device, tiny.dtype)).sample * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()
    return [Image.fromarray((row * 255).round().to(torch.uint8).numpy()) for row in pixels_BHWC]


def as_png(picture: Image) -> bytes:
    """A picture as the bytes of a PNG file, every value kept."""
    return _written(picture, "PNG")


def as_jpeg(picture: Image, quality: int = JPEG_QUALITY) -> bytes:
    """A picture as the bytes of a JPEG file, several times smaller."""
    return _written(picture, "JPEG", quality=quality)


def _written(picture: Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        return file.getvalue()
