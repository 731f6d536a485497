"""The verbs about runs that are there: list, draw with, do again, show and upload them, and choose among their checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sd3tune as st
from sd3tune.errors import ConfigError, TrainingError


def add_verbs(verb: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """``runs``, ``sample``, ``replay``, ``report``, ``board`` and ``push`` with what may be written after them."""
    listed = verb("runs", _runs, "list the runs of a folder, or say what became of one run")
    listed.add_argument("folder", nargs="?", default="runs", help="a folder of runs, or a run folder (%(default)s)")
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
    folder = Path(options.folder)
    print(st.open_run(folder) if (folder / "config.yaml").is_file() else st.runs(folder))


def _sample(options: argparse.Namespace) -> None:
    from sd3tune.config.reading import parse_setting
    from sd3tune.records import ImageRecord, NoticeRecord
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
        elif isinstance(record, NoticeRecord):
            print(record.text, flush=True)
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
    from sd3tune.run_folder import RunFolder

    print(write_report(RunFolder.of(options.run)))


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
    from sd3tune.listing import as_set
    from sd3tune.reporting.publishing import publish
    from sd3tune.run_folder import RunFolder

    folder = RunFolder.of(options.run)
    print(publish(folder, as_set(folder).replace(**dict(map(parse_setting, options.set)))))


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
