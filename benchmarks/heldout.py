"""Does it learn the style, and are captions paired with their pictures?

With each of 3 seeds: the loss on the 24 held-out pictures before and after the playground's preset, and after the same run
with the training captions shuffled among the pictures. python benchmarks/heldout.py [--seeds 3] [--steps 150]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch

import sd3tune as st
from sd3tune import playground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(options.seeds):
            paired = losses(folder, seed, options.steps, shuffled=False)
            shuffled = losses(folder, seed, options.steps, shuffled=True)
            row = {
                "seed": seed, "base": paired[0], "paired": paired[1], "shuffled": shuffled[1], "fall": 1 - paired[1] / paired[0],
                "worse_when_shuffled": (shuffled[1] - paired[1]) / paired[0],
            }  # fmt: skip
            print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)


def losses(folder: Path, seed: int, steps: int, *, shuffled: bool) -> tuple[float, float]:
    """Held-out loss before and after one run."""
    train = folder / f"train-{seed}-{shuffled}"
    shutil.copytree(playground.PICTURES / "train", train)
    if shuffled:
        files = sorted(train.glob("*.txt"))
        texts = [f.read_text() for f in files]
        random.Random(seed).shuffle(texts)
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
    data = folder / "datasets.yaml"
    data.write_text(
        f"- {{id: train, instance_data_dir: {train}, resolution: 64,\n"
        "   crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]}\n"
        f"- {{id: held, instance_data_dir: {playground.PICTURES / 'heldout'}, resolution: 64, dataset_type: eval}}\n"
    )
    config = st.presets.playground(
        eval_timesteps=8, seed=seed, max_train_steps=steps, validation_prompt=(), cache_dir=str(folder / "cache"),
        output_dir=str(folder / "runs" / "run"),
    )  # fmt: skip
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build())
    evaluations = [record.loss for record in trainer.run() if record.type == "eval"]  # type: ignore[attr-defined]
    return evaluations[0], evaluations[-1]


if __name__ == "__main__":
    main()
