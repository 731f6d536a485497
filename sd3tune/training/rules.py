"""The numbers of an update: all that mathematics is told of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from sd3tune.training import flow
from sd3tune.training.optim import Rule
from sd3tune.training.rollout import Rollout
from sd3tune.training.spreads import Spread

ADAMW = Rule()
"""The default."""


@dataclass(frozen=True)
class Rules:
    """The numbers an update needs."""

    seed: int
    accumulation: int
    sigmoid_scale: float
    shift: float | None
    """``None`` follows each batch's size."""
    stratified: bool
    schedule: str
    warmup: int
    total: int
    max_grad_norm: float
    spread: Spread | None = None
    """A logit-normal of ``sigmoid_scale`` when left out."""
    measure: flow.Measure = flow.L2
    weighting: str = "none"
    perturbation: float = 0.0
    """Size of the extra noise that the model sees and need not find."""
    rule: Rule = ADAMW
    cycles: int = 1
    power: float = 1.0
    end: float = 0.0
    clip_method: str = "norm"
    scaled: bool = False
    """Multiply the loss, so that gradients do not vanish in fp16."""
    ema_decay: float | None = None
    ema_interval: int = 1
    mask_normalise: bool = True
    """Whether a masked loss is the mean over what its mask counts."""
    regularisation_weight: float = 1.0
    """What the loss of a regularisation picture counts in the gradient."""
    ema_device: str | None = None
    """Where the average is kept; with the adapter when left out."""
    rollout: Rollout | None = None
    """Which images the model sees where it walked to itself; none when left out."""


HIGHEST_SCALE = 2.0**15
"""Where the scale of an fp16 loss begins, and the most that it may become."""

CALM = 200
"""Updates without an overflow after which the scale is doubled."""


def ema_decay(number: int, most: float) -> float:
    """Decay of the average's update ``number`` (from 1): the first one takes the weights as they are, and it follows quickly at first.

    Source: (1 + n) / (10 + n) after n updates, ``EMAModel.get_decay`` of diffusers.
    """
    done = number - 1
    return min(most, (1 + done) / (10 + done)) if done else 0.0
