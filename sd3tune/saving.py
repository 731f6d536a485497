"""The files of one run while it goes on: history, log, checkpoints and their second copy. Only the main process writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3tune import certificate, keeping
from sd3tune.config.schema import RunConfig
from sd3tune.errors import TrainingError
from sd3tune.files import write_text
from sd3tune.history import History, newest_segment, written_at
from sd3tune.locking import Lock
from sd3tune.manifest import Manifest
from sd3tune.mirror import Mirror
from sd3tune.records import CheckpointRecord, Record, SegmentRecord, StepRecord
from sd3tune.run_folder import PINNED, RunFolder, latest_step, open_log


class Saver:
    """Writes what a run should not lose. Raises: FileError, CheckpointError, ConfigError."""

    def __init__(self, folder: RunFolder, config: RunConfig, *, main: bool) -> None:
        self.folder, self.main = folder, main
        self.keeper = keeping.Keeper()
        self.log = open_log(folder) if main else logging.Logger("sd3tune")
        self._history = History(folder.history) if main else None
        self._lock = Lock(folder.lock)
        to = config.run.mirror_to
        self._mirror = Mirror(folder.path, to) if main and to else None

    def begin(self, config: RunConfig, manifest: Manifest, said: str) -> None:
        """Write what a new run is about to do."""
        if not self.main:
            return
        write_text(self.folder.environment, certificate.installed())
        config.save(self.folder.config)
        write_text(self.folder.manifest, json.dumps(manifest.as_dict(), indent=1) + "\n")
        self.log.info("run folder %s\n%s%s", self.folder.path, said + "\n" * bool(said), manifest)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the folder for as long as a run goes on. Raises: TrainingError when another process does, or went on with it meanwhile."""
        if not self.main:
            yield
            return
        self._lock = Lock(self.folder.lock)  # of this loop alone: one that was left half-way may end later, and must not let go of this
        with self._lock:
            if newest_segment(self.folder.history) != self.segment:
                raise TrainingError(
                    f"{self.folder.path}: this run was resumed elsewhere and went on from there; to go on with that, resume it again "
                    f"(Trainer.resume({str(self.folder.path)!r}))"
                )
            yield

    def beat(self) -> None:
        """Give a sign of life. Raises: TrainingError when another process has taken the folder."""
        self._lock.beat()

    @property
    def mine(self) -> bool:
        """Whether no other process has taken the folder."""
        try:
            self._lock.require_free()
        except TrainingError:
            return False
        return True

    def beating(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of a run, with a sign of life now and then. Raises: TrainingError when another process has taken the folder."""
        for record in records:
            self.beat()
            yield record

    def tell(self, record: Record) -> None:
        """Write a record to the history; those that are rare also to the log, in words."""
        if self._history is None:
            return
        self._history.append(record)
        if not isinstance(record, StepRecord):
            self.log.info("%s", record)

    @property
    def segment(self) -> int:
        """Which stretch of the history is being written."""
        return self._history.segment if self._history else 0

    def go_on_from(self, segment: int, step: int) -> None:
        """Take over a history that stands at ``step`` of ``segment``."""
        if self._history:
            self._history.segment = segment
        self.keeper.saved(step)

    def branch(self, why: str, step: int, *, live: Mapping[str, Any], skipped: Sequence[int]) -> SegmentRecord:
        """From here on the history goes on from ``step``, with these settings and without these batches."""
        parent = self.segment
        if self._history:
            self._history.segment = 1 + max((line.get("segment", 0) for line in self.folder.read_history()), default=0)
        record = SegmentRecord(step=step, from_step=step, parent=parent, why=why, live=live, skipped=tuple(skipped))
        self.tell(record)
        best = keeping.best_of(self.folder.checkpoint_folder) if self.main else None
        if best is not None and best[0] > step:
            keeping.forget_best(self.folder.checkpoint_folder, step, self.folder.read_history())
        return record

    def checkpoint(self, step: int, state: Mapping[str, Any], keep: int) -> CheckpointRecord:
        """Write a checkpoint and read it back; older ones are untouched until then. Raises: TrainingError when the folder is another's."""
        self._lock.require_free()
        rest = {**state, "segment": self.segment}
        tensors = {name: rest.pop(name) for name in ("adapter", "optimizer")}
        path, count = self.folder.write_checkpoint(step, tensors, rest, keep)
        record = CheckpointRecord(step=step, path=str(path), tensors=count)
        self.tell(record)
        if self._history:
            self._history.sync()
        self.keeper.saved(step)
        if self._mirror:
            facts = [self.folder.config, self.folder.manifest, self.folder.environment, self.folder.history]
            written = [*sorted(path.glob("*.safetensors")), path / "state.json", self.folder.checkpoint_folder / "latest.json"]
            self._mirror.copy(f"step {step}", [*facts, *written], keep=[p.name for p in self.folder.checkpoints()])
        return record

    def finished(self, step: int) -> bool:
        """Whether the final adapter is that of ``step``, and not one that a resume or a rewind has left behind."""
        lora = self.folder.lora
        return lora.exists() and written_at(self.folder.read_history(), lora.name) == step

    def best_so_far(self, loss: float) -> bool:
        """Whether no checkpoint was better on the held-out pictures."""
        best = keeping.best_of(self.folder.checkpoint_folder)
        return best is None or loss < best[1]

    def mark_best(self, step: int, loss: float) -> None:
        """The checkpoint of ``step`` is the best so far, and stays."""
        keeping.mark_best(self.folder.checkpoint_folder, step, loss)

    def pin(self, checkpoint: Path) -> Path:
        """Keep a checkpoint for good."""
        write_text(checkpoint / PINNED, "kept by hand\n")
        return checkpoint

    def pin_newest(self, step: int, damaged: Sequence[str]) -> str:
        """Of a run that goes on from an older checkpoint, not for want of a whole newer one, keep the newest for good; its path, if any."""
        newest = latest_step(self.folder.checkpoint_folder)
        path = self.folder.checkpoint_folder / f"step-{newest or 0:06d}"
        if newest is None or newest <= step or not path.is_dir() or any(said.startswith(path.name) for said in damaged):
            return ""
        return str(self.pin(path))

    @property
    def copying(self) -> bool:
        """Whether a copy is under way."""
        return self._mirror is not None and self._mirror.busy

    def news(self, *, wait: bool = False) -> list[str]:
        """What the mirror has to say."""
        return self._mirror.news(wait=wait) if self._mirror else []

    def finish(self) -> list[str]:
        """Copy the finished run's files; what is to be said of that."""
        if not self._mirror:
            return []
        self._mirror.copy("the run", [p for p in sorted(self.folder.path.iterdir()) if p.is_file() and p != self.folder.lock])
        said = self.news(wait=True)
        self._mirror.close()
        return said
