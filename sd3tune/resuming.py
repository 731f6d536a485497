"""What a run folder holds for a run that goes on: its settings, its newest whole checkpoint, and its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.assembly import plan_digest, rebuild_cache
from sd3tune.cache import Cache
from sd3tune.config.reading import steered
from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError
from sd3tune.locking import Lock
from sd3tune.processes import Processes
from sd3tune.run_folder import RunFolder, step_of


@dataclass(frozen=True)
class Resumable:
    """All that a trainer needs to go on."""

    folder: RunFolder
    config: RunConfig
    cache: Cache
    state: dict[str, Any]


def read(run: str | Path, cache: Cache | None, processes: Processes) -> Resumable:
    """Read the folder of a run, or of one of its checkpoints; the main process reads the checkpoint for all.

    Raises: CheckpointError when there is none, or when pictures or captions are no longer the same.
    """
    folder, step = place_of(run)
    state = processes.by_main(lambda: folder.read_checkpoint(step))
    config = shared_out(RunConfig.load(folder.config), processes.count)
    cache = cache or rebuild_cache(folder, config, processes)
    if state["plan"] != plan_digest(cache.plan):
        raise CheckpointError(
            f"{folder.path}: the pictures, captions or batch settings are not those of the run; put them back to resume it, "
            "or start a new run (data sets with a train_batch_size of their own need as many processes as before)"
        )
    return Resumable(folder, as_it_was(config, state), cache, state)


def place_of(run: str | Path) -> tuple[RunFolder, int | None]:
    """The folder of a run, and the step when a checkpoint in it is named. Raises: CheckpointError when it is no run's."""
    path = Path(run).absolute()
    step = step_of(path) if path.parent.name == "checkpoints" else None
    return RunFolder.of(path if step is None else path.parent.parent), step


@contextmanager
def alone(run: str | Path, processes: Processes) -> Iterator[None]:
    """Hold the folder of a run while it is taken up. Raises: TrainingError when another process is running it; CheckpointError."""
    lock = Lock(place_of(run)[0].lock)
    processes.by_main(lock.take)
    try:
        yield
    finally:
        if processes.main:
            lock.release()


def as_it_was(config: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """A run's settings with what a person had changed by the time of a checkpoint. Raises: ConfigError."""
    return steered(config, state["live"])


def shared_out(config: RunConfig, count: int) -> RunConfig:
    """The same batches for another number of processes. Raises: CheckpointError when they cannot be shared out evenly."""
    before = config.run.num_processes or 1
    if before == count:
        return config
    images = config.data.train_batch_size * before
    if images % count:
        raise CheckpointError(
            f"the run has batches of {images} pictures, which {count} processes cannot share out evenly; start {before} as before"
        )
    return config.replace(num_processes=count, train_batch_size=images // count)
