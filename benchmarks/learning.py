"""How well do our defaults learn beside the field's recipes?

The playground's base and pictures, rank 16, batches of 2, the same seeds: our defaults, the recipe of diffusers' example
(train_dreambooth_lora_sd3.py), and SimpleTuner's documented defaults with an optimizer that does what its name says. Judged by the loss on
the 24 held-out pictures after 100, 300 and 1,000 updates, as a share of the base model's. The first seed tries five rates; the others run
those that were best for it. Every run is one row of a file, so that an interrupted benchmark goes on; --table reads the file alone.
python benchmarks/learning.py ROWS.jsonl [--seeds 3] [--steps 100 300 1000] [--table]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sd3tune as st
from sd3tune import playground

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

COMMON: dict[str, Any] = {
    "model_flavour": "playground", "mixed_precision": "no", "vae_dtype": "fp32", "tokenizer_max_length": 16, "aspect_bucket_alignment": 16,
    "train_batch_size": 2, "lora_rank": 16, "validation_prompt": (), "num_eval_images": 24, "eval_timesteps": 8,
    "checkpoint_step_interval": 100_000, "checkpoint_minutes": 0, "checkpoint_keep_best": False,
}  # fmt: skip
"""What every recipe has: the playground's facts, and no files on the way."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

RECIPES: dict[str, dict[str, Any]] = {
    "sd3tune": {},
    "diffusers": {
        "lora_targets": tuple(f"attn.{name}" for name in ATTENTION), "lora_init_type": "gaussian", "lr_scheduler": "constant",
        "optimizer_config": "weight_decay=1e-4", "caption_dropout_probability": 0.0, "latent_draw": "sample", "stratified": False,
        "loss_weighting": "sigma_squared",
    },
    "simpletuner": {
        "lora_dropout": 0.1, "optimizer": "adamw_bf16", "optimizer_config": "eps=1e-6", "lr_warmup_steps": 0, "grad_clip_method": "value",
        "max_grad_norm": 2.0, "stratified": False, "latent_draw": "sample",
    },
}  # fmt: skip
"""What differs from our defaults. diffusers: --weighting_scheme logit_normal --precondition_outputs 1, its own defaults."""

DOCUMENTED = {"sd3tune": 1e-4, "diffusers": 1e-4, "simpletuner": 1e-4}
"""Rates that the recipes' own pages name for LoRA; shown, without a claim."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        measure(options.rows, options.seeds, options.steps)
    print(table(read(options.rows), options.steps))


def measure(rows: Path, seeds: int, steps: list[int]) -> None:
    """Run what is not in the file yet, seed by seed."""
    done = {(row["recipe"], row["rate"], row["seed"]) for row in read(rows)}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(seeds):
            for rate in RATES:
                for recipe in RECIPES:
                    wanted = [step for step in steps if not seed or best(read(rows), recipe, step)[0] == rate]
                    if wanted and (recipe, rate, seed) not in done:
                        row = {"recipe": recipe, "rate": rate, "seed": seed, **run(Path(name), recipe, rate, seed, wanted)}
                        with rows.open("a") as file:
                            file.write(json.dumps(row) + "\n")


def run(folder: Path, recipe: str, rate: float, seed: int, steps: list[int]) -> dict[str, Any]:
    """Held-out losses, as shares of the base's, after each number of updates; infinite once the guard has stopped the run."""
    data = folder / "datasets.yaml"
    data.write_text(
        f"- {{id: train, instance_data_dir: {playground.PICTURES / 'train'}, resolution: 64,\n"
        "   crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]}\n"
        f"- {{id: held, instance_data_dir: {playground.PICTURES / 'heldout'}, resolution: 64, dataset_type: eval}}\n"
    )
    config = st.RunConfig.make(
        **COMMON, **RECIPES[recipe], learning_rate=rate, seed=seed, max_train_steps=max(steps), cache_dir=str(folder / "cache"),
        output_dir=str(folder / "runs" / "run"),
    )  # fmt: skip
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build())
    base, started = trainer.evaluate().loss, time.process_time()
    shares: dict[str, float] = {}
    for step in sorted(steps):
        try:
            while trainer.steps_done < step:
                trainer.step()
            shares[str(step)] = trainer.evaluate().loss / base
        except st.TrainingError:
            shares[str(step)] = math.inf
    return {"shares": shares, "cpu_seconds": round(time.process_time() - started)}


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows that were measured."""
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def table(rows: list[dict[str, Any]], steps: list[int]) -> str:
    """For each number of updates and recipe: its best rate by the mean over seeds, and the paired difference of ours to it."""
    names = (
        "updates",
        "recipe",
        "best rate",
        "loss, share of the base's",
        "at its documented rate",
        "seeds",
        "ours - it (2 standard errors)",
    )
    lines = ["| " + " | ".join(names) + " |", "|---:|---|---:|---:|---:|---:|---:|"]
    for step in sorted(steps):
        ours = best(rows, "sd3tune", step)
        for recipe in RECIPES:
            rate, shares = best(rows, recipe, step)
            documented = statistics.mean(of(rows, recipe, step, DOCUMENTED[recipe]).values())
            cells = [f"{step}", recipe, f"{rate:g}", f"{statistics.mean(shares.values()):.4f}", f"{documented:.4f}", f"{len(shares)}"]
            lines.append("| " + " | ".join([*cells, apart(ours[1], shares)]) + " |")
    return "\n".join(lines)


def of(rows: list[dict[str, Any]], recipe: str, step: int, rate: float) -> dict[int, float]:
    """Seed -> share."""
    mine = [row for row in rows if (row["recipe"], row["rate"]) == (recipe, rate)]
    return {row["seed"]: row["shares"][str(step)] for row in mine if str(step) in row["shares"]}


def best(rows: list[dict[str, Any]], recipe: str, step: int) -> tuple[float, dict[int, float]]:
    """The rate that was best for the first seed, and its shares by seed."""
    first = {rate: of(rows, recipe, step, rate)[0] for rate in RATES if 0 in of(rows, recipe, step, rate)}
    rate = min(first, key=first.__getitem__)
    return rate, of(rows, recipe, step, rate)


def apart(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean of the paired differences, with two standard errors of it."""
    differences = list(_paired(ours, theirs))
    if len(differences) < 2 or ours == theirs:
        return ""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.4f} ({2 * error:.4f})"


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> Iterator[float]:
    for seed in sorted(ours.keys() & theirs.keys()):
        yield ours[seed] - theirs[seed]


if __name__ == "__main__":
    main()
