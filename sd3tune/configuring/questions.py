"""What is asked, as frozen data; and an answer, typed or given, as the value that it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sd3tune.errors import ConfigError

Kind = Literal["choice", "number", "text", "texts", "yes/no", "folder"]
"""``texts`` is a list; typed on one line, ``|`` stands between two."""

YES, NO = ("y", "yes", "true"), ("n", "no", "false")
BETWEEN = "|"


@dataclass(frozen=True)
class Choice:
    """One of the answers to choose from, and what it means."""

    value: str
    meaning: str = ""


def anything(value: Any) -> str:
    """Refuses nothing."""
    return ""


@dataclass(frozen=True)
class Question:
    """One question. Nothing in it depends on who asks."""

    name: str
    """The setting or key that it is about, or a name of the wizard's own."""
    asks: str
    why: str
    """Why it is asked, in one sentence."""
    kind: Kind
    default: Any = None
    """What no answer means; ``None`` when there has to be one."""
    choices: tuple[Choice, ...] = ()
    check: Callable[[Any], str] = field(default=anything, repr=False, compare=False)
    """From a value of the right kind to what is wrong with it; empty when nothing is."""

    def read(self, given: Any = None) -> Any:
        """The value of an answer; no answer is the default. Raises: ConfigError that says what is wrong."""
        empty = given is None or (isinstance(given, str) and not given.strip())
        if empty and self.default is None:
            raise ConfigError([f"{self.name}: this needs an answer"], "configure")
        value = self.default if empty else READERS[self.kind](self, given)
        if wrong := self.check(value):
            raise ConfigError([wrong], "configure")
        return value

    def refused(self, given: Any, wanted: str) -> ConfigError:
        """That an answer is not of the right kind."""
        shown = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:77]}..."
        return ConfigError([f"{self.name}: {shown} is not allowed: it should be {wanted}"], "configure")

    @property
    def shown_default(self) -> str:
        """The default as a person would type it."""
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        if isinstance(self.default, (list, tuple)):
            return f" {BETWEEN} ".join(map(str, self.default))
        return f"{self.default:g}" if isinstance(self.default, float) else "" if self.default is None else str(self.default)


def _choice(question: Question, given: Any) -> str:
    values = [choice.value for choice in question.choices]
    text = str(given).strip() if isinstance(given, (str, int)) and not isinstance(given, bool) else ""
    if text in values:
        return text
    if text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= len(values):
        return values[int(text) - 1]
    raise question.refused(given, f"one of {', '.join(values)}")


def _number(question: Question, given: Any) -> int | float:
    value = given
    if isinstance(given, str):
        try:
            value = int(given) if given.strip().lstrip("+-").isdecimal() else float(given)
        except ValueError:
            raise question.refused(given, "a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise question.refused(given, "a number")
    if not -1e18 < value < 1e18 or (isinstance(value, float) and not math.isfinite(value)):
        raise question.refused("that number", "a smaller one")
    return value


def _text(question: Question, given: Any) -> str:
    if not isinstance(given, str):
        raise question.refused(given, "a text")
    text = given.strip()
    if not text.isprintable():
        raise question.refused(given, "a text on one line, without control characters")
    return text


def _texts(question: Question, given: Any) -> tuple[str, ...]:
    rows = given.split(BETWEEN) if isinstance(given, str) else given
    if not isinstance(rows, (list, tuple)):
        raise question.refused(given, f"a text, or several with {BETWEEN} between them")
    return tuple(text for row in rows if (text := _text(question, row)))


def _yes(question: Question, given: Any) -> bool:
    if isinstance(given, bool):
        return given
    word = given.strip().lower() if isinstance(given, str) else ""
    if word in YES or word in NO:
        return word in YES
    raise question.refused(given, "yes or no")


READERS: dict[str, Callable[[Question, Any], Any]] = {
    "choice": _choice, "number": _number, "text": _text, "texts": _texts, "yes/no": _yes, "folder": _text,
}  # fmt: skip
