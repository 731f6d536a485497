"""Draw validation pictures into a run folder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sd3tune.cache.states import Text
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.models import adapters, components, lycoris_adapters
from sd3tune.models.attention import attention, unable
from sd3tune.models.tiny import load_tiny
from sd3tune.records import ImageRecord, NoticeRecord, PreviewRecord, Record
from sd3tune.run_folder import RunFolder
from sd3tune.validation.kept import keep, kept
from sd3tune.validation.painter import Drawn, Event, Failed, Painter, Said, Step
from sd3tune.validation.pictures import Places, Source, drawn, write_picture, write_problem
from sd3tune.validation.shots import Shot


def check(config: RunConfig, transformer: Any, device: torch.device) -> None:
    """Raises: ConfigError for skip-layer guidance on a block that a model does not have, or attention that does not work on a device."""
    if config.prompts and (why := unable(config.model.attention_mechanism, device)):
        raise ConfigError([why])
    depth = transformer.config.num_layers
    wrong = [n for n in config.validation.validation_guidance_skip_layers or () if n >= depth]
    if wrong:
        raise ConfigError([f"validation_guidance_skip_layers: {wrong} is beyond this model's blocks, 0 to {depth - 1}"])


@contextmanager
def painting(config: RunConfig, transformer: Any, text: Callable[[str], Text], device: torch.device) -> Iterator[Painter]:
    """A painter with the decoders that it needs, which are in memory for the duration of the block. Raises: ModelError."""
    v = config.validation
    yield Painter(
        transformer, components.load_vae(config, device), partial(components.load_scheduler, config), text,
        attention(config.model.attention_mechanism), components.compute_dtype(config), device,
        load_tiny(config, device) if v.validation_preview else None, v.validation_preview_steps,
    )  # fmt: skip


def draw(painter: Painter, shots: Sequence[Shot], source: Source, place: Callable[[Shot], Path]) -> Iterator[Record]:
    """Draw shots into the files that ``place`` names; one record per sampler step and per picture."""
    for event in painter.draw(shots, source.config.validation.validation_batch_size):
        if isinstance(event, Step):
            yield preview_of(event, source.step)
        elif isinstance(event, Drawn):
            path = place(event.shot)
            yield write_picture(path, event.picture, event.shot, event.batch, source)
            if source.kind == "base":
                keep(path, event.shot, source)
        elif isinstance(event, Failed):
            yield write_problem(place(event.shot), event.shot, source, event.why)
        else:
            yield NoticeRecord(step=source.step, text=event.text, warning=True)


def picture_of(events: Iterable[Event], step: int) -> Generator[Record, None, Drawn | Failed]:
    """What became of a single shot, after the records of its way there."""
    found: Drawn | Failed | None = None
    for event in events:
        if isinstance(event, Step):
            yield preview_of(event, step)
        elif isinstance(event, Said):
            yield NoticeRecord(step=step, text=event.text)
        else:
            found = event
    assert found is not None
    return found


def preview_of(event: Step, step: int) -> PreviewRecord:
    """The record of a step of the sampler, after ``step`` updates."""
    return PreviewRecord(
        step=step, prompt=event.batch[0].prompt, sampler_step=event.done, sampler_steps=event.steps, count=len(event.batch),
        prompts=tuple(shot.prompt for shot in event.batch), previews=event.previews, width=event.batch[0].width,
        height=event.batch[0].height, timestep=event.timestep,
    )  # fmt: skip


@contextmanager
def at_strength(transformer: Any, network: Any, strength: float) -> Iterator[None]:
    """A share of the change of a LoRA, or of a LyCORIS network, for the duration of the block."""
    with adapters.scaled(transformer, strength) if network is None else lycoris_adapters.scaled(network, strength):
        yield


def base_rows(shots: Sequence[Shot], source: Source, folder: RunFolder) -> Iterator[ImageRecord | Shot]:
    """The base model's pictures that the run folder does not hold yet: copied from another run's, or a shot that is to be drawn.

    One that another model drew (a resumed run may have another precision) makes room for a new one.
    """
    own = [found for found in drawn(folder, 0) if found.kind == "base" and found.path.exists()]
    there = {found.shot for found in own if found.model == source.model}
    place = Places(folder, 0, "base")
    for shot in dict.fromkeys(shot.base for shot in shots):
        if shot in there:
            continue
        found = kept(shot, source)
        yield shot if found is None else write_picture(place(shot), found[0], shot, found[1], source)
