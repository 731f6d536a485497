"""Whether a component fits into the memory that is free now, asked before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from sd3tune.errors import ModelError

ROOT = Path("/")

STEPS = {"int8-quanto": "nf4-bnb", "fp8-quanto": "nf4-bnb", "no_change": "int8-quanto"}
"""What takes about half of a format's memory."""

BASE, ELSEWHERE = "base_model_precision", "build the cache on another machine"


def require(part: str, need: float, *, precision: str, device: torch.device) -> None:
    """Raises: ModelError when ``need`` bytes are not free where ``part``, a folder of the pipeline, is to be loaded."""
    free, where = free_on(device)
    if need > free:
        raise ModelError(f"{part}: needs {need / 1e9:.2g} GB of {where}, {free / 1e9:.2g} GB free: {remedy(part, precision)}")


def remedy(part: str, precision: str) -> str:
    """What to do about a part that does not fit."""
    smaller = STEPS.get(precision)
    if part == "transformer":
        return (f"{BASE}: {smaller}, or " if smaller else "") + "close what else uses this memory"
    if not part.startswith("text_encoder"):
        return f"close what else uses this memory, or {ELSEWHERE}"
    number = part.removeprefix("text_encoder").removeprefix("_") or "1"
    said = ["use_t5: false"] if number == "3" else []
    return ", ".join([*said, *([f"text_encoder_{number}_precision: {smaller}"] if smaller else []), f"or {ELSEWHERE}"])


def free_on(device: torch.device) -> tuple[float, str]:
    """Bytes that can be had on a device, and what that memory is called."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + own, "GPU memory"
    return available(), "memory"


def available(root: Path = ROOT) -> float:
    """Bytes of the machine's memory that can be had without swapping: ``MemAvailable``, and what the process's cgroups leave of it."""
    table = _table(root / "proc/meminfo")
    if "MemAvailable:" not in table:
        import psutil

        return float(psutil.virtual_memory().available)
    return min([table["MemAvailable:"] * 1024, *_cgroups(root)])


def _cgroups(root: Path) -> Iterator[int]:
    """What each cgroup of this process, and each above it, leaves of its limit; pages of files count as free."""
    try:
        rows = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in rows:
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if controllers else ("memory.max", "memory.current", "")
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(top) and (left := _left(folder, *names)) is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """What one cgroup leaves; none when it has no limit."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None  # "max"
    kept = _table(folder / "memory.stat")
    files = sum(kept.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
    return max(0, int(most) - used + files)


def _table(path: Path) -> Mapping[str, int]:
    """The numbers of a file of lines such as ``name 123``; empty when there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
