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
    if not pixels:
        return ""
    (width, height), left, top, bucket, mirrored = geometry
    return digest("latent", FORMAT, pixels, f"{width}x{height}+{left}+{top} {bucket}" + " mirrored" * mirrored, background, fingerprint)


def text_key(caption: str, fingerprint: str) -> str:
    """Key of a text's states: its characters and the encoders, tokenizers and lengths that read it."""
    return digest("text", FORMAT, caption, fingerprint)
