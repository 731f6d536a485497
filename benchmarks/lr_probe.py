"""Does the rate that `lr_probe` recommends learn as much as the best of a grid?

For each seed and kind of adapter: the fall of the held-out loss in whole runs of 200 updates at nine rates from 1e-5 to 1e-1 (the
preset's cosine schedule with its warm-up), in one more at the recommended rate, and the share of the best that it reaches. From
the middle outwards; beyond a rate that reaches less than a third of the best so far, the grid is not measured unless --all is
given. One thread. Rows that --known holds already are not measured again.
python benchmarks/lr_probe.py [--arm SEED:KIND ...] [--known FILE] [--all]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sd3tune as st
from sd3tune import playground
from sd3tune.validation.evaluate import evaluation_levels, evaluation_loss
from sd3tune.validation.probed import Probed

KINDS: dict[str, dict[str, Any]] = {
    "preset-16": {},
    "attention-4": {"lora_rank": 4, "lora_targets": ("to_q", "to_k", "to_v", "to_out.0")},
}
RATES = tuple(10 ** (-5 + i / 2) for i in range(9))
UPDATES = 200
DATA = f"""
- {{id: train, instance_data_dir: {playground.PICTURES / "train"}, resolution: 64,
   crop: true, crop_aspect: closest, crop_aspect_buckets: [0.6, 1.0, 1.67]}}
- {{id: held, instance_data_dir: {playground.PICTURES / "heldout"}, resolution: 64, dataset_type: eval}}
"""


class Arm:
    """One seed and one kind of adapter."""

    def __init__(self, name: str, folder: Path, known: Path) -> None:
        seed, self._kind = name.split(":")
        self._name, self._seed, self._folder, self._known = name, int(seed), folder, known
        data = folder / "datasets.yaml"
        data.write_text(DATA)
        config = self._config(1e-3)
        self._cache = st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build()

    def _config(self, rate: float) -> st.RunConfig:
        return st.presets.playground(
            seed=self._seed, max_train_steps=UPDATES, eval_timesteps=8, learning_rate=rate, validation_prompt=(),
            cache_dir=str(self._folder / "cache"), output_dir=str(self._folder / "runs" / "run"), **KINDS[self._kind],
        )  # fmt: skip

    def fall(self, rate: float) -> float:
        """How much of the held-out loss a whole run takes away; nothing, if it ran away."""
        rows = [json.loads(line) for line in self._known.read_text().splitlines()] if self._known.exists() else []
        for row in rows:
            if row["arm"] == self._name and abs(row["rate"] / rate - 1) < 1e-6:
                return float(row["fall"])
        trainer, started = st.Trainer(self._config(rate), self._cache), time.monotonic()
        base, why = self._held_out(trainer), ""
        try:
            while not trainer.done:
                trainer.step()
        except st.TrainingError as error:
            why = str(error).split(";")[0]
        fall = 0.0 if why else 1 - self._held_out(trainer) / base
        row = {"arm": self._name, "rate": rate, "fall": fall, "why": why, "seconds": round(time.monotonic() - started)}
        with self._known.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return fall

    def probe(self) -> Probed:
        """What the probe says before the first update."""
        trainer = st.Trainer(self._config(1e-3), self._cache)
        probe, started = st.lr_probe(trainer), time.monotonic()
        print(probe, flush=True)
        found = probe.run()
        print(f"{found}\nin {time.monotonic() - started:.0f} s", flush=True)
        return found

    def _held_out(self, trainer: st.Trainer) -> float:
        levels = evaluation_levels(trainer.engine.rules, self._cache.plan.evaluation, 8)
        velocity = trainer.engine.velocity
        return evaluation_loss(velocity, self._cache, sigmas=levels, device=trainer.device, step=trainer.steps_done).loss

    def falls(self, everything: bool) -> dict[float, float]:
        """Rate -> fall, as far as it is worth while."""
        middle = len(RATES) // 2
        found = {RATES[middle]: self.fall(RATES[middle])}
        for side in (RATES[middle + 1 :], RATES[:middle][::-1]):
            for rate in side:
                found[rate] = self.fall(rate)
                if found[rate] < max(found.values()) / 3 and not everything:
                    break
        return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", nargs="*", default=["0:preset-16", "1:attention-4"])
    parser.add_argument("--known", default="lr_probe.jsonl", type=Path)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for arm_name in options.arm:
            arm = Arm(arm_name, Path(name), options.known)
            found = arm.probe()
            reached = arm.fall(found.rate) if found.rate else 0.0
            falls = arm.falls(options.all)
            best = max(falls.values())
            print(arm_name, ", ".join(f"{rate:.1e}: {fall:.4f}" for rate, fall in falls.items()))
            print(f"recommended {found.rate}: {reached:.4f}, {reached / best:.1%} of the best of the grid", flush=True)


if __name__ == "__main__":
    main()
