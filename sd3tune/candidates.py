"""The checkpoints of a run as candidates to choose from: which there are, their weights, and the file of the chosen one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sd3tune.assembly import rule_of, write_noted
from sd3tune.config.library import parse_size
from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError, ConfigError, FileError
from sd3tune.files import free_name
from sd3tune.history import newest_chain, read_lines
from sd3tune.models import components
from sd3tune.models.lora_files import Verified
from sd3tune.models.lora_layouts import Layout
from sd3tune.models.modelspec import described
from sd3tune.resuming import as_it_was
from sd3tune.run_folder import RunFolder, read_state, step_of
from sd3tune.sampling import exchange, loaded
from sd3tune.shown import Shown
from sd3tune.training.optim import AVERAGING, averaged_of
from sd3tune.validation.votes import Candidate


def adapter_file(folder: RunFolder, step: int) -> Path:
    """The weights of the checkpoint of a step, as they train."""
    return folder.checkpoint_folder / f"step-{step:06d}" / "adapter.safetensors"


def whole_checkpoints(folder: RunFolder, steps: Sequence[int] | None = None) -> dict[int, str]:
    """Step and adapter's SHA-256 of the checkpoints that read back whole and lead to where the run is now; those of ``steps``, or all.

    Nothing was learned yet at step 0, so it is among them only when it is asked for: a row of the base model.
    Raises: CheckpointError when one that is asked for is not there, damaged or left behind, or when there is none at all.
    """
    there = {step_of(path): path for path in folder.checkpoints() if path.suffix != ".old"}
    chain = newest_chain(read_lines(folder.history))
    if steps is not None:
        found = {step: _examined(there[step], chain) for step in sorted({*steps} & there.keys())}
        absent = [f"there is no checkpoint of step {step}" for step in sorted({*steps} - there.keys())]
        if not absent and all(mark for mark, _ in found.values()):
            return {step: mark for step, (mark, _) in found.items()}
    else:
        found, absent = {}, []
    every = {step: found.get(step) or _examined(path, chain) for step, path in there.items()}
    marks = {step: mark for step, (mark, _) in every.items() if mark}
    if steps is None and (learned := {step: mark for step, mark in marks.items() if step}):
        return learned
    wrong = [why for step, (_, why) in every.items() if why and (steps is None or step in steps)]
    known = f"there are {', '.join(map(str, marks))}" if any(marks) else "there is no whole checkpoint to choose from"
    raise CheckpointError(f"{folder.path}: {'; '.join([*absent, *wrong, known])}")


def _examined(path: Path, chain: Mapping[int, float]) -> tuple[str, str]:
    """The SHA-256 of a checkpoint's adapter, or why it is no candidate."""
    state, damage = read_state(path)
    if damage:
        return "", f"{path.name} is damaged ({damage})"
    if step_of(path) > chain.get(int(state.get("segment", 0)), -1):
        return "", f"{path.name} was left behind when the run went back to an earlier step"
    return str(state["sha256"]["adapter.safetensors"]), ""


def config_at(folder: RunFolder, step: int) -> RunConfig:
    """A run's settings as they were at the checkpoint of a step. Raises: CheckpointError, ConfigError."""
    return as_it_was(RunConfig.load(folder.config), _state(folder, step))


def _state(folder: RunFolder, step: int, mark: str = "") -> dict[str, Any]:
    """The state of a checkpoint. Raises: CheckpointError when it is gone, damaged, or another one than ``mark`` says."""
    path = adapter_file(folder, step).parent
    if not path.exists():
        raise CheckpointError(
            f"{path}: the checkpoint is gone; a run keeps checkpoints_total_limit of them, and those with a file PINNED for good"
        )
    state, damage = read_state(path)
    if damage:
        raise CheckpointError(f"{path}: damaged: {damage}; choose another step")
    if mark and state["sha256"]["adapter.safetensors"] != mark:
        raise CheckpointError(f"{path}: is another checkpoint by now, because the run went back and on again; make the picker anew")
    return state


def weights_of(folder: RunFolder, config: RunConfig, candidate: Candidate) -> dict[str, Tensor]:
    """The weights that a candidate draws with, on the CPU: what validation drew with at that step. Raises: CheckpointError."""
    from safetensors.torch import load_file

    _state(folder, candidate.step, candidate.mark)
    path, rule = adapter_file(folder, candidate.step), rule_of(config)
    weights = load_file(path)
    return averaged_of(rule, weights, load_file(path.with_name("optimizer.safetensors"))) if rule.name in AVERAGING else weights


# --- the chosen one ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Promoted(Shown):
    """A file that was written, with what was compared when it was read back."""

    path: Path
    candidate: Candidate
    folded: bool
    verified: Verified

    def __str__(self) -> str:
        use = ""
        if self.candidate.strength != 1:
            use = "; the strength is in it, so use it at 1" if self.folded else f"; use it at strength {self.candidate.strength:g}"
        return f"{self.path}: {self.candidate}, {self.verified}{use}"


def promote(
    folder: RunFolder, candidate: Candidate, path: str | Path | None = None, *, layout: Layout = "diffusers", fold: bool = False
) -> Promoted:
    """Write a candidate's adapter as a file of its own, read it back and compare; ``<run>/picked.safetensors``, or with a number.

    ``fold`` multiplies the strength into the file. Raises: CheckpointError when the checkpoint is gone or damaged, or the file is not what
    it should be; ConfigError for what LyCORIS cannot do; FileError when something lies at ``path`` already.
    """
    if not candidate.step:
        raise CheckpointError(f"{folder.path}: nothing was learned yet at step 0; choose another step")
    out = Path(path).absolute() if path is not None else free_name(folder.path / "picked.safetensors")
    if out.exists():
        raise FileError(f"{out}: is already there; give another name")
    if not candidate.mark:
        candidate = replace(candidate, mark=whole_checkpoints(folder, (candidate.step,))[candidate.step])
    config = config_at(folder, candidate.step)
    lycoris, folded = config.adapter.lora_type == "lycoris", fold and candidate.strength != 1
    if lycoris and layout != "diffusers":
        raise ConfigError(["a LyCORIS file has lycoris' own layout, which ComfyUI reads, too; leave the layout out"], "promote")
    if lycoris and folded:
        raise ConfigError(["a strength cannot be folded into a LyCORIS file; use it at that strength"], "promote")
    weights = weights_of(folder, config, candidate)
    if folded:
        weights = {name: weight * candidate.strength if ".lora_B." in name else weight for name, weight in weights.items()}
    notes = {"sd3tune.step": str(candidate.step), **_described(folder, config, out.stem)}
    if not lycoris:
        return Promoted(out, candidate, folded, write_noted(out, weights, config, notes, network=None, layout=layout))
    with loaded(config, adapter_file(folder, candidate.step), components.pick_device()) as (transformer, network):
        exchange(transformer, network, weights, str(candidate))
        return Promoted(out, candidate, folded, write_noted(out, weights, config, notes, network=network, layout=layout))


def _described(folder: RunFolder, config: RunConfig, title: str) -> dict[str, str]:
    """What the file says of itself, as far as the run's manifest knows of its pictures, which may be gone."""
    rows: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        rows = json.loads(folder.manifest.read_text())
    largest = max((str(name) for name, _ in rows.get("buckets", ())), key=lambda size: math.prod(parse_size(size)), default="")
    return described(config, title, largest, [row["instance_prompt"] for row in rows.get("datasets", ()) if row.get("instance_prompt")])
