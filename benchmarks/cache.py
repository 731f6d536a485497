"""What the cache builder costs beyond the work itself, by process time, both arms in turn.

decode: pictures of 12 megapixels to 1024 px with an encoder that does nothing, against a bare loop of open, draft, load, resize, crop.
encode: the playground's autoencoder on its own pictures, against a bare loop of encode calls.
read:   latents and texts of real size copied into a batch, against a bare copy of the same bytes, and against torch.load of one file each.
python benchmarks/cache.py [--pictures 24] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import sd3tune as st
from sd3tune import playground
from sd3tune.cache.builder import TextStates, cut
from sd3tune.cache.store import Store
from sd3tune.data import Dataset
from sd3tune.data.catalog import from_datasets
from sd3tune.data.images import DRAFT


class NoEncoders:
    """Gives a small tensor for each picture and text without looking at it."""

    latent_fingerprint = text_fingerprint = "none"

    @contextmanager
    def load(self) -> Iterator[NoEncoders]:
        yield self

    def encode_images(self, pictures: Sequence[Any]) -> torch.Tensor:
        return torch.zeros(len(pictures), 16, 4, 4)

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        return [TextStates(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2)) for _ in texts]


def photograph(seed: int, width: int = 4000, height: int = 3000) -> Image.Image:
    """1/f noise, most of it light."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(height * np.fft.fftfreq(height)[:, None], np.arange(width // 2 + 1))
    grain = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(2, height, width))) / np.maximum(frequency, 1))
    grain /= grain.std(axis=(1, 2), keepdims=True)
    rgb = 128 + 50 * grain[0] + 10 * grain[1] * np.array([1, -0.5, -1])[:, None, None]
    return Image.fromarray(np.uint8(np.clip(rgb, 0, 255)).transpose(1, 2, 0))


def seconds(work: Callable[[], object]) -> float:
    """Process time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(ours: Callable[[int], object], bare: Callable[[int], object], rounds: int) -> dict[str, float]:
    """Median of the ratios of process times, arms in turn, after one round that does not count."""
    rows = []
    for number in range(rounds + 1):
        pair = seconds(lambda number=number: ours(number)), seconds(lambda number=number: bare(number))  # type: ignore[misc]
        rows.append(pair)
    ratios = sorted(a / b for a, b in rows[1:])
    return {
        "ratio": round(statistics.median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
        "bare_s": round(rows[-1][1], 3),
    }


def decode(folder: Path, pictures: int, rounds: int) -> dict[str, float]:
    """The builder against the bare loop on the same JPEGs."""
    (folder / "in").mkdir()
    originals = [photograph(n) for n in range(4)]
    for n in range(pictures):
        originals[n % 4].save(folder / "in" / f"{n}.jpg", quality=90, comment=str(n).encode())
        (folder / "in" / f"{n}.txt").write_text("x")
    config = st.presets.playground(aspect_bucket_alignment=64, cache_dir=str(folder / "cache0"))
    made = st.plan(st.discover(folder / "in"), config)

    def ours(number: int) -> None:
        again = st.plan(made.catalog, config.replace(cache_dir=str(folder / f"cache{number}")))
        st.CacheBuilder(again, NoEncoders()).build()

    def bare(number: int) -> None:
        for placement in made.train:
            resized, left, top, bucket, _ = placement.geometry
            with Image.open(placement.item.path) as opened:
                opened.draft(None, (int(DRAFT * resized[0]), int(DRAFT * resized[1])))
                picture = ImageOps.exif_transpose(opened).convert("RGB")
            picture.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + bucket.width, top + bucket.height))

    return compare(ours, bare, rounds)


def encode(folder: Path, rounds: int) -> dict[str, float]:
    """The builder with the playground's autoencoder against its encode calls alone."""
    config = st.presets.playground(validation_prompt=())
    catalog = from_datasets([Dataset(id="train", instance_data_dir=str(playground.PICTURES / "train"), resolution=64)])
    made = st.plan(catalog, config.replace(cache_dir=str(folder / "e")))
    groups = [list(made.train)[i : i + 4] for i in range(0, len(made.train), 4)]
    groups = [g for g in groups if len({p.bucket for p in g}) == 1]
    flat = tuple(p for g in groups for p in g)
    pictures = [[cut(p) for p in g] for g in groups]
    with st.encoders(config).load() as loaded:
        loaded.encode_images(pictures[0])

        class Held:
            latent_fingerprint = text_fingerprint = "held"

            @contextmanager
            def load(self) -> Iterator[Any]:
                yield self

            encode_images = staticmethod(loaded.encode_images)
            encode_texts = staticmethod(NoEncoders().encode_texts)

        def ours(number: int) -> None:
            again = st.plan(catalog, config.replace(cache_dir=str(folder / f"e{number}")))
            st.CacheBuilder(replace(again, train=flat), Held()).build()

        def bare(number: int) -> None:
            for group in pictures:
                loaded.encode_images(group)

        return compare(ours, bare, rounds)


def read(folder: Path, rounds: int, entries: int = 48) -> dict[str, dict[str, float]]:
    """Our entries, and one ``.pt`` file each, against a copy of the same bytes."""
    store = Store(folder / "read")
    values = {
        "latents": {"latent_CHW": torch.randn(16, 128, 128, dtype=torch.bfloat16)},
        "texts": {
            "clip_LD": torch.randn(77, 2048).bfloat16(), "t5_LD": torch.randn(154, 4096).bfloat16(),
            "pooled_P": torch.randn(2048).bfloat16(),
        },
    }  # fmt: skip
    found = {}
    for kind, tensors in values.items():
        held = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(entries)]
        batch = {name: torch.empty((entries, *tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()}
        for n in range(entries):
            store.write(kind, f"{n:064x}", held[n], 1)
            torch.save(held[n], folder / f"{kind}{n}.pt")

        def ours(_: int, kind: str = kind, batch: Any = batch) -> None:
            for n in range(entries):
                for name, tensor in zip(batch, store.read(kind, f"{n:064x}", tuple(batch)), strict=True):
                    batch[name][n].copy_(tensor)

        def files(_: int, kind: str = kind, batch: Any = batch) -> None:
            for n in range(entries):
                loaded = torch.load(folder / f"{kind}{n}.pt")
                for name in batch:
                    batch[name][n].copy_(loaded[name])

        def bare(_: int, held: Any = held, batch: Any = batch) -> None:
            for n in range(entries):
                for name in batch:
                    batch[name][n].copy_(held[n][name])

        size = store.path(kind, f"{0:064x}").stat().st_size
        found[kind] = {
            **compare(ours, bare, 4 * rounds),
            "pt_ratio": compare(files, bare, 4 * rounds)["ratio"],
            "entry_MB": round(size / 1e6, 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, work in {
        "read": lambda folder: read(folder, options.rounds), "encode": lambda folder: encode(folder, options.rounds),
        "decode": lambda folder: decode(folder, options.pictures, options.rounds),
    }.items():  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: work(Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
