"""How far a run is: a bar in a terminal, one line that updates in place in a notebook. Passes every record through."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol

from sd3tune.records import CacheRecord, EvalRecord, PreviewRecord, Record, StepRecord
from sd3tune.shown import duration


class Going(Protocol):
    """A trainer, or a run in another process."""

    @property
    def steps_done(self) -> int:
        """Updates done."""

    @property
    def total(self) -> int:
        """Updates of the whole run."""

    def run(self, n: int | None = None) -> Iterator[Record]:
        """Its records."""


def progress(trainer: Going, n: int | None = None) -> Generator[Record, None, None]:
    """The records of ``trainer.run(n)``, with the progress shown while they pass."""
    return _in_notebook(trainer, n) if _has_front_end() else _in_terminal(trainer, n)


def building(builder: Iterable[CacheRecord]) -> Iterator[CacheRecord]:
    """The records of a cache builder, with a bar that shows rate and time left, in a terminal or below a notebook's cell."""
    from tqdm import tqdm

    bar = None
    try:
        for record in builder:
            what = {"pictures": "reading", "states": record.name}.get(record.kind, "encoding")
            if bar is None or bar.desc.removesuffix(": ") != what:
                if bar is not None:
                    bar.close()
                unit = {"pictures": "picture", "states": "text"}.get(record.kind, "entry")
                bar = tqdm(total=record.total, desc=what, unit=unit, initial=record.step - 1)
            bar.update()
            if record.problem:
                tqdm.write(f"{record.name}: {record.problem}")
            yield record
    finally:
        if bar is not None:
            bar.close()


def _has_front_end() -> bool:
    """Whether an IPython kernel is showing this (imported already, if so)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _in_notebook(trainer: Going, n: int | None) -> Generator[Record, None, None]:
    from IPython.display import Markdown, display

    handle = display(Markdown("starting"), display_id=True)
    shown, line = 0.0, Line(trainer)
    for record in trainer.run(n):
        line.read(record)
        if time.monotonic() - shown > 0.25:
            handle.update(Markdown(line.text()))
            shown = time.monotonic()
        yield record
    handle.update(Markdown(line.text()))


def _in_terminal(trainer: Going, n: int | None) -> Generator[Record, None, None]:
    from tqdm import tqdm

    line = Line(trainer)
    begun, total = (trainer.steps_done, trainer.total) if n is None else (0, min(n, trainer.total - trainer.steps_done))
    with tqdm(total=total, initial=begun, desc="training", unit="update") as bar:
        for record in trainer.run(n):
            line.read(record)
            if isinstance(record, StepRecord):
                bar.update()
            bar.set_postfix_str(line.detail)
            yield record


class Line:
    """The status line: what is going on, in words."""

    def __init__(self, trainer: Going) -> None:
        self._trainer, self._seconds, self.detail, self._verdict = trainer, 0.0, "loading", ""

    def read(self, record: Record) -> None:
        """Take in one record."""
        if isinstance(record, StepRecord):
            self._seconds = 0.9 * self._seconds + 0.1 * record.seconds if self._seconds else record.seconds
            found = (("loss", record.loss), ("regularisation", record.regularisation_loss))
            self.detail = ", ".join(f"{name} {value:.4f}" for name, value in found if value is not None)
        elif isinstance(record, PreviewRecord):
            others = f" and {record.count - 1} more" if record.count > 1 else ""
            self.detail = f'drawing "{record.prompt}"{others} {record.sampler_step}/{record.sampler_steps}'
        elif isinstance(record, EvalRecord):
            self.detail, self._verdict = f"held-out loss {record.loss:.4f}", record.verdict
        else:
            self.detail = record.type

    def text(self) -> str:
        """Such as ``step 41/300 · loss 0.6123 · 25 s left``, over the newest verdict."""
        done, total = self._trainer.steps_done, self._trainer.total
        left = (total - done) * self._seconds
        time_left = "" if done >= total or not left else f" · {duration(left)} left"
        return f"step {done}/{total} · {self.detail}{time_left}" + f"\n\n{self._verdict}" * bool(self._verdict)
