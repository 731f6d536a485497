"""Draw the validation prompts with the live transformer, and put the pictures of a run into one grid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.cache.decoding import cut
from sd3tune.cache.reading import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.files import make_folder, write_text, write_with
from sd3tune.models import components
from sd3tune.records import ImageRecord, PreviewRecord
from sd3tune.run_folder import RunFolder
from sd3tune.validation.grids import Grid
from sd3tune.validation.sampler import Guidance, decode, sample, start_noise


class Validator:
    """Draws pictures of the transformer as it is now; the autoencoder is in memory only while it does."""

    def __init__(self, transformer: Any, cache: Cache, device: torch.device) -> None:
        self._transformer, self._cache, self._device = transformer, cache, device

    def draw(self, config: RunConfig, folder: RunFolder, step: int) -> Iterator[PreviewRecord | ImageRecord]:
        """Draw every prompt at every size into the run folder; one record per sampler step and per picture."""
        vae, scheduler = components.load_vae(config, self._device), components.load_scheduler(config)
        guidance, steps = guidance_of(config), config.validation.validation_num_inference_steps
        negative = self._cache.text(config.validation.validation_negative_prompt)
        channels = self._transformer.config.in_channels
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        dtype = components.compute_dtype(config)
        make_folder(folder.images(step))
        for number, (prompt, (width, height)) in enumerate(cells(config)):
            noise_BCHW = start_noise((channels, height // factor, width // factor), config.validation_seed, dtype).to(self._device)
            for done, latent_BCHW in sample(  # noqa: B007 (the last one is decoded)
                self._transformer, scheduler, positive=self._cache.text(prompt), negative=negative, noise_BCHW=noise_BCHW, steps=steps,
                guidance=guidance,
            ):  # fmt: skip
                yield PreviewRecord(step=step, prompt=prompt, sampler_step=done, sampler_steps=steps)
            record = ImageRecord(
                step=step, prompt=prompt, path=str(picture_path(folder, step, number)), seed=config.validation_seed, width=width,
                height=height, guidance=guidance.scale, skip_layers=guidance.skip_layers,
            )  # fmt: skip
            write_picture(decode(vae, latent_BCHW)[0], record, config)
            yield record


def guidance_of(config: RunConfig) -> Guidance:
    """The sampler's guidance from the settings."""
    v = config.validation
    return Guidance(
        v.validation_guidance, v.validation_guidance_skip_layers or (), v.validation_guidance_skip_layers_start,
        v.validation_guidance_skip_layers_stop, v.validation_guidance_skip_scale,
    )  # fmt: skip


def cells(config: RunConfig) -> list[tuple[str, tuple[int, int]]]:
    """Every prompt at every size, in the grid's order."""
    return [(prompt, size) for prompt in config.prompts for size in config.validation_sizes]


def picture_path(folder: RunFolder, step: int, number: int) -> Path:
    """File of the ``number``-th picture."""
    return folder.images(step) / f"{number:02d}.png"


def write_picture(picture: Image.Image, record: ImageRecord, config: RunConfig) -> None:
    """Write a picture with its settings inside, and the same settings beside it as JSON. Raises: FileError."""
    settings = {k: v for k, v in config.leaves().items() if k.startswith("validation_")}
    described = json.dumps({**record.as_dict(), "settings": settings}, indent=1)
    info = PngInfo()
    info.add_text("sd3tune", described)
    path = Path(record.path)
    write_with(path, lambda draft: picture.save(draft, "PNG", pnginfo=info))
    write_text(path.with_suffix(".json"), described + "\n")


def grid_of(config: RunConfig, folder: RunFolder, cache: Cache, steps: list[int]) -> Grid:
    """The pictures drawn after each of ``steps`` updates, and the real ones that have the same captions."""
    wanted = cells(config)
    rows: list[tuple[str, tuple[Image.Image | None, ...]]] = []
    for step in steps:
        drawn = _drawn(folder, step)
        label = "base model" if step == 0 else f"LoRA, step {step}"
        rows.append((label, tuple(_open(drawn[cell]) if cell in drawn else None for cell in wanted)))
    placements = {p.item.caption: p for p in (*cache.plan.train, *cache.plan.evaluation)}
    references = tuple(cut(placements[prompt]) if prompt in placements else None for prompt, _ in wanted)
    if any(references):
        rows.append(("reference", references))
    several = len(config.validation_sizes) > 1
    return Grid(tuple(rows), tuple(f"{prompt} {w}x{h}" if several else prompt for prompt, (w, h) in wanted))


def newest_grid(config: RunConfig, folder: RunFolder, cache: Cache, step: int) -> Grid:
    """The newest pictures drawn after up to ``step`` updates under the base model's, over the real ones."""
    drawn = sorted(int(p.name.removeprefix("step-")) for p in folder.images(0).parent.glob("step-*"))
    drawn = [found for found in drawn if found <= step]
    return grid_of(config, folder, cache, sorted({*drawn[:1], *drawn[-1:]}))


def _drawn(folder: RunFolder, step: int) -> dict[tuple[str, tuple[int, int]], Path]:
    """The pictures of a step by prompt and size, for prompts may change in mid-run."""
    found = {}
    for path in sorted(folder.images(step).glob("*.json")):
        row = json.loads(path.read_text())
        found[row["prompt"], (row["width"], row["height"])] = path.with_suffix(".png")
    return found


def _open(path: Path) -> Image.Image | None:
    if not path.exists():
        return None
    with Image.open(path) as opened:
        return opened.convert("RGB")
