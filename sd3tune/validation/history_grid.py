"""The grid that lies in a run folder: prompts by steps, and what each of its pictures is, inside it and beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.run_folder import RunFolder, picture_folders, step_of
from sd3tune.validation.pictures import Found, grid_of, model_settings, rows_of, settings_of, title
from sd3tune.validation.shots import shots_of

MOST = 6
"""Steps with a row of their own; of more the first, the last, and some evenly between."""

PIXELS = 64_000_000
"""Of all its pictures; with more of them each is made smaller, so that neither memory nor the file grows without bounds."""


def write_grid(config: RunConfig, folder: RunFolder, made: Plan, step: int) -> None:
    """Write ``grid.png`` with the pictures drawn after up to ``step`` updates, and ``grid.json``. Raises: FileError."""
    steps = steps_shown(folder, step)
    grid_of(config, folder, made, steps, most=PIXELS).save(folder.grid, about_grid(config, folder, steps))


def steps_shown(folder: RunFolder, step: int) -> list[int]:
    """The steps that have a row: those whose pictures are not the base model's alone, at most `MOST`."""
    drawn = [step_of(at) for at in picture_folders(folder) if step_of(at) <= step]
    return thinned([at for at in drawn if at or len(drawn) == 1], MOST)


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most so many, with the first and the last, evenly taken."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def about_grid(config: RunConfig, folder: RunFolder, steps: Sequence[int]) -> dict[str, Any]:
    """What stands in the grid: for each row its label and each cell's file with the adapter and the shot that drew it."""
    shots = shots_of(config)
    rows = [{"label": label, "cells": [_cell(folder, found) for found in cells]} for label, cells in rows_of(folder, shots, steps)]
    return {
        "type": "grid", "steps": list(steps), "columns": [title(shot, shots) for shot in shots], "rows": rows,
        "settings": settings_of(config), "model_settings": model_settings(config),
    }  # fmt: skip


def _cell(folder: RunFolder, found: Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "file": found.path.relative_to(folder.path).as_posix(), "kind": found.kind, "adapter": found.adapter, "model": found.model,
        "problem": found.problem, "shot": found.shot.as_dict(),
    }  # fmt: skip
