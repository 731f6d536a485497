"""What an entry is called: a digest of everything its values depend on, never a position, a file name or a time."""

from __future__ import annotations

from sd3tune.data.buckets import Geometry
from sd3tune.files import digest

FORMAT = "3"
"""Raised when the meaning of the stored tensors changes."""


def latent_key(pixels: str, geometry: Geometry, fingerprint: str, background: str = "white") -> str:
    """Key of a picture's latent: its bytes, how it is resized and cut, what is behind it, and the autoencoder that sees it.

    The empty text when ``pixels`` is empty: a picture that was not hashed yet has no key.
    """
    return digest("latent", FORMAT, pixels, _cut(geometry), background, fingerprint) if pixels else ""


def mask_key(pixels: str, kind: str, geometry: Geometry) -> str:
    """Key of a mask in latent size: its bytes, how it is read, and its picture's cut; no model looks at it. Empty without bytes."""
    return digest("mask", FORMAT, pixels, kind, _cut(geometry)) if pixels else ""


def _cut(geometry: Geometry) -> str:
    (width, height), left, top, bucket, mirrored = geometry
    return f"{width}x{height}+{left}+{top} {bucket}" + " mirrored" * mirrored


def text_key(caption: str, fingerprint: str) -> str:
    """Key of a text's states: its characters and the encoders, tokenizers and lengths that read it."""
    return digest("text", FORMAT, caption, fingerprint)
