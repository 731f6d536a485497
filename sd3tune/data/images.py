"""Picture files: their size from the header, and their pixels as the VAE sees them."""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError)
"""What Pillow raises for files that are not the picture they claim to be."""

ROTATED = frozenset({5, 6, 7, 8})
"""Orientations of the EXIF tag 274 that swap width and height."""


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as shown, EXIF rotation included. Raises: one of ``BROKEN``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as opened:
                width, height = opened.size
                turned = opened.getexif().get(274) in ROTATED
            with Image.open(path) as opened:
                opened.verify()
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    return (height, width) if turned else (width, height)


def measure(width: int, height: int, unit: str) -> float:
    """A size in the unit of ``resolution_type``: the shorter side, megapixels, or the side of a square of the same area."""
    if unit == "pixel":
        return min(width, height)
    return width * height / 1e6 if unit == "area" else math.sqrt(width * height)


def read_rgb(path: Path) -> Image.Image:
    """The picture upright, on white where it is transparent. Raises: one of ``BROKEN``."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode not in ("RGBA", "LA", "PA") and "transparency" not in upright.info:
            return upright.convert("RGB")
        layered = upright.convert("RGBA")
    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
    white.alpha_composite(layered)
    return white.convert("RGB")
