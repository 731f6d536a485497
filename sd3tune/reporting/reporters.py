"""Everything that follows a run, as one consumer: the trainer's only door to this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from sd3tune.config.hooks import hooks_of
from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.listing import as_set
from sd3tune.records import FailureRecord, NoticeRecord, Record, WaitRecord
from sd3tune.reporting.events import Events
from sd3tune.reporting.page import write_report
from sd3tune.reporting.publishing import PAUSES, Publisher, default_api, open_repository, write_card
from sd3tune.reporting.tail import Patience, Tail, explained
from sd3tune.reporting.trackers import Tracker, kinds_of, left_out
from sd3tune.reporting.webhooks import PATIENCE as WEBHOOKS
from sd3tune.reporting.webhooks import Webhook
from sd3tune.run_folder import RunFolder

POLL = 0.2
"""Seconds between two looks at what is still being sent."""

LAST_WORDS = (NoticeRecord, WaitRecord, FailureRecord)
"""What may be said after the end of a run without its going on."""

TRACKERS = Patience(failures=3, limit=60)
HUB = Patience(pauses=PAUSES, limit=3600)


def require(config: RunConfig) -> tuple[str, ...]:
    """Ask for all that reporting needs, before a model is loaded, and make the hub's repository; what will have to wait, in sentences.

    Raises: ConfigError for a missing package, login, right to write, or address.
    """
    kinds_of(config)
    hooks_of(config.reporting.webhook_config)
    notes = left_out(config)
    if config.reporting.push_to_hub:
        name, hindrance = open_repository(config, default_api(), ask=True)
        if hindrance:
            notes += (f"push_to_hub: {hindrance}; {name} is tried again at the end, and until then all is in the run folder",)
    return notes


class Reporters:
    """Takes every record and hands it on; none of its consumers can stop or slow the run."""

    def __init__(self, folder: RunFolder, tails: Sequence[Tail] = (), notes: Sequence[str] = ()) -> None:
        self._folder, self._tails, self._notes = folder, tuple(tails), list(notes)

    @classmethod
    def of(cls, config: RunConfig, folder: RunFolder, plan: Plan, notes: Sequence[str] = ()) -> Reporters:
        """What a configuration asks for; ``notes`` are the first news. Raises: as `require`."""
        tails = [Tail(Tracker(kind, config, folder), TRACKERS, most=2000) for kind in kinds_of(config)]
        if config.reporting.push_to_hub:
            tails.append(Tail(Publisher(config, folder), HUB, most=2))
        interval = config.reporting.webhook_reporting_interval
        for hook in hooks_of(config.reporting.webhook_config):
            events = Events(config, folder, total=plan.steps, updates_per_epoch=plan.updates_per_epoch)
            tails.append(Tail(Webhook(hook, events, interval), WEBHOOKS))
        return cls(folder, tails, notes)

    def take(self, record: Record) -> None:
        """Hand a record on; returns at once. What shows that the run goes on after an end opens what was closed then."""
        for tail in self._tails:
            if not isinstance(record, LAST_WORDS):
                tail.go_on()
            tail.take(record)

    def failed(self, step: int, error: BaseException) -> None:
        """The run ends here, before it is done."""
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        self.take(FailureRecord(step=step, text=text))

    def news(self) -> list[str]:
        """What went wrong since the last call, in sentences."""
        notes, self._notes = self._notes, []
        return [*notes, *(said for tail in self._tails for said in tail.news())]

    def finish(self, step: int) -> Iterator[Record]:
        """Write the model card, wait for what is left, up to each consumer's limit, and write the report; losses come as notices."""
        yield from self._written(step, "the model card", lambda: write_card(self._folder, as_set(self._folder)))
        for tail in self._tails:
            tail.stop()
        while not all(tail.ended for tail in self._tails):
            time.sleep(POLL)
            yield WaitRecord(step=step, why="what is left is being sent")
        for said in self.news():
            yield NoticeRecord(step=step, text=said)
        yield from self.report(step)

    def report(self, step: int) -> Iterator[NoticeRecord]:
        """Write the report of the run as it is now; why not is a notice."""
        yield from self._written(step, "the report", lambda: write_report(self._folder))

    def _written(self, step: int, what: str, write: Callable[[], object]) -> Iterator[NoticeRecord]:
        try:
            write()
        # The adapter is saved by now, and a page about it is no reason to end with a traceback.
        except Exception as error:  # noqa: BLE001
            yield NoticeRecord(step=step, text=f"{what} could not be written ({explained(error)})", warning=True)
