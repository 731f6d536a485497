"""The pictures of a run: a step to scrub to, the base model beside the adapter, one picture at full size."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from sd3tune.panels.clicking import Clickable, Part, part_of
from sd3tune.panels.looks import offer, put, row, sentence, tip, visible
from sd3tune.records import READING, ScoreRecord
from sd3tune.run_folder import RunFolder
from sd3tune.validation.grids import Grid
from sd3tune.validation.history_grid import Rows, rows_of
from sd3tune.validation.pictures import Found, cell_of, drawn, title
from sd3tune.validation.standing import counting, standing, steps_drawn

SIDE, KEPT = 320, 24
"""Pixels of a picture in the grid, and grids that are kept to scrub through."""

ALL = "all, small"
BACK = Part("all pictures again", (-1, -1, 0))


class PicturesView:
    """Shows what a run stands on. Arrow keys go through the steps; a click shows one at full size, the wipe lays it over the base's."""

    def __init__(self) -> None:
        self._folder: RunFolder | None = None
        self._made: dict[object, tuple[bytes, list[Part]]] = {}
        """Grids and wipes with what can be clicked, by the files they were made of."""
        self._wiped = (-1, 0)
        """What a click made of the wipe, and what it was before."""
        self._busy = threading.RLock()
        self._chosen_here = False
        narrow = {"width": "min(300px, 98%)"}
        self.steps: list[int] = []
        self.number: Any = tip(
            widgets.BoundedIntText(value=1, min=1, max=1, description="Drawing no.", continuous_update=True, layout=narrow),
            "which of the drawings, from the first step to the newest; arrow keys go through them",
        )
        self.which: Any = widgets.Dropdown(options=[(ALL, -1)], description="Picture", layout=narrow)
        self.wipe: Any = tip(
            widgets.BoundedIntText(value=50, min=0, max=100, step=10, description="Wipe, %", continuous_update=True, layout=narrow),
            "how much of the picture is the adapter's, from the left; the rest is the base model's; arrow keys move the edge",
        )
        self.said = widgets.HTML()
        self.shown = Clickable(self._clicked)
        self.image: Any = self.shown.image
        self.widget: Any = widgets.VBox(
            [row(self.number, self.which, self.wipe), self.said, self.shown.widget], layout=widgets.Layout(width="100%", display="none")
        )
        for one in (self.number, self.which, self.wipe):
            one.observe(lambda _: self.show(), "value")

    @property
    def step(self) -> int:
        """Whose pictures are shown; -1 while there are none."""
        return self.steps[min(self.number.value, len(self.steps)) - 1] if self.steps else -1

    def go(self, step: int) -> None:
        """Show another step's pictures."""
        self.number.value = self.steps.index(step) + 1

    def look(self, folder: Path | str) -> None:
        """Take in what was drawn since, and what counts no longer; go to the newest step unless a person looks at another."""
        with self._busy:
            self._folder = RunFolder(Path(folder))
            steps, before = steps_drawn(self._folder), self.step
            newest = not self.steps or self.number.value == len(self.steps)
            visible(self.widget, bool(steps))
            self.steps = steps
            if not steps:
                return
            number = len(steps) if newest else max(1, sum(step <= before for step in steps))
            with self._choosing():
                self.number.max = len(steps)
                put(self.number, number)
            self.show()

    def show(self) -> None:
        """Bring picture and sentence up to date."""
        with self._busy:
            if self._folder is not None and self.step >= 0 and not self._chosen_here:
                self._show(self._folder)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """Fields that are set in the block show nothing by themselves."""
        self._chosen_here = True
        try:
            yield
        finally:
            self._chosen_here = False

    def _show(self, folder: RunFolder) -> None:
        found = standing(folder, self.step)
        pictures = looked_at(found)
        large = [*pictures, *(one for one in found if one.kind == "ema" and one not in pictures)]
        self._name(large)
        if not self.alone:
            self._put_back()
        visible(self.wipe, self.alone)
        put(self.said, sentence(in_words(folder, self.step, pictures)))
        files = (*_files(folder, self.step), *_files(folder, 0), *(one.path for one in large))
        key = (self.step, self.which.value if self.alone else -1, self.wipe.value if self.alone else 0, files)
        if key not in self._made:
            while len(self._made) >= KEPT:
                del self._made[next(iter(self._made))]
            if self.alone:
                self._made[key] = self._one(large[self.which.value]), [BACK]
            else:
                self._made[key] = _all(*grid_rows(folder, self.step, pictures), large, self.step)
        self.shown.show(*self._made[key])

    @property
    def alone(self) -> bool:
        """Whether one picture is shown at full size."""
        return self.which.value is not None and self.which.value >= 0

    def _clicked(self, what: tuple[int, int, int]) -> None:
        """One picture of the grid at full size, the base's or the adapter's alone; or all of them again."""
        step, which, share = what
        with self._busy:
            if step not in (self.step, -1) or which >= len(self.which.options) - 1:
                return  # something else has come since
            with self._choosing():
                if which >= 0:
                    self._wiped = (share, self.wipe.value)
                    put(self.wipe, share)
                put(self.which, which)
            self.show()

    def _put_back(self) -> None:
        """The wipe as it was before a click set it, unless a person has moved it since."""
        share, before = self._wiped
        self._wiped = (-1, 0)
        if self.wipe.value == share:
            with self._choosing():
                put(self.wipe, before)

    def _name(self, pictures: list[Found]) -> None:
        """Offer the pictures of a step by name; the one that is looked at stays, by its name or else by its place."""
        shots = [one.shot for one in pictures if one.kind == pictures[0].kind]
        several = len(shots) < len(pictures)
        called = [title(one.shot, shots) + (", average" if several and one.kind == "ema" else "") for one in pictures]
        names = [(ALL, -1), *((name, k) for k, name in enumerate(called))]
        chosen = next((k for name, k in names if name == self.which.label), self.which.value)
        with self._choosing():
            offer(self.which, names, chosen=chosen)

    def _one(self, found: Found) -> bytes:
        """One picture at full size, its right part the base model's."""
        assert self._folder is not None
        base = next((one for one in drawn(self._folder, 0) if one.kind == "base" and one.shot == found.shot.base), None)
        ours, theirs = cell_of(found), cell_of(base)
        if isinstance(theirs, Image.Image) and not self.wipe.value:
            return jpeg(theirs)
        if not isinstance(ours, Image.Image):
            return jpeg(Grid((("", (ours,)),), ("",)).image())
        if isinstance(theirs, Image.Image) and theirs.size == ours.size:
            edge = ours.width * self.wipe.value // 100
            ours.paste(theirs.crop((edge, 0, ours.width, ours.height)), (edge, 0))
        return jpeg(ours)


