"""Encoders without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from sd3tune.cache.conditioning import Conditioning
from sd3tune.cache.states import Moments, PartStates, TextStates, whole


class Fake:
    """Encoders that are functions of pixels, characters and of everything encoded together, and that count what they do."""

    text_parts, held_bytes = ("CLIP-L", "CLIP-G", "T5"), 48

    def __init__(self, mark: str = "1") -> None:
        self.latent_fingerprint, self.text_fingerprint = f"vae {mark}", f"text {mark}"
        self.conditioning = Conditioning((1, 2))
        self.loads = 0
        self.pictures: list[int] = []
        self.texts: list[tuple[str, ...]] = []

    @contextmanager
    def load(self) -> Iterator[Fake]:
        self.loads += 1
        yield self

    def encode_images(self, pictures: Sequence[Image.Image], *, tiled: bool = False) -> Moments:
        self.pictures.append(len(pictures))
        pixels = torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)) for p in pictures])
        z = pixels[:, ::8, ::8].permute(0, 3, 1, 2).contiguous() / 255
        return Moments(z + z.mean() * 1e-3, z * 0.01 + 0.5)

    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        group = float(sum(map(len, texts))) * 1e-3
        values = [float(int(hashlib.sha256(t.encode()).hexdigest()[:4], 16)) for t in texts]
        if part != self.text_parts[-1]:
            width = self.text_parts.index(part) + 1
            return [PartStates(torch.full((2, width), v + group), torch.full((2 * width,), v)) for v in values]
        self.texts.append(tuple(texts))
        return [PartStates(torch.full((4, 5), -v), None) for v in values]

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        return [whole(parts) for parts in zip(*(self.encode_part(part, texts) for part in self.text_parts), strict=True)]
