"""The loss of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3tune.files import write_with
from sd3tune.history import smooth


def draw_losses(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss of every update, smoothed, with the evaluation losses, from the lines of a history. Raises: FileError."""
    from matplotlib.figure import Figure

    steps = [r for r in history if r["type"] == "step" and r["loss"] is not None]
    evals = [r for r in history if r["type"] == "eval"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    x, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    axes.plot(x, losses, color="#b8c4d6", linewidth=0.8, label="each update")
    axes.plot(x, smooth(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
    axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o--", color="#c2410c", label="held-out pictures")
    axes.set(xlabel="update", ylabel="loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_with(path, lambda draft: figure.savefig(draft, format="png", dpi=130))
