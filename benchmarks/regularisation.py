"""Does regularisation keep what the base knows?

On the playground: a LoRA learns the style of half of the training pictures, without and with regularisation on pictures that the base
model draws of 24 other captions (the class pictures). Judged before, after half, and after all of the updates that learn (with
regularisation there are as many again on class pictures) on: the base's drawings of 24 captions that neither saw (others: how much of
the base is lost), and the held-out pictures of the new style (style: what was learned).
python benchmarks/regularisation.py [--seeds 2] [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sd3tune as st
from sd3tune import playground
from sd3tune.validation.class_pictures import draw
from sd3tune.validation.evaluate import evaluation_levels, evaluation_loss

CROP = "resolution: 64, crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 4.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder)
        for seed in range(options.seeds):
            for weight in (None, *options.weights):
                started = time.process_time()
                for row in run(folder, seed, options.steps, weight):
                    print(json.dumps({**row, "cpu_seconds": round(time.process_time() - started)}), flush=True)


def pictures(folder: Path) -> None:
    """Pictures of the style, the base's own of 24 captions to keep, and of 24 others to judge by."""
    files = sorted((playground.PICTURES / "train").glob("*.png"))
    (folder / "style").mkdir()
    for file in files[::2]:
        shutil.copy(file, folder / "style")
        shutil.copy(file.with_suffix(".txt"), folder / "style")
    config = st.presets.playground(validation_resolution="64x64", validation_num_inference_steps=20)
    others = [file.with_suffix(".txt").read_text().strip() for file in files[1::2]]
    held = [file.read_text().strip() for file in sorted((playground.PICTURES / "heldout").glob("*.txt"))]
    list(draw(config, others[:24], folder / "class", 48))
    list(draw(config.replace(validation_seed=1000), held, folder / "others", 24))


def run(folder: Path, seed: int, steps: int, weight: float | None) -> Iterator[dict[str, Any]]:
    """Both losses before, half through and after one run; without regularisation when there is no weight."""
    data = folder / "datasets.yaml"
    rows = [f"- {{id: style, instance_data_dir: {folder / 'style'}, {CROP}}}"]
    if weight is not None:
        rows.append(f"- {{id: class, instance_data_dir: {folder / 'class'}, {CROP}, is_regularisation_data: true}}")
    data.write_text(
        "\n".join([*rows, f"- {{id: held, instance_data_dir: {playground.PICTURES / 'heldout'}, {CROP}, dataset_type: eval}}\n"])
    )
    settings = {
        "seed": seed, "validation_prompt": (), "num_eval_images": 24, "cache_dir": str(folder / "cache"), "eval_timesteps": 8,
        "regularisation_weight": 1.0 if weight is None else weight, "max_train_steps": 10_000, "lr_warmup_steps": 0,
    }  # fmt: skip
    config = st.presets.playground(**settings, output_dir=str(folder / "runs" / f"{seed}-{weight}"))
    trainer = st.Trainer(config, built(data, config))
    judge = folder / "judge.yaml"
    judge.write_text(f"{rows[0]}\n- {{id: others, instance_data_dir: {folder / 'others'}, {CROP}, dataset_type: eval}}\n")
    base = built(judge, config)
    learned = 0
    for wanted in (0, steps // 2, steps):
        while learned < wanted:
            learned += trainer.step().loss is not None
        found = {name: round(value, 4) for name, value in losses(trainer, base).items()}
        yield {"seed": seed, "weight": weight, "learned": learned, "updates": trainer.steps_done, **found}


def built(data: Path, config: st.RunConfig) -> st.Cache:
    return st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build()


def losses(trainer: st.Trainer, base: st.Cache) -> dict[str, float]:
    """On the style's held-out pictures, and on the base's drawings of other captions."""
    levels = evaluation_levels(trainer.engine.rules, base.plan.evaluation, 8)
    with trainer._judge._evaluating():
        found = {
            name: evaluation_loss(trainer.engine.velocity, cache, sigmas=levels, device=trainer.device, step=0).loss
            for name, cache in (("style", trainer.cache), ("others", base))
        }
    return found


if __name__ == "__main__":
    main()
