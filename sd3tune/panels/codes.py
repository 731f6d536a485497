"""A configuration as the Python that makes it again, and what differs between two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3tune.config import presets
from sd3tune.config.schema import RunConfig

Steering = Sequence[tuple[int, dict[str, Any]]]
"""Settings that were changed by hand, and after how many updates."""


def differences(config: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ: name -> (in ``other``, in ``config``)."""
    ours, theirs = config.leaves(), other.leaves()
    return {name: (theirs[name], value) for name, value in ours.items() if value != theirs[name]}


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The preset from which the fewest settings differ, and those settings."""
    found = [(name, {key: new for key, (_, new) in differences(config, presets.load(name)).items()}) for name in presets.names()]
    return min(found, key=lambda one: len(one[1]))


def config_code(config: RunConfig) -> str:
    """An expression that makes this configuration: a preset, and only what differs from it."""
    name, changed = nearest_preset(config)
    if not changed:
        return f"st.presets.load({name!r})"
    lines = [f"    {key}={value!r}," for key, value in changed.items()]
    return "\n".join([f"st.presets.load(\n    {name!r},", *lines, ")"])


def run_code(config: RunConfig, steering: Steering = (), data: str | Path = "datasets.yaml") -> str:
    """A cell that does a run again, with everything that was changed by hand on the way."""
    lines = [
        "import sd3tune as st", "", f"config = {config_code(config)}",
        f"cache = st.CacheBuilder(st.plan(st.discover({str(data)!r}), config), st.encoders(config)).build()",
        "trainer = st.Trainer(config, cache)",
    ]  # fmt: skip
    if steering:
        rows = [f"    ({step}, {settings!r})," for step, settings in steering]
        lines += ["changes = [  # by hand: after which update, and what", *rows, "]", "for step, settings in changes:"]
        lines += ["    for record in trainer.run(step - trainer.steps_done):", "        pass", "    trainer.set(**settings)"]
    return "\n".join([*lines, "for record in trainer.run():", "    pass", ""])


def difference_text(config: RunConfig, other: RunConfig) -> str:
    """What differs, one setting a line."""
    rows = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in differences(config, other).items()]
    return "\n".join(rows) or "nothing differs"
