"""SimpleTuner's two files as ours, with a line for every key: nothing is dropped in silence."""

from __future__ import annotations

import io
import json
import re
import shlex
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sd3tune.config.reading import LEAVES, NOT_YAML, build, dump, nearest, values_refused
from sd3tune.config.schema import RunConfig
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.data.entries import EMBEDS, UNNECESSARY, entry_of, unneeded_on_masks
from sd3tune.data.simpletuner_training import UNCONDITIONAL, Fate, settled
from sd3tune.errors import ConfigError, FileError
from sd3tune.files import write_text
from sd3tune.shown import Shown

RENAMED = {
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_step_interval": "validation_steps",
    "model_alpha": "lora_alpha",
    "rank": "lora_rank",
}
"""Their name -> ours."""

NOT_NEEDED = {
    "model_family": "the pipeline says by itself what it is",
    "model_type": "sd3tune trains adapters",
    "data_backend_config": "datasets.yaml is named on the command line",
    "resume_from_checkpoint": "sd3tune train --resume RUN",
    "trainer_extra_args": "its settings are listed here one by one",
    **dict.fromkeys(("accelerate_config", "deepspeed_config", "fsdp_enable"), "several GPUs need no more than num_processes and torchrun"),
    "disable_benchmark": "there is none; the base model's pictures are the grid's first row",
    "aspect_bucket_rounding": "shapes count to two decimals",
    "push_to_hub_background": "uploads are always in the background",
    "model_card_safe_for_work": "the card makes no claim about audiences; its tags are yours to add",
    "hub_token": "a token is never a setting; hf auth login, or HF_TOKEN",
}
"""Keys whose job is done otherwise."""

IGNORED_THERE = {
    "offset_noise": "flow-matching models never get it",
    "noise_offset": "flow-matching models never get it",
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
        "only DeepSpeed reads it; use optimizer_config, optimizer_beta1 and optimizer_beta2",
    ),
}
"""Keys that SimpleTuner accepts for SD3 and does not obey."""

OFF = (0, "0", "", "none", "None", "null", None)


@dataclass(frozen=True)
class Line:
    """What became of one key."""

    where: str
    key: str
    fate: Fate
    why: str = ""

    def __str__(self) -> str:
        return f"{self.fate:26} {self.where}{self.key}" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True, repr=False)
class Imported(Shown):
    """A configuration, data sets, and the report on how they came about."""

    config: RunConfig
    datasets: tuple[dict[str, Any], ...]
    report: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.report))

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``run.yaml`` and ``datasets.yaml`` into a folder. Raises: FileError when one of them is already there."""
        files = Path(folder) / "run.yaml", Path(folder) / "datasets.yaml"
        for file in files:
            if file.exists():
                raise FileError(f"{file}: is already there; nothing was written; choose another folder")
        stream = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(list(self.datasets), stream)
        write_text(files[0], dump(self.config))
        write_text(files[1], stream.getvalue())
        return files


def from_simpletuner(config: str | Path, datasets: str | Path | None = None) -> Imported:
    """Translate ``config.json`` (or TOML, or ``config.env``) and ``multidatabackend.json``.

    The second file is looked for where the first one says, then beside it, when it is not given. Raises: ConfigError.
    """
    path = Path(config)
    given = read_settings(path)
    named = str(given.get("data_backend_config") or "multidatabackend.json")
    backend = Path(datasets) if datasets else next((p for p in (Path(named), path.parent / Path(named).name) if p.is_file()), None)
    missing = [Line("", named, "no counterpart", "no such file of data sets; pass its path")]
    entries, more = entries_of(backend) if backend else ([], missing)
    kinds = {str(row.get("conditioning_type")) for row in entries if row.get("dataset_type") == "conditioning"}
    made, report = settings_of(given, str(path), kinds)
    return Imported(made, tuple(entries), (*report, *more))


# --- settings --------------------------------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """Their settings by plain lower-case names, whatever the file's form. Raises: ConfigError."""
    text = _text(path)
    try:
        if path.suffix.lower() == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix.lower() == ".env" or path.name.startswith(".env"):
            content = read_env(text)
        else:
            content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"cannot be read ({error})"], str(path)) from None
    if not isinstance(content, dict):
        raise ConfigError(["the file is not a mapping of settings"], str(path))
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = plain_name(key)
        if name in found and found[name] != value:
            raise ConfigError([f"{name} is set twice"], str(path))
        found[name] = value
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"there is no such file; the working folder is {Path.cwd()}"], str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read as text: {error}"], str(path)) from None


def plain_name(key: str) -> str:
    """``--validation-steps`` and ``VALIDATION_STEPS`` are ``validation_steps``."""
    return key.strip().lstrip("-").replace("-", "_").lower()


