"""The verbs about runs that are there: list them, write one as a page, say what its pictures were to it, upload its adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sd3tune as st
from sd3tune.errors import CheckpointError

if TYPE_CHECKING:
    from sd3tune.run_folder import RunFolder


def add_verbs(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``runs``, ``report``, ``board`` and ``push`` with what may be written after them."""
    verb("runs", _runs, "list the runs of a folder").add_argument("folder", nargs="?", default="runs")
    verb("report", _report, "write a run as one page that needs no network").add_argument("run", help="a run folder")
    learned = verb("board", _board, "say of each training picture how often it was seen, and whether it was learned")
    learned.add_argument("run", help="a run folder")
    learned.add_argument("--chart", metavar="FILE", help="also draw it, as a PNG file")
    pushed = verb("push", _push, "upload a finished run's adapter to the Hugging Face hub, with a model card")
    pushed.add_argument("run", help="a run folder")
    pushed.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting, such as hub_model_id=me/pots")


def _runs(options: argparse.Namespace) -> None:
    print(st.runs(Path(options.folder)))


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
