"""Draws shots with a transformer as it is: in batches, with what to do when memory runs out or a picture fails.

Shapes: B pictures, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd3tune.cache.memory import is_out_of_memory
from sd3tune.cache.states import Text
from sd3tune.errors import Sd3TuneError
from sd3tune.models.freeing import give_back
from sd3tune.models.tiny import as_jpeg, due, previews
from sd3tune.validation.sampler import decode, sample, start_noise
from sd3tune.validation.shots import Shot, together


@dataclass(frozen=True)
class Step:
    """The sampler has done a step of a batch; ``previews`` are JPEG files of its pictures so far, if they were asked for."""

    batch: tuple[Shot, ...]
    done: int
    steps: int
    previews: tuple[bytes, ...] = ()
    timestep: float | None = None
    """The scheduler's, of the step that is done."""


@dataclass(frozen=True)
class Drawn:
    """A picture, and what was drawn in one batch with it: its last bits depend on that."""

    shot: Shot
    batch: tuple[Shot, ...]
    picture: Image.Image


@dataclass(frozen=True)
class Failed:
    """A picture that could not be drawn."""

    shot: Shot
    why: str


@dataclass(frozen=True)
class Said:
    """Something a person should read."""

    text: str


Event = Step | Drawn | Failed | Said


@dataclass(frozen=True)
class Painter:
    """What pictures are drawn with."""

    transformer: Any
    vae: Any
    scheduler: Callable[[str, float], Any]
    """Solver and shift -> a new scheduler."""
    text: Callable[[str], Text]
    attention: AbstractContextManager[Any]
    """What is put around each step of the sampler."""
    dtype: torch.dtype
    device: torch.device
    tiny: Any = None
    """The decoder of previews, if there are to be any."""
    every: int = 1
    """Sampler steps between two previews."""

    def draw(self, shots: Sequence[Shot], most: int | None = None) -> Iterator[Event]:
        """Draw shots, ``most`` at a time; one that fails is told in its place, and the others are drawn."""
        for batch in together(shots, most):
            yield from self._drawn(batch)

    def _drawn(self, batch: tuple[Shot, ...]) -> Iterator[Event]:
        why, full = "", False
        try:
            yield from self._batch(batch)
        except (RuntimeError, ValueError, IndexError, Sd3TuneError) as error:
            why, full = " ".join(str(error).split()) or type(error).__name__, is_out_of_memory(error)
        if not why:
            return
        give_back()  # outside of the except clause, which holds the frames in which it failed
        if len(batch) > 1:
            yield Said(f"{len(batch)} pictures at once {'need more memory than there is' if full else f'failed ({why})'}; one by one now")
            for shot in batch:
                yield from self._drawn((shot,))
        else:
            yield Failed(batch[0], why)

    def _batch(self, batch: tuple[Shot, ...]) -> Iterator[Event]:
        first, latents_BCHW = batch[0], None
        for done, times, latents_BCHW in self._walk(batch):
            steps = len(times)
            seen = previews(self.tiny, latents_BCHW) if self.tiny is not None and due(done, self.every, steps) else ()
            yield Step(batch, done, steps, tuple(as_jpeg(picture) for picture in seen), times[done - 1])
        assert latents_BCHW is not None, first
        pictures: list[Image.Image] = []
        for found in self._decoded(latents_BCHW):
            if isinstance(found, Said):
                yield found
            else:
                pictures += found
        for shot, picture in zip(batch, pictures, strict=True):
            yield Drawn(shot, batch, picture)

    def _walk(self, batch: tuple[Shot, ...]) -> Iterator[tuple[int, list[float], Tensor]]:
        """Steps done, every timestep of the walk, and the latents."""
        first, factor = batch[0], 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (self.transformer.config.in_channels, first.height // factor, first.width // factor)
        noise_BCHW = start_noise(shape, [shot.seed for shot in batch], self.dtype).to(self.device)
        scheduler = self.scheduler(first.solver, first.shift)
        walk = sample(
            self.transformer, scheduler, positives=[self.text(shot.prompt) for shot in batch],
            negatives=[self.text(shot.negative) for shot in batch], noise_BCHW=noise_BCHW, steps=first.steps, guidance=first.guidance,
        )  # fmt: skip
        times: list[float] = []
        while True:
            with self.attention:
                found = next(walk, None)
            if found is None:
                return
            times = times or scheduler.timesteps.tolist()
            yield found[0], times, found[1]

    def _decoded(self, latents_BCHW: Tensor) -> Iterator[list[Image.Image] | Said]:
        """The pictures of some latents: together, one by one if there is no room, and in tiles if even that is too much."""
        if (together := self._tried(latents_BCHW)) is not None:
            yield together
            return
        said = len(latents_BCHW) > 1
        if said:
            yield Said(f"decoding {len(latents_BCHW)} pictures at once needs more memory than there is; one by one now")
        for latent_BCHW in torch.split(latents_BCHW, 1):
            alone = self._tried(latent_BCHW) if said else None
            if alone is None:
                yield Said("decoding a picture needs more memory than there is; in tiles now, which differ slightly at their edges")
                tiled = self.vae.use_tiling
                self.vae.enable_tiling()
                try:
                    alone = decode(self.vae, latent_BCHW)
                finally:
                    self.vae.use_tiling = tiled
            yield alone

    def _tried(self, latents_BCHW: Tensor) -> list[Image.Image] | None:
        try:
            return decode(self.vae, latents_BCHW)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        give_back()
        return None


def seconds_of_a_forward(painter: Painter, batch: Sequence[Shot]) -> float | None:
    """Seconds of one picture's pass through the model: of a sampler's second step, for the first warms up; nothing if it fails."""
    pictures, before = [replace(shot, steps=max(2, shot.steps)) for shot in batch], 0.0
    for event in painter.draw(pictures, len(pictures)):
        if not isinstance(event, Step):
            continue
        if painter.device.type == "cuda":
            torch.cuda.synchronize()  # a step is only queued when it is told
        if event.done == 2:
            looks = 2 if batch[0].guidance.scale > 1 else 1
            return (time.perf_counter() - before) / (looks * len(event.batch))
        before = time.perf_counter()
    return None
