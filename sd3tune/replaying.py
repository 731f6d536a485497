"""Do a recorded run again from its settings and commands, and compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sd3tune.assembly import rebuild_cache
from sd3tune.cache import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError
from sd3tune.history import accepted
from sd3tune.processes import started
from sd3tune.records import NoticeRecord, Record
from sd3tune.redrawing import redraw
from sd3tune.resuming import shared_out
from sd3tune.run_folder import RunFolder
from sd3tune.trainer import Trainer

STEERING = ("learning_rate", "max_grad_norm", "max_train_steps")
"""What a person may change that an update depends on."""


def replay(run_folder: str | Path, cache: Cache | None = None) -> Iterator[Record]:
    """Do every update of a run again, with every command at its place; the last record says whether the adapter is the same.

    The run itself is only read; the replay has a folder of its own beside it. A picture of a run is drawn again instead, see `redraw`.
    Raises: CheckpointError when it is no run folder.
    """
    path = Path(run_folder).absolute()
    if path.is_file() or path.suffix == ".png":
        yield from redraw(path)
        return
    folder = RunFolder.of(path)
    recorded = shared_out(RunConfig.load(folder.config), started())
    quiet = recorded.replace(
        output_dir=str(folder.path.with_name(f"{folder.path.name}-replay")),
        validation_prompt=(),
        mirror_to=None,
        guard_policy="stop",
        report_to="none",
        push_to_hub=False,
        push_checkpoints_to_hub=False,
        webhook_config=None,
    )
    trainer = Trainer(quiet, cache or rebuild_cache(folder, recorded))
    apart = ""
    for row in folder.read_history():
        if row["type"] == "command":
            _steer(trainer, row)
        elif row["type"] == "step":
            record = trainer.step()
            yield record
            if not apart and list(record.losses) != row["losses"]:
                apart = f"the losses of update {row['step']} differ: {record.losses} now, {tuple(row['losses'])} then"
    yield NoticeRecord(step=trainer.steps_done, text=_verdict(folder, trainer, apart))


def _steer(trainer: Trainer, row: Mapping[str, Any]) -> None:
    """Obey a command of the history as far as it changes updates."""
    if row["name"] == "skip":
        for number in row["value"]:
            trainer.engine.skip(int(number))
    elif wanted := {name: value for name, value in accepted(row).items() if name in STEERING}:
        trainer.set(**wanted)


def _verdict(folder: RunFolder, trainer: Trainer, apart: str) -> str:
    step = trainer.steps_done
    try:
        then = folder.read_checkpoint(step)["adapter"]
    except CheckpointError:
        end = f"there is no checkpoint of step {step} to compare the adapter with"
        return f"replayed {step} updates; {apart or 'every loss is the same'}; {end}"
    now = trainer.state_dict()["adapter"]
    most = max(float((now[name] - value).abs().max()) for name, value in then.items())
    same = now.keys() == then.keys() and all(torch.equal(now[name], value) for name, value in then.items())
    said = (
        "the adapter is the same, bit for bit" if same else f"the adapter differs by up to {most:.3g}; {apart or 'every loss is the same'}"
    )
    return f"replayed {step} updates: {said}"
