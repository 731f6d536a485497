"""One folder per run, and the names of everything in it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3tune.errors import CheckpointError, ConfigError
from sd3tune.files import (
    digest_of,
    explained,
    file_digest,
    make_folder,
    new_numbered_folder,
    write_bytes,
    write_folder,
    write_text,
)
from sd3tune.history import follow_segments, read_lines
from sd3tune.keeping import best_of
from sd3tune.locking import NAME

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """The files of one run. Never overwrites another run's: a taken name gets a number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, wanted: Path) -> RunFolder:
        """Make a new folder at ``wanted``, or at ``wanted-2``, ``-3``, ... Raises: FileError."""
        return cls(new_numbered_folder(wanted))

    @classmethod
    def of(cls, path: str | Path) -> RunFolder:
        """The folder of a run that is there. Raises: CheckpointError when it is none."""
        folder = cls(Path(path).absolute())
        if not folder.config.exists():
            raise CheckpointError(f"{folder.path}: not a run folder (there is no config.yaml)")
        return folder

    @property
    def config(self) -> Path:
        """Every setting of the run."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What was found, before the first update."""
        return self.path / "manifest.json"

    @property
    def history(self) -> Path:
        """One record a line; the only file that grows."""
        return self.path / "history.jsonl"

    @property
    def log(self) -> Path:
        """Messages in words."""
        return self.path / "train.log"

    @property
    def environment(self) -> Path:
        """Every installed package with its version."""
        return self.path / "environment.txt"

    @property
    def lock(self) -> Path:
        """Who is writing into this folder; there while a run goes on."""
        return self.path / NAME

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def lora(self) -> Path:
        """The final adapter, diffusers layout."""
        return self.path / "lora.safetensors"

    @property
    def lora_ema(self) -> Path:
        """The running average of the adapter."""
        return self.path / "lora-ema.safetensors"

    @property
    def picks(self) -> Path:
        """Pictures and votes from which a checkpoint is chosen."""
        return self.path / "picks"

    @property
    def card(self) -> Path:
        """The model card: what the adapter is and how it is used."""
        return self.path / "README.md"

    @property
    def report(self) -> Path:
        """The whole run as one page."""
        return self.path / "report.html"

    @property
    def grid(self) -> Path:
        """Base, adapter and reference pictures side by side."""
        return self.path / "grid.png"

    @property
    def loss_chart(self) -> Path:
        """The loss over the updates."""
        return self.path / "loss.png"

    def images(self, step: int) -> Path:
        """Validation pictures drawn after ``step`` updates."""
        return self.path / "images" / f"step-{step:06d}"

    # --- adapters of pictures ----------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Path:
        """Adapters that pictures were drawn with, each by the SHA-256 of its file."""
        return self.path / "adapters"

    def keep_adapter(self, weights: Mapping[str, Tensor]) -> str:
        """Keep the weights that pictures are about to be drawn with, once; a checkpoint's file is linked. Returns the name.

        Raises: FileError.
        """
        from safetensors.torch import save

        data = save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()})
        mark = digest_of(data)
        path = self.adapters / f"{mark}.safetensors"
        if path.exists():
            return mark
        make_folder(self.adapters)
        for folder in self.checkpoints():
            with suppress(OSError):  # a file system without links
                if file_digest(folder / "adapter.safetensors") == mark:
                    path.hardlink_to(folder / "adapter.safetensors")
                    return mark
        write_bytes(path, data)
        return mark

    def drop_adapters(self) -> None:
        """Delete adapters whose pictures are gone."""
        named = set()
        for path in (*self.images(0).parent.glob("*/*.json"), *self.picks.glob("*.json")):
            with suppress(OSError, ValueError, AttributeError):
                named.add(json.loads(path.read_text()).get("adapter"))
        for path in self.adapters.glob("*.safetensors"):
            if path.stem not in named:
                path.unlink(missing_ok=True)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def write_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
    ) -> tuple[Path, int]:
        """Write ``adapter`` and ``optimizer`` tensors and ``state.json`` with their digests, read them back, then drop the oldest.

        Returns the checkpoint's folder and its number of tensors. Raises: FileError; CheckpointError when it does not read back.
        Older checkpoints are then untouched.
        """
        from safetensors.torch import save

        folder = self.checkpoint_folder / f"step-{step:06d}"
        with write_folder(folder) as draft:
            digests = {}
            for name, held in tensors.items():
                data = save({key: value.contiguous() for key, value in held.items()})  # save_file would hide a full disk
                (draft / f"{name}.safetensors").write_bytes(data)
                digests[f"{name}.safetensors"] = digest_of(data)
            (draft / "state.json").write_text(json.dumps({**state, "sha256": digests}, indent=1) + "\n")
            if folder.exists():  # from before a resume or a rollback; readable under its other name until the new one is there
                shutil.rmtree(folder.with_suffix(".old"), ignore_errors=True)
                folder.rename(folder.with_suffix(".old"))
        _, damage = read_state(folder)
        if damage:
            raise CheckpointError(f"{folder}: {damage}; the checkpoints before it are untouched, and the next one is tried elsewhere")
        self.point_at(step)
        self._rotate(step, keep)
        return folder, sum(len(held) for held in tensors.values())

    def point_at(self, step: int) -> None:
        """Make the checkpoint of ``step`` the newest that counts. Raises: FileError."""
        write_text(self.checkpoint_folder / "latest.json", json.dumps({"step": step, "folder": f"step-{step:06d}"}) + "\n")

    def _rotate(self, newest: int, keep: int) -> None:
        """Drop what is too old, and what a rollback has left behind; the best and those with a file PINNED stay."""
        best = best_of(self.checkpoint_folder)
        kept = [p for p in self.checkpoints() if step_of(p) <= newest and p.suffix != ".old"][-keep:]
        for folder in self.checkpoints():
            is_best = best is not None and step_of(folder) == best[0] and step_of(folder) <= newest and folder.suffix != ".old"
            if folder not in kept and not is_best and not (folder / PINNED).exists():
                shutil.rmtree(folder)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; one that another of the same step has replaced comes before that."""
        there = (p.parent for p in self.checkpoint_folder.glob("step-*/state.json"))
        return sorted(there, key=lambda path: (step_of(path), path.suffix != ".old"))

    def read_checkpoint(self, step: int | None = None, *, before: int = 0) -> dict[str, Any]:
        """The newest checkpoint that reads back whole: its state with the tensors of ``adapter`` and ``optimizer``.

        ``folder`` is its path and ``passed_over`` says which newer ones are damaged. ``step`` asks for that one alone; ``before``
        leaves out so many whole ones, as long as there are others. Raises: CheckpointError when there is none.
        """
        from safetensors.torch import load_file

        damaged, found = [], None
        for folder in self._candidates(step):
            state, damage = read_state(folder)
            if damage:
                damaged.append(f"{folder.name}: {damage}")
                continue
            found, before = (folder, state), before - 1
            if before < 0:
                break
        if found is not None:
            folder, state = found
            tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["sha256"]}
            return {**state, **tensors, "folder": str(folder), "passed_over": damaged}
        why = "; damaged: " + "; ".join(damaged) if damaged else ""
        raise CheckpointError(f"{self.path}: there is no checkpoint to resume from{why}")

    def _candidates(self, step: int | None) -> list[Path]:
        """Checkpoints to try, newest first: none that a rollback has left behind."""
        newest = latest_step(self.checkpoint_folder)
        if step is not None:
            return [p for p in reversed(self.checkpoints()) if step_of(p) == step]
        return [p for p in reversed(self.checkpoints()) if newest is None or step_of(p) <= newest]

    # --- history -----------------------------------------------------------------------------------------------------

    def read_history(self) -> list[dict[str, Any]]:
        """The lines that count, oldest first: a later segment replaces what its parent did beyond the step it left from."""
        return follow_segments(read_lines(self.history))


def picture_folders(folder: RunFolder) -> list[Path]:
    """The folders of validation pictures, oldest first."""
    return sorted(folder.images(0).parent.glob("step-*"), key=step_of)


PINNED = "PINNED"
"""A file of this name in a checkpoint's folder keeps it."""


