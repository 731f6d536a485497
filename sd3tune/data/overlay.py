"""Captions that a person edited: a file beside ``datasets.yaml`` that goes before every other source, never in the picture's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.errors import DataError
from sd3tune.files import write_text

if TYPE_CHECKING:
    from sd3tune.data.catalog import Item

Captions = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Data set -> picture's name inside it -> captions."""


def path_of(datasets: Path) -> Path:
    """Where the edited captions of a ``datasets.yaml`` are."""
    return datasets.with_suffix(".captions.json")


def read(datasets: Path) -> Captions:
    """The edited captions of a ``datasets.yaml``; none when there is no file. Raises: DataError."""
    path = path_of(datasets)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return {
            str(name): {str(picture): _texts(given) for picture, given in rows.items()} for name, rows in content.items()
        }  # fmt: skip
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(
            f'{path}: not a file of edited captions ({error}); it looks like {{"data set": {{"a.png": "a caption"}}}}, or take it away'
        ) from None


def _texts(given: object) -> tuple[str, ...]:
    rows = [row for row in (given if isinstance(given, list) else [given]) if isinstance(row, str)]
    if rows != given and [given] != rows:
        raise ValueError(f"{given!r} is not a caption")
    return tuple(clean for row in rows if (clean := " ".join(row.split())))


def save(datasets: Path, edits: Captions) -> Path:
    """Add edits to those that are there, and return the file. Raises: DataError, FileError."""
    merged = {name: dict(rows) for name, rows in read(datasets).items()}
    for name, rows in edits.items():
        merged.setdefault(name, {}).update(rows)
    path = path_of(datasets)
    write_text(path, json.dumps(merged, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return path


def notes(edited: Captions, items: Iterable[Item]) -> list[str]:
    """That captions were edited, and which edits are of pictures that are not there."""
    there = {(item.dataset.id, item.found.name) for item in items if item.found}
    wanted = [(name, picture) for name, rows in edited.items() for picture in rows]
    lost = [f"{name}: {picture}" for name, picture in wanted if (name, picture) not in there]
    said = [f"{len(wanted) - len(lost)} captions are taken from the edits beside datasets.yaml"] if len(wanted) > len(lost) else []
    return said + ([f"edited captions of pictures that are not there: {', '.join(lost[:5])}"] if lost else [])
