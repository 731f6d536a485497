"""What was noticed while pictures were decoded: pairs that look alike, and pictures that look blurred. Warnings, never more."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3tune.data.catalog import Item, Problem
from sd3tune.data.planning import Plan

ALIKE = 4
"""Of 64 bits, how many may differ between two pictures that look alike."""

BLURRED = 0.1
"""Share of the median sharpness of its data set below which a picture looks blurred."""

FEW = 8
"""With fewer pictures in a data set there is no median to speak of."""


def findings(plan: Plan, looks: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with its warnings, from what was noticed of each picture (by path)."""
    items = {str(p.item.path): p.item for p in (*plan.train, *plan.evaluation)}
    known = {path: item for path, item in items.items() if looks.get(path)}
    return replace(plan, warnings=(*_alike(known, looks), *_blurred(known, looks)))


def _alike(items: Mapping[str, Item], looks: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    paths = list(items)
    for first, second, bits in near([int(looks[path]["hash"]) for path in paths]):
        one, two = items[paths[first]], items[paths[second]]
        if one.pixels == two.pixels:
            continue  # said already, when they were found
        held = one.held_out != two.held_out
        yield Problem(
            two.path, f"looks like {one.path.name} ({bits} of 64 bits differ)" + (", and one of them is held out" if held else "")
        )  # fmt: skip


def near(hashes: Sequence[int], most: int = ALIKE) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, differing bits) with i < j whose hashes differ in at most ``most`` bits, in order; flat pictures are passed over."""
    import numpy as np

    rows = np.array(hashes, dtype=np.uint64)
    for number, value in enumerate(rows[:-1]):
        if 8 <= int(value).bit_count() <= 56:
            bits = np.unpackbits((rows[number + 1 :] ^ value).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
            yield from ((number, number + 1 + int(j), int(bits[j])) for j in np.flatnonzero(bits <= most))


def _blurred(items: Mapping[str, Item], looks: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    by_dataset: dict[str, list[tuple[Path, float]]] = {}
    for path, item in items.items():
        by_dataset.setdefault(item.dataset.id, []).append((item.path, float(looks[path]["sharpness"])))
    for rows in by_dataset.values():
        middle = statistics.median(sharpness for _, sharpness in rows)
        for place, sharpness in rows:
            if len(rows) >= FEW and sharpness < BLURRED * middle:
                yield Problem(place, f"looks blurred (sharpness {sharpness:.3g}, the middle of its data set is {middle:.3g})")
