"""How well the playground draws: of 200 captions of its training set, how many pictures have their own emoji nearest.

Needs the two npm packages of sd3tune/playground/README.md: python benchmarks/quality.py NPM [--count 200]
20 steps, CFG 3, picture i with seed i; nearest by distance of the autoencoder's latents among all training pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from pathlib import Path

import torch
from PIL import Image

import sd3tune as st
from sd3tune import playground
from sd3tune.cache.states import Text, joined
from sd3tune.models import components
from sd3tune.playground.recipe import autoencoder, pictures
from sd3tune.validation.sampler import Guidance, decode, sample, start_noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("npm", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--model", type=Path, default=playground.MODEL)
    parser.add_argument(
        "--t5-length", type=int, default=16, help="16 as trained; 256 is what a stock call without max_sequence_length uses"
    )
    parser.add_argument("--sheet", type=Path, help="write the first 48 pictures here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    config = st.RunConfig.make(
        pretrained_model_name_or_path=str(options.model),
        mixed_precision="no",
        tokenizer_max_length=options.t5_length,
        validation_resolution="64",
    )
    device = components.pick_device()
    emoji = pictures.read(options.npm)
    vae, transformer = components.load_vae(config, device), components.load_transformer(config, device).eval()
    originals = components.pixels([pictures.on_white(e.noto) for e in emoji]).to(device)
    known_BN = latents(vae, originals).flatten(1)
    print(f"autoencoder: {autoencoder.psnr(vae, originals):.2f} dB over {len(emoji)} pictures")

    chosen = random.Random(0).sample(range(len(emoji)), options.count)
    with st.encoders(config).load() as loaded:
        states = loaded.encode_texts([*(emoji[i].name for i in chosen), ""])
    *texts, empty = [Text(*(values[0] for values in joined([of_one]))) for of_one in states]
    first = five = 0
    drawn: list[Image.Image] = []
    started = time.monotonic()
    scheduler = components.load_scheduler(config)
    for seed, (i, text) in enumerate(zip(chosen, texts, strict=True)):
        walk = sample(
            transformer, scheduler, positive=text, negative=empty, steps=20, guidance=Guidance(3.0),
            noise_BCHW=start_noise((16, 8, 8), seed, torch.float32).to(device),
        )  # fmt: skip
        picture = decode(vae, deque(walk, maxlen=1)[0][1])[0]
        distance_N = torch.cdist(latents(vae, components.pixels([picture]).to(device)).flatten(1), known_BN)[0]
        rank = int((distance_N < distance_N[i]).sum())
        first, five = first + (rank == 0), five + (rank < 5)
        drawn.append(picture)
    if options.sheet:
        sheet(drawn[:48], [emoji[i] for i in chosen[:48]], options.sheet)
    print(
        json.dumps(
            {
                "captions": options.count, "t5_length": options.t5_length, "nearest": first / options.count,
                "among_five": five / options.count, "chance_five": 5 / len(emoji), "seconds": round(time.monotonic() - started),
            }
        )
    )  # fmt: skip


def latents(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return autoencoder.moments(vae, pixels)[0]


def sheet(drawn: list[Image.Image], emoji: list[pictures.Emoji], path: Path) -> None:
    whole = Image.new("RGB", (16 * 64, 6 * 64), "white")
    for n, (picture, e) in enumerate(zip(drawn, emoji, strict=True)):
        whole.paste(pictures.on_white(e.noto), ((n % 8) * 128, n // 8 * 64))
        whole.paste(picture, ((n % 8) * 128 + 64, n // 8 * 64))
    whole.save(path)


if __name__ == "__main__":
    main()
