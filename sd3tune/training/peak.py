"""The most memory that was ever held."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes ever held: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory; 0 on other devices."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
