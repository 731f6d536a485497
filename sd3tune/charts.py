"""Charts as SVG text: they follow the theme, scale with the page, and can be read aloud."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sd3tune.files import write_with
from sd3tune.history import smooth
from sd3tune.run_folder import RunFolder

Point = tuple[int, float]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 58, 14, 26, 34
MOST = 300
"""Most points of one curve; of more, each bucket keeps its lowest and highest."""


def line(losses: Sequence[Point], evals: Sequence[Point] = (), *, total: int = 0, marks: Sequence[int] = (), name: str = "loss") -> str:
    """The loss over the updates: every value faint, smoothed bold, held-out dots, dashed lines where settings changed."""
    shown = [(x, y) for x, y in losses if math.isfinite(y)]
    held = [(x, y) for x, y in evals if math.isfinite(y)]
    frame = _frame(spoken(losses, held, name))
    if not shown and not held:
        body = f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" {_TEXT} text-anchor="middle">no {escape(name)} yet</text>'
        return f"{frame}{body}</svg>"
    scale = _Scale([*shown, *held], total)
    parts = [scale.axes(name)]
    parts += [f'<path d="M{scale.x(x)} {TOP}V{HEIGHT - BOTTOM}" stroke-dasharray="3 4" opacity="0.6"/>' for x in marks]
    parts.append(f'<path d="{scale.path(envelope(shown))}" opacity="0.3"/>')
    smoothed = zip([x for x, _ in shown], smooth([y for _, y in shown]), strict=True)
    parts.append(f'<path d="{scale.path(thinned(list(smoothed)))}" stroke="{_ACCENT}" stroke-width="2.2"/>')
    parts += [f'<circle cx="{scale.x(x)}" cy="{scale.y(y)}" r="4" stroke="{_HELD}" stroke-width="2"/>' for x, y in held]
    parts.append(_legend(bool(held), bool(marks)))
    return f"{frame}{''.join(parts)}</svg>"


def held_out(evals: Sequence[Point], name: str = "loss on held-out pictures") -> str:
    """The loss on held-out pictures alone (or another number that is measured now and then), on its own scale."""
    shown = [(x, y) for x, y in evals if math.isfinite(y)]
    scale = _Scale(shown or [(0, 0.0)], 0)
    dots = "".join(f'<circle cx="{scale.x(x)}" cy="{scale.y(y)}" r="4" fill="{_HELD}" stroke="none"/>' for x, y in shown)
    body = f'{scale.axes(name)}<path d="{scale.path(thinned(shown))}" stroke="{_HELD}" stroke-width="2"/>{dots}'
    return f"{_frame(spoken(shown, name=name))}{body}</svg>"


def levels(counts: Sequence[int]) -> str:
    """How often each tenth of the noise levels, from picture to noise, is drawn: ten bars with their shares in per cent."""
    shares = [100 * count / max(sum(counts), 1) for count in counts]
    says = "noise levels drawn, per cent in each tenth from picture to noise: " + ", ".join(f"{share:.0f}" for share in shares)
    width, parts = (WIDTH - LEFT - RIGHT) / max(len(shares), 1), [f'<text x="4" y="15" {_TEXT}>noise levels drawn, %</text>']
    for place, share in enumerate(shares):
        x, tall = LEFT + place * width, 44 * share / max([*shares, 1])
        parts.append(
            f'<rect x="{x + 3:.1f}" y="{84 - tall:.1f}" width="{width - 6:.1f}" height="{tall:.1f}" fill="{_ACCENT}" stroke="none"/>'
        )
        parts.append(f'<text x="{x + width / 2:.1f}" y="{80 - tall:.1f}" {_TEXT} text-anchor="middle">{share:.0f}</text>')
    ends = ((LEFT, "start", "picture"), (WIDTH - RIGHT, "end", "noise"))
    parts += [f'<text x="{x}" y="100" {_TEXT} text-anchor="{anchor}" opacity="0.7">{word}</text>' for x, anchor, word in ends]
    return f"{_frame(says, 106)}{''.join(parts)}</svg>"


def _frame(says: str, height: int = HEIGHT) -> str:
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(says)}" '
    return frame + 'style="width:100%;height:auto;display:block" fill="none" stroke="currentColor" font-family="sans-serif" font-size="13">'


def spoken(losses: Sequence[Point], held: Sequence[Point] = (), name: str = "loss") -> str:
    """The chart in one sentence, newest number first."""
    if not losses:
        return f"no {name} yet"
    step, value = losses[-1]
    number = f"{value:.3g}" if math.isfinite(value) else "not a number"
    more = f"; {held[-1][1]:.3g} on held-out pictures" if held else ""
    return f"{name} {number} at step {step}{more}"


def envelope(points: Sequence[Point]) -> list[Point]:
    """At most `MOST` points that keep every peak: lowest and highest of each bucket, in order."""
    if len(points) <= MOST:
        return list(points)
    size = math.ceil(len(points) / (MOST // 2))
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [p for bucket in buckets for p in sorted({min(bucket, key=lambda q: q[1]), max(bucket, key=lambda q: q[1])})]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST` points, evenly taken, with the newest."""
    size = math.ceil(len(points) / (MOST - 1)) if len(points) > MOST else 1
    return [*points[:-1:size], *points[-1:]]


_TEXT = 'stroke="none" fill="currentColor"'
_ACCENT = "#3b82f6"
_HELD = "#d9730d"


class _Scale:
    """From steps and losses to the picture."""

    def __init__(self, points: Sequence[Point], total: int) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.last = max([total, 1, *xs])
        low, high = min(ys), max(ys)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room

    def x(self, step: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * step / self.last:.1f}"

    def y(self, value: float) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low):.1f}"

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points) if points else "M0 0"

    def axes(self, name: str) -> str:
        parts = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" opacity="0.7"/>']
        for i in range(4):
            value = self.low + (self.high - self.low) * (i + 0.5) / 4
            parts.append(f'<path d="M{LEFT} {self.y(value)}H{WIDTH - RIGHT}" opacity="0.12"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{float(self.y(value)) + 4:.1f}" {_TEXT} text-anchor="end">{value:.3g}</text>')
        for step in sorted({0, self.last // 2, self.last}):
            anchor = "end" if step == self.last else "middle"
            parts.append(f'<text x="{self.x(step)}" y="{HEIGHT - 16}" {_TEXT} text-anchor="{anchor}">{step}</text>')
        parts.append(f'<text x="{WIDTH / 2 + 90}" y="{HEIGHT - 3}" {_TEXT} text-anchor="middle" opacity="0.7">update</text>')
        parts.append(f'<text x="4" y="15" {_TEXT}>{escape(name)}</text>')
        return "".join(parts)


def _legend(held: bool, marks: bool) -> str:
    rows = [("M0 0h18", f'stroke="{_ACCENT}" stroke-width="2.2"', "smoothed"), ("M0 0h18", 'opacity="0.4"', "each update")]
    if held:
        rows.append(("M5 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", f'stroke="{_HELD}" stroke-width="2"', "held-out pictures"))
    if marks:
        rows.append(("M9 -7v14", 'stroke-dasharray="3 4"', "you changed a setting"))
    parts, x = [], LEFT + 12
    for path, look, label in rows:
        parts.append(f'<g transform="translate({x} 11)"><path d="{path}" {look}/><text x="24" y="4" {_TEXT}>{label}</text></g>')
        x += 40 + 7 * len(label)
    return "".join(parts)


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
