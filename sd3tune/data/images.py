"""Picture files: their size from the header, and their pixels as the VAE sees them."""

from __future__ import annotations

import io
import math
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageCms, ImageColor, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
HEIC = frozenset({".heic", ".heif"})
BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for files that are not the picture they claim to be."""

ORIENTATION = 274
ROTATED = frozenset({5, 6, 7, 8})
"""Values of the EXIF tag 274 that swap width and height."""

TRANSPARENT = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
"""Pillow's modes with an alpha channel."""

DRAFT = 3.0
"""JPEG may be decoded at a half, a quarter or an eighth if that is still this much larger than what is wanted.

Measured on 1/f noise at quality 90: a mean error of 0.5 to 1.0 of 255 at 3.0, but 1.3 to 2.1 at 1.9.
"""


@cache
def suffixes() -> frozenset[str]:
    """Endings of the files that are looked at; those of HEIC, too, when its plugin is installed."""
    try:
        import pillow_heif
    except ImportError:
        return SUFFIXES
    pillow_heif.register_heif_opener()
    return SUFFIXES | HEIC


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as shown, EXIF rotation included, from the header alone. Raises: one of ``BROKEN``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd tags
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with path.open("rb") as file, Image.open(file) as opened:
                width, height = opened.size
                turned = opened.getexif().get(ORIENTATION) in ROTATED
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    return (height, width) if turned else (width, height)


def measure(width: int, height: int, unit: str) -> float:
    """A size in the unit of ``resolution_type``: the shorter side, megapixels, or the side of a square of the same area."""
    if unit == "pixel":
        return min(width, height)
    return width * height / 1e6 if unit == "area" else math.sqrt(width * height)


def read_rgb(file: Path | BinaryIO, *, background: str = "white", wanted: tuple[int, int] | None = None) -> Image.Image:
    """The first frame, upright, in sRGB, on ``background`` where it is transparent. Raises: one of ``BROKEN``.

    ``wanted`` is the size it will be resized to: a JPEG may then be decoded smaller, but never below `DRAFT` times that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            if wanted is not None and opened.format == "JPEG":
                turned = opened.getexif().get(ORIENTATION) in ROTATED
                least = [math.ceil(DRAFT * side) for side in (wanted[::-1] if turned else wanted)]
                opened.draft(None, (least[0], least[1]))
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            layered = in_srgb(opened)
    if layered.mode == "RGB":
        return layered
    below = Image.new("RGBA", layered.size, (*ImageColor.getrgb(background)[:3], 255))
    below.alpha_composite(layered)
    return below.convert("RGB")


def has_alpha(file: BinaryIO) -> bool:
    """Whether a picture says how transparent it is, from its header. Raises: one of ``BROKEN``."""
    with Image.open(file) as opened:
        return opened.mode in TRANSPARENT or "transparency" in opened.info


def read_alpha(file: BinaryIO) -> Image.Image:
    """How opaque the first frame is, upright, in 256 greys. Raises: one of ``BROKEN``."""
    with Image.open(file) as opened:
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
        return opened.convert("RGBA").getchannel("A")


def in_srgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB, or RGBA where it is transparent, 8 bits, in sRGB. Raises: ValueError for floating-point pictures."""
    profile = picture.info.get("icc_profile")
    if picture.mode == "RGB" and not profile and "transparency" not in picture.info:
        return picture  # `convert` would copy it
    if picture.mode == "F":
        raise ValueError("pictures of floating-point numbers have no range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        wide = picture.convert("I")
        scale = 1 / 257 if wide.getextrema()[1] > 255 else 1.0  # type: ignore[operator]
        return wide.point(lambda value: value * scale + 0).convert("L").convert("RGB")
    if picture.mode == "LAB":
        return _transformed(picture, ImageCms.createProfile("LAB"), "RGB")
    transparent = picture.mode in TRANSPARENT or "transparency" in picture.info
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        plain = _with_profile(picture, profile)
    else:
        plain = picture.convert("RGBA" if transparent else "RGB")
        if profile and transparent:
            plain = Image.merge("RGBA", [*_with_profile(plain.convert("RGB"), profile).split(), plain.getchannel("A")])
    return plain


def _with_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    """RGB by an embedded ICC profile; as if it had none when the profile is damaged or of another kind of picture."""
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if picture.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(embedded).lower():
            return picture
        return _transformed(picture, embedded, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture.convert("RGB")


def _transformed(picture: Image.Image, source: object, mode: str) -> Image.Image:
    result = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)  # type: ignore[arg-type]
    assert result is not None
    result.info.pop("icc_profile", None)
    return result
