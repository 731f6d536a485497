"""The buttons of a run: which may be pressed now, what they say until the run answers, and the checkpoints to go back to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from sd3tune.panels.looks import button, offer, tip
from sd3tune.run_folder import RunFolder, step_of
from sd3tune.snapshot import LEGAL, TERMINAL, Snapshot

BUTTONS = {
    "start": ("Start", "Starting", "load the model and begin; a new run never overwrites another"),
    "pause": ("Pause", "Pausing", "stop after this update and keep everything in memory"),
    "go_on": ("Go on", "Going on", "go on from where the run is; one that was stopped, failed or killed resumes its newest checkpoint"),
    "stop": ("Stop and save", "Stopping", "finish the update, write a checkpoint and the adapter, and free the memory"),
    "validate": ("Sample now", "Sampling", "draw the validation prompts with the adapter as it is"),
    "save": ("Checkpoint now", "Saving", "write a checkpoint and the adapter, and go on"),
    "rewind": ("Rewind", "Rewinding", "go back to the chosen checkpoint; the state as it is stays as a checkpoint of its own"),
}  # fmt: skip
"""Command -> what its button says, what it says until the run answers, and what it does."""

PATIENCE = 30
"""Seconds for which a button waits for the run's answer before it can be pressed again."""


class Controls:
    """Buttons by their commands, and the checkpoint that *Rewind* goes back to. ``press(name)`` is what a button does."""

    def __init__(self, press: Callable[[str], object]) -> None:
        self.buttons = {name: button(said, lambda name=name: press(name), about) for name, (said, _, about) in BUTTONS.items()}  # type: ignore[misc]
        self.checkpoint: Any = tip(
            widgets.Dropdown(
                options=[("no checkpoint", -1)], description="Checkpoint", style={"description_width": "80px"},
                layout={"width": "230px", "max_width": "98%"},
            ),
            "to rewind to",
        )  # fmt: skip
        self._asked = dict[str, tuple[str, float]]()
        self._listed: tuple[str, ...] | None = None

    def asked(self, name: str, state: str) -> None:
        """A button was pressed while the run was in a state."""
        self._asked[name] = (state, time.monotonic())

    def look(self, now: Snapshot, answered: bool, clock: float) -> None:
        """Bring buttons and checkpoints up to date."""
        if now.log != self._listed:  # whatever writes a checkpoint says so
            self._listed = now.log
            there = RunFolder(Path(now.folder)).checkpoints() if now.folder else []
            options = [(f"step {step_of(path)}", step_of(path)) for path in there if path.suffix != ".old"]
            offer(self.checkpoint, options or [("no checkpoint", -1)], otherwise=-1)
        checkpoints = self.checkpoint.value >= 0
        for name, one in self.buttons.items():
            again = name == "start" or (name == "go_on" and now.state != "finished" and checkpoints)
            legal = name in LEGAL[now.state] or (now.state in TERMINAL and again)
            state, since = self._asked.get(name, ("", 0.0))
            pending = state == now.state and not answered and clock - since < PATIENCE
            one.disabled = not legal or pending or (name == "rewind" and not checkpoints)
            said, waiting, _ = BUTTONS[name]
            one.description = f"{waiting} ..." if pending else said
