"""One widget for one setting, made from its declaration: meaning, range, choices. What is typed is never rounded or cut to fit."""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets

from sd3tune.config.explaining import explain
from sd3tune.config.reading import LEAVES, parse_setting
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.errors import ConfigError
from sd3tune.panels.looks import tip

NAMES = {
    "base_model_precision": "Base precision",
    "pretrained_model_name_or_path": "Model folder or hub id",
    "model_flavour": "Model",
    "use_t5": "Read texts with T5",
    "vae_dtype": "Autoencoder's format",
    "lr_scheduler": "Schedule",
    "lr_warmup_steps": "Warm-up",
    "max_grad_norm": "Longest gradient",
    "max_train_steps": "Updates",
    "num_train_epochs": "Epochs",
    "train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Batches per update",
    "flow_schedule_shift": "Shift",
    "flow_schedule_auto_shift": "Shift by size",
    "flow_sigmoid_scale": "Noise spread",
    "flow_use_uniform_schedule": "Noise levels drawn evenly",
    "flow_use_beta_schedule": "Noise levels from a beta distribution",
    "flow_beta_schedule_alpha": "Beta's alpha",
    "flow_beta_schedule_beta": "Beta's beta",
    "aspect_bucket_alignment": "Step of sizes",
    "validation_prompt": "Prompts",
    "validation_negative_prompt": "Negative prompt",
    "validation_resolution": "Sizes",
    "validation_guidance": "Guidance",
    "validation_num_inference_steps": "Sampler steps",
    "validation_noise_scheduler": "Sampler",
    "validation_guidance_skip_layers": "SLG layers",
    "validation_guidance_skip_scale": "SLG scale",
    "validation_guidance_skip_layers_start": "SLG start",
    "validation_guidance_skip_layers_stop": "SLG stop",
    "validation_adapter_strength": "Strength",
    "validation_steps": "Draw every",
    "validation_preview": "Show previews",
    "ema_validation": "Average's pictures",
    "use_dora": "DoRA",
    "use_ema": "Keep an average",
}
"""Settings whose name in a form is not made of their leaf name."""

SHORT = {"lora": "LoRA", "vae": "VAE", "ema": "EMA", "clip": "CLIP", "t5": "T5", "lr": "Learning rate", "slg": "SLG", "sd3": "SD3"}


def label(name: str) -> str:
    """What a setting is called in a form."""
    if name in NAMES:
        return NAMES[name]
    words = [SHORT.get(word, word) for word in name.removeprefix("validation_").split("_")]
    return words[0][:1].upper() + " ".join(words)[1:]


def declared(name: str) -> Any:
    """The declaration of a setting (pydantic's ``FieldInfo``)."""
    return SECTION_CLASSES[LEAVES[name]].__pydantic_fields__[name]  # type: ignore[attr-defined]


def hint(name: str) -> str:
    """What a person should know of a setting: meaning, range, unit, and whether it may change while training."""
    one = explain(name)
    span = [f"{word} {end:g}" for word, end in (("from", one.low), ("above", one.above), ("to", one.high)) if end is not None]
    limits = " ".join(filter(None, (*span, one.unit)))
    parts = (one.meaning, f"({limits})" if limits else "", "May change while training." if one.live else "")
    return f"{name}: " + " ".join(part for part in parts if part)


def form_of(name: str) -> str:
    """How a setting is edited: ``flag``, ``choice``, ``whole``, ``number``, ``words``, ``lines``, ``numbers``, or as ``yaml``."""
    kinds = [kind for kind in (get_args(declared(name).annotation) or (declared(name).annotation,)) if kind is not NoneType]
    if get_origin(declared(name).annotation) is Literal or all(get_origin(kind) is Literal or kind is bool for kind in kinds):
        return "flag" if kinds == [bool] else "choice"
    if kinds in ([int], [float]) and NoneType not in get_args(declared(name).annotation):
        return "whole" if kinds == [int] else "number"
    if kinds == [str]:
        return "words"
    if kinds and kinds[0] is str and get_origin(kinds[-1]) is tuple:
        return "lines"
    whole = declared(name).annotation
    listed = [kind for kind in (whole, *get_args(whole)) if get_origin(kind) is tuple]
    return "numbers" if listed and "int" in str(listed[0]) and len(kinds) == 1 else "yaml"


def choices(name: str) -> list[tuple[str, Any]]:
    """(word, value) of each choice."""
    whole = declared(name).annotation
    found: list[tuple[str, Any]] = []
    for kind in (whole,) if get_origin(whole) is Literal else get_args(whole):
        if kind is NoneType:
            found.insert(0, ("left out", None))
        elif kind is bool:
            found += [("yes", True), ("no", False)]
        else:
            found += [(str(one), one) for one in get_args(kind)]
    return found


LOOK = {"style": {"description_width": "150px"}, "layout": {"width": "98%"}}


def field(name: str, value: Any) -> Any:
    """A labelled widget for a setting, reachable by keyboard. Its ``value`` is what `shown` makes of the setting."""
    kind, look = form_of(name), {"description": label(name), **LOOK}
    if kind == "flag":
        made = widgets.Checkbox(value=value, indent=False, description=label(name), layout={"width": "98%"})
    elif kind == "choice":
        made = widgets.Dropdown(options=choices(name), value=value, **look)
    elif kind in ("whole", "number"):
        made = (widgets.IntText if kind == "whole" else widgets.FloatText)(value=value, continuous_update=False, **look)
    elif kind == "lines":
        made = widgets.Textarea(value=shown(name, value), placeholder="one prompt a line", continuous_update=False, rows=4, **look)
    else:
        empty = "off, or 7, 8, 9" if kind == "numbers" else "left out"
        made = widgets.Text(value=shown(name, value), placeholder=empty, continuous_update=False, **look)
    return tip(made, hint(name))


def shown(name: str, value: Any) -> Any:
    """A setting as its field shows it."""
    kind = form_of(name)
    if kind in ("flag", "choice", "whole", "number"):
        return value
    if value is None:
        return ""
    if kind == "lines":
        return value if isinstance(value, str) else "\n".join(value)
    if kind == "words":
        return value
    if kind == "numbers" or isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


def read(name: str, typed: Any) -> Any:
    """What stands in a field, as a setting. Raises: ConfigError with a sentence when it cannot be read."""
    kind = form_of(name)
    if kind in ("flag", "choice", "whole", "number"):
        return typed
    if kind == "lines" and not typed.strip() and declared(name).default is None:
        return None
    if kind == "lines":
        return tuple(line.strip() for line in typed.splitlines() if line.strip())
    if kind == "words":
        return typed if typed or declared(name).annotation is str else None
    if not typed.strip():
        return None
    if kind == "numbers":
        try:
            return tuple(int(part) for part in typed.split(","))
        except ValueError:
            raise ConfigError([f"{name}: {typed!r} is not a list of block numbers such as 7, 8, 9"]) from None
    listed = "," in typed and not typed.lstrip().startswith(("[", "{"))
    value = parse_setting(f"{name}={f'[{typed}]' if listed else typed}")[1]
    return tuple(value) if isinstance(value, list) else value
