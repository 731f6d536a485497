"""What AMD's GPUs want in the environment before torch is imported, set only where torch is built for them."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

AMDSMI = (
    "apt install amd-smi-lib", "pushd /opt/rocm/share/amd_smi", "python3 -m pip install --upgrade pip", "python3 -m pip install .", "popd",
)  # fmt: skip
"""What brings amdsmi, which reads the GPU's memory. Source: SimpleTuner's SD3 guide."""


def defaults() -> dict[str, str]:
    """Let torch measure which of ROCm's matrix kernels is fastest, and remember it for the next run (torch's TunableOp)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {"PYTORCH_TUNABLEOP_ENABLED": "1", "PYTORCH_TUNABLEOP_FILENAME": str(root / "sd3tune" / "tunableop%d.csv")}


def built_for_rocm() -> bool:
    """Whether the installed torch is one for AMD's GPUs; it is not imported for this."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return bool(re.search(r"^hip(?:\s*:[^=]+)?\s*=\s*['\"]", text, re.M))


def apply(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the defaults that are not set, on ROCm alone, unless torch is imported already: then it is too late."""
    if "torch" in sys.modules or not built_for_rocm():
        return
    place = os.environ if environment is None else environment
    for name, value in defaults().items():
        place.setdefault(name, value)


def missing(environment: Mapping[str, str]) -> list[str]:
    """Names of the defaults that are not set."""
    return [name for name in defaults() if name not in environment]
