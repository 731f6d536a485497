"""Does training on its own path help the model on its own path?

On the playground, each arm 300 updates with the same data and noise: plain; rolled out, with the probability rising to 0.5 over half of
them and up to 3 of 28 sampler steps, aimed at the picture (reaimed) or at n - x (straight); and with ReflexFlow. Judged on the 24 held-out
pictures: the held-out loss; the squared error of the picture that is predicted from exact mixtures, and after 3 and 10 Euler steps of its
own down to the same noise levels (own path); and of 2 pictures drawn of each caption in 28 steps without guidance, the distance to the real
one (paired) and the energy distance between drawn and real (drawn; 0 if they were of one distribution), all in latents.
python benchmarks/rollout.py [--seeds 2] [--steps 300]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sd3tune as st
from sd3tune import playground
from sd3tune.data.planning import Plan
from sd3tune.training import flow, rollout, sigmas, solvers
from sd3tune.training.batches import Batch, load, noise
from sd3tune.validation.evaluate import evaluation_levels, evaluation_loss

CROP = "resolution: 64, crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]"
SQUARE = "resolution: 64, crop: true, crop_aspect: square"
LEVELS, DRAWN = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--arms", nargs="*", default=["plain", "reaimed", "reflexflow", "straight"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(options.first, options.first + options.seeds):
            for arm in options.arms:
                print(json.dumps(run(folder, seed, arm, options.steps)), flush=True)


def settings_of(arm: str, steps: int) -> dict[str, Any]:
    if arm in ("plain", "untrained"):
        return {}
    rolled = {
        "scheduled_sampling_max_step_offset": 3, "scheduled_sampling_ramp_steps": steps // 2, "scheduled_sampling_prob_end": 0.5,
        "scheduled_sampling_target": "straight" if arm == "straight" else "reaimed", "scheduled_sampling_reflexflow": arm == "reflexflow",
    }  # fmt: skip
    return rolled


def run(folder: Path, seed: int, arm: str, steps: int) -> dict[str, Any]:
    """One run, and what it is worth."""
    data = folder / "datasets.yaml"
    data.write_text(
        f"- {{id: train, instance_data_dir: {playground.PICTURES / 'train'}, {CROP}}}\n"
        f"- {{id: held, instance_data_dir: {playground.PICTURES / 'heldout'}, {SQUARE}, dataset_type: eval}}\n"
    )
    config = st.presets.playground(
        seed=seed, max_train_steps=max(steps, 20), validation_prompt=(), num_eval_images=24, eval_timesteps=LEVELS, checkpoint_minutes=0.0,
        cache_dir=str(folder / "cache"), output_dir=str(folder / "runs" / f"{seed}-{arm}"), **settings_of(arm, steps),
    )  # fmt: skip
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build())
    started, extra = time.process_time(), 0
    for _ in range(0 if arm == "untrained" else steps):
        extra += trainer.step().extra_forwards
    seconds = (time.process_time() - started) / steps
    with trainer._evaluating():
        found = judge(trainer)
    return {
        "seed": seed, "arm": arm, **{name: round(value, 4) for name, value in found.items()}, "extra": round(extra / steps, 2),
        "expected": round(trainer.manifest.extra_forwards, 2), "seconds": round(seconds, 3),
    }  # fmt: skip


@torch.no_grad()
def judge(trainer: st.Trainer) -> dict[str, float]:
    """Every figure of one adapter, in the order of the docstring."""
    cache, velocity = trainer.cache, trainer.engine.velocity
    levels = evaluation_levels(trainer.engine.rules, cache.plan.evaluation, LEVELS)
    loss = evaluation_loss(velocity, cache, sigmas=levels, device=trainer.device, step=0).loss
    batches = [load(cache, [(p, p.item.caption) for p in rows]) for rows in _by_size(cache.plan)]
    found = {"heldout": loss}
    for steps in (0, 3, 10):
        errors = torch.cat([own_path(velocity, batch, n, levels[1::2], steps) for n, batch in enumerate(batches)])
        found[f"own{steps}"] = float(errors.mean())
    pairs = [drawn(velocity, batch, n) for n, batch in enumerate(batches)]
    found["paired"] = float(torch.cat([(made - real).square().flatten(2).mean(2).flatten() for made, real in pairs]).mean())
    found["drawn"] = sum(energy(made.flatten(0, 1), real) for made, real in pairs) / len(pairs)
    return found


def own_path(velocity: flow.Velocity, batch: Batch, n: int, levels: tuple[float, ...], steps: int) -> Tensor:
    """Squared error of the predicted picture at each level, after some steps of the model's own."""
    noise_BCHW, factor = noise(batch.latent_BCHW.shape, seed=0, k=n), sigmas.factor_of(3.0, *batch.latent_BCHW.shape[2:])
    errors = []
    for level in levels:
        path = rollout.path(level, steps, rollout.grid(factor))
        start = flow.mix(batch.latent_BCHW, noise_BCHW, torch.full((len(batch.ids),), path[0]))
        here = solvers.walk(velocity, start, batch.joint_BLD, batch.pooled_BP, paths=[path] * len(batch.ids), sampler="euler", order=1)
        picture = here - level * velocity(here, torch.full((len(batch.ids),), level), batch.joint_BLD, batch.pooled_BP)
        errors.append((picture - batch.latent_BCHW).square().flatten(1).mean(1))
    return torch.cat(errors)


def drawn(velocity: flow.Velocity, batch: Batch, n: int) -> tuple[Tensor, Tensor]:
    """Latents drawn of each caption, several times, and the real ones."""
    path = (*rollout.grid(3.0), 0.0)
    made = [
        solvers.walk(
            velocity, noise(batch.latent_BCHW.shape, seed=1 + draw, k=n), batch.joint_BLD, batch.pooled_BP, paths=[path] * len(batch.ids),
            sampler="euler", order=1,
        )
        for draw in range(DRAWN)
    ]  # fmt: skip
    return torch.stack(made), batch.latent_BCHW


def energy(made: Tensor, real: Tensor) -> float:
    """The energy distance of two samples, each without its distances to itself."""
    x, y = made.flatten(1), real.flatten(1)
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def _by_size(plan: Plan) -> list[list[Any]]:
    sizes = sorted({p.bucket for p in plan.evaluation})
    return [[p for p in plan.evaluation if p.bucket == size] for size in sizes]


if __name__ == "__main__":
    main()
