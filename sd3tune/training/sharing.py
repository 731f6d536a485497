"""What several processes add up once per update: gradients, and what each measured of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sd3tune.processes import Processes
from sd3tune.training.objective import Part


def measured(parts: Sequence[Part]) -> Tensor:
    """All that was measured, in one row."""
    passes = torch.tensor([float(part.extra_forwards) for part in parts], device=parts[0].loss_B.device)
    return torch.cat([*(part.loss_B for part in parts), *(part.nothing_B for part in parts), passes])


def with_measured(parts: Sequence[Part], row: Tensor) -> list[Part]:
    """Undo `measured`."""
    sizes = [len(part.ids) for part in parts]
    losses, nothings, passes = torch.split(row, [sum(sizes), sum(sizes), len(parts)])
    rows = zip(parts, torch.split(losses, sizes), torch.split(nothings, sizes), passes.tolist(), strict=True)
    return [replace(part, loss_B=loss_B, nothing_B=nothing_B, extra_forwards=round(count)) for part, loss_B, nothing_B, count in rows]


def summed(parts: Sequence[Part], weights: Mapping[str, nn.Parameter], processes: Processes) -> list[Part]:
    """Gradients (in place) and measured losses of all processes together: one sum of one flat tensor. Raises: TrainingError."""
    if processes.count == 1:
        return list(parts)
    gradients = [(torch.zeros_like(w) if w.grad is None else w.grad).float().flatten() for w in weights.values()]
    total = processes.sum(torch.cat([*gradients, measured(parts)]))
    sizes = [gradient.numel() for gradient in gradients]
    *sums, row = torch.split(total, [*sizes, total.numel() - sum(sizes)])
    for weight, gradient in zip(weights.values(), sums, strict=True):
        weight.grad = gradient.view_as(weight).to(weight.dtype)
    return with_measured(parts, row)
