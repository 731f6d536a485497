"""Curves and pictures in TensorBoard, Weights & Biases or trackio, through accelerate's trackers and no ``Accelerator``."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.files import digest, write_text
from sd3tune.records import EvalRecord, ImageRecord, Record, ScoreRecord, SegmentRecord, StepRecord
from sd3tune.reporting.cleaning import shareable
from sd3tune.run_folder import RunFolder

KINDS = ("tensorboard", "wandb", "trackio")
PROJECT = "sd3tune"

LONGEST = 60
"""Characters of a prompt that name a picture."""

WHOSE = {"base": " (base)", "ema": " (average)"}


def kinds_of(config: RunConfig) -> tuple[str, ...]:
    """The trackers that a configuration asks for. Raises: ConfigError when one is not installed, or has no login."""
    wanted = config.reporting.report_to
    if wanted == "none":
        return ()
    installed = _installed()
    if wanted == "all":
        if not installed:
            raise ConfigError(["report_to: all finds no tracker; pip install 'sd3tune[trackers]', or set report_to: none"])
        return tuple(kind for kind in installed if kind != "wandb" or not login_problem())
    if wanted not in installed:
        raise ConfigError([f"report_to: {wanted} is not installed; pip install {wanted} (or 'sd3tune[trackers]')"])
    if wanted == "wandb" and (problem := login_problem()):
        raise ConfigError([f"report_to: wandb: {problem}"])
    return (wanted,)


def left_out(config: RunConfig) -> tuple[str, ...]:
    """Which installed tracker ``report_to: all`` does without, and why."""
    if config.reporting.report_to != "all" or "wandb" not in _installed() or not (problem := login_problem()):
        return ()
    return (f"report_to: all leaves wandb out: {problem}",)


def _installed() -> list[str]:
    return [kind for kind in KINDS if importlib.util.find_spec(kind) is not None]


def login_problem() -> str:
    """Why Weights & Biases would ask for a login; empty when it would not. The key itself is not looked at."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return ""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in (Path(place).expanduser() for place in places if place):
        try:
            if netrc.netrc(place).authenticators(host):
                return ""
        except (OSError, netrc.NetrcParseError):
            continue
    return f"there is no login for {host}; run: wandb login (or set WANDB_API_KEY, or WANDB_MODE=offline to keep the curves here)"


class Tracker:
    """One tracker of one run; started by the first record, in the thread that sends."""

    def __init__(self, kind: str, config: RunConfig, folder: RunFolder) -> None:
        self.name, self._folder = kind, folder
        self._project = config.reporting.tracker_project_name or PROJECT
        self._run = config.reporting.tracker_run_name or folder.path.name
        self._facts = {name: _plain(value) for name, value in shareable(config).items()}
        self._made: Any = None
        self._from: int | None = None
        self._last = 0
        self._seed = config.validation_seed

    def wants(self, record: Record) -> bool:
        """Numbers, pictures, and where the run goes on."""
        return isinstance(record, (StepRecord, EvalRecord, ImageRecord, ScoreRecord, SegmentRecord))

    def send(self, record: Record) -> None:
        """Show a record; one that goes back in time hides what it replaces, where the tracker can."""
        if isinstance(record, SegmentRecord):
            self._from = record.from_step + 1
            if self._made is not None and self.name == "tensorboard":
                self.finish()
            return
        if isinstance(record, ImageRecord) and record.problem:
            return
        self._start()
        if isinstance(record, ImageRecord):
            self._show(record)
        else:
            self._made.log(numbers_of(record), step=self._place(record.step))

    def _place(self, step: int) -> int:
        """Where a step is shown: wandb drops what goes back, so there it stands at the last step that it had."""
        self._last = max(self._last, step)
        return self._last if self.name == "wandb" else step

    def finish(self) -> str:
        """Close the tracker."""
        made, self._made = self._made, None
        if made is not None:
            made.finish()
        return ""

    def _start(self) -> None:
        if self._made is not None:
            return
        from accelerate import tracking
        from accelerate.state import PartialState

        PartialState()  # accelerate's own log asks for it; it knows processes and devices, and no precision
        if self.name == "tensorboard":
            made = tracking.TensorBoardTracker(self.name, self._folder.path, purge_step=self._from)
        elif self.name == "wandb":
            made = tracking.WandBTracker(
                self._project, name=self._run, id=self._identity(), resume="allow", reinit="create_new", dir=str(self._folder.path),
                config=self._facts,
            )  # fmt: skip
        else:
            made = tracking.TrackioTracker(self._project, name=self._run, resume="allow", config=self._facts)
        made.start()
        if self.name == "tensorboard":
            made.log({"settings": "".join(f"    {name}: {value}\n" for name, value in self._facts.items())}, step=self._from or 0)
        elif self.name == "wandb":
            self._last = max(self._last, int(made.run.step))  # of a run that is resumed
        self._made, self._from = made, None

    def _show(self, record: ImageRecord) -> None:
        import numpy as np

        name, said = f"validation/{title_of(record, self._seed)}", f"step {record.step}: {record.prompt}"
        with Image.open(record.path) as opened:
            picture_HWC = np.asarray(opened.convert("RGB"))
        if self.name == "tensorboard":
            self._made.log_images({name: picture_HWC[None]}, step=record.step, dataformats="NHWC")
            self._made.writer.flush()
        elif self.name == "wandb":
            import wandb

            self._made.log({name: [wandb.Image(picture_HWC, caption=said)]}, step=self._place(record.step))
        else:
            import trackio

            self._made.log({name: trackio.Image(picture_HWC, caption=said)}, step=record.step)

    def _identity(self) -> str:
        """Of this run folder and no other, so that a resumed run goes on in its own curve."""
        known = self._folder.path / "tracker.json"
        if not known.exists():
            write_text(known, json.dumps({"id": uuid.uuid4().hex[:16]}) + "\n")
        return str(json.loads(known.read_text())["id"])


def title_of(record: ImageRecord, seed: int) -> str:
    """What a picture is called at every step, and no other picture of the step: what it shows, its size, and whose it is."""
    named = record.name and record.name != record.prompt
    shown = f"{record.name}: {record.prompt}" if named and record.prompt else record.name or record.prompt
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]} {digest(shown)[:6]}"
    ending = f" seed {record.seed}" if record.seed != seed else ""
    return f"{shown} {record.width}x{record.height}{ending}{WHOSE.get(record.kind, '')}"


def numbers_of(record: Record) -> dict[str, float]:
    """A record's numbers under the names that trainers use."""
    if isinstance(record, EvalRecord):
        others = {"loss/val_ema": record.ema_loss, "loss/val_relative": record.relative}
        each = {f"loss/val/{name}": loss for name, loss in record.losses_by_dataset.items()}
        return {"loss/val": record.loss, **each, **{name: value for name, value in others.items() if value is not None}}
    if isinstance(record, ScoreRecord):
        ending = "_ema" if record.kind == "ema" else ""
        return {f"clip/{name}{ending}": getattr(record, name) for name in ("mean", "min", "max", "std")}
    if not isinstance(record, StepRecord):
        return {}
    found = {
        "train_loss": record.loss, "regularisation_loss": record.regularisation_loss, "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm, "images_per_second": record.images_per_second,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> bool | int | float | str | None:
    return value if isinstance(value, (bool, int, float, str)) or value is None else json.dumps(value)
