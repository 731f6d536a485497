"""A build that is killed ends, after another start, as one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import lose, stored

from sd3tune.playground import PICTURES

SERVER = """
import os, sys
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
import sd3tune as st

def build(datasets, cache_dir):
    torch.set_num_threads(1)
    config = st.presets.playground(cache_dir=cache_dir, validation_prompt=(), write_batch_size=2)
    cache = st.CacheBuilder(st.plan(st.discover(datasets), config), st.encoders(config)).build()
    for placement in cache.plan.train:
        cache.latent(placement)
        cache.text(placement.item.caption)
    print("done", os.getpid(), cache.hits, cache.misses, flush=True)

for line in sys.stdin:
    if os.fork():
        continue  # to the next build; the other process waits for this one
    pid = os.fork()
    if not pid:
        build(*line.split())
        os._exit(0)
    print("pid", pid, flush=True)
    print("ended", pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)
"""
"""Pays for the imports once; each line of its input starts a process that builds."""


class Builds:
    """Builds in processes of their own."""

    def __init__(self, datasets: Path) -> None:
        self.datasets, self._said = datasets, list[list[str]]()
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, cache: Path) -> int:
        """Begin a build. Returns its process id."""
        assert self.server.stdin
        print(self.datasets, cache, file=self.server.stdin, flush=True)
        return int(self._answer("pid")[1])

    def end(self, build: int) -> tuple[int, tuple[int, int] | None]:
        """Exit code, and (hits, misses) when the build came to its end."""
        code = int(self._answer("ended", str(build))[2])
        done = [words for words in self._said if words[:2] == ["done", str(build)]]
        return code, (int(done[0][2]), int(done[0][3])) if done else None

    def finish(self, cache: Path) -> tuple[int, int]:
        """(hits, misses) of a build that is left alone and then reads every entry."""
        code, done = self.end(self.start(cache))
        assert code == 0
        assert done
        return done

    def _answer(self, *begin: str) -> list[str]:
        """The next line that begins so; what others say meanwhile is kept."""
        assert self.server.stdout
        while True:
            for words in self._said:
                if tuple(words[: len(begin)]) == begin:
                    self._said.remove(words)
                    return words
            line = self.server.stdout.readline()
            assert line, "the server is gone"
            self._said.append(line.split())


def files(cache: Path) -> int:
    return sum(1 for p in cache.rglob("*.safetensors") if not p.name.startswith("."))


def count(cache: Path) -> int:
    return len(stored(cache))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    folder = tmp_path_factory.mktemp("builds")
    (folder / "pots").mkdir()
    for picture in sorted((PICTURES / "train").glob("*.png"))[:12]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder / "pots")
    (folder / "datasets.yaml").write_text("- {id: pots, instance_data_dir: pots, resolution: 64}\n")
    made = Builds(folder / "datasets.yaml")
    with made.server:
        yield made


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
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code, _ = builds.end(child)
        killed += code == -signal.SIGKILL and count(cache) < total
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
    (code, first), (again, second) = builds.end(one), builds.end(other)
    assert code == again == 0
    assert first
    assert second
    assert sum(first) == sum(second) == 25
    assert stored(cache) == stored(whole)
    assert builds.finish(cache) == (25, 0)
