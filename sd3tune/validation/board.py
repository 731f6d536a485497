"""What each training picture was to a run: how often it was seen, how hard it is beside the others, and whether it was learned."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from sd3tune.data.catalog import Item, again
from sd3tune.data.datasets import dataset_of
from sd3tune.data.seen import digests
from sd3tune.errors import CheckpointError, Sd3TuneError
from sd3tune.run_folder import RunFolder
from sd3tune.shown import Shown
from sd3tune.validation.sightings import Learned, learned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFTEN, MUCH = 2.0, 3.0
"""How many times an even share of all updates, and of all loss, dominates. Pictures differ in their losses anyway."""

FEW = 4
"""Times seen below which the sum of a picture's losses says nothing about it."""

HARD = 1.5
"""How many times the loss of the others at the same noise levels is much."""

SHOWN = 100
"""Rows of a table."""

NAMED = 3
"""Pictures of one kind that a sentence names."""


class Board(Shown):
    """A row for each training picture, those that stand out first; a sentence on them, and one on what happened elsewhere."""

    def __init__(self, rows: Sequence[Learned], forgetting: str = "", names: Mapping[str, str] | None = None) -> None:
        self._names, self.forgetting = dict(names or {}), forgetting
        self.rows = tuple(sorted(rows, key=lambda row: (not self.remarks(row, rows), -row.share_of_loss, row.id)))

    def name(self, row: Learned) -> str:
        """The picture's file, or its identity where the file is not known."""
        return self._names.get(row.id, row.id)

    def remarks(self, row: Learned, rows: Sequence[Learned] | None = None) -> list[str]:
        """What stands out about a picture."""
        rows, said = self.rows if rows is None else rows, []
        count = len(rows)
        if row.share * count > OFTEN or (row.seen >= FEW and row.share_of_loss * count > MUCH):
            said.append("dominates")
        if row.beside.mean - row.beside.band * surely(count) > HARD:
            said.append("hard")
        others = [r.change.mean for r in rows if r.change is not None and r is not row]
        if row.change is not None and others:
            lag = row.change.mean - sum(others) / len(others)
            if lag > row.change.band * surely(count):
                said.append("not learned" if not row.change.falls else "learned less")
        return said

    @property
    def sentence(self) -> str:
        """What stands out, in words."""
        if not self.rows:
            return "no training picture was seen yet"
        least, most = min(r.seen for r in self.rows), max(r.seen for r in self.rows)
        said = [f"{len(self.rows)} pictures, seen {least} to {most} times"]
        for word in ("dominates", "not learned", "learned less", "hard"):
            found = [row for row in self.rows if word in self.remarks(row)]
            named = [f"{self.name(row)} ({_evidence(word, row)})" for row in found[:NAMED]]
            if found:
                said.append(f"{word}: {', '.join(named)}" + f" and {len(found) - NAMED} more" * (len(found) > NAMED))
        return "; ".join(said if len(said) > 1 else [*said, "none of them stands out"])

    def __str__(self) -> str:
        lines = [self.sentence, *([self.forgetting] if self.forgetting else []), ""]
        table = [HEAD, *(self._cells(row) for row in self.rows[:SHOWN])]
        widths = [max(len(line[at]) for line in table) for at in range(len(HEAD))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
        if len(self.rows) > SHOWN:
            lines.append(f"and {len(self.rows) - SHOWN} more")
        return "\n".join(lines)

    def _cells(self, row: Learned) -> tuple[str, ...]:
        fixed = "" if row.fixed is None else f"{row.fixed:+.1%}"
        beside = f"{row.beside.mean:.2f}" + f" ± {row.beside.band:.2f}" * (row.seen > 1)
        return (
            self.name(row), str(row.seen), f"{row.share:.1%}", f"{row.share_of_loss:.1%}", beside,
            "" if row.change is None else str(row.change), fixed, ", ".join(self.remarks(row)),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        lines = [self._cells(row) for row in self.rows[:SHOWN]]
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
        picture = f'<img alt="{escape(self.sentence, quote=True)}" src="data:image/png;base64,{base64.b64encode(self.png()).decode()}">'
        more = f"<p>and {len(self.rows) - SHOWN} more</p>" if len(self.rows) > SHOWN else ""
        said = "".join(f"<p>{escape(text)}</p>" for text in (self.sentence, self.forgetting) if text)
        return f"{said}{picture}<table><tr>{head}</tr>{body}</table>{more}"

    def png(self) -> bytes:
        """The chart as a PNG file."""
        held = io.BytesIO()
        self.chart().savefig(held, format="png", dpi=110)
        return held.getvalue()

    def chart(self) -> Figure:
        """Two views of the pictures: their shares of updates and of loss, and their loss early and late. `sentence` says it in words."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.5, 4.4), layout="constrained")
        shares, course = figure.subplots(1, 2)
        count = len(self.rows)
        self._points(shares, [(row, row.share * count, row.share_of_loss * count) for row in self.rows])
        shares.set(xlabel="share of updates / even share", ylabel="share of loss / even share", title="what dominates: upper right")
        self._points(course, [(row, row.early, row.late) for row in self.rows if row.early is not None and row.late is not None])
        course.set(xlabel="first half of the times it was seen", ylabel="second half")
        course.set_title("loss beside the others at the same noise\nbelow the line: learned")
        return figure

    def _points(self, axes: Axes, points: Sequence[tuple[Learned, float, float]]) -> None:
        """Pictures as points, those that stand out coloured and named, and the line where both numbers are one."""
        for colour, chosen in (("#8fa3bf", False), ("#c2410c", True)):
            there = [(x, y) for row, x, y in points if bool(self.remarks(row)) == chosen]
            axes.scatter([x for x, _ in there], [y for _, y in there], s=28, color=colour, alpha=0.8, linewidth=0)
        values = [value for _, x, y in points for value in (x, y)]
        for number, (row, x, y) in enumerate(sorted((p for p in points if self.remarks(p[0])), key=lambda p: p[2])):
            left, height = x > (min(values) + max(values)) / 2, 4 if number % 2 else -9
            at, align = ((-6, height), "right") if left else ((6, height), "left")
            axes.annotate(self.name(row)[-28:], (x, y), xytext=at, ha=align, textcoords="offset points", fontsize=8)
        if values:
            low, high = min(values), max(values)
            axes.plot([low, high], [low, high], color="#94a3b8", linewidth=0.8, linestyle="--", zorder=0)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)


def _evidence(word: str, row: Learned) -> str:
    if word == "dominates":
        return f"{row.share:.0%} of all updates, {row.share_of_loss:.0%} of all loss"
    return f"{row.beside.mean:.2g} times the loss of the others at the same noise" if word == "hard" else str(row.change)


HEAD = ("picture", "seen", "of updates", "of loss", "loss beside others", "late against early", "fixed noise", "stands out")


def surely(count: int) -> float:
    """How much wider bands of 95 % must be for one of them to be right about ``count`` pictures at once (Bonferroni)."""
    normal = NormalDist()
    return normal.inv_cdf(1 - 0.025 / max(count, 1)) / normal.inv_cdf(0.975)


def board_of(history: Sequence[Mapping[str, Any]], *, stays: Collection[str] = (), names: Mapping[str, str] | None = None) -> Board:
    """The board of a history's lines. ``stays`` are pictures of regularisation, which are not learned; ``names`` the files' names."""
    evals = [row for row in history if row["type"] == "eval"]
    return Board(learned([row for row in history if row["type"] == "step"], evals, stays), forgetting_of(evals), names)


def forgetting_of(evals: Sequence[Mapping[str, Any]]) -> str:
    """What happened to pictures outside the training set, in a sentence; empty when that was not measured."""
    rows = [row for row in evals if row.get("drifts_by_image")]
    if not rows:
        return ""
    first, last = (math.fsum(row["drifts_by_image"]) / len(row["drifts_by_image"]) for row in (rows[0], rows[-1]))
    said = "" if rows[-1].get("relative") is None else f", where the loss is {rows[-1]['relative']:.1%} of the base's"
    return (
        f"forgetting: on {len(rows[-1]['drifts_by_image'])} pictures outside the training set the predictions are {last:.2%} of the base's "
        f"error away from the base's at step {rows[-1]['step']}, {first:.2%} at step {rows[0]['step']}{said}"
    )


def board(run: str | Path) -> Board:
    """The board of a run folder; pictures have their names where their folders are still there. Raises: CheckpointError."""
    folder = RunFolder(Path(run).absolute())
    if not folder.history.exists():
        raise CheckpointError(f"{folder.path}: not a run folder (there is no history.jsonl)")
    items = _items(folder)
    stays = {item.id for item in items if item.dataset.is_regularisation_data}
    return board_of(folder.read_history(), stays=stays, names={item.id: item.path.name for item in items})


def _items(folder: RunFolder) -> tuple[Item, ...]:
    """The pictures of the run's own folders, as far as they are there; nothing is fetched."""
    try:
        manifest = json.loads(folder.manifest.read_text())
        datasets = [dataset_of(row) for row in manifest["datasets"]]
        items = again([d for d in datasets if d.type == "local" and "://" not in d.instance_data_dir], manifest.get("source", "")).items
    except (OSError, ValueError, KeyError, TypeError, Sd3TuneError):
        return ()
    known = {path: pixels for path, pixels, _ in digests([item.path for item in items if not item.pixels])}
    return tuple(replace(item, pixels=item.pixels or known[item.path]) for item in items)
