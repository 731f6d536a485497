"""A run in other processes, seen and steered like one in this kernel: what the runner and the panel ask of a trainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.files import write_text
from sd3tune.launching import POLL, Launched, launch
from sd3tune.records import CheckpointRecord, CommandRecord, Record

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd3tune.cache import Cache


class Picture:
    """The grid that the run has written last."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def image(self) -> Image:
        """The whole grid as one picture."""
        from PIL import Image

        with Image.open(self._path) as opened:
            return opened.convert("RGB")


class Followed:
    """Stands for the trainer of a launched run. What is asked of it goes there by control files, and comes back in the history."""

    def __init__(self, launched: Launched) -> None:
        """Waits until the run has written what it is about to do. Raises: TrainingError when it ends before."""
        while (folder := launched.folder) is None or not folder.manifest.exists():
            if not launched.running:
                launched.wait()
            time.sleep(POLL)
        self._launched, self.folder = launched, folder
        self.config = RunConfig.load(folder.config)
        manifest = json.loads(folder.manifest.read_text())
        self.total, self.noise_levels = int(manifest["updates"]), tuple(manifest["levels"])

    @property
    def steps_done(self) -> int:
        """Updates done, as far as they were read."""
        return self._launched.steps_done

    def run(self, n: int | None = None) -> Iterator[Record]:
        """The records as they are written."""
        return self._launched.run(n)

    def set(self, **settings: Any) -> CommandRecord:
        """Ask for other settings; whether they were taken is a record of the run."""
        refused = ""
        try:
            self.config = self.config.replace(**settings)
            self._ask("SET", json.dumps(settings))
        except ConfigError as error:
            refused = "; ".join(error.problems)
        return CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)

    def note(self, name: str) -> CommandRecord:
        """Pause, go on, or stop and wait for the end. Raises: TrainingError when the run fails."""
        if name == "pause":
            self._ask("PAUSE")
        elif name == "go_on":
            (self.folder.path / "PAUSE").unlink(missing_ok=True)
        elif name == "stop":
            self._launched.stop()
            self._launched.wait()
        return CommandRecord(step=self.steps_done, name=name)

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

    def grid(self) -> Picture:
        """The newest pictures."""
        return Picture(self.folder.grid)

    def _ask(self, name: str, text: str = "") -> None:
        write_text(self.folder.path / name, text)


def in_processes(data: str | Path = "datasets.yaml", processes: int | None = None) -> Callable[[RunConfig, Cache], Followed]:
    """How ``TrainingPanel`` starts its run in processes of its own: ``TrainingPanel(config, cache, make=in_processes(data, 2))``."""

    def make(config: RunConfig, cache: Cache) -> Followed:
        run = Path(tempfile.mkdtemp(prefix="sd3tune-launch-")) / "run.yaml"
        config.save(run)
        return Followed(launch(run, data, processes=processes))

    return make
