"""What the package needs and is not there yet, installed beside a kernel that runs; what that kernel uses stays as it is.

A hosted notebook has its own torch, numpy and widgets, imported or about to be. Replacing one of them costs a restart at best.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.errors import ConfigError
from sd3tune.secrets import without_secrets
from sd3tune.shown import Shown

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "sd3tune"

KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy", "ipython", "ipykernel", "ipywidgets")
"""What is never replaced, imported or not."""


@dataclass(frozen=True, repr=False)
class Completed(Shown):
    """What was installed; nothing when everything was there."""

    installed: tuple[str, ...]

    def __str__(self) -> str:
        return f"installed: {', '.join(self.installed)}" if self.installed else "everything that sd3tune needs is there"


def complete(*extras: str, package: str = PACKAGE) -> Completed:
    """Install what is missing, of the package and of some of its extras (``complete("datasets")``), with pip and no shell.

    Without anything missing nothing is asked of the network. Raises: ConfigError when there is no such extra, when something that is kept
    is too old, and with pip's last words when pip fails.
    """
    wanted = missing(*extras, package=package)
    if not wanted:
        return Completed(())
    kept = constraints()
    if old := [f"{row} is needed and {kept[row.name.lower()]} is here" for row in wanted if row.name.lower() in kept]:
        raise ConfigError(
            [f"{said}; this is not replaced under a kernel that runs: install it in a terminal, then restart the kernel" for said in old],
            "installing",
        )
    with tempfile.TemporaryDirectory(prefix="sd3tune-install-") as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(file)]
        done = subprocess.run([*pip, *map(str, wanted)], capture_output=True, text=True, check=False)
    if done.returncode:
        words = without_secrets(" ".join((done.stderr or done.stdout).split())[-600:])
        raise ConfigError([f"pip could not install {', '.join(map(str, wanted))}: {words}"], "installing")
    importlib.invalidate_caches()
    return Completed(tuple(map(str, wanted)))


def missing(*extras: str, package: str = PACKAGE) -> tuple[Requirement, ...]:
    """What a package and its extras ask for and is not there, or is too old. Raises: ConfigError for an extra that there is not."""
    try:
        known = metadata.metadata(package).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        raise ConfigError([f"{package} is not installed as a package; run: pip install --no-deps FOLDER, then this again"]) from None
    if strange := [extra for extra in extras if extra not in known]:
        raise ConfigError([f"{package} has no extra {strange[0]!r}; there are {', '.join(sorted(known))}"], "installing")
    return tuple(row for row in dict.fromkeys(_asked_for(package, extras)) if not _is_there(row))


def _asked_for(package: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that hold on this machine, without their markers."""
    from packaging.requirements import Requirement

    for line in metadata.requires(package) or []:
        row = Requirement(line)
        if row.marker is None or any(row.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            row.marker = None
            if row.name == package:  # an extra of extras
                yield from _asked_for(package, row.extras)
            else:
                yield row


def _is_there(row: Requirement) -> bool:
    try:
        return row.specifier.contains(metadata.version(row.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def constraints() -> dict[str, str]:
    """Name and version of what must stay: ``KEPT``, and whatever this process has imported."""
    imported = {name.partition(".")[0] for name in sys.modules}
    used = {owner for module, owners in metadata.packages_distributions().items() if module in imported for owner in owners}
    found = {}
    for name in sorted({*KEPT, *(owner.lower() for owner in used)} - {PACKAGE}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
