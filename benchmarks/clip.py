"""Does the CLIP score see what a LoRA learned?

The playground's preset, one run per seed: the 24 held-out and the 72 learned captions are drawn by the base and by the LoRA from the same
noise, and scored by the playground's CLIP with the caption alone, with ", fluent 3d style" (what the LoRA learned) and with ", noto style"
(what the base draws) after it. Then the real held-out pictures with their own and with shuffled captions.
python benchmarks/clip.py [--seeds 1] [--steps 300]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import sd3tune as st
from sd3tune import playground
from sd3tune.config.library import HELD_OUT
from sd3tune.data.images import read_rgb
from sd3tune.models.clip import Scorer, summary
from sd3tune.validation.pictures import drawn

LEARNED = tuple(file.read_text().strip() for file in sorted((playground.PICTURES / "train").glob("*.txt")))
CAPTIONS = {"held-out": tuple(HELD_OUT), "all": (*HELD_OUT, *LEARNED)}
ENDINGS = ("", ", fluent 3d style", ", noto style")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scorer = Scorer.load(playground.SCORER)
    rises: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            folder = run(Path(name), seed, options.steps)
            base, lora = drawn_of(folder, 0), drawn_of(folder, options.steps)
            for kind, captions in CAPTIONS.items():
                for ending in ENDINGS:
                    texts = [caption + ending for caption in captions]
                    before, after = (scorer.scores([pictures[caption] for caption in captions], texts) for pictures in (base, lora))
                    rise = [b - a for a, b in zip(before, after, strict=True)]
                    rises.setdefault((kind, ending), []).append(rise)
                    shown = f"{kind} caption{ending}"
                    print(
                        f"seed {seed}  {shown:34} base {summary(before).mean:.3f}  LoRA {summary(after).mean:.3f}  "
                        f"difference {spread(rise)}",
                        flush=True,
                    )
    for (kind, ending), rows in rises.items():  # a caption is one sample, whatever the number of seeds
        mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
        print(f"all seeds  {kind} caption{ending}: difference {spread(mean)}")
    real = [read_rgb(playground.PICTURES / "heldout" / f"{'-'.join(caption.split())}.png") for caption in HELD_OUT]
    shuffled = [summary(scorer.scores(real, rotated(HELD_OUT, seed))).mean for seed in range(3)]
    own = summary(scorer.scores(real, HELD_OUT))
    print(f"real pictures: own captions {own}, shuffled {', '.join(f'{mean:.3f}' for mean in shuffled)}")


def spread(values: Sequence[float]) -> str:
    """The mean, with two standard errors of it."""
    return f"{statistics.mean(values):+.3f} (2 standard errors {2 * statistics.stdev(values) / len(values) ** 0.5:.3f})"


def run(folder: Path, seed: int, steps: int) -> st.Trainer:
    """The preset, drawing all captions at its start and its end."""
    data = folder / "datasets.yaml"
    data.write_text(
        f"- {{id: train, instance_data_dir: {playground.PICTURES / 'train'}, resolution: 64,\n"
        "   crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]}\n"
    )
    config = st.presets.playground(
        seed=seed, max_train_steps=steps, validation_prompt=tuple(dict.fromkeys(CAPTIONS["all"])), cache_dir=str(folder / "cache"),
        output_dir=str(folder / "runs" / "run"),
    )  # fmt: skip
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build())
    for _ in trainer.run():
        pass
    return trainer


def drawn_of(trainer: st.Trainer, step: int) -> dict[str, Image.Image]:
    """Caption -> what was drawn of it at a step."""
    return {one.shot.prompt: Image.open(one.path).convert("RGB") for one in drawn(trainer.folder, step)}


def rotated(captions: Sequence[str], seed: int) -> list[str]:
    """The captions in an order in which none stays."""
    shift = random.Random(seed).randrange(1, len(captions))
    return [*captions[shift:], *captions[:shift]]


if __name__ == "__main__":
    main()
