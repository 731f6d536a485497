"""The learning rate as a function of the update alone, so that a resumed run needs no scheduler."""

from __future__ import annotations

import math


def learning_rate(
    update: int, *, peak: float, schedule: str, warmup: int, total: int, cycles: int = 1, power: float = 1.0, end: float = 0.0
) -> float:
    """Rate of ``update`` (from 0): linear warm-up (not for ``constant``), then the course that ``schedule`` names, down to ``total``.

    ``cycles`` counts the cosines with restarts; ``power`` and ``end`` are the polynomial's. Raises: ValueError for an unknown name.
    """
    if schedule == "constant":
        return peak
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant_with_warmup":
        return peak
    done = (update - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    left = max(0.0, 1 - done)
    if schedule == "linear":
        return peak * left
    if schedule == "cosine_with_restarts":
        return peak * 0.5 * (1 + math.cos(math.pi * (cycles * done % 1))) if left else 0.0
    if schedule == "polynomial":
        return end + (peak - end) * math.pow(left, power)
    raise ValueError(f"unknown schedule {schedule!r}")
