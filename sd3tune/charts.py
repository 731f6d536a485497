"""Charts as SVG text: they follow the theme, scale with the page, and can be read aloud."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sd3tune.curves import Curve, curve_of
from sd3tune.files import digest, write_with
from sd3tune.history import smooth
from sd3tune.run_folder import RunFolder

Point = tuple[int, float]

WIDTH = 6.6
"""Inches; a page shows it as wide as it has room."""

ACCENT, HELD = "#3b82f6", "#d9730d"
BANDS = ("#0d9488", "#3b82f6", "#a855f7", "#db2777")
"""Of the noise levels, from picture to noise; each line also has its name beside it."""


def line(
    curve: Curve, evals: Sequence[Point] = (), *, total: int = 0, marks: Sequence[int] = (), name: str = "loss"
) -> str:  # fmt: skip
    """A number over the updates: every value faint, smoothed bold, held-out dots, dashed lines where settings changed."""
    held = [(x, y) for x, y in evals if math.isfinite(y)]
    figure, (axes,) = _figure(2.5, 1)
    _draw(axes, curve, name, total, marks)
    if held:
        axes.plot(*zip(*held, strict=True), "o", color=HELD, markersize=5, label="held-out pictures")
    if not curve.stretches and not held:
        axes.text(0.5, 0.5, f"no {name} yet", transform=axes.transAxes, ha="center")
    else:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    return svg(figure, spoken(curve, held, name))


def strip(
    curves: Mapping[str, Curve | Mapping[str, Curve]], *, total: int = 0, marks: Sequence[int] = (), exact: Sequence[str] = ()
) -> str:  # fmt: skip
    """Several numbers over the updates beside each other, smoothed but for the ``exact`` ones; a mapping is several lines of one chart."""
    figure, places = _figure(1.5, len(curves))
    for axes, (name, found) in zip(places, curves.items(), strict=True):
        if isinstance(found, Curve):
            _draw(axes, found, name, total, marks, faint=False, exact=name in exact)
            continue
        for (label, one), colour in zip(found.items(), BANDS, strict=False):
            if one.stretches:
                axes.plot([s.last for s in one.stretches], [s.smooth for s in one.stretches], color=colour, linewidth=1.3, label=label)
        _dress(axes, name, total, marks)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=6, ncols=2, handlelength=1)
    says = "; ".join(
        spoken(found, name=name) if isinstance(found, Curve) else ", ".join(spoken(c, name=f"{name} {k}") for k, c in found.items())
        for name, found in curves.items()
    )
    return svg(figure, says)


def held_out(evals: Sequence[Point], name: str = "loss on held-out pictures") -> str:
    """The loss on held-out pictures alone (or another number that is measured now and then), on its own scale."""
    shown = [(x, y) for x, y in evals if math.isfinite(y)]
    figure, (axes,) = _figure(2.2, 1)
    axes.plot([x for x, _ in shown], [y for _, y in shown], "o-", color=HELD, markersize=4, linewidth=1.5)
    _dress(axes, name, 0, ())
    return svg(figure, spoken(curve_of(shown), name=name))


def levels(counts: Sequence[int]) -> str:
    """How often each tenth of the noise levels, from picture to noise, is drawn: ten bars with their shares in per cent."""
    shares = [100 * count / max(sum(counts), 1) for count in counts]
    figure, (axes,) = _figure(1.3, 1)
    bars = axes.bar(range(len(shares)), shares, color=ACCENT)
    axes.margins(y=0.25)
    axes.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=8)
    axes.set_xticks([0, len(shares) - 1], ["picture", "noise"])
    axes.set_yticks([])
    axes.set_title("noise levels drawn, %", fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    says = ", ".join(f"{share:.0f}" for share in shares)
    return svg(figure, f"noise levels drawn, per cent in each tenth from picture to noise: {says}")


def _figure(height: float, count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    edges = {"left": 0.6 / WIDTH, "right": 1 - 0.2 / WIDTH, "top": 1 - 0.3 / height, "bottom": 0.25 / height}
    return figure, list(figure.subplots(1, count, squeeze=False, gridspec_kw={**edges, "wspace": 0.35})[0])


def _draw(axes: Any, curve: Curve, name: str, total: int, marks: Sequence[int], *, faint: bool = True, exact: bool = False) -> None:
    steps = [s.last for s in curve.stretches]
    if faint and steps:
        low, high = [s.low for s in curve.stretches], [s.high for s in curve.stretches]
        if low == high:
            axes.plot(steps, low, color="#000000", alpha=0.35, linewidth=0.8, label="each update")
        else:
            axes.fill_between(steps, low, high, color="#000000", alpha=0.25, linewidth=0, label="lowest to highest")
    if steps:
        axes.plot(steps, [s.high if exact else s.smooth for s in curve.stretches], color=ACCENT, linewidth=1.8, label="smoothed")
    _dress(axes, name, total, marks, told=faint)


def _dress(axes: Any, name: str, total: int, marks: Sequence[int], *, told: bool = False) -> None:
    for place, step in enumerate(sorted(set(marks))):
        label = "you changed a setting" if told and not place else ""
        axes.axvline(step, color="#000000", alpha=0.6, linewidth=0.9, dashes=(3, 3), label=label)
    if total and axes.lines:
        axes.set_xlim(0, min(total, 1.25 * max(axes.dataLim.x1, 1)))  # a long run begins at the left edge otherwise
    axes.set_title(name, fontsize=9, loc="right")
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.yaxis.get_major_locator().set_params(nbins=4)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.15, color="#000000")
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: Any, says: str) -> str:
    """A figure as SVG text that has the page's width and its colour of text. Names inside it are its own on any page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    head = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', text)
    assert head is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text[head.end() :], flags=re.DOTALL)  # a style would be the page's
    body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
    body = re.sub(r">\s+<", "><", body).strip()
    numbers = {name: f"n{k}" for k, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', body)))}  # theirs are drawn at random
    plain = re.sub(r'(\bid="|"#|url\(#)([^")]+)', lambda found: found[1] + numbers[found[2]], body)
    own = f"c{digest(plain)[:8]}-"
    body = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{own}", plain)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{head.group(1)}" role="img" '
        f'aria-label="{escape(says)}" fill="currentColor" stroke-linejoin="round" style="width:100%;height:auto;display:block">{body}'
    )


def spoken(curve: Curve, held: Sequence[Point] = (), name: str = "loss") -> str:
    """The chart in one sentence, newest number first."""
    if curve.latest is None:
        return f"no {name} yet"
    step, value = curve.latest
    number = f"{value:.3g}" if math.isfinite(value) else "not a number"
    more = f"; {held[-1][1]:.3g} on held-out pictures" if held else ""
    return f"{name} {number} at step {step}{more}"


def save_losses(folder: RunFolder) -> None:
    """Draw the loss of every update, smoothed, with the evaluation losses, into a run folder. Raises: FileError."""
    from matplotlib.figure import Figure

    history = folder.read_history()
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
    write_with(folder.loss_chart, lambda draft: figure.savefig(draft, format="png", dpi=130))
