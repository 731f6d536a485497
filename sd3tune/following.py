"""A run in other processes, seen and steered like one in this kernel: what the runner and the panel ask of a trainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3tune.config.reading import frozen, mapping_of
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError, TrainingError
from sd3tune.files import write_text
from sd3tune.launching import POLL, Launched, launch
from sd3tune.records import CheckpointRecord, CommandRecord, Record
from sd3tune.validation.grids import Grid
from sd3tune.validation.history_grid import newest_grid

if TYPE_CHECKING:
    from sd3tune.cache import Cache


class Followed:
    """Stands for the trainer of a launched run. What is asked of it goes there by control files, and comes back in the history."""

    def __init__(self, launched: Launched, cache: Cache) -> None:
        """Waits until the run has written what it is about to do. Raises: TrainingError when it ends before."""
        while (folder := launched.folder) is None or not folder.manifest.exists():
            if not launched.running:
                launched.wait()
            time.sleep(POLL)
        self._launched, self.folder, self._cache = launched, folder, cache
        self.config = RunConfig.load(folder.config)
        manifest = json.loads(folder.manifest.read_text())
        self.total, self.noise_levels = int(manifest["updates"]), tuple(manifest["levels"])

    @property
    def total_memory_bytes(self) -> int:
        """Not known here: the run's devices are the other processes'."""
        return 0

    @property
    def steps_done(self) -> int:
        """Updates done, as far as they were read."""
        return self._launched.steps_done

    def run(self, n: int | None = None) -> Iterator[Record]:
        """The records as they are written."""
        return self._launched.run(n)

    def set(self, **settings: Any) -> CommandRecord:
        """Ask for other settings; whether they were taken is a record of the run."""
        refused = frozen(settings)
        try:
            if not refused:
                self.config = self.config.replace(**settings)
                self._ask("SET", json.dumps({**self._waiting(), **settings}))
        except ConfigError as error:
            refused = "; ".join(error.problems)
        return CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)

    def unread(self, settings: Mapping[str, Any]) -> list[str]:
        """Nothing: what its text encoders have not read is for the run to say."""
        return []

    def encode(self, prompts: Sequence[str]) -> Iterator[Record]:
        """Raises: TrainingError."""
        raise TrainingError("a run in other processes cannot read new prompts")

    def rewind(self, step: int) -> Record:
        """Raises: TrainingError."""
        raise TrainingError("a run in other processes cannot go back; stop it, and resume the checkpoint's folder")

    def note(self, name: str) -> CommandRecord:
        """Pause, go on, or stop and wait for the end. Raises: TrainingError when the run fails."""
        if name == "pause":
            self._ask("PAUSE")
        elif name == "go_on":
            (self.folder.path / "PAUSE").unlink(missing_ok=True)
        elif name == "stop":
            self._launched.stop()
            (self.folder.path / "PAUSE").unlink(missing_ok=True)
            self._launched.wait()
        return CommandRecord(step=self.steps_done, name=name)

    def beat(self) -> None:
        """The run gives its own signs of life."""

    def parting(self) -> Iterator[Record]:
        """Nothing: the run itself says what has become of its copies."""
        return iter(())

    def checkpoint(self) -> CheckpointRecord:
        """Ask for a checkpoint before the next update."""
        self._ask("SAVE")
        return CheckpointRecord(step=self.steps_done, path=str(self.folder.checkpoint_folder), tensors=0)

    def save(self, path: Path) -> int:
        """The run writes its adapter itself, when it ends."""
        return 0

    def validation(self) -> Iterator[Record]:
        """Ask for pictures; their records are the run's."""
        self._ask("SAMPLE")
        return iter(())

    def grid(self) -> Grid:
        """The newest pictures under the base model's, over the real ones."""
        return newest_grid(self.config, self.folder, self._cache.plan, self.steps_done)

    def _waiting(self) -> dict[str, Any]:
        """What was asked and is not taken yet."""
        try:
            return mapping_of((self.folder.path / "SET").read_text(encoding="utf-8"))
        except (FileNotFoundError, ConfigError):
            return {}

    def _ask(self, name: str, text: str = "") -> None:
        write_text(self.folder.path / name, text)


def in_processes(data: str | Path = "datasets.yaml", processes: int | None = None) -> Callable[[RunConfig, Cache], Followed]:
    """How ``TrainingPanel`` starts its run in processes of its own: ``TrainingPanel(config, cache, make=in_processes(data, 2))``."""

    def make(config: RunConfig, cache: Cache) -> Followed:
        run = Path(tempfile.mkdtemp(prefix="sd3tune-launch-")) / "run.yaml"
        config.save(run)
        return Followed(launch(run, data, processes=processes), cache)

    return make
