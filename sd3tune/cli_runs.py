"""The verbs about runs that are there: list, draw with, do again, show and upload them, and choose among their checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sd3tune as st
from sd3tune.errors import CheckpointError, ConfigError, TrainingError

if TYPE_CHECKING:
    from sd3tune.run_folder import RunFolder


def add_verbs(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``runs``, ``sample``, ``replay``, ``report``, ``board`` and ``push`` with what may be written after them."""
    verb("runs", _runs, "list the runs of a folder").add_argument("folder", nargs="?", default="runs")
    drawn = verb("sample", _sample, "draw prompts with an adapter: a run folder, one of its checkpoints, or a LoRA file")
    drawn.add_argument("file", help="a run folder, a checkpoint's folder, or a .safetensors file of any layout")
    drawn.add_argument("prompt", nargs="+")
    drawn.add_argument("--out", default="samples", metavar="FOLDER", help="where the pictures go (%(default)s); nothing is overwritten")
    drawn.add_argument("--config", help="the YAML file that names the model, for a file that lies in no run folder")
    drawn.add_argument("--strength", type=float, help="how much of the adapter's change (1)")
    drawn.add_argument("--slg", metavar="LAYERS", help="skip-layer guidance on these blocks, such as 7,8,9")
    drawn.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; may be repeated")
    again = verb("replay", _replay, "do a run again and compare the adapter, or draw one of its pictures again and compare")
    again.add_argument("path", help="a run folder, or a picture in one")
    verb("report", _report, "write a run as one page that needs no network").add_argument("run", help="a run folder")
    learned = verb("board", _board, "say of each training picture how often it was seen, and whether it was learned")
    learned.add_argument("run", help="a run folder")
    learned.add_argument("--chart", metavar="FILE", help="also draw it, as a PNG file")
    pushed = verb("push", _push, "upload a finished run's adapter to the Hugging Face hub, with a model card")
    pushed.add_argument("run", help="a run folder")
    pushed.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting, such as hub_model_id=me/pots")


def _runs(options: argparse.Namespace) -> None:
    print(st.runs(Path(options.folder)))


def _sample(options: argparse.Namespace) -> None:
    from sd3tune.config.reading import parse_setting
    from sd3tune.records import ImageRecord
    from sd3tune.sampling import drawing

    settings: dict[str, Any] = dict(map(parse_setting, options.set))
    if options.strength is not None:
        settings["validation_adapter_strength"] = options.strength
    if options.slg is not None:
        settings["validation_guidance_skip_layers"] = _layers(options.slg)
    config = st.RunConfig.load(options.config) if options.config else None
    failed = 0
    for record in drawing(options.file, options.prompt, out=options.out, config=config, **settings):
        if isinstance(record, ImageRecord):
            failed += bool(record.problem)
            print(f"{record.prompt!r}: {record.problem or record.path}", flush=True)
    if failed:
        raise TrainingError(f"{failed} of the pictures could not be drawn")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise ConfigError([f"--slg {text!r}: write the numbers of blocks with commas, such as 7,8,9"], "sd3tune sample") from None


def _replay(options: argparse.Namespace) -> None:
    from sd3tune.records import ImageRecord, NoticeRecord

    for record in st.replay(options.path):
        if isinstance(record, ImageRecord):
            print(f"drawn again: {record.path}")
        elif isinstance(record, NoticeRecord):
            print(record.text)


def _report(options: argparse.Namespace) -> None:
    from sd3tune.reporting.page import write_report

    print(write_report(_run_of(options.run)))


def _board(options: argparse.Namespace) -> None:
    from sd3tune.files import write_with
    from sd3tune.validation.board import board

    found = board(options.run)
    print(found)
    if options.chart:
        path = Path(options.chart).absolute()
        write_with(path, lambda draft: found.chart().savefig(draft, format="png", dpi=110))
        print(f"chart: {path}")


def _push(options: argparse.Namespace) -> None:
    from sd3tune.config.reading import parse_setting
    from sd3tune.reporting.publishing import publish

    folder = _run_of(options.run)
    print(publish(folder, st.RunConfig.load(folder.config).replace(**dict(map(parse_setting, options.set)))))


def _run_of(path: str) -> RunFolder:
    """The run folder of a command. Raises: CheckpointError when it is none."""
    from sd3tune.run_folder import RunFolder

    folder = RunFolder(Path(path).absolute())
    if not folder.config.exists():
        raise CheckpointError(f"{folder.path}: not a run folder (there is no config.yaml)")
    return folder
