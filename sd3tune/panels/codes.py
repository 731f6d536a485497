"""A configuration as the Python that makes it again, and what differs between two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3tune.config import presets
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.listing import begun
from sd3tune.run_folder import RunFolder

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
        lines += ["    for record in trainer.run(step - trainer.steps_done):", "        pass"]
        lines += ["    for record in trainer.encode(trainer.unread(settings)):  # prompts that were new then", "        pass"]
        lines += ["    changed = trainer.set(**settings)", "    assert not changed.refused, changed.refused"]
    return "\n".join([*lines, "for record in trainer.run():", "    pass", ""])


def source_of(run: str) -> str:
    """What the run of a folder was trained on, as its manifest says; empty when that does not."""
    try:
        return str(json.loads(RunFolder(Path(run)).manifest.read_text()).get("source", ""))
    except (OSError, ValueError):
        return ""


def last_run(config: RunConfig, but: str = "") -> Path | None:
    """The newest run folder beside where this configuration's runs go, other than ``but``."""
    found = [path for path in begun(Path(config.run.output_dir).absolute().parent) if str(path) != but]
    return found[-1] if found else None


def difference_to(config: RunConfig, what: str, but: str = "") -> str:
    """What differs from the nearest preset or from the last run (other than ``but``), which the first line names.

    Raises: ConfigError for another word, and for a run whose settings cannot be read.
    """
    if what == "preset":
        name, _ = nearest_preset(config)
        return f"beside the preset {name}:\n{difference_text(config, presets.load(name))}"
    if what != "last":
        raise ConfigError([f"{what!r} is nothing to compare with; say preset or last, or give a configuration"], "diff")
    folder = last_run(config, but)
    if folder is None:
        return f"there is no other run in {Path(config.run.output_dir).absolute().parent}"
    return f"beside the run {folder.name}:\n{difference_text(config, RunConfig.load(folder / 'config.yaml'))}"


def difference_text(config: RunConfig, other: RunConfig) -> str:
    """What differs, one setting a line."""
    rows = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in differences(config, other).items()]
    return "\n".join(rows) or "nothing differs"
