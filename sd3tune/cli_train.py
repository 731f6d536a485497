"""``sd3tune train``: the headless twin of the notebook."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import sd3tune as st
from sd3tune.cli_data import config_of
from sd3tune.control import FILES
from sd3tune.errors import ConfigError, Sd3TuneError
from sd3tune.listing import newest_of
from sd3tune.records import CheckpointRecord, CommandRecord, EvalRecord, NoticeRecord, Record
from sd3tune.snapshot import in_words

if TYPE_CHECKING:
    from sd3tune.data import Plan
    from sd3tune.trainer import Trainer

DATA = "datasets.yaml"
"""What is trained on when nothing else is named."""


def add_arguments(made: argparse.ArgumentParser) -> None:
    """What training alone understands."""
    made.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="go on with a run folder, or one of its checkpoints; without RUN, with the newest run of the settings file",
    )  # fmt: skip
    made.add_argument("--stop-before", metavar="TIME", help="save and stop before this much time has passed, such as 11h30m")


def run(options: argparse.Namespace) -> int:
    """Encode what is missing, train, validate, save; the exit code. Raises: Sd3TuneError."""
    from sd3tune.assembly import encoded
    from sd3tune.processes import join, leave, started

    deadline = time.monotonic() + seconds_of(options.stop_before) if options.stop_before else None
    if options.resume is not None:
        from sd3tune.config.reading import parse_setting

        changes = dict(map(parse_setting, options.set))
        place = changes.pop("output_dir", None) if not options.resume else None  # it says which run is meant
        trainer = st.Trainer.resume(_to_resume(options, place), **changes)
    else:
        config = config_of(options)
        config = config.replace(num_processes=config.run.num_processes or started())
        processes = join(config.run.num_processes)
        plan = st.plan(st.discover(options.data), config)
        cache = encoded_with_a_bar(config, plan) if processes.count == 1 else encoded(config, plan, processes)
        trainer = st.Trainer(config, cache, processes=processes)
    if trainer.processes.main:
        print(f"run folder: {trainer.folder.path}\n{trainer.manifest}", flush=True)
        code = _drive(trainer, deadline)
    else:
        for _ in trainer.run():
            pass
        code = 0
    leave()
    return code


def _to_resume(options: argparse.Namespace, place: str | None) -> Path:
    """The run to go on with: the one that is named, or the newest in ``place`` or where the settings file says.

    Raises: ConfigError when it is not clear which, or when it has its own of what was given.
    """
    if options.data != DATA:
        raise ConfigError(["a run that goes on has its own data; leave --data out"], "--resume")
    if options.resume and options.config:
        raise ConfigError(
            [f"{options.resume} has its own settings; leave {options.config} out, and change one with --set NAME=VALUE"], "--resume"
        )
    if options.resume:
        return Path(options.resume)
    begun = st.RunConfig.load(options.config) if options.config else st.presets.playground()
    wanted = Path(place or begun.run.output_dir)
    newest = newest_of(wanted)
    if newest is None:
        raise ConfigError([f"there is no run in {wanted.absolute()}; leave --resume out to start one"], "--resume")
    return newest


def seconds_of(text: str) -> float:
    """``"11h30m"``, ``"45m"``, ``"1.5h"`` or ``"90s"`` in seconds. Raises: ConfigError."""
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        if found and any(found.groups()):
            return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    except ValueError:
        pass
    raise ConfigError([f"{text!r} is not a time such as 11h30m, 45m or 90s"], "--stop-before")


def _drive(trainer: Trainer, deadline: float | None) -> int:
    """Run to the end with one progress line. Ctrl-C or SIGTERM finishes the update, saves a checkpoint and stops."""
    from tqdm import tqdm

    from sd3tune.progress import progress

    records, longest, before = progress(trainer), 0.0, time.monotonic()
    again = f"go on with: sd3tune train --resume {trainer.folder.path}"
    try:
        for record in records:
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
            if deadline is not None and before + 2 * longest > deadline and not trainer.done:
                trainer.stop()
            for said in told(record):
                tqdm.write(f"step {record.step}: {said}")
    except Sd3TuneError:
        _part(trainer)
        raise
    except KeyboardInterrupt as interrupt:
        records.close()
        if isinstance(interrupt.__context__, Sd3TuneError):  # what went wrong in the update that was interrupted
            print(f"\n{interrupt.__context__}", file=sys.stderr)
        print(f"\ninterrupted after step {trainer.steps_done}; saved {trainer.secure()}\n{again}", flush=True)
        _part(trainer)
        return 130
    if not trainer.done:
        print(f"stopped after step {trainer.steps_done}; saved {trainer.secure()}\n{again}")
        return 0
    print(f"adapter: {trainer.folder.lora}\npictures: {trainer.folder.grid}")
    return 0


def told(record: Record) -> list[str]:
    """What stands in a terminal about a record, beside the progress line."""
    if isinstance(record, EvalRecord):
        beside = "" if record.relative is None else f", {record.relative:.1%} of the base model's"
        return [f"loss on {record.images} held-out images {record.loss:.4f}{beside}", *filter(None, [record.verdict])]
    if isinstance(record, CheckpointRecord):
        return [f"saved {record.path}"]
    if isinstance(record, CommandRecord):
        asked = f"{record.name} {in_words(record.value)}" if isinstance(record.value, Mapping) else record.name
        return [f"{asked}: not done: {record.refused}" if record.refused else asked]
    return [record.text] if isinstance(record, NoticeRecord) and record.step else []


def attach(options: argparse.Namespace) -> int:
    """Show a run that goes on in another process until it ends. Ctrl-C ends the showing, not the run. Raises: CheckpointError."""
    from tqdm import tqdm

    from sd3tune.progress import progress
    from sd3tune.written import Written

    run = st.open_run(options.run)
    print(f"{run.path}\n{run.state}", flush=True)
    if run.status != "running":
        return 0
    print(f"Ctrl-C ends this view, not the run; files in its folder steer it: {', '.join(FILES)}", flush=True)
    written = Written(run.folder, updates=run.total)
    written.so_far()
    try:
        for record in progress(written):
            for said in told(record):
                tqdm.write(f"step {record.step}: {said}")
    except KeyboardInterrupt:
        print()
    print(run.refresh().state)
    return 0


def _part(trainer: Trainer) -> None:
    """Say what has become of the copies of a run that ends early."""
    for record in trainer.parting():
        if isinstance(record, NoticeRecord):
            print(f"step {record.step}: {record.text}", flush=True)


def encoded_with_a_bar(config: st.RunConfig, plan: Plan) -> st.Cache:
    """The cache of a plan, with a progress bar."""
    from sd3tune.progress import building

    builder = st.CacheBuilder(plan, st.encoders(config))
    return builder.cache(list(building(builder)))
