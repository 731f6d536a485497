"""The grids of a run folder: prompts by steps. The one that lies in it says what each of its pictures is, inside and in a file beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3tune.cache.decoding import cut
from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.run_folder import RunFolder
from sd3tune.validation.grids import Grid
from sd3tune.validation.pictures import Found, cell_of, drawn, model_settings, settings_of, title
from sd3tune.validation.shots import Shot, shots_of
from sd3tune.validation.standing import standing, steps_drawn

MOST = 6
"""Steps with a row of their own; of more the first, the last, and some evenly between."""

Rows = Sequence[tuple[str, Sequence[Found | None]]]
"""Labelled rows of pictures."""

PIXELS = 64_000_000
"""Of all its pictures; with more of them each is made smaller, so that neither memory nor the file grows without bounds."""


def write_grid(config: RunConfig, folder: RunFolder, made: Plan, step: int) -> None:
    """Write ``grid.png`` with the pictures drawn after up to ``step`` updates, and ``grid.json``. Raises: FileError."""
    steps, shots = steps_shown(folder, step), shots_of(config)
    rows = rows_of(folder, shots, steps)
    grid_of(shots, rows, made, most=PIXELS).save(folder.grid, {**about_grid(config, folder, shots, rows), "steps": steps})


def grid_of(shots: Sequence[Shot], found: Rows, made: Plan, *, most: int | None = None) -> Grid:
    """Rows of pictures over the real ones that have the same captions; made smaller where all together have more than ``most`` pixels."""
    each = None if most is None else most / max(1, len(found) * len(shots))
    rows = [(label, tuple(cell_of(one, each) for one in cells)) for label, cells in found]
    placements = {p.item.caption: p for p in (*made.train, *made.evaluation)}
    references = tuple(cut(placements[shot.prompt]) if shot.prompt in placements else None for shot in shots)
    if any(references):
        rows.append(("reference", references))
    return Grid(tuple(rows), tuple(title(shot, shots) for shot in shots))


def rows_of(folder: RunFolder, shots: Sequence[Shot], steps: Sequence[int]) -> Rows:
    """What counts of some shots: the base model's, and those drawn after each of ``steps`` updates, each row with its label."""
    base = {found.shot: found for found in drawn(folder, 0) if found.kind == "base"}
    rows = [("base model", tuple(base.get(shot.base) for shot in shots))] if base else []
    for step in steps:
        found = standing(folder, step)
        for kind, label in (("adapter", f"LoRA, step {step}"), ("ema", f"average, step {step}")):
            there = {one.shot.place: one for one in found if one.kind == kind}
            if there:
                rows.append((label, tuple(there.get(shot.place) for shot in shots)))
    return rows


def newest_grid(config: RunConfig, folder: RunFolder, made: Plan, step: int) -> Grid:
    """The newest pictures drawn after up to ``step`` updates under the base model's, over the real ones."""
    shots = shots_of(config)
    return grid_of(shots, rows_of(folder, shots, [at for at in steps_drawn(folder) if at <= step][-1:]), made)


def steps_shown(folder: RunFolder, step: int) -> list[int]:
    """The steps that have a row: those whose pictures are not the base model's alone, at most `MOST`."""
    found = [at for at in steps_drawn(folder) if at <= step]
    return thinned([at for at in found if at or len(found) == 1], MOST)


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most so many, with the first and the last, evenly taken."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def about_grid(config: RunConfig, folder: RunFolder, shots: Sequence[Shot], rows: Rows) -> dict[str, Any]:
    """What stands in a grid: for each row its label and each cell's file with the adapter and the shot that drew it."""
    return {
        "type": "grid", "columns": [title(shot, shots) for shot in shots],
        "rows": [{"label": label, "cells": [_cell(folder, found) for found in cells]} for label, cells in rows],
        "settings": settings_of(config), "model_settings": model_settings(config),
    }  # fmt: skip


def _cell(folder: RunFolder, found: Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "file": found.path.relative_to(folder.path).as_posix(), "kind": found.kind, "adapter": found.adapter, "model": found.model,
        "problem": found.problem, "shot": found.shot.as_dict(),
    }  # fmt: skip