def read_env(text: str) -> dict[str, Any]:
    """A shell file of ``export NAME=value`` lines; the flags of ``TRAINER_EXTRA_ARGS`` count as settings. Raises: ValueError."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"line {number}: {word!r} is not NAME=value")
            found[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: found.get(match[1], ""), value)
    flags = shlex.split(found.pop("TRAINER_EXTRA_ARGS", ""))
    settings: dict[str, Any] = {**found}
    while flags:
        name, equals, value = flags.pop(0).partition("=")
        if not name.startswith("--"):
            raise ValueError(f"TRAINER_EXTRA_ARGS: {name!r} belongs to no flag")
        if not equals:
            value = flags.pop(0) if flags and not flags[0].startswith("--") else "true"
        settings[name] = value
    return settings


def settings_of(given: dict[str, Any], where: str, masks: Collection[str] = ()) -> tuple[RunConfig, list[Line]]:
    """Our configuration, and a line for each of their settings. ``masks`` are the kinds of masks that the data sets have.

    Raises: ConfigError for what contradicts itself.
    """
    flat: dict[str, Any] = {}
    said: dict[str, Line] = {}
    report: list[Line] = []
    for key, value in given.items():
        name = RENAMED.get(key, key)
        if key == "model_family" and str(value).lower() not in ("sd3", "sd35", "sd3.5"):
            raise ConfigError([f"model_family is {value!r}; sd3tune trains Stable Diffusion 3 and 3.5"], where)
        if key == "model_type" and str(value).lower() != "lora":
            raise ConfigError([f"model_type is {value!r}; sd3tune trains adapters (lora)"], where)
        if key in NOT_NEEDED:
            report.append(Line("", key, "not needed", NOT_NEEDED[key]))
        elif key in IGNORED_THERE and name not in LEAVES:
            report.append(Line("", key, "was silently ignored there", IGNORED_THERE[key]))
        elif name not in LEAVES:
            report.append(Line("", key, "no counterpart", f"{value!r} is not carried over{nearest(key, list(LEAVES))}"))
        elif name in ("max_train_steps", "num_train_epochs") and value in OFF:
            report.append(Line("", key, "not needed", f"{value!r} means that it is not set"))
        else:
            flat[name] = typed(name, value)
            said[name] = Line("", key, "taken over" if name == key else "renamed", f"{name} = {flat[name]!r}")
            if key in UNCONDITIONAL:
                why = "it was read nowhere, and the empty text was encoded whatever it said; here it works"
                report.append(Line("", key, "was silently ignored there", why))
            if key == "validation_guidance_skip_layers" and isinstance(value, list):
                report.append(
                    Line("", key, "was silently ignored there", "as a JSON list it switched skip-layer guidance off; here it works")
                )
    if "max_train_steps" in flat and "num_train_epochs" in flat:
        flat.pop("num_train_epochs")
        said["num_train_epochs"] = Line("", "num_train_epochs", "not needed", "max_train_steps decides")
    flat, notes = settled(flat, masks, Path(where).parent)
    refused = values_refused(flat)
    for name, problem in refused.items():
        value = flat.pop(name)
        default = SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name].default  # type: ignore[attr-defined]
        said[name] = Line("", said[name].key, "no counterpart", f"{value!r} is not there in this version; {default!r} is used. {problem}")
    for name, value in flat.items():
        default = SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name].default  # type: ignore[attr-defined]
        if value == default:
            said[name] = Line("", said[name].key, "already the default", f"{name} = {value!r}")
    for name, (fate, why) in notes.items():
        if name not in refused:
            said[name] = Line("", said[name].key if name in said else name, fate, why)
    return build(flat, where), [*said.values(), *report]


def typed(name: str, value: Any) -> Any:
    """A value as our setting wants it: texts are read like YAML unless the setting is a text; lists become tuples."""
    info = SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name]  # type: ignore[attr-defined]
    wants_text = "str" in str(info.annotation) and "tuple" not in str(info.annotation)
    if isinstance(value, str) and (name == "validation_prompt" or wants_text):
        return None if value in ("none", "None") and info.default is None else value
    if isinstance(value, str):
        try:
            value = None if value in ("none", "None") else YAML(typ="safe", pure=True).load(value)
        except NOT_YAML:
            return value
    if isinstance(value, list):
        return tuple(value)
    return bool(value) if info.annotation is bool and value in (0, 1) else value


# --- data sets -------------------------------------------------------------------------------------------------------


def entries_of(path: Path) -> tuple[list[dict[str, Any]], list[Line]]:
    """Our entries and a line for each of their keys. Raises: ConfigError when the file is not a list of data sets."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"cannot be read ({error})"], str(path)) from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ConfigError(["the file is not a list of data sets"], str(path))
    made: list[dict[str, Any]] = []
    report: list[Line] = []
    for number, row in enumerate(content, start=1):
        where = f"{row.get('id', number)}."
        kind = row.get("dataset_type")
        if isinstance(kind, str) and kind in EMBEDS:
            report += [Line(where, key, "not needed", f"{EMBEDS[kind]} are kept in one cache, keyed by content") for key in row]
            continue
        row, linked = _linked(row, content)
        report += linked
        kept, refused = entry_of({plain_name(str(key)): value for key, value in row.items()})
        for key in row:
            name = plain_name(str(key))
            if name in UNNECESSARY:
                report.append(Line(where, key, "not needed", UNNECESSARY[name]))
            elif name in refused:
                report.append(Line(where, key, "no counterpart", refused[name]))
            elif unneeded_on_masks(row, name):
                report.append(Line(where, key, "not needed", "masks are cut as their pictures"))
            else:
                report.append(Line(where, key, "taken over"))
        report += [Line(where, key, "no counterpart", why) for key, why in refused.items() if key not in map(plain_name, map(str, row))]
        if {"id", "instance_data_dir", "type", "dataset_type"} & set(refused):
            kept["disabled"] = True
            report.append(Line(where, "disabled", "no counterpart", "the entry is written with disabled: true, for you to complete"))
        made.append(kept)
    return made, report


def _linked(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Line]]:
    """An entry, with masks linked as here: its pictures name them, where there they may name their pictures (source_dataset_id)."""
    if row.get("dataset_type") == "conditioning" and "source_dataset_id" in row:
        source = row["source_dataset_id"]
        said = Line(f"{row.get('id')}.", "source_dataset_id", "renamed", f"conditioning_data on {source!r}")
        return {key: value for key, value in row.items() if key != "source_dataset_id"}, [said]
    masks = [r.get("id") for r in rows if r.get("dataset_type") == "conditioning" and r.get("source_dataset_id") == row.get("id")]
    if len(masks) == 1 and row.get("id") is not None and "conditioning_data" not in row:
        return {**row, "conditioning_data": masks[0]}, []
    return row, []
