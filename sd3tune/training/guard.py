"""Whether an update may be applied, judged by the run's own history before any weight moves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sd3tune.errors import TrainingError

WINDOW = 50
"""Applied updates that count as the run's own history."""

ENOUGH = 5
"""Updates before gradient norms are compared."""

LOOK = 10
"""Updates between two looks at the adapter itself; each of the first ones is looked at."""

GRADIENT_FACTOR, BLOCK_FACTOR = 30.0, 10.0
"""How many times the largest gradient of the window, and a block's adapter at the last look, are too much.

On the playground with rates that learn, the largest seen were 4.6 and 1.5.
"""

LOSS_FACTOR = 3.0
"""How many times the largest loss of the window, or what predicting nothing would cost, is too much."""

RECENT = 8
"""Updates whose mean loss tells a model that has forgotten everything from an unlucky batch."""

BROKEN, BEGINNING = 0.75, 0.6
"""Mean loss, as a share of what predicting nothing costs, above which a model is broken that began below the second number.

On the playground the means of 8 updates are at most 0.4 with rates that learn and at least 0.82 with rates that break it.
"""

STILL = 0.01
"""A block whose weights' root mean square is below this has hardly begun; growth counts from here."""


@dataclass(frozen=True)
class Refusal:
    """Why an update was not applied."""

    step: int
    batch: int
    """Which update's worth of batches it was: the number that would be skipped."""
    why: str
    items: tuple[str, ...]
    sigmas: tuple[float, ...]
    block: str
    runaway: bool
    """The weights themselves may be bad, not only this batch."""

    def __str__(self) -> str:
        levels = ", ".join(f"{sigma:.3f}" for sigma in self.sigmas)
        what = f"; items {', '.join(self.items)} at noise levels {levels}" if self.items else ""  # none: it was the weights
        where = f"; block {self.block}" if self.block else ""
        return f"step {self.step}: {self.why}{what}{where}"


class GuardError(TrainingError):
    """An update was not applied; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(
            f"{refusal}. The update was not applied. Lower learning_rate, {'look at these items with the catalog, ' * bool(refusal.items)}"
            "or set guard_policy: skip or rollback."
        )


@dataclass
class Guard:
    """The history that updates are judged by; part of a run's state."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    blocks: dict[str, float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    """Losses as shares of what predicting nothing costs."""
    began: float | None = None
    """The share before the adapter had learned anything."""

    def objection(self, loss: float, grad_norm: float, *, nothing: float) -> tuple[str, bool]:
        """What is wrong with a loss and a gradient norm, and whether that looks like a runaway; empty when nothing is.

        ``nothing`` is the loss that predicting zero has on the same images.
        """
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the gradient is {grad_norm} and the loss {loss:.4g}", False
        most = LOSS_FACTOR * max([nothing, *self.losses])
        if loss > most:
            return f"the loss is {loss:.4g}, above {most:.4g} = {LOSS_FACTOR:g} x that of the last updates and of predicting nothing", True
        shares = [*self.shares, loss / nothing]
        if self.began is not None and self.began < BEGINNING and len(shares) >= RECENT and sum(shares) > BROKEN * len(shares):
            share = sum(shares) / len(shares)
            return f"the last {RECENT} losses are {share:.2f} of predicting nothing, and began at {self.began:.2f}", True
        if len(self.norms) >= ENOUGH and grad_norm > GRADIENT_FACTOR * max(self.norms):
            return f"the gradient's norm is {grad_norm:.4g}, above {GRADIENT_FACTOR:g} x the largest of the last updates", True
        return "", False

    def grown(self, blocks: Mapping[str, float]) -> tuple[str, str]:
        """The block whose adapter grew too fast since the last look, and what is wrong with it."""
        for name, size in blocks.items():
            if not math.isfinite(size):
                return name, "the adapter is not finite"
            before = max(self.blocks.get(name, size), STILL)
            if size > BLOCK_FACTOR * before:
                return name, f"the adapter's weights grew from {before:.3g} to {size:.3g} (root mean square)"
        return "", ""

    def accept(self, loss: float, grad_norm: float, *, nothing: float) -> None:
        """Take in an update that will be applied."""
        self.shares = [*self.shares[2 - RECENT :], loss / nothing]
        self.losses = [*self.losses[1 - WINDOW :], loss]
        self.norms = [*self.norms[1 - WINDOW :], grad_norm]

    def state(self) -> dict[str, Any]:
        """Plain data."""
        return {"losses": self.losses, "norms": self.norms, "blocks": self.blocks, "shares": self.shares, "began": self.began}


def due(updates: int) -> bool:
    """Whether the adapter itself is looked at before this update."""
    return updates <= LOOK or updates % LOOK == 0


def block_of(name: str) -> str:
    """The transformer block that a weight belongs to: ``transformer_blocks.7``, or the name's first part."""
    found = re.search(r"transformer_blocks[._](\d+)", name)
    return f"transformer_blocks.{found[1]}" if found else name.split(".")[0]


def _norms(values: Sequence[Tensor]) -> list[float]:
    return torch.stack(torch._foreach_norm([value.detach().float() for value in values])).tolist()


def block_sizes(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each block's adapter weights. One wait for the device."""
    total: dict[str, tuple[float, int]] = {}
    for (name, weight), norm in zip(weights.items(), _norms(list(weights.values())), strict=True):
        square, count = total.get(block_of(name), (0.0, 0))
        total[block_of(name)] = (square + norm * norm, count + weight.numel())
    return {name: math.sqrt(square / count) for name, (square, count) in total.items()}


def worst_block(weights: Mapping[str, Tensor]) -> str:
    """The block with the largest, or the first not finite, gradient."""
    rows = [(block_of(name), weight.grad) for name, weight in weights.items() if weight.grad is not None]
    if not rows:
        return ""
    norms = _norms([gradient for _, gradient in rows])
    bad = [name for (name, _), norm in zip(rows, norms, strict=True) if not math.isfinite(norm)]
    return bad[0] if bad else max(zip(norms, (name for name, _ in rows), strict=True))[1]


def suspects(items: Iterable[str], sigmas: Iterable[float], losses: Iterable[float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The images whose loss is not finite, or the one with the largest, with their noise levels."""
    rows = list(zip(items, sigmas, losses, strict=True))
    bad = [row for row in rows if not math.isfinite(row[2])] or [max(rows, key=lambda row: row[2])]
    return tuple(row[0] for row in bad), tuple(row[1] for row in bad)
