"""What would make a run smaller: changes of settings with the memory that each saves, by the same formulas as the prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sd3tune.config.reading import HOW
from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError
from sd3tune.models import memory
from sd3tune.shown import size_in_words


@dataclass(frozen=True)
class Saving:
    """A change of settings, what it saves at the peak, and what it costs."""

    settings: dict[str, Any]
    bytes: float
    cost: str

    @property
    def goes_on(self) -> bool:
        """Whether a run can go on with it from its last step; otherwise it is another run."""
        return all(name in HOW or name == "validation_batch_size" for name in self.settings)

    def __str__(self) -> str:
        changed = ", ".join(f"{name} = {value}" for name, value in self.settings.items())
        how = "goes on from the last checkpoint" if self.goes_on else "begins another run"
        return f"{changed}: saves {size_in_words(self.bytes)}; {self.cost}; {how}"


def savings(config: RunConfig, *, side: int) -> tuple[Saving, ...]:
    """Changes that make a configuration's peak smaller, those that a run can go on with first, the largest first."""
    now = memory.predict(config, side=side).peak
    found = []
    for settings, cost in _changes(config):
        try:
            changed = config.replace(**settings)
        except ConfigError:
            continue
        found.append(Saving(settings, now - memory.predict(changed, side=side).peak, cost))
    return tuple(sorted((one for one in found if one.bytes > 0), key=lambda one: (not one.goes_on, -one.bytes)))


MOST = 64
"""Larger batches are not looked for."""


def largest_batch(config: RunConfig, *, side: int, room: float) -> int:
    """The largest ``train_batch_size``, up to `MOST`, whose predicted peak is below ``room`` bytes; 0 when not even one picture is."""
    need = memory.predict(config.replace(train_batch_size=1), side=side)
    if need.peak >= room:
        return 0
    return min(MOST, math.ceil((room - need.training) / need.activations))  # nothing else grows with it


def batches(config: RunConfig, *, side: int, room: float) -> str:
    """How large a batch may be here, also with a base in 8 bits where that is allowed and helps; empty when no picture fits at all."""
    own, parts = largest_batch(config, side=side, room=room), list[str]()
    if own:
        parts.append(_or_more(own))
    if config.model.base_model_precision == "no_change" and config.adapter.lora_type == "standard":
        with suppress(ConfigError):  # some adapters need the base's weights whole
            smaller = largest_batch(config.replace(base_model_precision="int8-quanto"), side=side, room=room)
            if smaller > own:
                parts.append(f"with a base in int8-quanto {_or_more(smaller)}")
    return f"Largest batch size that fits: {', '.join(parts)}." if parts else ""


def _or_more(size: int) -> str:
    return f"{size} or more" if size == MOST else f"{size}"


def _changes(config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    batch = config.data.train_batch_size
    if config.memory.gradient_checkpointing is False:
        yield {"gradient_checkpointing": True}, "updates take about a third longer"
    smaller = {"no_change": ("int8-quanto", "nf4-bnb"), "int8-quanto": ("nf4-bnb", "int4-quanto"), "fp8-quanto": ("nf4-bnb",)}
    for precision in smaller.get(config.model.base_model_precision, ()):
        yield {"base_model_precision": precision}, "the base is rounded more"
    if config.prompts and any(config.drawn_together(*size) > 1 for size in config.validation_sizes):
        yield {"validation_batch_size": 1}, "pictures are drawn one by one"
    if not config.model.vae_enable_tiling:
        yield {"vae_enable_tiling": True}, "pictures differ slightly at the edges of tiles"
    if batch > 1:
        halved = {"train_batch_size": batch // 2, "gradient_accumulation_steps": config.data.gradient_accumulation_steps * 2}
        yield halved, "as many pictures an update, in twice as many passes"
    if config.adapter.lora_rank > 4:
        yield {"lora_rank": config.adapter.lora_rank // 2}, "an adapter that can hold less"
    if memory.STATES[config.optimizer.optimizer] > 2:
        yield {"optimizer": "bnb-adamw8bit"}, "moments in 8 bits"
    if config.model.use_t5 and config.model.text_encoder_3_precision == "no_change":
        yield {"text_encoder_3_precision": "int8-quanto"}, "T5 is rounded; texts are encoded again"
