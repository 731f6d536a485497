"""A few pictures of the playground, encoded once for the whole session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sd3tune as st
from sd3tune import playground

torch.set_num_threads(2)


def write_datasets(folder: Path, train: int = 12, heldout: int = 4) -> Path:
    """Copy some pictures of the playground and write a ``datasets.yaml`` for them."""
    for part, count in (("train", train), ("heldout", heldout)):
        (folder / part).mkdir(parents=True)
        for picture in sorted((playground.PICTURES / part).glob("*.png"))[:count]:
            shutil.copy(picture, folder / part)
            shutil.copy(picture.with_suffix(".txt"), folder / part)
    path = folder / "datasets.yaml"
    path.write_text(
        "- {id: some, instance_data_dir: train, resolution: 64}\n"
        "- {id: held, instance_data_dir: heldout, resolution: 64, dataset_type: eval}\n"
    )
    return path


class Workbench:
    """Makes configurations and trainers that share one cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.datasets = write_datasets(root / "pictures")
        self._number = 0

    def config(self, **settings: Any) -> st.RunConfig:
        """A quick playground run in a folder of its own."""
        self._number += 1
        quick: dict[str, Any] = {
            "max_train_steps": 30, "lr_warmup_steps": 5, "train_batch_size": 2, "checkpoint_step_interval": 1000,
            "validation_prompt": ("lock", "croissant"), "validation_num_inference_steps": 3, "eval_timesteps": 2, "num_eval_images": 4,
            "cache_dir": str(self.root / "cache"), "output_dir": str(self.root / "runs" / f"run{self._number}"),
        }  # fmt: skip
        return st.presets.playground(**{**quick, **settings})

    def cache(self, config: st.RunConfig) -> st.Cache:
        """The cache of a configuration."""
        return st.CacheBuilder(st.plan(st.discover(self.datasets), config), st.encoders(config)).build()

    def trainer(self, **settings: Any) -> st.Trainer:
        """A trainer in a new run folder."""
        config = self.config(**settings)
        return st.Trainer(config, self.cache(config))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))
