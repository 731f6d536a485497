"""How noise levels spread over 0 to 1 before the shift, each as its inverse CDF, so that any of them can be drawn in strata.

Shapes: B images in a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["logit-normal", "uniform", "beta", "cubic", "fixed-list", "round-robin"]

POINTS = 8193
"""Points of a tabulated inverse CDF; linear between them."""


@dataclass(frozen=True)
class Spread:
    """One distribution with its numbers."""

    kind: Kind = "logit-normal"
    scale: float = 1.0
    """Spread of the logit-normal."""
    alpha: float = 2.0
    beta: float = 2.0
    """Exponents of the beta distribution, sigma^(alpha - 1) (1 - sigma)^(beta - 1): a large beta favours low levels."""
    weights: tuple[float, ...] = ()
    """The cubic density at equally spaced levels from 0 to 1."""
    levels: tuple[float, ...] = ()
    """The levels of a list; they are meant as they stand and are not shifted."""

    @property
    def listed(self) -> bool:
        """Whether the levels come from a list."""
        return self.kind in ("fixed-list", "round-robin")

    def at(self, quantile_B: Tensor, offset: float = 0.0) -> Tensor:
        """The levels below which these shares lie; ``offset`` moves the logit-normal alone. float64 in and out."""
        if self.kind == "logit-normal":
            return logit_normal(quantile_B, self.scale, offset)
        if self.kind == "uniform":
            return quantile_B
        if self.kind == "beta":
            return torch.sigmoid(_between(quantile_B, *beta_table(self.alpha, self.beta)))
        if self.kind == "cubic":
            return _between(quantile_B, *cubic_table(self.weights))
        places_B = (quantile_B * len(self.levels)).long().clamp(max=len(self.levels) - 1)
        return torch.tensor(self.levels, dtype=torch.float64)[places_B]

    def turn(self, count: int, k: int) -> Tensor:
        """Levels of batch ``k`` of ``count`` images when the list is gone through in order."""
        places = [(k * count + place) % len(self.levels) for place in range(count)]
        return torch.tensor([self.levels[place] for place in places], dtype=torch.float64)


def logit_normal(quantile: Tensor, scale: float, offset: float = 0.0) -> Tensor:
    """The noise level below which a share ``quantile`` of a logit-normal of middle ``offset`` and spread ``scale`` lies."""
    return torch.sigmoid(offset + scale * torch.special.ndtri(quantile))


@lru_cache(maxsize=8)
def beta_table(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The CDF of Beta(alpha, beta) at logits: there its density, x^alpha (1 - x)^beta, is smooth and has no poles."""
    middle, width = math.log(alpha / beta), math.sqrt(1 / alpha + 1 / beta)
    logits = torch.linspace(middle - 12 * width - 30 / alpha, middle + 12 * width + 30 / beta, POINTS, dtype=torch.float64)
    log_density = alpha * torch.nn.functional.logsigmoid(logits) + beta * torch.nn.functional.logsigmoid(-logits)
    return _cumulated(logits, (log_density - log_density.max()).exp())


@lru_cache(maxsize=8)
def cubic_table(weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The CDF of the density that runs through ``weights``, by a cubic that is monotone between neighbours and so never negative.

    Source: Fritsch and Butland 1984, "A method for constructing local monotone piecewise cubic interpolants".
    """
    step = 1 / (len(weights) - 1)
    slopes = _slopes([(b - a) / step for a, b in pairwise(weights)])
    at = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    left = (at / step).long().clamp(max=len(weights) - 2)
    t = at / step - left
    value, slope = torch.tensor(weights, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64) * step
    rise = value[left + 1] - value[left]
    density = value[left] + rise * t**2 * (3 - 2 * t) + slope[left] * t * (1 - t) ** 2 - slope[left + 1] * t**2 * (1 - t)
    return _cumulated(at, density.clamp(min=0))


def _slopes(secants: list[float]) -> list[float]:
    """Slopes at the knots: the harmonic mean of the secants beside one, zero at an extremum, one-sided at the ends."""
    if len(secants) == 1:
        return [secants[0], secants[0]]
    inner = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(secants)]
    return [_end(secants[0], secants[1]), *inner, _end(secants[-1], secants[-2])]


def _end(near: float, far: float) -> float:
    """Slope at an end, no steeper than keeps the curve monotone."""
    slope = (3 * near - far) / 2
    if slope * near <= 0:
        return 0.0
    return 3 * near if near * far < 0 and abs(slope) > 3 * abs(near) else slope


def _cumulated(at: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """Points and the share below each."""
    areas = (density[1:] + density[:-1]) / 2 * at.diff()
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), areas.cumsum(0)])
    return at, shares / shares[-1]


def _between(quantile_B: Tensor, at: Tensor, shares: Tensor) -> Tensor:
    """Where the share is ``quantile_B``, linearly between the points of a table."""
    right = torch.searchsorted(shares, quantile_B).clamp(1, len(at) - 1)
    low, high = shares[right - 1], shares[right]
    part = ((quantile_B - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return at[right - 1] + part * (at[right] - at[right - 1])
