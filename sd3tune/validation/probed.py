"""What a learning-rate probe found: a table, a chart, and a recommendation with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sd3tune.records import ProbeRecord
from sd3tune.shown import Shown
from sd3tune.validation.rates import Advice, Losses, Trial, advise, fall

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 58, 14, 26, 34


@dataclass(frozen=True, repr=False)
class Probed(Shown):
    """The result: ``rate`` is recommended, or nothing; ``low`` to ``high`` is its range; ``reason`` says why."""

    configured: float
    base: Losses
    trials: tuple[Trial, ...]
    advice: Advice
    judges: str

    @property
    def rate(self) -> float | None:
        """The recommended rate."""
        return self.advice.rate

    @property
    def low(self) -> float:
        """The lower end of its range."""
        return self.advice.low

    @property
    def high(self) -> float:
        """The upper end of its range."""
        return self.advice.high

    @property
    def reason(self) -> str:
        """Why, in words."""
        return self.advice.reason

    @property
    def sentence(self) -> str:
        """The recommendation in one line."""
        if self.rate is None:
            return f"no learning_rate to recommend: {self.reason}"
        where = "inside" if self.low <= self.configured <= self.high else "below" if self.configured < self.low else "above"
        return (
            f"learning_rate {self.rate:.1e}, anything from {self.low:.1e} to {self.high:.1e}: {self.reason}; "
            f"the configured {self.configured:.1e} is {where} that range"
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """After how many updates each rate was judged."""
        return tuple(sorted({n for trial in self.trials for n in trial.losses}))

    def __str__(self) -> str:
        head = ["rate", *(f"after {n}" for n in self.numbers)]
        rows = [[f"{trial.rate:.1e}", *self._cells(trial)] for trial in self.trials]
        table = "\n".join("".join(cell.ljust(9) if i == 0 else cell.ljust(30) for i, cell in enumerate(r)).rstrip() for r in [head, *rows])
        return f"{self.sentence}\n\nchange of the loss on {self.judges}, with 95 % bands over them\n{table}"

    def _cells(self, trial: Trial) -> list[str]:
        cells = [str(fall(self.base, trial.losses[n])) for n in self.numbers if n in trial.losses]
        return [*cells, *([f"ran away: {trial.refused}"] if trial.refused else [])]

    def _repr_html_(self) -> str:
        return f"{chart(self)}<pre>{escape(str(self))}</pre>"


def probed(records: Sequence[ProbeRecord], *, configured: float, length: float, judges: str) -> Probed:
    """The result of a probe's records. ``length`` is the run's, in updates at a constant rate."""
    base = records[0].losses_by_image
    trials = []
    for rate in sorted({r.learning_rate for r in records if r.updates}):
        own = [r for r in records if r.updates and r.learning_rate == rate]
        losses = {r.updates: r.losses_by_image for r in own if not r.refused}
        trials.append(Trial(rate, losses, "".join(r.refused for r in own)))
    return Probed(configured, base, tuple(trials), advise(base, trials, length), judges)


def chart(found: Probed) -> str:
    """The share of the loss that each rate has taken away, one line for each number of updates; the range shaded. SVG."""
    logs = [math.log10(trial.rate) for trial in found.trials]
    shares = {n: [(math.log10(t.rate), fall(found.base, t.losses[n])) for t in found.trials if n in t.losses] for n in found.numbers}
    most = max([-c.mean + c.band for rows in shares.values() for _, c in rows if math.isfinite(c.band)], default=0.0)
    most, least = max(most, 1e-4), min(logs)
    across, down = (WIDTH - LEFT - RIGHT) / (max(logs) - least or 1), (HEIGHT - TOP - BOTTOM) / (1.25 * most)

    def x(log: float) -> str:
        return f"{LEFT + across * (min(max(log, least), max(logs)) - least):.1f}"

    def y(share: float) -> str:
        return f"{TOP + down * (most - min(max(share, -0.25 * most), most)):.1f}"

    text = 'stroke="none" fill="currentColor"'
    parts = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}" opacity="0.7"/><path d="M{LEFT} {y(0)}H{WIDTH - RIGHT}" opacity="0.7"/>']
    if found.rate is not None:
        begin, end = float(x(math.log10(found.low))), float(x(math.log10(found.high)))
        shape = f'x="{begin}" y="{TOP}" width="{end - begin:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect {shape} stroke="none" fill="#3b82f6" opacity="0.15"/>')
        parts.append(f'<path d="M{x(math.log10(found.rate))} {TOP}V{HEIGHT - BOTTOM}" stroke="#3b82f6" stroke-width="2"/>')
    for number, (n, rows) in enumerate(shares.items(), 1):
        points = [(x(log), c) for log, c in rows]
        look = f'opacity="{number / len(shares):.2f}"'
        parts.append(f'<path d="M{"L".join(f"{at} {y(-c.mean)}" for at, c in points)}" stroke-width="2" {look}/>')
        parts += [f'<path d="M{at} {y(-c.mean - c.band)}V{y(-c.mean + c.band)}" {look}/>' for at, c in points if math.isfinite(c.band)]
        at, last = points[-1]
        parts.append(f'<text x="{at}" y="{float(y(-last.mean)) - 5:.1f}" {text} text-anchor="end" {look}>{n} updates</text>')
    parts += [f'<text x="{x(log)}" y="{HEIGHT - 16}" {text} text-anchor="middle">{10**log:.0e}</text>' for log in logs]
    parts.append(f'<text x="4" y="15" {text}>loss taken away, at most {most:.1%}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 3}" {text} text-anchor="middle" opacity="0.7">learning rate</text>')
    look = 'style="width:100%;max-width:760px;height:auto;display:block" fill="none" stroke="currentColor" font-family="sans-serif"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(found.sentence)}"'
    return f'{frame} {look} font-size="13">{"".join(parts)}</svg>'
