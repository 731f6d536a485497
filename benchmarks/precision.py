"""What each precision of the base costs on the playground: bytes, error of the weights and of the prediction, time, and what is learned.

Steps of all precisions are timed in turn, by process time; the held-out loss is that after the same short run.
python benchmarks/precision.py [--steps 60] [--pairs 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sd3tune as st
from sd3tune.models import components
from sd3tune.models.quantize import PRECISIONS, bytes_of, dequantised


def predicted(model: Any) -> torch.Tensor:
    g, c = torch.Generator().manual_seed(0), model.config
    shapes = ((8, 16, 8, 8), (8, 32, c.joint_attention_dim), (8, c.pooled_projection_dim))
    x, t, p = (torch.randn(shape, generator=g) for shape in shapes)
    with torch.no_grad():
        found: torch.Tensor = model(
            hidden_states=x, encoder_hidden_states=t, pooled_projections=p, timestep=torch.linspace(50, 950, 8)
        ).sample
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = st.presets.playground(cache_dir=str(Path(folder) / "cache"), validation_prompt=(), max_train_steps=options.steps)
        cache = st.CacheBuilder(st.plan(st.discover("datasets.yaml"), base), st.encoders(base)).build()
        plain = components.load_transformer(base, torch.device("cpu")).eval()
        weights = {name: module.weight for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
        expected = predicted(plain)
        trainers, rows = {}, {}
        for precision in PRECISIONS:
            config = base.replace(base_model_precision=precision, output_dir=str(Path(folder) / precision))
            model = components.load_transformer(config, torch.device("cpu")).eval()
            held = {name: dequantised(module) for name, module in model.named_modules() if name in weights}
            error = (
                statistics.median(float((held[n] - w).norm() / w.norm()) for n, w in weights.items() if not torch.equal(held[n], w))
                if (precision != "no_change")
                else 0.0
            )
            moved = float((predicted(model) - expected).norm() / expected.norm())
            rows[precision] = {"MB": round(bytes_of(model) / 1e6, 1), "weights": round(error, 4), "prediction": round(moved, 4)}
            trainers[precision] = st.Trainer(config, cache)
        times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(options.pairs):
            for precision, trainer in trainers.items():
                started = time.process_time()
                trainer.step()
                times[precision].append(time.process_time() - started)
        for precision, trainer in trainers.items():
            while not trainer.done:
                trainer.step()
            rows[precision] |= {
                "step_ratio": round(statistics.median(a / b for a, b in zip(times[precision], times["no_change"], strict=True)), 2),
                "held_out_loss": round(trainer.evaluate().loss, 4),
            }
            print(json.dumps({precision: rows[precision]}), flush=True)


if __name__ == "__main__":
    main()
