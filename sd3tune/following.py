"""A run in another process, seen and steered like one in this kernel: what the runner and the panel ask of a trainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3tune.config.reading import frozen, mapping_of
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError, TrainingError
from sd3tune.files import write_text
from sd3tune.launching import launch
from sd3tune.listing import as_set
from sd3tune.records import CheckpointRecord, CommandRecord, Record, SegmentRecord, WaitRecord, records_of
from sd3tune.run_folder import RunFolder
from sd3tune.written import POLL, Written

if TYPE_CHECKING:
    from sd3tune.cache import Cache


class Followed:
    """Stands for the trainer of such a run. What is asked of it goes there by control files, and comes back in the history."""

    own = False

    def __init__(self, written: Written) -> None:
        """Waits until the run has written what it is about to do. Raises: TrainingError when it ends before."""
        while (folder := written.folder) is None or not folder.manifest.exists():
            if not written.running:
                written.wait()
            time.sleep(POLL)
        self._written, self.folder = written, folder
        self.config = as_set(folder)
        manifest = json.loads(folder.manifest.read_text())
        self.noise_levels = tuple(manifest["levels"])
        written.total = written.total or int(manifest["updates"])

    @property
    def total_memory_bytes(self) -> int:
        """Not known here: the run's devices are the other processes'."""
        return 0

    @property
    def steps_done(self) -> int:
        """Updates done, as far as they were read."""
        return self._written.steps_done

    @property
    def total(self) -> int:
        """Updates of the whole run, as it was set last."""
        return self._written.total

    @property
    def done(self) -> bool:
        """Whether the run has all its updates."""
        return self.steps_done >= self.total

    def run(self) -> Generator[Record, None, None]:
        """The records as they are written, and a `WaitRecord` while there is none, so that it can be steered then, too."""
        for record in self._written.pulse():
            if isinstance(record, SegmentRecord) or (isinstance(record, CommandRecord) and record.name == "set"):  # whoever asked for it
                self.config = as_set(self.folder)
            yield record or WaitRecord(step=self.steps_done, why="")

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
            self._written.stop()
            (self.folder.path / "PAUSE").unlink(missing_ok=True)
            try:
                self._written.wait()
            finally:
                (self.folder.path / "STOP").unlink(missing_ok=True)  # where it came too late
        return CommandRecord(step=self.steps_done, name=name)

    def check(self, config: RunConfig) -> None:
        """Raises: TrainingError: nobody here can draw with its model."""
        raise TrainingError("a run in another process cannot lend its model; draw where it runs, or from its checkpoints: sd3tune grid")

    @property
    def held(self) -> bool:
        """Whether a file PAUSE holds it, whoever wrote that."""
        return (self.folder.path / "PAUSE").exists()

    def beat(self) -> bool:
        """Whether its pause still holds; signs of life it gives by itself. A pause of a run that is over would only hold the next one."""
        if not self._written.running:
            (self.folder.path / "PAUSE").unlink(missing_ok=True)
        return self.held

    def parting(self) -> Iterator[Record]:
        """What the run wrote before it ended, such as what has become of its copies; nothing while it goes on."""
        return iter(()) if self._written.running else self._written.run()

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
        return Followed(launch(run, data, processes=processes))

    return make


def attached(folder: RunFolder) -> Generator[Record, None, Followed]:
    """A run that goes on in another process, whoever began it: what it has written so far, then what stands for its trainer."""
    written = Written(folder)
    yield from records_of(written.so_far())
    return Followed(written)
