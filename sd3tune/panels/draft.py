"""The configuration that panels edit together, and its one owner."""

from __future__ import annotations

import re
from typing import Any

import traitlets

from sd3tune.config.reading import LEAVES, is_live
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError


class Draft(traitlets.HasTraits):
    """A configuration on its way. Panels observe ``config``, which is always whole and legal, and ask for changes.

    ``live`` is true while a run goes on with it: then only live settings can be changed. ``origin`` is what it began with, ``folder``
    where its run is.
    """

    config = traitlets.Any()
    live = traitlets.Bool(False)

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.origin, self.folder = config, ""
        self.config = config

    @classmethod
    def of(cls, given: RunConfig | Draft) -> Draft:
        """A draft that other panels share, or one of a configuration's own."""
        return given if isinstance(given, Draft) else cls(given)

    def change(self, **settings: Any) -> dict[str, str]:
        """Take over other values; nothing is changed when one is wrong. Returns a sentence for each setting that is, "" for all."""
        closed = [name for name in settings if self.live and not is_live(name)]
        if closed:
            return {name: f"{name} cannot change while training" for name in closed}
        if not settings:
            return {}
        try:
            self.config = self.config.replace(**settings)
        except ConfigError as error:
            return by_setting(error.problems, settings)
        return {}

    def take(self, **settings: Any) -> dict[str, str]:
        """Take over what is right of other values, together if that goes. Returns a sentence for each setting that stays as it was."""
        left, wrong = settings, dict[str, str]()
        while left and (found := self.change(**left)):
            named = found.keys() & left.keys()
            if not named:  # it is about settings that were not changed: which of these is at fault shows when each comes alone
                alone = {name: "; ".join(self.change(**{name: value}).values()) for name, value in left.items()}
                return wrong | {name: said for name, said in alone.items() if said}
            wrong |= {name: found[name] for name in named}
            left = {name: value for name, value in left.items() if name not in named}
        return wrong

    def start_over(self, config: RunConfig) -> None:
        """Begin anew with another configuration, such as a preset; where files go stays as it is."""
        kept = {name: value for name, value in self.config.leaves().items() if LEAVES[name] == "run"}
        self.origin = config.replace(**kept)
        self.config = self.origin


def by_setting(problems: tuple[str, ...], settings: dict[str, Any]) -> dict[str, str]:
    """Problems by the setting that they are about: the one that was changed, or that they name first; "" for those of none."""
    found: dict[str, str] = {}
    for problem in problems:
        named = [word for word in re.findall(r"\w+", problem) if word in LEAVES]
        place = next((name for name in named if name in settings), named[0] if named else "")
        found[place] = f"{found[place]}; {problem}" if place in found else problem
    return found
