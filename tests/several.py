"""What each process of a test does: train as a file says, and write down what it did. Started by torchrun, or alone."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import sd3tune as st
from sd3tune.assembly import encoded
from sd3tune.files import digest_of
from sd3tune.processes import join, leave


class Counting:
    """A velocity that counts the images that learn."""

    def __init__(self, velocity: Any) -> None:
        self.velocity, self.images = velocity, 0

    def __call__(self, noisy: Any, *rest: Any) -> Any:
        predicted = self.velocity(noisy, *rest)
        self.images += len(noisy) * bool(predicted.requires_grad)
        return predicted


class Poisoned:
    """Batches of which one has a last image that is not a number."""

    def __init__(self, batches: Any, k: int) -> None:
        self._batches, self._k, self.ids = batches, k, batches.ids

    def part(self, k: int, places: range) -> Any:
        batch = self._batches.part(k, places)
        if k == self._k and len(self.ids(k)) - 1 in places:
            batch = replace(batch, latent_BCHW=batch.latent_BCHW.float().clone())
            batch.latent_BCHW[-1] = math.nan
        return batch


def main(job: Path) -> None:
    given = json.loads(job.read_text())
    config = st.RunConfig.make(**given["settings"])
    processes = join(config.run.num_processes)
    trainer = st.Trainer(config, encoded(config, st.plan(st.discover(given["data"]), config), processes), processes=processes)
    counting = trainer.engine.velocity = Counting(trainer.engine.velocity)
    if "poison" in given:
        trainer.engine.batches = Poisoned(trainer.engine.batches, given["poison"])
    records = []
    for record in trainer.run():
        records += [record] if isinstance(record, st.StepRecord) else []
        if processes.main and record.step == given.get("slower_from") and record.type == "step":
            trainer.set(learning_rate=config.optimizer.learning_rate / 4)
    adapter = trainer.state_dict()["adapter"]
    told = {
        "count": processes.count, "images": counting.images, "losses": [record.losses for record in records],
        "mean": [record.loss for record in records], "items": [record.items for record in records], "folder": str(trainer.folder.path),
        "norms": [record.grad_norm for record in records], "rates": [record.learning_rate for record in records],
        "extra": [record.extra_forwards for record in records],
        "skipped": sorted(trainer.engine.skipped),
        "digest": digest_of(b"".join(adapter[name].numpy().tobytes() for name in sorted(adapter))),
    }  # fmt: skip
    job.with_name(f"told-{processes.rank}-of-{processes.count}.json").write_text(json.dumps(told))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
