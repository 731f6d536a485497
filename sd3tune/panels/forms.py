"""A group of settings as a form: a change is a new configuration, or a sentence at the field that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from sd3tune.config.reading import is_live
from sd3tune.errors import ConfigError
from sd3tune.panels import fields
from sd3tune.panels.draft import Draft
from sd3tune.panels.looks import put, sentence


class Form:
    """Fields of some settings over a draft. What is typed and wrong stays in its field, with the reason below it."""

    def __init__(self, draft: Draft, names: Sequence[str]) -> None:
        self.draft, self._busy = draft, False
        leaves = draft.config.leaves()
        self.fields: dict[str, Any] = {name: fields.field(name, fields.shown(name, leaves[name])) for name in names}
        self.errors: dict[str, Any] = {name: widgets.HTML() for name in names}
        rows = [part for name in names for part in (self.fields[name], self.errors[name])]
        self.widget = widgets.VBox(rows, layout=widgets.Layout(width="100%", overflow="visible"))
        for one in self.fields.values():
            one.observe(lambda _: self.apply(), "value")
        draft.observe(lambda _: self.show(), ["config", "live"])
        self.show()

    def apply(self) -> bool:
        """Take what was typed over into the draft; what is wrong stays in its field with a sentence, and then this is false."""
        if self._busy:
            return True
        leaves, values, problems = self.draft.config.leaves(), dict[str, Any](), dict[str, str]()
        for name, one in self.fields.items():
            if one.value != fields.shown(name, leaves[name]):
                try:
                    values[name] = fields.read(name, one.value)
                except ConfigError as error:
                    problems[name] = "; ".join(error.problems)
        self._busy = True  # this form shows what was typed already
        try:
            problems |= self.draft.take(**values)
        finally:
            self._busy = False
        for name, below in self.errors.items():
            put(below, sentence(problems.get(name, ""), bad=True))
        self.show()
        return not problems

    @property
    def wrong(self) -> bool:
        """Whether a field holds what cannot be taken over."""
        return any(error.value for error in self.errors.values())

    def show(self) -> None:
        """Show the draft's values; a field with something wrong in it keeps what was typed."""
        if self._busy:
            return
        self._busy = True
        try:
            leaves = self.draft.config.leaves()
            for name, one in self.fields.items():
                if not self.errors[name].value:
                    put(one, fields.shown(name, leaves[name]))
                closed = self.draft.live and not is_live(name)
                if one.disabled != closed:
                    one.disabled = closed
        finally:
            self._busy = False
