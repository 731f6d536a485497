"""A few pictures of the playground, encoded once for the whole session."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import shutil
import signal
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


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What was imported before a file's tests stays: collecting garbage, which releasing a model does, need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _listed_once() -> Iterator[None]:
    """What is installed stays so while tests run; reading it takes as long as an update."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(certificate, "installed", functools.cache(certificate.installed))
        yield


@pytest.fixture(autouse=True)
def _same_sigterm() -> Iterator[None]:
    """A run of a panel takes SIGTERM over for its process, which here is that of the other tests, too."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


BEGAN = {False: 0.5, True: 0.8}
"""On the guard's side of what the eight batches give (for the miniature?), so that its verdicts are the same."""


NUMBERS = itertools.count(1)
"""Of run folders."""

KEPT = (0, 6, 11)
"""Blocks of the playground's twelve that the miniature has: one with a second attention, one without, and the last, without a context."""


def write_miniature(folder: Path) -> Path:
    """The playground with three of its blocks, which trains five times as fast. It has everything but knowledge."""
    from diffusers import SD3Transformer2DModel

    whole = SD3Transformer2DModel.from_pretrained(playground.MODEL / "transformer")
    dual = [place for place, block in enumerate(KEPT) if block in whole.config.dual_attention_layers]
    small = SD3Transformer2DModel.from_config({**whole.config, "num_layers": len(KEPT), "dual_attention_layers": dual})
    places = {f"transformer_blocks.{block}.": f"transformer_blocks.{place}." for place, block in enumerate(KEPT)}
    values = whole.state_dict()
    blocks = {new + name.removeprefix(old): v for name, v in values.items() for old, new in places.items() if name.startswith(old)}
    rest = {name: v for name, v in values.items() if not name.startswith("transformer_blocks.")}
    small.load_state_dict({**rest, **blocks})
    folder.mkdir()
    for part in playground.MODEL.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    small.save_pretrained(folder / "transformer")
    return folder


class Workbench:
    """Makes configurations and trainers that share one cache, of the miniature unless a test names another model."""

    def __init__(self, root: Path, miniature: Path | None) -> None:
        self.root, self.datasets = root, root / "pictures" / "datasets.yaml"
        self.model = {"model_flavour": None, "pretrained_model_name_or_path": str(miniature)} if miniature else {}

    def config(self, **settings: Any) -> st.RunConfig:
        """A quick run in a folder of its own."""
        number = next(NUMBERS)
        quick: dict[str, Any] = {
            "max_train_steps": 30, "lr_warmup_steps": 5, "train_batch_size": 2, "checkpoint_step_interval": 1000,
            "validation_prompt": ("lock", "croissant"), "validation_num_inference_steps": 3, "eval_timesteps": 2, "num_eval_images": 4,
            "cache_dir": str(self.root / "cache"), "output_dir": str(self.root / "runs" / f"run{number}"),
        }  # fmt: skip
        named = settings.keys() & self.model.keys()
        return st.presets.playground(**{**quick, **({} if named else self.model), **settings})

    def cache(self, config: st.RunConfig) -> st.Cache:
        """The cache of a configuration."""
        return st.CacheBuilder(st.plan(st.discover(self.datasets), config), st.encoders(config)).build()

    def trainer(self, **settings: Any) -> st.Trainer:
        """A trainer in a new run folder; its guard is told where the model began, and need not look at eight batches first."""
        config = self.config(**settings)
        trainer = st.Trainer(config, self.cache(config))
        trainer.engine.guard.began = BEGAN[config.model.model_flavour is None]
        return trainer


@pytest.fixture(scope="session")
def bench_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    write_datasets(root / "pictures")
    return root


@pytest.fixture(scope="session")
def bench(bench_root: Path) -> Workbench:
    return Workbench(bench_root, write_miniature(bench_root / "miniature"))


@pytest.fixture(scope="session")
def grown(bench_root: Path) -> Workbench:
    """The same with the whole playground."""
    return Workbench(bench_root, None)
