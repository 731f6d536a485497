"""What encoders give, and what the cache asks of them.

Shapes: B pictures or texts, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sd3tune.cache.conditioning import Conditioning


class Text(NamedTuple):
    """What the transformer reads of one text."""

    joint_LD: Tensor
    pooled_P: Tensor


class TextStates(NamedTuple):
    """What is stored of one text: D of CLIP is not padded yet."""

    clip_LD: Tensor
    t5_LD: Tensor
    pooled_P: Tensor


class PartStates(NamedTuple):
    """What one text encoder gives of one text; T5 pools nothing."""

    hidden_LD: Tensor
    pooled_P: Tensor | None


def whole(parts: Sequence[PartStates]) -> TextStates:
    """The states of one text from what its encoders gave: the CLIPs side by side, then the last."""
    import torch

    *clips, last = parts
    pooled = [part.pooled_P for part in clips if part.pooled_P is not None]
    return TextStates(torch.cat([part.hidden_LD for part in clips], dim=-1), last.hidden_LD, torch.cat(pooled, dim=-1))


def joined(rows: Sequence[TextStates]) -> tuple[Tensor, Tensor]:
    """Joint states B L D and pooled B P: CLIP padded with zeros to T5's width, then T5. Each value is copied once."""
    import torch

    first = rows[0]
    length, (after, width) = first.clip_LD.shape[0], first.t5_LD.shape
    joint_BLD = torch.zeros((len(rows), length + after, width), dtype=first.t5_LD.dtype)
    for place, row in enumerate(rows):
        joint_BLD[place, :length, : row.clip_LD.shape[1]] = row.clip_LD
        joint_BLD[place, length:] = row.t5_LD
    return joint_BLD, torch.stack([row.pooled_P for row in rows])


class Moments(NamedTuple):
    """The autoencoder's posterior of pictures, scaled as the transformer sees latents."""

    mean_BCHW: Tensor
    deviation_BCHW: Tensor


class LoadedEncoders(Protocol):
    """Encoders, of which one at a time is in memory: each is loaded when it is first asked for, in place of the one before."""

    @property
    def text_parts(self) -> Sequence[str]:
        """Names of the text encoders, in the order in which `whole` takes what they give."""

    @property
    def held_bytes(self) -> int:
        """Bytes of what all text encoders but the last give of one text."""

    def encode_images(self, pictures: Sequence[Image], *, tiled: bool = False) -> Moments:
        """The posterior of pictures of one size; ``tiled`` needs less memory."""

    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        """What one text encoder gives of each text, in the machine's memory."""


class Shower(Protocol):
    """Encoders that can also show what they made."""

    def decode_latents(self, latent_BCHW: Tensor) -> list[Image]:
        """The pictures of scaled latents."""

    def tokens_seen(self, texts: Sequence[str]) -> list[str]:
        """For each text what the encoders count in it, and what they do not see."""


class Encoders(Protocol):
    """What the cache needs of the models: an identity without loading, and a scope in which they are loaded."""

    @property
    def latent_fingerprint(self) -> str:
        """Changes when the same picture would give another latent."""

    @property
    def text_fingerprint(self) -> str:
        """Changes when the same text would give other states."""

    @property
    def conditioning(self) -> Conditioning:
        """How their states reach the transformer."""

    def load(self) -> AbstractContextManager[LoadedEncoders]:
        """A scope at whose end no encoder is in memory any more."""
