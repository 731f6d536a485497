"""The base model's pictures, kept in the cache for other runs: each is found by everything that it depends on."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from PIL import Image

from sd3tune.errors import FileError
from sd3tune.files import digest, write_bytes
from sd3tune.validation.pictures import Source, about, opened
from sd3tune.validation.shots import Shot


def kept(shot: Shot, source: Source) -> tuple[Image.Image, tuple[Shot, ...]] | None:
    """A picture of the base model with what was drawn in one batch with it; nothing when there is none, or it cannot be read."""
    path = _place(shot, source)
    if not path.exists():
        return None
    try:
        batch = tuple(Shot.of(row) for row in about(path)["batch"])
        return (opened(path), batch) if shot in batch else None
    except (FileError, OSError, KeyError, TypeError):
        return None


def keep(path: Path, shot: Shot, source: Source) -> None:
    """Keep a copy of a picture; a full disk is no reason to stop."""
    with suppress(FileError, OSError):
        write_bytes(_place(shot, source), path.read_bytes())


def _place(shot: Shot, source: Source) -> Path:
    name = digest(source.model, source.device, json.dumps(dict(source.versions)), json.dumps(shot.as_dict()))
    return Path(source.config.run.cache_dir).absolute() / "pictures" / f"{name}.png"
