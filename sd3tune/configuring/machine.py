"""What the wizard knows of this machine. Tests and forms for other machines make one by hand."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.config.schema import RunConfig


def _nothing(config: RunConfig) -> tuple[str, ...]:
    return ()


def _all_work(names: Iterable[str]) -> Mapping[str, str]:
    return dict.fromkeys(names, "")


def _usable(name: str) -> str:
    return ""


@dataclass(frozen=True)
class Machine:
    """Its card, its memory, and what it can be asked. Nothing is asked before an answer makes it matter."""

    gpu: str = ""
    """Name of the card; empty when there is none that torch can use."""
    gpu_bytes: float = 0.0
    memory_bytes: float = 0.0
    apple: bool = False
    free_bytes: Callable[[Path], float] = field(default=lambda path: float("inf"), repr=False)
    """Room on the disk where a path is, or would be."""
    tried: Callable[[Iterable[str]], Mapping[str, str]] = field(default=_all_work, repr=False)
    """Number format -> why it does not work here; empty when it does."""
    unusable: Callable[[str], str] = field(default=_usable, repr=False)
    """Update rule -> why it cannot run here."""
    access: Callable[[RunConfig], tuple[str, ...]] = field(default=_nothing, repr=False)
    """What stands in the way of the base model: token, licence, network."""
    trackers: Callable[[RunConfig], tuple[str, ...]] = field(default=_nothing, repr=False)
    """What stands in the way of the tracker."""

    def __str__(self) -> str:
        card = f"{self.gpu}, {self.gpu_bytes / 1e9:.1f} GB" if self.gpu else "no GPU that torch can use"
        return f"{card}; {self.memory_bytes / 1e9:.1f} GB of memory"


def look() -> Machine:
    """This machine. Nothing is downloaded, and no format is tried yet."""
    import psutil
    import torch

    from sd3tune.checkup import model_findings, tracker_findings
    from sd3tune.models import capabilities
    from sd3tune.models.components import pick_device
    from sd3tune.training.optim import unusable

    device = pick_device()
    cuda = device.type == "cuda"
    return Machine(
        gpu=torch.cuda.get_device_name() if cuda else "", gpu_bytes=float(torch.cuda.mem_get_info()[1]) if cuda else 0.0,
        memory_bytes=float(psutil.virtual_memory().total), apple=sys.platform == "darwin", free_bytes=_free,
        tried=lambda names: capabilities.probe(name for name in names if name not in capabilities.COMPILED),  # those take minutes
        unusable=lambda name: unusable(name, device),
        access=lambda config: tuple(one.text for one in model_findings(config) if one.state != "ok"),
        trackers=lambda config: tuple(one.text for one in tracker_findings(config) if one.state == "bad"),
    )  # fmt: skip


def _free(path: Path) -> float:
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return float(shutil.disk_usage(there).free)
