"""Fresh Python processes whose expensive imports are already paid for: forked from a process that made them and did nothing else."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

WARM = (
    "torch", "safetensors.torch", "diffusers.models.transformers.transformer_sd3", "diffusers.models.autoencoders.autoencoder_kl", "peft",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
)  # fmt: skip
"""Nothing of sd3tune: a process that must not know it does not."""

KERNEL = """
import sys, time
import sd3tune as st
from sd3tune.runner import Runner
config = st.RunConfig.load(sys.argv[1])
cache = st.CacheBuilder(st.plan(st.discover(sys.argv[2]), config), st.encoders(config)).build()
run = Runner(lambda: st.Trainer(config, cache))
run.start()
run.wait(until=lambda now: now.step >= 3)
print("folder", run.snapshot.folder, flush=True)
while run.snapshot.live:
    time.sleep(0.05)
print("ended", run.snapshot.state, flush=True)
while True:
    time.sleep(0.05)
"""
"""A program of a run file and its data: a kernel whose main thread is idle while a run goes on, and afterwards."""

CONTEXT = multiprocessing.get_context("forkserver")


class Fresh:
    """``python WORDS``, as ``subprocess.Popen`` would run it; what it says, on both of its outputs, goes to a file."""

    def __init__(self, words: Sequence[str], said: Path, env: Mapping[str, str] | None = None) -> None:
        CONTEXT.set_forkserver_preload(list(WARM))
        self.said = said
        self._process = CONTEXT.Process(target=become, args=(list(words), str(said), dict(env or {})))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What it has said until now."""
        return self.said.read_text() if self.said.exists() else ""

    def poll(self) -> int | None:
        """Its exit code; nothing while it runs. Below zero: minus the signal that ended it."""
        return self._process.exitcode

    def until(self, words: str, seconds: float = 180.0) -> None:
        """Wait until it has said something."""
        self.until_file(self.said, words, seconds)

    def until_file(self, file: Path, words: str, seconds: float = 180.0) -> None:
        """Wait until something stands in a file that it writes."""
        deadline = time.monotonic() + seconds
        while not (file.exists() and words in file.read_text()):
            assert self.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code, when it has ended."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running after {seconds} s: {self.output}"
        return code


def run(words: Sequence[str], said: Path, env: Mapping[str, str] | None = None) -> str:
    """What ``python WORDS`` says; it must end well."""
    process = Fresh(words, said, env)
    assert process.wait() == 0, process.output
    return process.output


def become(words: list[str], said: str, env: dict[str, str]) -> None:
    """In the new process."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115 (as long as the process)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= env
    kind, what, *rest = words if words[0] in ("-c", "-m") else ("", *words)
    sys.argv = [kind or what, *rest]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")
