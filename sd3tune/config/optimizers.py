"""The update rules: what each may be told through ``optimizer_config``, with its defaults, and what it needs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = bool | int | float | None
NOTHING = object()
"""What is no value at all."""


@dataclass(frozen=True)
class Known:
    """One update rule."""

    betas: tuple[float, float] | None
    """Its own; ``None`` where there are none to choose."""
    options: Mapping[str, Value] = field(default_factory=dict)
    """Keys of ``optimizer_config`` and their defaults."""
    package: str = ""
    """What has to be importable."""
    paged: str = ""
    """The rule that it is without a GPU to page from."""

    def __str__(self) -> str:
        betas = f"betas {self.betas[0]:g}, {self.betas[1]:g}" if self.betas else ""
        return ", ".join(part for part in (betas, *(f"{name} {value}" for name, value in self.options.items())) if part)


ADAM: dict[str, Value] = {"eps": 1e-8, "weight_decay": 0.01}
OPTIMI: dict[str, Value] = {"decouple_lr": False}
EIGHT_BIT: dict[str, Value] = {"min_8bit_size": 4096}

OPTIMIZERS: dict[str, Known] = {
    "adamw": Known((0.9, 0.999), {**ADAM, "amsgrad": False}),
    "adamw_bf16": Known((0.9, 0.999), ADAM),
    "stableadamw": Known((0.9, 0.99), {"eps": 1e-6, "weight_decay": 0.01, **OPTIMI}, "optimi"),
    "lion": Known((0.9, 0.99), {"weight_decay": 0.0, **OPTIMI}, "optimi"),
    "adafactor": Known(None, {"beta2_decay": -0.8, "d": 1.0, "weight_decay": 0.0}),
    "prodigy": Known(
        (0.9, 0.999),
        {"beta3": None, "eps": 1e-8, "weight_decay": 0.0, "decouple": True, "use_bias_correction": False, "safeguard_warmup": False,
         "d0": 1e-6, "d_coef": 1.0, "growth_rate": float("inf"), "slice_p": 1},
        "prodigyopt",
    ),
    "schedulefree": Known((0.9, 0.999), {"eps": 1e-8, "weight_decay": 0.0, "r": 0.0, "weight_lr_power": 2.0}, "schedulefree"),
    "bnb-adamw8bit": Known((0.9, 0.999), {**ADAM, **EIGHT_BIT}, "bitsandbytes"),
    "bnb-adamw8bit-paged": Known((0.9, 0.999), {**ADAM, **EIGHT_BIT}, "bitsandbytes", "bnb-adamw8bit"),
    "bnb-lion8bit": Known((0.9, 0.99), {"weight_decay": 0.0, **EIGHT_BIT}, "bitsandbytes"),
    "bnb-lion8bit-paged": Known((0.9, 0.99), {"weight_decay": 0.0, **EIGHT_BIT}, "bitsandbytes", "bnb-lion8bit"),
}  # fmt: skip
"""Name -> what it is."""


def as_text(given: object) -> object:
    """A mapping as ``"k=v,k=v"``, anything else as it is."""
    return ",".join(f"{key}={value}" for key, value in given.items()) if isinstance(given, dict) else given


def options_of(optimizer: str, text: str | None) -> dict[str, Value]:
    """The rule's defaults with what ``optimizer_config`` says instead. Raises: ValueError with a sentence for the first that is wrong."""
    options = dict(OPTIMIZERS[optimizer].options)
    for part in (text or "").split(","):
        key, equals, given = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if key not in options:
            close = difflib.get_close_matches(key, options, n=1)
            instead = {"betas": "set optimizer_beta1 and optimizer_beta2", "lr": "set learning_rate"}.get(key)
            hint = instead or (f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(options)}")
            raise ValueError(f"optimizer_config: {optimizer} has no {key!r}; {hint}")
        default = options[key]
        options[key] = _like(default, given)
        if not equals or options[key] is NOTHING:
            wanted = "true or false" if isinstance(default, bool) else "a whole number" if type(default) is int else "a number"
            raise ValueError(f"optimizer_config: {key}={given} is not {wanted}; {optimizer} has {key}={default}")
    return options


def _like(default: Value, text: str) -> Any:
    """A text as a value of the default's kind, or `NOTHING`."""
    plain = {"true": True, "false": False}
    if isinstance(default, bool):
        return plain.get(text.lower(), NOTHING)
    if default is None and text.lower() in ("none", "null"):
        return None
    try:
        number = float(text)
    except ValueError:
        return NOTHING
    if math.isnan(number) or (type(default) is int and not number.is_integer()):
        return NOTHING
    return int(number) if type(default) is int else number
