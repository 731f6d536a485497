"""What is in the folders: an item for each usable picture, a problem for each other one. Reads headers, changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from sd3tune.config.reading import nearest, read_yaml
from sd3tune.config.schema import STRICT
from sd3tune.data import captions, images
from sd3tune.errors import ConfigError, DataError
from sd3tune.files import digest, file_digest
from sd3tune.shown import Shown


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dataset:
    """One entry of ``datasets.yaml``: a local folder."""

    id: Annotated[str, Field(description="Name in reports.", min_length=1)]
    instance_data_dir: Annotated[str, Field(description="Folder; a relative one is looked for beside datasets.yaml.", min_length=1)]
    type: Annotated[Literal["local"], Field(description="Where the folder is.")] = "local"
    dataset_type: Annotated[Literal["image", "eval"], Field(description="To train on, or held out.")] = "image"
    disabled: Annotated[bool, Field(description="Leave this entry out.")] = False
    caption_strategy: Annotated[Literal["textfile", "filename"], Field(description="Where captions come from.")] = "textfile"
    resolution: Annotated[int, Field(description="Side in px of a square of the area to train at.", ge=16, le=4096)] = 1024
    crop: Annotated[bool, Field(description="Cut a square out of the centre instead of keeping the shape.")] = False
    repeats: Annotated[int, Field(description="Extra passes in each epoch: 1 shows every picture twice.", ge=0, le=10_000)] = 0


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture with its caption. ``pixels`` identifies the file's bytes, ``id`` the pair."""

    id: str
    dataset: Dataset
    path: Path
    width: int
    height: int
    pixels: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is left out, and why."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Catalog(Shown):
    """What `discover` found, in order of data set and path."""

    datasets: tuple[Dataset, ...]
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    missing_captions: tuple[Path, ...]

    def __str__(self) -> str:
        lines = []
        for dataset in self.datasets:
            count = sum(item.dataset == dataset for item in self.items)
            lines.append(f"{dataset.id}: {count} pictures from {dataset.instance_data_dir}")
        lines += [f"refused: {p.path}: {p.reason}" for p in self.problems]
        if self.missing_captions:
            lines.append(f"without a caption: {len(self.missing_captions)}, the first is {self.missing_captions[0]}")
        return "\n".join(lines)


def discover(source: str | Path) -> Catalog:
    """Everything in the folders of a ``datasets.yaml``, or in one folder with ``.txt`` captions.

    Raises: ConfigError for entries that are wrong; DataError for a folder that is missing or holds no usable picture.
    """
    path = Path(source)
    if path.is_dir():
        entries = [Dataset(id=path.resolve().name or "pictures", instance_data_dir=str(path))]
        return from_datasets(entries)
    if path.suffix.lower() not in (".yaml", ".yml"):
        what = "is a file, not a folder" if path.exists() else f"no such folder (from {Path.cwd()})"
        raise DataError(f"{path}: {what}; give a folder of pictures or a datasets.yaml")
    return from_datasets(read_datasets(path), beside=path.parent)


def from_datasets(datasets: Sequence[Dataset], *, beside: Path = Path()) -> Catalog:
    """The catalog of entries already read; relative folders are looked for in ``beside``. Raises: DataError."""
    return _catalog([dataclasses.replace(d, instance_data_dir=str((beside / d.instance_data_dir).resolve())) for d in datasets])


def read_datasets(path: Path) -> list[Dataset]:
    """The entries of a ``datasets.yaml`` that are not disabled. Raises: ConfigError with every problem at once."""
    content = read_yaml(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ConfigError(["the file is not a list of data sets"], str(path))
    problems: list[str] = []
    found: list[Dataset] = []
    for number, row in enumerate(content, start=1):
        name = f"data set {row.get('id', number)!r}"
        rows: dict[str, Any] = {str(k): v for k, v in row.items()}
        known = [f.name for f in dataclasses.fields(Dataset)]
        problems += [f"{name}: unknown key {k!r}{nearest(k, known)}" for k in rows if k not in known]
        try:
            found.append(Dataset(**{k: v for k, v in rows.items() if k in known}))
        except ValidationError as error:
            problems += [f"{name}: {one['loc'][0]}: {one['msg'].removeprefix('Input should be ')}" for one in error.errors()]
    ids = [d.id for d in found]
    problems += [f"id {twice!r} is used twice" for twice in sorted({i for i in ids if ids.count(i) > 1})]
    if problems:
        raise ConfigError(problems, str(path))
    return [d for d in found if not d.disabled]


def _catalog(datasets: list[Dataset]) -> Catalog:
    items: list[Item] = []
    problems: list[Problem] = []
    missing: list[Path] = []
    for dataset in datasets:
        folder = Path(dataset.instance_data_dir)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise DataError(f"data set {dataset.id!r}: {folder} {what}; correct instance_data_dir")
        before, refused = len(items), len(problems)
        for found in _read_folder(dataset, folder):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            items.append(found)
            if not found.caption:
                missing.append(found.path)
        if len(items) == before:
            reasons = "".join(f"\n  {p.path.name}: {p.reason}" for p in problems[refused : refused + 5])
            held = f"none of its {len(problems) - refused} pictures can be used:{reasons}" if reasons else "it holds no picture"
            raise DataError(f"data set {dataset.id!r}: {folder}: {held}" + ("" if reasons else f" ({', '.join(sorted(images.SUFFIXES))})"))
    if not any(item.dataset.dataset_type == "image" for item in items):
        raise DataError("there is nothing to train on: no enabled data set has dataset_type: image")
    return Catalog(tuple(datasets), tuple(items), tuple(problems), tuple(missing))


def _read_folder(dataset: Dataset, folder: Path) -> Iterator[Item | Problem]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES and not p.name.startswith(".")):
        try:
            width, height = images.size(path)
        except images.BROKEN as error:
            yield Problem(path, f"not a readable picture ({error})")
            continue
        if min(width, height) < 16:
            yield Problem(path, f"{width}x{height} px is too small")
            continue
        try:
            caption = captions.from_filename(path) if dataset.caption_strategy == "filename" else captions.from_textfile(path)
        except (ValueError, OSError) as error:
            yield Problem(path, str(error))
            continue
        pixels = file_digest(path)
        caption = caption or ""
        yield Item(digest(pixels, caption)[:16], dataset, path, width, height, pixels, caption)
