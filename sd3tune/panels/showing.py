"""What a snapshot looks like: in one line, in curves, in words."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape

from sd3tune import charts
from sd3tune.curves import Curve
from sd3tune.panels.looks import SMALL, sentence
from sd3tune.shown import duration, size_in_words
from sd3tune.snapshot import BAND, Snapshot


def status(now: Snapshot, price: float = 0.0) -> str:
    """The state of a run in one line: step, loss, rate, time and money left, memory."""
    parts = [now.state]
    if now.total_steps:
        parts.append(f"step {now.step}/{now.total_steps}")
    if now.loss.latest is not None:
        parts.append(f"loss {now.loss.latest[1]:.3g}")
    if now.learning_rate is not None:
        parts.append(f"learning rate {now.learning_rate:.3g}")
    if now.live:
        parts += [*filter(None, (time_left(now), cost(now, price)))]
    elif price > 0 and now.seconds:
        parts.append(f"about {spent(now, price):.2f} spent")
    if now.peak_memory_bytes:
        of = f" of {size_in_words(now.total_memory_bytes)}" if now.total_memory_bytes else ""
        parts.append(f"memory {size_in_words(now.peak_memory_bytes)}{of}")
    return " · ".join([*parts, *filter(None, [now.error or now.message])])


def time_left(now: Snapshot) -> str:
    """How long the run still takes: the updates alone, to with everything that falls due between them."""
    least, most = now.seconds_left, now.most_seconds_left
    if not least:
        return ""
    words = [duration(least), duration(max(least, most or 0.0))]
    return f"{words[0]} left" if words[0] == words[1] else f"{words[0]} to {words[1]} left"


def cost(now: Snapshot, price: float) -> str:
    """What the machine has cost since the first update, and what it still costs until the end, at a price per hour."""
    left = max(now.seconds_left or 0.0, now.most_seconds_left or 0.0)
    return f"about {spent(now, price):.2f} spent, {left / 3600 * price:.2f} to pay until then" if price > 0 and left else ""


def spent(now: Snapshot, price: float) -> float:
    """What the machine has cost from the first update of this process to the newest, at a price per hour."""
    return now.seconds / 3600 * price


def bar(now: Snapshot) -> str:
    """How far the run is, as a bar that is also read aloud."""
    if not now.total_steps:
        return ""
    done = 100 * now.step / now.total_steps
    inner = f'<div style="width:{done:.1f}%;height:100%;background:#3b82f6"></div>'
    return (
        f'<div role="progressbar" aria-label="updates done" aria-valuemin="0" aria-valuemax="{now.total_steps}" aria-valuenow="{now.step}" '
        f'style="height:6px;border:1px solid currentColor;border-radius:3px;opacity:0.8;overflow:hidden">{inner}</div>'
    )


def main_curve(now: Snapshot) -> str:
    """The loss with the held-out pictures' and a mark at each change."""
    return charts.line(now.loss, now.evals, total=now.total_steps, marks=[step for step, _ in now.changes])


def other_curves(now: Snapshot) -> str:
    """Learning rate, gradient norm before clipping, and the loss by noise level."""
    if not now.count:
        return ""
    bands = {f"{k * BAND:g} to {(k + 1) * BAND:g}": one for k, one in enumerate(now.bands)}
    shown: dict[str, Curve | Mapping[str, Curve]] = {"learning rate": now.rates, "gradient norm, before clipping": now.grad_norms}
    shown["loss by noise level"] = bands
    drawn = charts.strip(shown, total=now.total_steps, marks=[step for step, _ in now.changes], exact=("learning rate",))
    return drawn + sentence(
        " ".join(filter(None, (ranged("learning rate", now.rates), ranged("gradient norm before clipping", now.grad_norms))))
    )


def ranged(name: str, curve: Curve) -> str:
    """A curve in a sentence: its newest value, and between which two all lie."""
    if curve.latest is None or not curve.stretches:
        return ""
    least, most = min(one.low for one in curve.stretches), max(one.high for one in curve.stretches)
    return f"The {name} is {curve.latest[1]:.3g}" + (f", of {least:.3g} to {most:.3g} so far." if least < most else ".")


def levels(now: Snapshot) -> str:
    """The noise levels that are drawn."""
    if not sum(now.noise_levels):
        return ""
    third = [sum(now.noise_levels[a:b]) / sum(now.noise_levels) for a, b in ((0, 3), (3, 7), (7, 10))]
    said = f"Noise levels drawn: {third[0]:.0%} below 0.3, near the picture; {third[1]:.0%} between; {third[2]:.0%} above 0.7, near noise."
    return charts.levels(now.noise_levels) + sentence(said)


def words(now: Snapshot) -> str:
    """The curves in a sentence or two: where the loss is, where it was, and what the held-out pictures say."""
    if now.loss.latest is None or not now.loss.stretches:
        return ""
    first, last = now.loss.stretches[0], now.loss.stretches[-1]
    said = f"The smoothed loss is {last.smooth:.3g} at step {last.last}; it began at {first.smooth:.3g}."
    bands = [(k, c.smooth) for k, c in enumerate(now.bands) if c.smooth is not None]
    if len(bands) > 1:
        said += " By noise level: " + ", ".join(f"{k * BAND:g} to {(k + 1) * BAND:g} {value:.3g}" for k, value in bands) + "."
    if now.loss.not_finite:
        said += f" {now.loss.not_finite} updates had a loss that is not a number."
    return f"{said} {now.verdict}".strip()


def spoken(now: Snapshot) -> str:
    """The same as HTML."""
    return sentence(words(now))


def changes(now: Snapshot) -> str:
    """What was changed, as lines under the curves; what lies before, or in another process, may have been the guard."""
    who = "changed by you" if now.own and not now.began_at else "changed on the way"
    rows = [f"step {step}: {text}" for step, text in now.changes[-6:]]
    return f'<div style="{SMALL}">{who}: {"; ".join(escape(row) for row in rows)}</div>' if rows else ""


def previews(now: Snapshot) -> str:
    """The pictures that are being drawn, small."""
    drawn = (b64encode(preview).decode() for preview in now.previews[:8])
    return "".join(f'<img style="max-width:24%" alt="a picture that is being drawn" src="data:image/jpeg;base64,{data}">' for data in drawn)


def log(now: Snapshot) -> str:
    """The log, newest line first."""
    style = f"max-height:11em;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0;{SMALL}"
    return f'<pre tabindex="0" aria-label="log" style="{style}">{escape(chr(10).join(reversed(now.log)))}</pre>' if now.log else ""
