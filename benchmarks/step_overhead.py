"""What `trainer.step()` costs beyond a bare loop on the same model and batch.

Process time, one torch thread, the two arms interleaved step by step; the figure is the median of the ratios.
python benchmarks/step_overhead.py [--pairs 60]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import sd3tune as st
from sd3tune import playground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "datasets.yaml"
        data.write_text(f"- {{id: fluent, instance_data_dir: {playground.PICTURES / 'train'}, resolution: 64, crop: true}}\n")
        config = st.presets.playground(
            output_dir=f"{folder}/run", cache_dir=f"{folder}/cache", validation_prompt=(), lr_scheduler="constant", max_train_steps=10_000
        )
        cache = st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build()
        ours, bare = st.Trainer(config, cache), st.Trainer(config, cache)
        step = bare_step(bare)
        ratios = []
        for pair in range(options.pairs + 5):
            arms = [("ours", ours.step), ("bare", step)]
            seconds = {name: timed(arm) for name, arm in (arms if pair % 2 else reversed(arms))}
            if pair >= 5:
                ratios.append(seconds["ours"] / seconds["bare"])
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"median ratio {statistics.median(ratios):.4f} (quartiles {low:.3f} to {high:.3f}) over {len(ratios)} pairs")


def timed(function: object) -> float:
    started = time.process_time()
    function()  # type: ignore[operator]
    return time.process_time() - started


def bare_step(trainer: st.Trainer) -> object:
    """The shortest loop that trains: one batch kept in memory, no records, no checks, torch's own AdamW."""
    transformer, weights = trainer.transformer, list(trainer.engine.weights.values())
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    batch = trainer.engine.batches[0]

    def step() -> None:
        sigma = torch.rand(len(batch.ids))
        noise = torch.randn_like(batch.latent_BCHW)
        level = sigma.view(-1, 1, 1, 1)
        out = transformer(
            hidden_states=(1 - level) * batch.latent_BCHW + level * noise, timestep=1000 * sigma, encoder_hidden_states=batch.joint_BLD,
            pooled_projections=batch.pooled_BP, return_dict=False,
        )[0]  # fmt: skip
        loss = (out - (noise - batch.latent_BCHW)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        loss.item()

    return step


if __name__ == "__main__":
    main()
