"""Form fields made from the declared settings: meaning, range and whether one may change while training."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import ipywidgets as widgets

from sd3tune.config.reading import LEAVES
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.errors import ConfigError

LABELS = {
    "base_model_precision": "Base precision",
    "learning_rate": "Learning rate",
    "validation_guidance": "Guidance",
    "validation_guidance_skip_layers": "SLG layers",
    "validation_guidance_skip_scale": "SLG scale",
    "validation_guidance_skip_layers_start": "SLG start",
    "validation_guidance_skip_layers_stop": "SLG stop",
}
"""Settings of the training panel and what their fields are called."""


def declared(name: str) -> Any:
    """The declaration of a setting (pydantic's ``FieldInfo``)."""
    return SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name]  # type: ignore[attr-defined]


def hint(name: str) -> str:
    """What a person should know of a setting: meaning, range, unit."""
    info = declared(name)
    words = {"ge": "from {:g}", "gt": "above {:g}", "le": "to {:g}"}
    limits = {key: getattr(rule, key) for rule in info.metadata for key in words if hasattr(rule, key)}
    span = " ".join(words[key].format(limits[key]) for key in words if limits.get(key) is not None)
    unit = info.json_schema_extra["unit"]
    return " ".join(part for part in (info.description, f"({span}{' ' + unit if unit else ''})" if span else "") if part)


def field(name: str, value: Any) -> Any:
    """A labelled widget for a setting, reachable by keyboard, that never clips what is typed."""
    kind = declared(name).annotation
    look = {"description": LABELS[name], "style": {"description_width": "110px"}, "layout": widgets.Layout(width="96%")}
    if kind is float:
        made = widgets.FloatText(value=value, continuous_update=False, **look)
    elif all(isinstance(choice, str) for choice in get_args(kind)):
        made = widgets.Dropdown(options=get_args(kind), value=value, **look)
    else:
        made = widgets.Text(value=shown(value), placeholder="off, or 7, 8, 9", continuous_update=False, **look)
    setattr(made, "tooltip" if "tooltip" in made.traits() else "description_tooltip", hint(name))
    return made


def shown(value: Any) -> Any:
    """A setting as its field shows it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value


def read(name: str, value: Any) -> Any:
    """A field's content as a setting. Raises: ConfigError with a sentence when it cannot be read."""
    if all(get_origin(kind) is not tuple for kind in get_args(declared(name).annotation)):
        return value
    try:
        return tuple(int(part) for part in value.split(",")) if value.strip() else None
    except ValueError:
        raise ConfigError([f"{LABELS[name]}: {value!r} is not a list of block numbers such as 7, 8, 9"]) from None
