"""Runs in processes of their own, started from a notebook and followed by what they write.

A kernel that has touched the GPU cannot be forked, which is what accelerate's notebook_launcher does; torchrun starts clean processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.errors import TrainingError
from sd3tune.run_folder import RunFolder
from sd3tune.written import Written


class Launched(Written):
    """A run in other processes: iterate over its records, ``stop`` it, ``wait`` for it. Leaving the notebook does not end it."""

    def __init__(self, command: list[str], *, updates: int = 0) -> None:
        super().__init__(None, updates=updates)
        self.output = Path(tempfile.mkdtemp(prefix="sd3tune-launch-")) / "output.txt"
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def folder(self) -> RunFolder | None:
        """The run folder, once there is one."""
        if self._folder is None and (found := re.search(r"^run folder: (.+)$", self._said(), re.M)):
            self._folder = RunFolder(Path(found[1]))
        return self._folder

    @property
    def running(self) -> bool:
        """Whether its processes are at it."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ask it to save and stop before its next update; a run that is still preparing is ended."""
        if self.running and self.folder is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        super().stop()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end. Raises: TrainingError with its last words when it failed; subprocess.TimeoutExpired."""
        code = self._process.wait(timeout)
        if code:
            words = "\n  ".join(_own(self._said().splitlines())[-12:])
            raise TrainingError(f"the launched run ended with exit code {code}; all it said is in {self.output}\n  {words}")

    def _said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def _own(lines: list[str]) -> list[str]:
    """What the run said itself, without the launcher's report."""
    said = [line for line in lines if line.strip() and not re.match(r"[WEI]\d{4} ", line)]
    report = next((i for i, line in enumerate(said) if "torch/distributed" in line), len(said))
    return [line for line in said[:report] if "<frozen runpy>" not in line]


def launch(run: str | Path, data: str | Path = "datasets.yaml", *, processes: int | None = None, **settings: Any) -> Launched:
    """Start a run file in clean processes, by torchrun when there are several: one for each GPU unless ``processes`` or the file says.

    Raises: ConfigError for what is wrong with file and settings, before anything is started.
    """
    config = RunConfig.load(run).replace(**settings)
    count = processes or config.run.num_processes or _gpus()
    arguments = ["-m", "sd3tune", "train", str(run), "--data", str(data), "--set", f"num_processes={count}"]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    return Launched([sys.executable, *several, *arguments], updates=config.max_train_steps or 0)


def _gpus() -> int:
    """How many GPUs there are, asked without touching them; 1 when there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, listed.count("GPU "))
