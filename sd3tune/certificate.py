"""What a resumed run says of itself: where it goes on, what was put back, and what is not as it was."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from typing import Any

import torch

from sd3tune.data.planning import Plan
from sd3tune.data.timeline import phase_of
from sd3tune.shown import Shown

PACKAGES = (
    "sd3tune", "torch", "diffusers", "transformers", "peft", "lycoris-lora", "optimum-quanto", "bitsandbytes", "torch-optimi", "prodigyopt",
    "schedulefree",
)  # fmt: skip
"""What can change a run's bits."""


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """How a run was resumed; prints as a short list."""

    lines: tuple[str, ...]
    differs: tuple[str, ...]

    def __str__(self) -> str:
        apart = [f"differs: {line}" for line in self.differs] or ["nothing differs: software, models and data are those of the checkpoint"]
        return "\n".join([*self.lines, *apart])


def versions(processes: int) -> dict[str, str]:
    """Software and devices that a run's bits may depend on."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads()), "processes": str(processes)}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def installed() -> str:
    """Every installed distribution with its version, a line each, as ``environment.txt`` holds it."""
    heads = [HeaderParser().parsestr(d.read_text("METADATA") or d.read_text("PKG-INFO") or "") for d in metadata.distributions()]
    rows = {f"{head['Name']}=={head['Version']}" for head in heads if head["Name"]}
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *sorted(rows, key=str.lower)]) + "\n"


def certify(
    state: Mapping[str, Any], made: Plan, *, steps: int, learning_rate: float, changes: Mapping[str, Any], processes: int,
    made_of: Mapping[str, str], lost: Sequence[tuple[int, str, Any]] = (), stays: str = "",
) -> Certificate:  # fmt: skip
    """The certificate of a state that was read back, for a plan whose order is known to be the same.

    ``made_of`` has digests of the models, ``lost`` the settings that were changed after the checkpoint, ``stays`` the folder of the
    newest checkpoint of what is left behind.
    """
    step = int(state["updates"])
    batch = int(state.get("next", step)) * made.accumulation
    phase = phase_of(made.phases, batch)
    epoch, position = divmod(batch - phase.start, phase.length)
    moments = [name for name in state["optimizer"] if not name.startswith("ema.")]
    mean = len(state["optimizer"]) - len(moments)
    lines = [
        f"resumed after update {step} of {steps}, from {state['folder']}",
        f"epoch {phase.epoch + epoch}, batch {position + 1} of {phase.length}; the order of the data is identical",
        f"put back: {len(state['adapter'])} adapter tensors, {len(moments)} of the optimizer" + (f", {mean} averages" if mean else ""),
        f"learning rate of the next update {learning_rate:.4g}",
        *(f"passed over: {damaged}" for damaged in state["passed_over"]),
        *(f"changed after the checkpoint, and no longer so: {name} = {value}, at step {at}" for at, name, value in lost),
        *(f"changed by you: {name} = {value}" for name, value in changes.items()),
        *([f"left behind, and kept for good: {stays}"] if stays else []),
    ]
    if state.get("skipped"):
        lines.append(f"left out for good by the guard: {len(state['skipped'])} updates' batches")
    then, now = state.get("versions", {}), versions(processes)
    apart = [f"{name} was {then[name]} and is {now[name]}" for name in now if name in then and then[name] != now[name]]
    known = state.get("made_of", {})
    apart += [f"the weights of the {name} are not those of then" for name, mark in made_of.items() if known.get(name, mark) != mark]
    return Certificate(tuple(lines), tuple(apart))
