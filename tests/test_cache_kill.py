"""A build that is killed ends, after another start, as one that was not."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import lose, stored
from fresh import Fresh

from sd3tune.playground import PICTURES

BUILD = """
import sys, torch
import sd3tune as st
torch.set_num_threads(1)
config = st.presets.playground(cache_dir=sys.argv[2], validation_prompt=(), write_batch_size=2)
cache = st.CacheBuilder(st.plan(st.discover(sys.argv[1]), config), st.encoders(config)).build()
for placement in cache.plan.train:
    cache.latent(placement)
    cache.text(placement.item.caption)
print("done", cache.hits, cache.misses, flush=True)
"""


class Builds:
    """Builds in processes of their own."""

    def __init__(self, datasets: Path) -> None:
        self.datasets, self._number = datasets, 0

    def start(self, cache: Path) -> Fresh:
        """Begin a build."""
        self._number += 1
        return Fresh(["-c", BUILD, str(self.datasets), str(cache)], self.datasets.parent / f"said-{self._number}.txt")

    def finish(self, cache: Path) -> tuple[int, int]:
        """(hits, misses) of a build that is left alone and then reads every entry."""
        return counted(self.start(cache))


def counted(build: Fresh) -> tuple[int, int]:
    """(hits, misses) of a build that comes to its end."""
    assert build.wait() == 0, build.output
    _, hits, misses = build.output.splitlines()[-1].split()
    return int(hits), int(misses)


def files(cache: Path) -> int:
    return sum(1 for p in cache.rglob("*.safetensors") if not p.name.startswith("."))


def count(cache: Path) -> int:
    return len(stored(cache))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    folder = tmp_path_factory.mktemp("builds")
    (folder / "pots").mkdir()
    for picture in sorted((PICTURES / "train").glob("*.png"))[:12]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder / "pots")
    (folder / "datasets.yaml").write_text("- {id: pots, instance_data_dir: pots, resolution: 64}\n")
    return Builds(folder / "datasets.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, builds: Builds) -> Path:
    """The cache of a build that nothing disturbed."""
    cache = tmp_path_factory.mktemp("whole")
    assert builds.finish(cache) == (0, count(cache))
    assert count(cache) == 25, "12 pictures, their captions and the empty text"
    return cache


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_builds_end_bitwise_equal(tmp_path: Path, builds: Builds, whole: Path, kills: int) -> None:
    """After SIGKILL at random moments of the writing, the cache is complete and equal in every bit to an undisturbed one."""
    cache, total = tmp_path / "killed", count(whole)
    moment = random.Random(kills)
    killed = 0
    while killed < kills:
        before, deadline = files(cache), time.monotonic() + 60
        child = builds.start(cache)
        while files(cache) == before:
            assert time.monotonic() < deadline, "the build writes nothing"
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.2))
        if child.poll() is None:
            child.signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL and count(cache) < total
        if count(cache) == total:  # too late: take some away, so that there is writing to interrupt
            lose(cache, moment.sample(sorted(stored(cache)), total // 2))

    hits, misses = builds.finish(cache)
    assert hits + misses == total
    assert misses > 0
    assert stored(cache) == stored(whole)
    assert builds.finish(cache) == (total, 0)


def test_two_builds_at_once_end_as_one(tmp_path: Path, builds: Builds, whole: Path) -> None:
    """Two processes that build the same cache at the same time both end well, and what stands there is what one build gives."""
    cache = tmp_path / "both"
    one, other = builds.start(cache), builds.start(cache)
    assert sum(counted(one)) == sum(counted(other)) == 25
    assert stored(cache) == stored(whole)
    assert builds.finish(cache) == (25, 0)
