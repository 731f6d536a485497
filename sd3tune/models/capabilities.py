"""What works on this machine: each number format tried with a tiny layer, in another process, and remembered."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from sd3tune.config.schema import RunConfig
from sd3tune.errors import ConfigError, FileError
from sd3tune.files import digest, write_text

PRECISIONS = ("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb")
FORMATS = ("bf16", "fp16")
NEAREST = {
    "fp8-quanto": "int8-quanto", "int4-quanto": "nf4-bnb", "int2-quanto": "nf4-bnb", "nf4-bnb": "int8-quanto", "bf16": "fp16",
    "fp16": "no", "int8-quanto": "no_change",
}  # fmt: skip
"""What to write instead of a format that does not work."""

COMPILED = ("int4-quanto", "int2-quanto")
"""Formats whose first use builds an extension, for about 80 s on a CPU."""

TRY = """
import json, sys, torch
from sd3tune.models.components import pick_device
from sd3tune.models.quantize import smaller
device = pick_device()
for name in sys.argv[1:]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)
    layer = torch.nn.Linear(256, 256).to(device, dtype).requires_grad_(False)
    x = torch.randn(4, 256, device=device, dtype=dtype, requires_grad=True)
    plain = layer(x.detach())
    made = layer if name in ("bf16", "fp16") else smaller(layer, name)
    out = made(x)
    out.float().square().mean().backward()
    error = float((out.float() - plain.float()).norm() / plain.float().norm())
    assert error < {"int2-quanto": 0.8, "bf16": 0.01, "fp16": 0.01}.get(name, 0.2), f"its results are wrong (relative error {error:.2f})"
    assert x.grad is not None and bool(x.grad.any()) and bool(x.grad.isfinite().all()), "no gradient comes through"
    print(name, flush=True)
"""

Capabilities = Mapping[str, str]
"""Format -> why it does not work here; the empty text when it does."""


def probe(names: Iterable[str] = (*FORMATS, *PRECISIONS)) -> dict[str, str]:
    """Try formats on this machine's device, each once for a machine and its versions."""
    memory = _memory()
    try:
        known: dict[str, str] = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    wanted = list(names)
    if new := [name for name in wanted if name not in known]:
        known |= _tried(new)
        with suppress(FileError, OSError):  # then it is tried again the next time
            write_text(memory, json.dumps(known))
    return {name: known[name] for name in wanted}


def _memory() -> Path:
    """The file of this machine and these versions."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = [version(name) for name in ("torch", "optimum-quanto", "bitsandbytes")]
    return root / "sd3tune" / "capabilities" / f"{digest(platform.platform(), sys.executable, *versions)[:16]}.json"


def _tried(names: list[str]) -> dict[str, str]:
    """One process for all of them, which takes seconds to start; after one that fails, another for those that are left."""
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]
    said = f"it needs {' and '.join(missing)} to build its extension; apt install g++ ninja-build"
    found = {name: said for name in names if missing and name in COMPILED}
    left = [name for name in names if name not in found]
    while left:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRY, *left], capture_output=True, text=True, check=False)
        works = {*done.stdout.splitlines()}
        while left and left[0] in works:
            found[left.pop(0)] = ""
        if left:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            found[left.pop(0)] = (lines[-1] if lines else f"it ends the process ({done.returncode})")[:200]
    return found


def needed(config: RunConfig) -> list[str]:
    """The formats that a configuration asks for."""
    m = config.model
    precisions = (m.base_model_precision, m.text_encoder_1_precision, m.text_encoder_2_precision, m.text_encoder_3_precision)
    return sorted({p for p in precisions if p != "no_change"} | ({m.mixed_precision} - {"no"}))


def problems(config: RunConfig, capabilities: Capabilities) -> list[str]:
    """What this machine cannot do of what is asked, one sentence each, with the nearest setting that works."""
    model, said = config.model, []
    for setting in (
        "mixed_precision", "base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision", "text_encoder_3_precision",
    ):  # fmt: skip
        name = getattr(model, setting)
        if reason := capabilities.get(name, ""):
            better = NEAREST[name]
            while capabilities.get(better, ""):
                better = NEAREST[better]
            said.append(f"{setting}: {name} does not work on this machine ({reason}); the nearest that does: {better}")
    return said


def require(config: RunConfig) -> None:
    """Raises: ConfigError when this machine cannot do what is asked."""
    found = problems(config, probe(needed(config)))
    if found:
        raise ConfigError(found, "this machine")
