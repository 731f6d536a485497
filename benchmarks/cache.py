"""What the cache builder costs beyond the work itself, by process time, both arms in turn.

decode: pictures of 12 megapixels to 1024 px with an encoder that does nothing, against a bare loop of open, draft, load, resize, crop.
encode: the playground's autoencoder on its own 64 px pictures and on JPEGs of 512 px, against a bare loop of encode calls.
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
from sd3tune.cache.conditioning import Conditioning
from sd3tune.cache.decoding import cut
from sd3tune.cache.states import Moments, PartStates
from sd3tune.cache.store import Entry, Store
from sd3tune.data import Dataset
from sd3tune.data.catalog import from_datasets
from sd3tune.data.images import DRAFT


class NoEncoders:
    """Gives a small tensor for each picture and text without looking at it."""

    latent_fingerprint = text_fingerprint = "none"
    conditioning = Conditioning((1, 1))
    text_parts, held_bytes = ("CLIP-L", "CLIP-G", "T5"), 24

    @contextmanager
    def load(self) -> Iterator[NoEncoders]:
        yield self

    def encode_images(self, pictures: Sequence[Any], *, tiled: bool = False) -> Moments:
        return Moments(torch.zeros(len(pictures), 16, 4, 4), torch.zeros(len(pictures), 16, 4, 4))

    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        if part == "T5":
            return [PartStates(torch.zeros(1, 2), None) for _ in texts]
        return [PartStates(torch.zeros(1, 1), torch.zeros(1)) for _ in texts]


def photograph(seed: int, width: int = 4000, height: int = 3000) -> Image.Image:
    """1/f noise, most of it light."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(height * np.fft.fftfreq(height)[:, None], np.arange(width // 2 + 1))
    grain = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(2, height, width))) / np.maximum(frequency, 1))
    grain /= grain.std(axis=(1, 2), keepdims=True)
    rgb = 128 + 50 * grain[0] + 10 * grain[1] * np.array([1, -0.5, -1])[:, None, None]
    return Image.fromarray(np.uint8(np.clip(rgb, 0, 255)).transpose(1, 2, 0))


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time of a call."""
    started = clock()
    work()
    return clock() - started


def compare(
    ours: Callable[[int], object], bare: Callable[[int], object], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median of the ratios of times, arms in turn, after one round that does not count."""
    rows = []
    for number in range(rounds + 1):
        pair = tuple(seconds(lambda work=work, number=number: work(number), clock) for work in (ours, bare))  # type: ignore[misc]
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


def encode(folder: Path, rounds: int, side: int) -> dict[str, Any]:
    """The builder with the playground's autoencoder against its encode calls alone: 64 px of the package's, or generated JPEGs."""
    config = st.presets.playground(validation_prompt=())
    source = playground.PICTURES / "train"
    if side > 64:
        source = folder / "in"
        source.mkdir()
        for n in range(16):
            photograph(n, side, side).save(source / f"{n}.jpg", quality=90)
    catalog = from_datasets([Dataset(id="train", instance_data_dir=str(source), resolution=side, caption_strategy="filename")])
    made = st.plan(catalog, config.replace(cache_dir=str(folder / "e")))
    groups = [list(made.train)[i : i + 4] for i in range(0, len(made.train), 4)]
    groups = [g for g in groups if len({p.bucket for p in g}) == 1]
    flat = tuple(p for g in groups for p in g)
    pictures = [[cut(p) for p in g] for g in groups]
    with st.encoders(config).load() as loaded:
        loaded.encode_images(pictures[0])

        class Held(NoEncoders):
            latent_fingerprint = text_fingerprint = "held"
            encode_images = staticmethod(loaded.encode_images)  # type: ignore[assignment]

        def ours(number: int) -> None:
            again = st.plan(catalog, config.replace(cache_dir=str(folder / f"e{time.monotonic_ns()}")))
            st.CacheBuilder(replace(again, train=flat), Held()).build()

        def bare(number: int) -> None:
            for group in pictures:
                loaded.encode_images(group)

        return {
            "side": side,
            "process time": compare(ours, bare, rounds),
            "wall clock": compare(ours, bare, rounds, clock=time.perf_counter),
        }


def read(folder: Path, rounds: int, entries: int = 48) -> dict[str, dict[str, float]]:
    """Our entries, and one ``.pt`` file each, against a copy of the same bytes."""
    store = Store(folder / "read")
    values = {
        "latents": {"mean_CHW": torch.randn(16, 128, 128, dtype=torch.bfloat16)},
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
            torch.save(held[n], folder / f"{kind}{n}.pt")
        store.write(kind, [Entry(f"{n:064x}", held[n], 1) for n in range(entries)])

        keys, names = [f"{n:064x}" for n in range(entries)], tuple(tensors)

        def ours(_: int, kind: str = kind, batch: Any = batch, keys: Any = keys, names: Any = names) -> None:
            for n, key in enumerate(keys):
                for name, tensor in zip(names, store.read(kind, key, names), strict=True):
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

        size = sum(shard.stamp.size for shard in store.shards(kind)) / entries
        found[kind] = {
            **compare(*(lambda number, work=work: [work(number) for _ in range(20)] for work in (ours, bare)), 4 * rounds),  # type: ignore[misc]
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
        "read": lambda folder: read(folder, options.rounds),
        "encode 64 px": lambda folder: encode(folder, options.rounds, 64),
        "encode 512 px": lambda folder: encode(folder, options.rounds, 512),
        "decode": lambda folder: decode(folder, options.pictures, options.rounds),
    }.items():  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: work(Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