def _all(rows: Rows, columns: tuple[str, ...], large: list[Found], step: int) -> tuple[bytes, list[Part]]:
    """The grid; behind each of its pictures, its place among the large ones and how much of that is not the base model's."""
    grid, parts = _grid(rows, columns, SIDE), []
    there = [(r, c, one) for r, (_, found) in enumerate(rows) for c, one in enumerate(found) if one is not None and not one.problem]
    for r, c, found in there:
        place = next((k for k, one in enumerate(large) if _shows(one, found)), None)
        if place is not None:
            what = (step, place, 0 if found.kind == "base" else 100)
            parts.append(part_of(grid, r, c, f"{columns[c]}, {rows[r][0]}: full size", what))
    return jpeg(grid.image()), parts


def shown_at(folder: RunFolder, step: int) -> list[Found]:
    """The pictures that a step is looked at by: the adapter's, or the base model's where there are no others."""
    return looked_at(standing(folder, step))


def looked_at(found: list[Found]) -> list[Found]:
    """The adapter's of some pictures, or all where it has none."""
    return [one for one in found if one.kind == "adapter"] or found


def _files(folder: RunFolder, step: int) -> list[tuple[str, int]]:
    """What lies in a step's folder, and since when: beside each picture, a description that is written last."""
    return sorted((one.name, one.stat().st_mtime_ns) for one in folder.images(step).glob("*.json"))


def grid_rows(folder: RunFolder, step: int, pictures: list[Found]) -> tuple[Rows, tuple[str, ...]]:
    """The base model's pictures over a step's, in labelled rows, and the columns' titles."""
    shots = [one.shot for one in pictures]
    return rows_of(folder, shots, [step]), tuple(title(shot, shots) for shot in shots)


def grid_at(folder: RunFolder, step: int, side: int = SIDE) -> Grid:
    """The base model's pictures over a step's, each at most ``side`` px."""
    return _grid(*grid_rows(folder, step, shown_at(folder, step)), side)


def _shows(large: Found, found: Found) -> bool:
    """Whether a picture of the grid is a large one, or the base model's that is part of it."""
    return found == large or (found.kind == "base" and found.shot == large.shot.base)


def _grid(rows: Rows, columns: tuple[str, ...], side: int) -> Grid:
    return Grid(tuple((label, tuple(small(one, side) for one in found)) for label, found in rows), columns)


def small(found: Found | None, side: int) -> Image.Image | str | None:
    """A picture of a grid, at most ``side`` px, or why there is none."""
    cell = cell_of(found)
    if isinstance(cell, Image.Image):
        cell.thumbnail((side, side))
    return cell


def in_words(folder: RunFolder, step: int, pictures: list[Found]) -> str:
    """What is seen, for those who do not see it: how many, of what, what failed, and the scores."""
    failed = [one for one in pictures if one.problem]
    whose = "the LoRA" if any(one.kind == "adapter" for one in pictures) else "the base model alone"
    prompts = ", ".join(one.shot.prompt or "no prompt" for one in pictures[:8])
    said = f"Step {step}: {len(pictures) - len(failed)} pictures of {whose}: {prompts}."
    said += "".join(f" {one.shot.prompt!r} could not be drawn: {one.problem}." for one in failed[:3])
    scores = [row for row in counting(folder) if row["type"] == ScoreRecord.type and row["step"] == step]
    said += "".join(f" CLIP score ({row['kind']}) {row['mean']:.3f}." for row in scores)
    return f"{said} {READING}" if scores else said


def jpeg(picture: Image.Image, quality: int = 85) -> bytes:
    """A picture as a JPEG file's bytes."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def alt(folder: RunFolder, step: int) -> str:
    """What stands in a picture's place for those who do not see it."""
    return escape(in_words(folder, step, shown_at(folder, step)), quote=True)
