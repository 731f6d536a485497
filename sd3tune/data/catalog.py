"""What is in the folders: an item for each usable picture, a problem for each other one. Reads, and changes nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3tune.data import captions, images
from sd3tune.data.datasets import Dataset
from sd3tune.data.entries import read_datasets
from sd3tune.errors import DataError
from sd3tune.files import digest, file_digest
from sd3tune.shown import Shown

LITTER = frozenset({".ipynb_checkpoints", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir"})
"""Names, in lower case, that systems leave in folders; passed over like everything that begins with a point."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture with its captions. ``pixels`` identifies the file's bytes, ``id`` the pair."""

    id: str
    dataset: Dataset
    path: Path
    width: int
    height: int
    pixels: str
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The first caption, or the empty text: what evaluation and reference pictures use."""
        return self.captions[0] if self.captions else ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is left out, and why."""

    path: Path
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Catalog(Shown):
    """What `discover` found, in order of data set and path. ``notes`` is what should be said of datasets.yaml once."""

    datasets: tuple[Dataset, ...]
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    missing_captions: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for dataset in self.datasets:
            count = sum(item.dataset == dataset for item in self.items)
            lines.append(f"{dataset.id}: {count} pictures from {dataset.instance_data_dir}")
        lines += [f"note: {text}" for text in self.notes]
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
        return from_datasets([Dataset(id=path.resolve().name or "pictures", instance_data_dir=str(path))])
    if path.suffix.lower() not in (".yaml", ".yml"):
        what = "is a file, not a folder" if path.exists() else f"no such folder (from {Path.cwd()})"
        raise DataError(f"{path}: {what}; give a folder of pictures or a datasets.yaml")
    entries, notes = read_datasets(path)
    return from_datasets(entries, beside=path.parent, notes=notes)


def from_datasets(datasets: Sequence[Dataset], *, beside: Path = Path(), notes: tuple[str, ...] = ()) -> Catalog:
    """The catalog of entries already read; relative folders are looked for in ``beside``. Raises: DataError."""
    entries = [dataclasses.replace(d, instance_data_dir=str((beside / d.instance_data_dir).resolve())) for d in datasets]
    items: list[Item] = []
    problems: list[Problem] = []
    for dataset in entries:
        found = list(_of_dataset(dataset))
        items += [one for one in found if isinstance(one, Item)]
        problems += [one for one in found if isinstance(one, Problem)]
    items, shared = _apart(items)
    if not any(item.dataset.dataset_type == "image" for item in items):
        raise DataError("there is nothing to train on: no enabled data set has dataset_type: image" + _listed(shared))
    missing = tuple(item.path for item in items if not item.captions)
    return Catalog(tuple(entries), tuple(items), (*problems, *shared), missing, (*notes, *_doubles(items)))


def _apart(items: list[Item]) -> tuple[list[Item], list[Problem]]:
    """The items without those to train on whose very bytes are also held out, under whatever name."""
    held = {item.pixels: item for item in items if item.dataset.dataset_type == "eval"}
    kept, shared = list[Item](), list[Problem]()
    for item in items:
        if item.dataset.dataset_type == "image" and item.pixels in held:
            other = held[item.pixels]
            shared.append(Problem(item.path, f"is also held out, in data set {other.dataset.id!r} as {other.path.name}; not trained on"))
        else:
            kept.append(item)
    return kept, shared


def _doubles(items: list[Item]) -> list[str]:
    """A sentence for each picture that stands twice in one data set."""
    first: dict[tuple[str, str], Item] = {}
    said = []
    for item in items:
        other = first.setdefault((item.dataset.id, item.pixels), item)
        if other is not item:
            said.append(f"{item.path} is the same picture as {other.path.name}; it counts twice")
    return said


def _of_dataset(dataset: Dataset) -> list[Item | Problem]:
    """Items and problems of one folder. Raises: DataError when there is not one item."""
    folder = Path(dataset.instance_data_dir)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data set {dataset.id!r}: {folder} {what}; correct instance_data_dir")
    read = captions.reader(dataset, folder)
    found = [_look(dataset, path, read) for path in sample(dataset, folder, sorted(_pictures(folder)))]
    if not any(isinstance(one, Item) for one in found):
        problems = [one for one in found if isinstance(one, Problem)]
        held = f"none of its {len(problems)} pictures can be used:{_listed(problems)}" if problems else "it holds no picture"
        raise DataError(f"data set {dataset.id!r}: {folder}: {held}" + ("" if problems else f" ({', '.join(sorted(images.SUFFIXES))})"))
    return found


def _listed(problems: Sequence[Problem]) -> str:
    return "".join(f"\n  {p.path.name}: {p.reason}" for p in problems[:5])


def sample(dataset: Dataset, folder: Path, paths: list[Path]) -> list[Path]:
    """At most ``max_num_samples`` of the paths: those whose digests of (id, name) are smallest, so that it never depends on order."""
    most = dataset.max_num_samples
    if most is None or len(paths) <= most:
        return paths
    return sorted(
        sorted(paths, key=lambda p: digest(dataset.id, p.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")))[:most]
    )


def _pictures(folder: Path) -> Iterator[Path]:
    """Picture files below a folder, linked folders included, each real folder once; litter is passed over."""
    seen: set[tuple[int, int]] = set()
    for name, below, files in os.walk(folder, followlinks=True):
        mark = os.stat(name)
        if (mark.st_dev, mark.st_ino) in seen:
            below.clear()
            continue
        seen.add((mark.st_dev, mark.st_ino))
        below[:] = sorted(d for d in below if not _is_litter(d))
        for file in files:
            if Path(file).suffix.lower() in images.SUFFIXES and not _is_litter(file):
                yield Path(name) / file


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _look(dataset: Dataset, path: Path, read: captions.Reader) -> Item | Problem:
    """An item for a file, or why it cannot be one."""
    try:
        width, height = images.size(path)
    except images.BROKEN as error:
        return Problem(path, f"not a readable picture ({error})")
    reason = unsuitable(dataset, width, height)
    if reason:
        return Problem(path, reason)
    try:
        texts = read(path)
        pixels = file_digest(path)
    except (ValueError, OSError) as error:
        return Problem(path, str(error))
    return Item(digest(pixels, *texts)[:16], dataset, path, width, height, pixels, texts)


def unsuitable(dataset: Dataset, width: int, height: int) -> str:
    """Why a picture of this size is left out; the empty text when it is not."""
    if min(width, height) < 16:
        return f"{width}x{height} px is too small"
    size, least = images.measure(width, height, dataset.resolution_type), dataset.minimum_image_size
    if least is not None and size < least:
        return f"{width}x{height} px is below minimum_image_size ({least:g}, {dataset.resolution_type})"
    shape = round(width / height, 2)
    if shape < dataset.minimum_aspect_ratio:
        return f"its shape {shape:g} is below minimum_aspect_ratio ({dataset.minimum_aspect_ratio:g})"
    if shape > dataset.maximum_aspect_ratio:
        return f"its shape {shape:g} is above maximum_aspect_ratio ({dataset.maximum_aspect_ratio:g})"
    return ""
