"""Strict reading and writing of configurations: YAML 1.2, flat or grouped, every problem reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import io
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sd3tune.config.schema import SECTION_CLASSES, RunConfig, check
from sd3tune.errors import ConfigError

LEAVES = {f.name: section for section, cls in SECTION_CLASSES.items() for f in dataclasses.fields(cls)}
"""Leaf name -> section."""

REFUSED = {
    "full": "full fine-tuning is out of scope; sd3tune trains adapters",
    "controlnet": "ControlNet training is out of scope",
    "train_text_encoder": "text-encoder training is out of scope for SD3; remove it",
}


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the most similar known name, if one is similar."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `sd3tune settings` lists all"


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file. Raises: ConfigError when it cannot be read or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"there is no such file; the working folder is {Path.cwd()}"], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read as text: {error}"], str(path)) from None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        raise ConfigError(["not valid YAML: " + " ".join(str(error).split())], str(path)) from None


def load(path: Path) -> RunConfig:
    """Read a configuration file, following ``extends``. Raises: ConfigError."""
    return build(_read_layers(path), str(path))


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(["extends goes round in a circle"], str(path))
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(["the file is not a mapping of settings"], str(path))
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(["extends must name one file"], str(path))
    below = _read_layers(path.parent / base, (*seen, path.resolve()))
    flat, problems = _flatten(below)
    over, more = _flatten(content)
    if problems or more:
        raise ConfigError([*problems, *more], str(path))
    return {**flat, **over}


def _flatten(settings: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leaf names and values of flat, grouped or dotted settings, and a sentence for each unknown name."""
    flat: dict[str, Any] = {}
    problems: list[str] = []

    def put(section: str | None, name: str, value: Any) -> None:
        shown = f"{section}.{name}" if section else name
        if section is not None and section not in SECTION_CLASSES:
            problems.append(f"unknown section {section!r}{nearest(section, list(SECTION_CLASSES))}")
        elif name in REFUSED:
            problems.append(REFUSED[name])
        elif name not in LEAVES or (section and LEAVES[name] != section):
            known = [n for n, s in LEAVES.items() if not section or s == section]
            problems.append(f"unknown setting {shown!r}{nearest(name, known)}")
        elif name in flat:
            problems.append(f"{name} is set twice")
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value

    for key, value in settings.items():
        name = str(key)
        if name in SECTION_CLASSES and isinstance(value, dict):
            for leaf, leaf_value in value.items():
                put(name, str(leaf), leaf_value)
        elif name in SECTION_CLASSES and value is None:
            continue
        elif "." in name:
            section, _, leaf = name.partition(".")
            put(section, leaf, value)
        else:
            put(None, name, value)
    return flat, problems


def _construct(flat: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """A configuration of the values that are legal, and a sentence for each leaf whose value is not."""
    made: dict[str, Any] = {}
    bad: dict[str, str] = {}
    for section, cls in SECTION_CLASSES.items():
        values = {name: value for name, value in flat.items() if LEAVES[name] == section}
        try:
            made[section] = cls(**values)
        except ValidationError as error:
            for one in error.errors():
                leaf = str(one["loc"][0])
                wanted = one["msg"].removeprefix("Input should be ")
                bad.setdefault(leaf, f"{leaf}: {values[leaf]!r} is not allowed: it should be {wanted}")
            made[section] = cls(**{name: value for name, value in values.items() if name not in bad})
    return RunConfig(**made), bad


def build(settings: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Check settings and make a configuration of them. Raises: ConfigError with every problem at once."""
    flat, problems = _flatten(settings)
    config, bad = _construct(flat)
    # Cross-field rules run even after field errors, over what is left, so that one report names everything.
    problems += bad.values()
    problems += [p for p in check(config) if not any(leaf in p for leaf in bad)]
    if problems:
        raise ConfigError(problems, where)
    return config


def dump(config: RunConfig) -> str:
    """The configuration as grouped YAML, every setting written out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    plain = {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }
    stream = io.StringIO()
    yaml.dump(plain, stream)
    return stream.getvalue()
