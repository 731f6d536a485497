"""What is to be drawn: everything that decides a picture besides the model, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd3tune.config.library import Prompt, parse_size
from sd3tune.config.schema import MOST, PIXELS, RunConfig
from sd3tune.config.sections.validating import Solver
from sd3tune.validation.sampler import Guidance


@dataclass(frozen=True)
class Shot:
    """One picture to draw."""

    name: str
    prompt: str
    negative: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: Guidance
    strength: float = 1.0
    """How much of the adapter's change."""
    solver: Solver = "euler"
    shift: float = 3.0

    @property
    def place(self) -> tuple[str, str, int, int, int]:
        """What stays the same of a picture while settings of the sampler change: a column of the grid."""
        return self.name, self.prompt, self.width, self.height, self.seed

    @property
    def base(self) -> Shot:
        """The same of the model without the adapter, of which there is no share."""
        return replace(self, strength=1.0)

    @property
    def forwards(self) -> int:
        """Pictures that go through the model to draw it: guidance and skip-layer guidance count, and Heun's second looks."""
        walked = range(2 * self.steps - 1 if self.solver == "heun" else self.steps)
        return sum((2 if self.guidance.scale > 1 else 1) + self.guidance.skips(step, self.steps) for step in walked)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Shot:
        """Undo `as_dict`, also after JSON."""
        guidance = {**row["guidance"], "skip_layers": tuple(row["guidance"]["skip_layers"])}
        return cls(**{**row, "guidance": Guidance(**guidance)})


def guidance_of(config: RunConfig) -> Guidance:
    """The sampler's guidance from the settings."""
    v = config.validation
    return Guidance(
        v.validation_guidance, v.validation_guidance_skip_layers or (), v.validation_guidance_skip_layers_start,
        v.validation_guidance_skip_layers_stop, v.validation_guidance_skip_scale,
    )  # fmt: skip


def shots_of(config: RunConfig) -> tuple[Shot, ...]:
    """Every prompt at every size, with each of its seeds, in the grid's order."""
    found = [
        _shot(config, prompt, size, number)
        for prompt in config.prompts
        for size in ([parse_size(prompt.size)] if prompt.size else config.validation_sizes)
        for number in range(config.validation.num_validation_images)
    ]
    return tuple(dict.fromkeys(found))


def _shot(config: RunConfig, prompt: Prompt, size: tuple[int, int], number: int) -> Shot:
    v, guidance = config.validation, guidance_of(config)
    own = v.validation_adapter_strength if prompt.strength is None else prompt.strength
    kind = v.validation_lycoris_strength if config.adapter.lora_type == "lycoris" else 1.0
    return Shot(
        name=prompt.name, prompt=prompt.prompt, negative=v.validation_negative_prompt if prompt.negative is None else prompt.negative,
        width=size[0], height=size[1], seed=(config.validation_seed if prompt.seed is None else prompt.seed) + number,
        steps=prompt.steps or v.validation_num_inference_steps,
        guidance=guidance if prompt.guidance is None else replace(guidance, scale=prompt.guidance),
        strength=own * kind, solver=v.validation_noise_scheduler, shift=v.validation_shift,
    )  # fmt: skip


def by_strength(shots: Sequence[Shot]) -> Iterator[tuple[float, list[Shot]]]:
    """The shots of each share of the adapter's change."""
    for strength in dict.fromkeys(shot.strength for shot in shots):
        yield strength, [shot for shot in shots if shot.strength == strength]


def in_words(config: RunConfig) -> str:
    """What is drawn, and in which steps skip-layer guidance is active; empty when nothing is."""
    shots = shots_of(config)
    if not shots:
        return ""
    first, sizes = shots[0], dict.fromkeys(f"{shot.width}x{shot.height}" for shot in shots)
    said = f"{len(shots)} of {len(config.prompts)} prompts, {', '.join(sizes)}, {first.steps} steps, guidance {first.guidance.scale:g}"
    each = dict.fromkeys((replace(shot.guidance, scale=first.guidance.scale), shot.steps) for shot in shots)
    return said + "".join(f"; {_skipping(guidance, steps)}" for guidance, steps in each if guidance.skip_layers)


def _skipping(guidance: Guidance, steps: int) -> str:
    blocks, active = ", ".join(map(str, guidance.skip_layers)), guidance.active_steps(steps)
    if not active:
        return f"skip-layer guidance is in no step of {steps}: widen validation_guidance_skip_layers_start and _stop"
    return f"skip-layer guidance on blocks {blocks} x {guidance.skip_scale:g}, steps {active[0]}-{active[-1]} of {steps}"


def together(shots: Sequence[Shot], most: int | None = None) -> Iterator[tuple[Shot, ...]]:
    """Shots that the sampler can draw in one batch, in the order of their first: alike in all but texts and seed."""
    alike: dict[tuple[Any, ...], list[Shot]] = {}
    for shot in shots:
        alike.setdefault((shot.width, shot.height, shot.steps, shot.guidance, shot.strength, shot.solver, shot.shift), []).append(shot)
    for rows in alike.values():
        size = most or max(1, min(MOST, PIXELS // (rows[0].width * rows[0].height)))
        for start in range(0, len(rows), size):
            yield tuple(rows[start : start + size])
