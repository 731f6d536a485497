"""The two files that the answers end in, what to type next, and the notebook cell that does the same."""

from __future__ import annotations

import io
import json
import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sd3tune.config import presets
from sd3tune.config.explaining import explain
from sd3tune.config.schema import RunConfig
from sd3tune.configuring.outcome import NO_PRESET
from sd3tune.data.datasets import Dataset
from sd3tune.errors import FileError
from sd3tune.files import write_text

CELL = """import sd3tune as st
from sd3tune import panels

config = st.RunConfig.load({run})
plan = st.plan(st.discover({data}), config)
cache = st.CacheBuilder(plan, st.encoders(config)).build()
trainer = st.Trainer(config, cache)
for record in panels.progress(trainer):
    pass
"""


@dataclass(frozen=True)
class Files:
    """Two files that are not written yet, under names that are free."""

    run: Path
    datasets: Path
    run_text: str
    datasets_text: str
    taken: tuple[Path, ...]
    """Files that are already there, because of which these have other names."""

    def write(self) -> None:
        """Write both. Raises: FileError when one of them is there by now, or cannot be written."""
        for path in (self.run, self.datasets):
            if path.exists():
                raise FileError(f"{path}: is already there; nothing was written")
        write_text(self.datasets, self.datasets_text)
        write_text(self.run, self.run_text)

    @property
    def commands(self) -> tuple[str, ...]:
        """What to type next."""
        run, data = (shlex.quote(str(path)) for path in (self.run, self.datasets))
        return (f"sd3tune plan {run} --data {data}", f"sd3tune train {run} --data {data}")

    @property
    def cell(self) -> str:
        """A notebook's cell that runs them."""
        return CELL.format(run=json.dumps(str(self.run)), data=json.dumps(str(self.datasets)))


def files_of(config: RunConfig, dataset: Dataset, preset: str, found: str, folder: Path) -> Files:
    """What to write into a folder: ``run.yaml`` and ``datasets.yaml``, or both with the first number that is free."""
    taken: list[Path] = []
    number = 1
    while True:
        run, datasets = (folder / f"{stem}{'' if number == 1 else f'-{number}'}.yaml" for stem in ("run", "datasets"))
        there = [path for path in (run, datasets) if path.exists() or path.is_symlink()]
        if not there:
            return Files(run, datasets, run_text(config, preset), datasets_text(dataset, found, folder), tuple(taken))
        taken += there
        number += 1


def run_text(config: RunConfig, preset: str) -> str:
    """The settings that differ from a preset, or from the defaults, each with its meaning."""
    base = RunConfig().leaves() if preset == NO_PRESET else presets.load(preset).leaves()
    values = config.leaves()
    chosen = [name for name, value in values.items() if value != base[name]]
    lines = ["# Made by `sd3tune configure`. Only what differs from the preset stands here; `sd3tune settings WORD` explains each."]
    if preset != NO_PRESET:
        lines.append(f"extends: {presets.PREFIX}{preset}  # {presets.about(preset)}")
    lines += [f"{yaml_line(name, values[name])}  # {_first(explain(name).meaning)}" for name in values if name in chosen]
    return "\n".join(lines) + "\n"


def datasets_text(dataset: Dataset, found: str, folder: Path) -> str:
    """One entry: what was answered, each key with its meaning."""
    place, home = dataset.instance_data_dir, folder.absolute()
    if "://" not in place and Path(place).is_relative_to(home):
        place = os.path.relpath(place, home)
    lines = [
        f"# Made by sd3tune: {found}.",
        "# `sd3tune plan` shows what becomes of it, before anything is encoded. More entries may follow.",
    ]
    keys = [one for one in fields(Dataset) if one.name == "id" or _said(dataset, one.name)]
    for one in keys:
        value = place if one.name == "instance_data_dir" else getattr(dataset, one.name)
        if one.name == "parquet":
            value = {"path": dataset.parquet.path} if dataset.parquet else None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        meaning = Dataset.__pydantic_fields__[one.name].description  # type: ignore[attr-defined]
        lines.append(f"{'- ' if one.name == 'id' else '  '}{yaml_line(one.name, value)}  # {meaning}")
    return "\n".join(lines) + "\n"


def _first(text: str) -> str:
    """The first sentence."""
    return text.partition(". ")[0].removesuffix(".")


ALWAYS = ("instance_data_dir", "caption_strategy", "resolution", "resolution_type", "crop", "repeats", "eval_share")
"""Keys that are written whatever they are, because a person may want to change them."""


def _said(dataset: Dataset, name: str) -> bool:
    default = Dataset.__pydantic_fields__[name].default  # type: ignore[attr-defined]
    return name in ALWAYS or getattr(dataset, name) != default


def yaml_line(name: str, value: Any) -> str:
    """``name: value`` on one line of YAML 1.2."""
    plain = list(value) if isinstance(value, tuple) else value
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = True, 1_000_000, True
    stream = io.StringIO()
    yaml.dump([plain], stream)  # in a list: a text that holds a comma or a colon is then quoted
    return f"{name}: {stream.getvalue().strip()[1:-1]}"
