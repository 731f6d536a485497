"""Strict reading and writing of configurations: YAML 1.2, flat or grouped, every problem reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sd3tune.config.schema import RunConfig, check
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.errors import ConfigError

LEAVES = {f.name: section for section, cls in SECTION_CLASSES.items() for f in dataclasses.fields(cls)}
"""Leaf name -> section."""

HOW = ("gradient_checkpointing", "base_model_precision", "vae_enable_tiling", "vae_enable_slicing")
"""Settings of how it is computed, not of what is learned: another memory, another resume. Another precision changes the base's rounding."""

REFUSED = {
    "full": "full fine-tuning is out of scope; sd3tune trains adapters",
    "controlnet": "ControlNet training is out of scope",
    "train_text_encoder": "text-encoder training is out of scope for SD3; remove it",
}


NOT_YAML = (YAMLError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""What ruamel.yaml raises for text that it cannot read; the last seven for wrong tags and deep nesting."""


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
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read as text: {error}"], str(path)) from None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except NOT_YAML as error:
        raise ConfigError(["not valid YAML: " + (" ".join(str(error).split()) or type(error).__name__)], str(path)) from None


def load(path: Path) -> RunConfig:
    """Read a configuration file or a preset, following ``extends``. Raises: ConfigError."""
    return _finish(*_read_layers(_located(str(path), Path())), str(path))


def _located(name: str, beside: Path) -> Path:
    """The file of ``preset:NAME``, or a file beside another. Raises: ConfigError when there is no such preset."""
    if not name.startswith("preset:"):
        return beside / name
    wanted, files = name.removeprefix("preset:"), Path(__file__).parent / "preset_files"
    known = sorted(path.stem for path in files.glob("*.yaml"))
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        raise ConfigError(
            [f"there is no preset {wanted!r}; " + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}")]
        )
    return files / f"{wanted}.yaml"


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    content = read_yaml(path)
    if path.resolve() in seen:
        raise ConfigError(["extends goes round in a circle"], str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(["the file is not a mapping of settings"], str(path))
    base = content.pop("extends", None)
    flat, problems = _flatten(content)
    if base is None:
        return flat, problems
    if not isinstance(base, str):
        raise ConfigError(["extends must name one file"], str(path))
    below, more = _read_layers(_located(base, path.parent), (*seen, path.resolve()))
    return {**below, **flat}, [*(f"{base}: {p}" for p in more), *problems]


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
        elif name in SECTION_CLASSES and name not in LEAVES:
            problems.append(f"{name} is a section: write its settings under it")
        elif name not in LEAVES or (section and LEAVES[name] != section):
            known = [n for n, s in LEAVES.items() if not section or s == section] + ([] if section else list(SECTION_CLASSES))
            problems.append(f"unknown setting {shown!r}{nearest(name, known)}")
        elif name in flat:
            problems.append(f"{name} is set twice")
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value

    for key, value in settings.items():
        name = key if isinstance(key, str) else _shown(key)
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


def _shown(value: Any) -> str:
    """A value as it may stand in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _construct(flat: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """A configuration of the values that are legal, and a sentence for each leaf whose value is not."""
    made: dict[str, Any] = {}
    bad: dict[str, str] = {}
    for section, cls in SECTION_CLASSES.items():
        values = {name: value for name, value in flat.items() if LEAVES[name] == section}
        try:
            made[section] = cls(**values)
        except ValidationError as error:
            wanted: dict[str, list[str]] = {}
            for one in error.errors():
                wanted.setdefault(str(one["loc"][0]), []).append(one["msg"].removeprefix("Input should be "))
            for leaf, choices in wanted.items():
                allowed = " or ".join(dict.fromkeys(choices)).replace("a valid tuple", "a list")
                bad[leaf] = f"{leaf}: {_shown(values[leaf])} is not allowed: it should be {allowed}"
            made[section] = cls(**{name: value for name, value in values.items() if name not in bad})
    return RunConfig(**made), bad


def values_refused(flat: dict[str, Any]) -> dict[str, str]:
    """Leaf name -> a sentence, for those of the known leaves whose value is not allowed."""
    return _construct(flat)[1]


def build(settings: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Check settings and make a configuration of them. Raises: ConfigError with every problem at once."""
    return _finish(*_flatten(settings), where)


def replaced(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The same with other values for some settings. Raises: ConfigError with every problem at once."""
    flat, problems = _flatten(settings)
    return _finish({**config.leaves(), **flat}, problems, "the configuration")


def steered(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A configuration with settings that were changed on the way, as JSON or YAML hold them. Raises: ConfigError."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if values.get("max_train_steps") is not None:
        values["num_train_epochs"] = None
    return config.replace(**values)


def _finish(flat: dict[str, Any], problems: list[str], where: str) -> RunConfig:
    if flat.get("optimizer") == "prodigy":
        flat = {"learning_rate": 1.0, **flat}  # there it is a multiplier
    if flat.get("validation_guidance_skip_layers"):
        flat = {"validation_guidance": 4.0, **flat}
    if isinstance(named := flat.get("user_prompt_library"), str):
        try:
            flat = {**flat, "user_prompt_library": read_yaml(Path(named))}  # the run's settings hold what was drawn, wherever the file goes
        except ConfigError as error:
            flat = {name: value for name, value in flat.items() if name != "user_prompt_library"}
            problems = [*problems, *(f"user_prompt_library: {Path(named).absolute()}: {problem}" for problem in error.problems)]
    config, bad = _construct(flat)
    # Cross-field rules run even after field errors, over what is left, so that one report names everything.
    found = [*problems, *bad.values()]
    found += [p for p in check(config) if not any(re.search(rf"\b{leaf}\b", p) for leaf in bad)]
    if found:
        raise ConfigError(found, where)
    return config


def dump(config: RunConfig) -> str:
    """The configuration as grouped YAML, every setting written out."""
    plain = {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }
    text = _as_yaml(plain, escaped=False)
    return text if "\x85" not in text else _as_yaml(plain, escaped=True)  # ruamel.yaml does not escape this line end by itself


def _as_yaml(plain: dict[str, Any], *, escaped: bool) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = not escaped
    stream = io.StringIO()
    yaml.dump(plain, stream)
    return stream.getvalue()


def frozen(settings: Iterable[str]) -> str:
    """Which of some settings cannot change while training, in a sentence; empty when all can."""
    names = [name for name in settings if not is_live(name)]
    return f"{', '.join(names)} cannot change while training" if names else ""


def is_live(name: str) -> bool:
    """Whether a setting may change while training."""
    if name not in LEAVES:
        return False
    return bool(SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name].json_schema_extra["live"])  # type: ignore[attr-defined]


def parse_setting(text: str) -> tuple[str, Any]:
    """``"learning_rate=5e-5"`` as name and value, read like a YAML value. Raises: ConfigError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError([f"{text!r} is not NAME=VALUE"], "--set")
    try:
        return name.strip(), YAML(typ="safe", pure=True).load(value)
    except NOT_YAML:
        raise ConfigError([f"{text!r}: the value is not valid YAML"], "--set") from None


def mapping_of(text: str) -> dict[str, Any]:
    """``"learning_rate: 5e-5"`` and further lines as names and values. Raises: ConfigError."""
    try:
        found = YAML(typ="safe", pure=True).load(text)
    except NOT_YAML as error:
        raise ConfigError([f"not valid YAML ({error})"], "settings") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise ConfigError([f"{text.strip()!r} is not a list of NAME: VALUE lines"], "settings")
    return dict(found)