def step_of(checkpoint: Path) -> int:
    """Updates done at a checkpoint, by its folder's name; -1 for a name that is not ours."""
    digits = checkpoint.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def latest_step(checkpoints: Path) -> int | None:
    """The step that ``latest.json`` points at; ``None`` when it cannot be read."""
    try:
        return int(json.loads((checkpoints / "latest.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_state(folder: Path) -> tuple[dict[str, Any], str]:
    """``state.json`` of a checkpoint, and what is wrong with its files; empty when each is what was written."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        wrong = [name for name, mark in state["sha256"].items() if file_digest(folder / name) != mark]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, str(error)
    return state, f"{wrong[0]} is not what was written" if wrong else ""


def log_level() -> str:
    """``SD3TUNE_LOG_LEVEL``. Raises: ConfigError when it is not a level."""
    level = os.environ.get("SD3TUNE_LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError([f"SD3TUNE_LOG_LEVEL is {level!r}; use DEBUG, INFO, WARNING or ERROR"], "the environment")
    return level


def open_log(folder: RunFolder) -> logging.Logger:
    """The run's logger, writing to ``train.log`` at ``SD3TUNE_LOG_LEVEL`` (INFO). Raises: FileError."""
    logger = logging.Logger(f"sd3tune.{folder.path.name}", log_level())
    with explained(folder.log):
        handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger
