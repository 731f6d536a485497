"""The verbs about runs that are there: list them, write one as a page, upload its adapter, choose a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sd3tune as st


def add_verbs(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``runs``, ``report`` and ``push`` with what may be written after them."""
    verb("runs", _runs, "list the runs of a folder").add_argument("folder", nargs="?", default="runs")
    verb("report", _report, "write a run as one page that needs no network").add_argument("run", help="a run folder")
    pushed = verb("push", _push, "upload a finished run's adapter to the Hugging Face hub, with a model card")
    pushed.add_argument("run", help="a run folder")
    pushed.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting, such as hub_model_id=me/pots")
    _add_grid(verb("grid", _grid, "draw a run's checkpoints side by side, and write the chosen one to a file of its own"))


def _add_grid(grid: argparse.ArgumentParser) -> None:
    grid.add_argument("run", help="a run folder")
    grid.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="these checkpoints; all when left out")
    grid.add_argument("--prompt", nargs="+", metavar="TEXT", help="these prompts instead of the run's")
    grid.add_argument("--strength", type=float, nargs="+", default=[1.0], metavar="SHARE", help="how much of the adapters' change (1)")
    grid.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting of validation; may be repeated")
    grid.add_argument("--promote", type=int, metavar="STEP", help="draw nothing: write this checkpoint's adapter, and compare the file")
    grid.add_argument("--out", metavar="FILE", help="promote: the file to write (picked.safetensors in the run folder)")
    grid.add_argument("--to", choices=("diffusers", "comfyui"), default="diffusers", help="promote: the layout (%(default)s)")
    grid.add_argument("--fold", action="store_true", help="promote: multiply the one --strength into the file")


def _runs(options: argparse.Namespace) -> None:
    print(st.runs(Path(options.folder)))


def _report(options: argparse.Namespace) -> None:
    from sd3tune.reporting.page import write_report
    from sd3tune.run_folder import RunFolder

    print(write_report(RunFolder.of(options.run)))


def _push(options: argparse.Namespace) -> None:
    from sd3tune.config.reading import parse_setting
    from sd3tune.reporting.publishing import publish
    from sd3tune.run_folder import RunFolder

    folder = RunFolder.of(options.run)
    print(publish(folder, st.RunConfig.load(folder.config).replace(**dict(map(parse_setting, options.set)))))


def _grid(options: argparse.Namespace) -> None:
    from sd3tune.candidates import promote
    from sd3tune.config.reading import parse_setting
    from sd3tune.errors import ConfigError
    from sd3tune.run_folder import RunFolder
    from sd3tune.validation.votes import Candidate

    if options.promote is not None:
        if len(options.strength) > 1:
            raise ConfigError(["--promote writes one file; give one --strength"], "sd3tune grid")
        print(
            promote(
                RunFolder.of(options.run),
                Candidate(options.promote, options.strength[0]),
                options.out,
                layout=options.to,
                fold=options.fold,
            )
        )
        return
    if options.out or options.fold:
        raise ConfigError(["--out and --fold belong to --promote STEP"], "sd3tune grid")
    _draw(options, dict(map(parse_setting, options.set)))


def _draw(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    from tqdm import tqdm

    from sd3tune.picking import Picker
    from sd3tune.records import ImageRecord, NoticeRecord

    picker = Picker(options.run, options.prompt, options.strength, options.steps, **settings)
    with tqdm(desc="drawing", unit="picture") as bar:
        for record in picker:
            if isinstance(record, NoticeRecord):
                tqdm.write(record.text)
            elif isinstance(record, ImageRecord):
                bar.update()
                if record.problem:
                    tqdm.write(f"step {record.step}: {record.prompt!r} could not be drawn: {record.problem}")
    print(f"{picker}\ngrid: {picker.grid_file}")
