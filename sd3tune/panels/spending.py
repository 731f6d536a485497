"""What a run may cost: the price of the machine, and the sum at which it is saved and stopped."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from sd3tune.panels.looks import tip
from sd3tune.panels.showing import spent
from sd3tune.snapshot import Snapshot


class Spending:
    """Two fields; nothing is limited while one of them is 0."""

    def __init__(self) -> None:
        self.price = _sum("Price per hour", "what an hour of this machine costs, to show what is still to pay")
        self.most = _sum(
            "Spend at most",
            "the run is saved and stopped when it has cost this much since its first update, at the price per hour; 0 is no limit. "
            "A paused run is not stopped",
        )
        self.most.disabled = True
        self.price.observe(lambda change: setattr(self.most, "disabled", not change["new"] > 0), "value")
        self._below: tuple[Any, ...] = ()
        """The run and the limit that was seen before it was reached: one that is typed too low stops nothing."""
        self._said: tuple[Any, ...] = ()
        self._asked = -1

    def take_over(self, viewer: object) -> None:
        """Go on with the price and the limit of the panel that showed the run before, where there are none here."""
        other = getattr(viewer, "spending", None)
        if isinstance(other, Spending) and not self.price.value:
            self.price.value, self.most.value = other.price.value, other.most.value
            self._below, self._said, self._asked = other._below, other._said, other._asked

    def look(self, now: Snapshot) -> tuple[str, bool]:
        """What is to be said, once for a limit, and whether the run is to be stopped: asked after each update, until it is."""
        price, most = self.price.value, self.most.value
        if not now.live or now.state == "stopping" or not (price > 0 and most > 0):
            return "", False
        limit, so_far = (now.folder, now.began_at, price, most), spent(now, price)
        if so_far < most:
            self._below = limit
        if so_far < most or now.step == self._asked:
            return "", False
        self._asked, over = now.step, self._below == limit
        if limit == self._said:
            return "", over
        self._said = limit
        if over:
            return f"About {so_far:.2f} of {most:g} are spent: the run is to be saved and stopped. Go on counts from 0.", True
        return f"About {so_far:.2f} are spent already, more than {most:g}: the run goes on. Enter what it may cost in all.", False


def _sum(name: str, about: str) -> Any:
    width = {"width": "190px", "max_width": "98%"}
    return tip(widgets.FloatText(value=0, description=name, style={"description_width": "100px"}, layout=width), about)
