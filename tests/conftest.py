"""A few pictures of the playground, encoded once for the whole session."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sd3tune as st
from sd3tune import certificate, playground
from sd3tune.cache.store import KINDS, Store

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True, scope="session")
def _own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of files and of this machine stays inside the tests, and is one for all that run at the same time."""
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "memory"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _listed_once() -> Iterator[None]:
    """What is installed stays so while tests run; reading it takes as long as an update."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(certificate, "installed", functools.cache(certificate.installed))
        yield


def stored(cache: Path) -> dict[str, bytes]:
    """``kind/key`` -> every bit of an entry: names, formats, values, facts, and the number encoded together."""
    store, found = Store(cache), {}
    for kind in KINDS:
        for key, _ in store.entries(kind):
            entry = store.entry(kind, key)
            found[f"{kind}/{key}"] = entry.checksum.encode() + b"".join(
                name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in sorted(entry.tensors.items())
            )
    return found


def lose(cache: Path, names: Iterable[str]) -> None:
    """Take ``kind/key`` entries away."""
    for name in names:
        kind, key = name.split("/")
        Store(cache).remove({kind: {key}})


def flip(cache: Path, name: str, share: float, bit: int) -> Path:
    """Flip a bit of the values of ``kind/key``, at a share of their length. Returns the file."""
    kind, key = name.split("/")
    shard = next(shard for known, shard in Store(cache).entries(kind) if known == key)
    places = [place for *_, begin, end in shard._where[key].values() for place in (begin, end)]
    data = bytearray(shard.path.read_bytes())
    data[min(places) + int(share * (max(places) - min(places) - 1))] ^= 1 << bit
    shard.path.write_bytes(data)
    return shard.path


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


BEGAN = 0.5
"""On the guard's side of what the eight batches give, so that its verdicts are the same."""


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
        """A trainer in a new run folder; its guard is told where the model began, and need not look at eight batches first."""
        config = self.config(**settings)
        trainer = st.Trainer(config, self.cache(config))
        trainer.engine.guard.began = BEGAN
        return trainer


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))
