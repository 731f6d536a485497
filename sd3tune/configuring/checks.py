"""Questions about settings and keys, with the check and the choices of their declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sd3tune.config.explaining import explain
from sd3tune.config.reading import values_refused
from sd3tune.configuring import outcome
from sd3tune.configuring.questions import Choice, Question
from sd3tune.errors import Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.configuring.wizard import Wizard


def declared(leaf: str) -> Callable[[Any], str]:
    """Refuses what a setting's declaration refuses, and says what it may be."""

    def check(value: Any) -> str:
        wrong = values_refused({leaf: value}).get(leaf, "")
        return f"{wrong} ({explain(leaf).values})" if wrong else ""

    return check


def in_entry(wizard: Wizard, name: str) -> Callable[[Any], str]:
    """Refuses what datasets.yaml refuses."""

    def check(value: Any) -> str:
        try:
            outcome.dataset_from({**wizard.answers, name: value}, wizard.pictures)
        except Sd3TuneError as error:
            return "; ".join(getattr(error, "problems", (str(error),)))
        return ""

    return check


def setting(wizard: Wizard, leaf: str, asks: str, why: str, kind: Any = "number", *, default: Any = None, **more: Any) -> Question:
    """A question about a setting, whose default is what holds so far."""
    now = wizard.config.leaves()[leaf] if default is None else default
    return Question(leaf, asks, why, kind, now, check=declared(leaf), **more)


def choices(leaf: str, meanings: dict[str, str]) -> tuple[Choice, ...]:
    """The choices of a setting's declaration, each with its meaning."""
    return tuple(Choice(value, meanings.get(value, "")) for value in explain(leaf).choices)
