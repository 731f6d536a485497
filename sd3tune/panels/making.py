"""What a panel's worker begins with: a trainer from a cache, from files, or from a run that goes on."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd3tune.cache import Cache
    from sd3tune.config import RunConfig
    from sd3tune.records import Record
    from sd3tune.trainer import Trainer


def make_trainer(config: RunConfig, cache: Cache) -> Trainer:
    """The trainer of a panel's run; called in the worker."""
    from sd3tune.trainer import Trainer

    return Trainer(config, cache)


def prepared(config: RunConfig, data: str | Path) -> Generator[Record, None, Trainer]:
    """A trainer from a file of data sets: plan, encode what is missing with a record for each entry, load the model."""
    from sd3tune.cache import CacheBuilder
    from sd3tune.data import discover, plan
    from sd3tune.models.encoders import encoders

    builder = CacheBuilder(plan(discover(data), config), encoders(config))
    records = []
    for one in builder:
        records.append(one)
        yield one
    return make_trainer(config, builder.cache(records))


def resumed(folder: str, cache: Cache | None, changes: dict[str, Any]) -> Generator[Record, None, Trainer]:
    """The trainer of a run that goes on, after the records of what it has done so far; called in the worker."""
    from sd3tune.records import records_of
    from sd3tune.run_folder import RunFolder, latest_step
    from sd3tune.trainer import Trainer

    there = RunFolder(Path(folder))
    newest = latest_step(there.checkpoint_folder) or 0
    yield from records_of(row for row in there.read_history() if row["step"] <= newest)
    return Trainer.resume(folder, cache, **changes)
