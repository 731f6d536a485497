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
        self.price, self.most = (
            tip(
                widgets.FloatText(
                    value=0, description=name, style={"description_width": "100px"}, layout={"width": "190px", "max_width": "98%"}
                ),
                about,
            )
            for name, about in (
                ("Price per hour", "what an hour of this machine costs, to show what is still to pay"),
                ("Spend at most", "the run is saved and stopped when it has cost this much, at the price per hour; 0 is no limit"),
            )
        )
        self.most.disabled = True
        self.price.observe(lambda change: setattr(self.most, "disabled", not change["new"] > 0), "value")
        self._said: tuple[Any, ...] = ()

    def used_up(self, now: Snapshot) -> str:
        """A sentence, once for a run and a limit, when an update has reached what may be spent; otherwise nothing."""
        price, most = self.price.value, self.most.value
        if not now.live or now.state == "stopping" or not (price > 0 and most > 0) or spent(now, price) < most:
            return ""
        limit = (now.folder, now.began_at, price, most)
        if limit == self._said:
            return ""
        self._said = limit
        return f"About {spent(now, price):.2f} of {most:g} are spent: the run is saved and stopped. Go on counts from 0."
