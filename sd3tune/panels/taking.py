"""Runs that are gone on with: what a form changes in them, and what lies in a folder that another process wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.config.reading import HOW, is_live
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError, Sd3TuneError
from sd3tune.listing import newest_of
from sd3tune.opening import OpenedRun, open_run
from sd3tune.panels import codes, fields
from sd3tune.records import StepRecord
from sd3tune.run_folder import RunFolder, latest_step
from sd3tune.snapshot import Gauges, Snapshot

# --- what a form changes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """What a form holds besides the settings that a run had: how it computes, what is live, and what needs a new run."""

    how: dict[str, Any] = field(default_factory=dict)
    live: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings that a run never changes, with the values that it has."""

    def require_possible(self) -> None:
        """Raises: ConfigError when something was changed that needs a new run."""
        if self.fixed:
            known = ", ".join(f"{fields.label(name)} ({value})" for name, value in self.fixed.items())
            raise ConfigError([f"{known} cannot change when a run goes on: put back what it had, or press Start for a new run"], "go on")


def changed(wanted: RunConfig, had: RunConfig, also: frozenset[str] = frozenset()) -> Changed:
    """What differs between a form and the settings that a run had; ``also`` are live settings that are to be told in any case."""
    found = codes.differences(wanted, had)
    if "max_train_steps" in found:
        found.pop("num_train_epochs", None)  # a run that is told its updates counts no epochs
    new = {name: value for name, (_, value) in found.items()} | {name: wanted.leaves()[name] for name in also}
    return Changed(
        {name: value for name, value in new.items() if name in HOW},
        {name: value for name, value in new.items() if is_live(name)},
        {name: old for name, (old, _) in found.items() if name not in HOW and not is_live(name)},
    )


def undone(now: Snapshot) -> frozenset[str]:
    """Settings that a failed run had changed after its newest checkpoint, which therefore does not know of them."""
    if now.state != "failed" or not now.folder:
        return frozenset()
    newest = latest_step(RunFolder(Path(now.folder)).checkpoint_folder)
    return frozenset(name for step, settings in now.steering if newest is not None and step >= newest for name in settings)


# --- what lies there -----------------------------------------------------------------------------------------------------


def newest_run(wanted: Path) -> OpenedRun | None:
    """The newest run of a wanted output folder: ``NAME``, ``NAME-2`` and so on. Nothing when there is none that can be read."""
    try:
        return open_run(newest) if (newest := newest_of(wanted)) else None
    except (Sd3TuneError, OSError):
        return None


def elsewhere(found: OpenedRun | None) -> bool:
    """Whether another process is running it."""
    return found is not None and found.status == "running" and found.holder is not None and not found.holder.here


def unfinished(found: OpenedRun | None) -> bool:
    """Whether a run can be gone on with that nobody runs."""
    return found is not None and found.status in ("stopped", "lost") and bool(found.checkpoints)


def as_left(found: OpenedRun) -> Snapshot:
    """A run that nobody runs any more, as far as its folder tells."""
    evals, gauges, seen = found.evals, Gauges(), dict[str, Any]()
    for record in found.records:
        if isinstance(record, StepRecord):
            seen = gauges.take(record)
    return Snapshot(
        **{name: seen[name] for name in ("count", "loss", "rates", "grad_norms", "bands") if seen},
        state="stopped", step=found.step, total_steps=found.total, folder=str(found.path),
        evals=tuple((one.step, one.loss) for one in evals), verdict=evals[-1].verdict if evals else "",
        pictures=sum(row["type"] == "image" for row in found.history), log=(f"{found.path}: {found.state}",),
    )  # fmt: skip


def in_words(found: OpenedRun | None) -> str:
    """What a person should know of a run that lies there; nothing of one that is finished."""
    if found is None or found.status in ("finished", "not begun"):
        return ""
    said = f"{found.path}: {found.state}."
    if found.status == "running" and not elsewhere(found):
        return f"{said} st.open_run({str(found.path)!r}) shows it; Start begins another run beside it."
    if found.status == "running":
        return f"{said} It is shown and steered from here, and does not end with this notebook. Another run needs another output_dir."
    if unfinished(found):
        return f"{said} Go on takes it up with the settings that it has, and with what you change from now on; Start begins another run."
    return said
