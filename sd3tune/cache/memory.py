"""Encoding in smaller parts when the memory is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sd3tune.errors import CacheError


class Halving:
    """Encodes rows together; after out-of-memory half as many, then tile by tile, and stays with what worked."""

    def __init__(self, encode: Callable[..., Any], *, can_tile: bool) -> None:
        self._encode, self._can_tile = encode, can_tile
        self._most: int | None = None
        self._tiled = False

    def __call__(self, rows: Sequence[Any]) -> Iterator[tuple[Any, int, str]]:
        """For each row its result, how many were encoded together, and what should be said. Raises: CacheError when one is too many."""
        start, said = 0, ""
        while start < len(rows):
            part = rows[start : start + (self._most or len(rows))]
            try:
                found = self._encode(part, tiled=self._tiled)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = self._less(len(part))
                _collect()
                continue
            results = zip(*found, strict=True) if hasattr(found, "_fields") else found
            yield from ((result, len(part), said) for result in results)
            start += len(part)

    def _less(self, tried: int) -> str:
        if tried > 1:
            self._most = (tried + 1) // 2
            return f"out of memory: {self._most} encoded together instead of {tried}"
        if self._tiled or not self._can_tile:
            raise CacheError("out of memory with one picture or text at a time; lower resolution, or close what else uses this memory")
        self._tiled = True
        return "out of memory with one picture: encoded in tiles, whose values differ slightly at their edges"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine is full."""
    import torch

    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text or "can't allocate memory" in text


def _collect() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
