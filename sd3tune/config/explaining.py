"""Every setting in words, from its declaration: for the command line, the settings page, and whoever refuses a value."""

from __future__ import annotations

import difflib
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from sd3tune.config import presets
from sd3tune.config.advice import Advice, about_setting
from sd3tune.config.reading import LEAVES
from sd3tune.config.sections import SECTION_CLASSES

PAGE = "docs/settings.md"
"""The settings page of this repository."""


@dataclass(frozen=True)
class Explained:
    """One setting: what it is, what it may be, and what should be thought of."""

    section: str
    name: str
    default: Any
    meaning: str
    unit: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    above: float | None
    kind: str
    """What a value is, in a word or two."""
    live: bool
    """Whether it may change while training."""
    advice: tuple[Advice, ...]

    @property
    def shown(self) -> str:
        """The default as it stands in a YAML file; empty when the setting is left out."""
        return _shown(self.default)

    @property
    def values(self) -> str:
        """What it may be: choices, or a kind with its range and unit."""
        if self.choices:
            return " | ".join(self.choices) + (f" | {self.kind}" if self.kind else "")
        ends = []
        if self.low is not None and self.high is not None:
            ends = [f"from {_plain(self.low)} to {_plain(self.high)}"]
        elif self.above is not None:
            ends = [f"above {_plain(self.above)}"] + ([f"at most {_plain(self.high)}"] if self.high is not None else [])
        return " ".join(part for part in (self.kind, ", ".join(ends), self.unit) if part)

    def line(self) -> str:
        """All of it on one line."""
        live = "; may change while training" if self.live else ""
        said = "".join(f"; advice: {one}" for one in self.advice)
        return f"{self.section}.{self.name} = {self.shown or 'left out'} [{self.values}]: {self.meaning}{live}{said}"

    def paragraph(self, width: int) -> str:
        """All of it, wrapped."""
        first = self.values + ("; may change while training" if self.live else "")
        rows = [first, self.meaning, *(f"advice: {one}" for one in self.advice)]
        wide = max(30, min(width, 120) - 4)
        wrapped = [textwrap.fill(row, wide, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False) for row in rows]
        return "\n".join([f"{self.section}.{self.name} = {self.shown or 'left out'}", *wrapped])

    def matches(self, word: str) -> bool:
        """Whether a word stands in its name, section, meaning or choices."""
        wanted = word.lower()
        return any(wanted in text.lower() for text in (f"{self.section}.{self.name}", self.meaning, *self.choices))


def settings() -> tuple[Explained, ...]:
    """All of them, in the order of files and forms."""
    return tuple(
        _explained(section, name, field)
        for section, cls in SECTION_CLASSES.items()
        for name, field in cls.__pydantic_fields__.items()  # type: ignore[attr-defined]
    )


def explain(name: str) -> Explained:
    """The one of a leaf name. Raises: KeyError."""
    return _explained(LEAVES[name], name, SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name])  # type: ignore[attr-defined]


def search(words: Sequence[str]) -> tuple[Explained, ...]:
    """Those in whose name, section, meaning or choices every word stands."""
    return tuple(one for one in settings() if all(one.matches(word) for word in words))


def similar(words: Sequence[str]) -> list[str]:
    """Names that are nearest to words that no setting has."""
    names = [one.name for one in settings()]
    return difflib.get_close_matches("_".join(words).lower(), names, n=3, cutoff=0.5)


def page() -> str:
    """Every setting as one Markdown page, a table for each section."""
    parts = [
        "# Settings", "",
        "Written by `sd3tune settings --page` from the declarations in `sd3tune/config/sections`; change those, not this page.",
        "A setting may stand in a YAML file flat or under its section, and on the command line as `--set NAME=VALUE`.",
        "Settings marked * may change while training. An empty default means that the setting is left out.", "",
    ]  # fmt: skip
    for section, cls in SECTION_CLASSES.items():
        parts += [f"## {section}", "", " ".join((cls.__doc__ or "").split()).replace("``", "`"), ""]
        parts += ["| setting | default | values | meaning |", "|---|---|---|---|"]
        parts += [_row(one) for one in settings() if one.section == section]
        parts.append("")
    parts += ["## Presets", "", "`extends: preset:NAME` in a run file, `st.presets.load(NAME)` in a notebook.", ""]
    parts += ["| preset | what it is for |", "|---|---|"]
    parts += [f"| {name} | {_cell(presets.about(name))} |" for name in presets.names()]
    return "\n".join(parts) + "\n"


def preset_lines(width: int | None = None) -> Iterator[str]:
    """Each preset with what it is for; wrapped when there is a width."""
    for name in presets.names():
        text = f"{'' if name == 'playground' else presets.PREFIX}{name}: {presets.about(name)}"
        yield text if width is None else textwrap.fill(text, max(30, min(width, 120)), subsequent_indent="    ", break_on_hyphens=False)


def _row(one: Explained) -> str:
    said = " ".join(f"*{advice}.*" for advice in one.advice)
    default = f"`{one.shown}`" if one.shown else ""
    return f"| `{one.name}`{' *' if one.live else ''} | {_cell(default)} | {_cell(one.values)} | {_cell(f'{one.meaning} {said}'.strip())} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _explained(section: str, name: str, field: Any) -> Explained:
    choices, kinds = _split(field.annotation)
    limits = {part: getattr(one, part) for one in field.metadata for part in ("ge", "le", "gt") if hasattr(one, part)}
    extra = field.json_schema_extra
    return Explained(
        section=section, name=name, default=field.default, meaning=field.description, unit=extra["unit"], choices=tuple(choices),
        low=limits.get("ge"), high=limits.get("le"), above=limits.get("gt"), kind=" or ".join(kinds), live=extra["live"],
        advice=about_setting(name),
    )  # fmt: skip


KINDS = {int: "a whole number", float: "a number", str: "a text", tuple: "a list", dict: "a mapping"}


def _split(annotation: Any) -> tuple[list[str], list[str]]:
    """The choices of an annotation, and the kinds of values that it allows besides."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        found = [_split(part) for part in get_args(annotation) if part is not type(None)]
        kinds = dict.fromkeys(kind for _, more in found for kind in more)
        return [choice for more, _ in found for choice in more], list(kinds)
    if origin is Literal:
        return [_shown(value) for value in get_args(annotation)], []
    if annotation is bool:
        return ["true", "false"], []
    if origin is tuple:
        return [], ["a list of mappings" if any(get_origin(part) is dict for part in get_args(annotation)) else "a list"]
    return [], [KINDS[origin or annotation]]


def _shown(value: Any) -> str:
    """A value as YAML has it on one line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.6g}" if abs(number) >= 1e-3 or not number else f"{number:g}"
