"""What is in the folders: an item for each usable picture, a problem for each other one. Reads, and changes nothing there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from sd3tune.data import captions, faces, holding, images, masks, overlay, sources
from sd3tune.data.datasets import Dataset
from sd3tune.data.entries import read_datasets
from sd3tune.data.masks import Mask
from sd3tune.data.seen import Seen, digests
from sd3tune.data.sources import Found
from sd3tune.errors import DataError
from sd3tune.files import digest
from sd3tune.shown import Shown


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture with its captions. ``pixels`` is the digest of the file's bytes, empty while it was not read yet."""

    dataset: Dataset
    path: Path
    width: int
    height: int
    pixels: str
    captions: tuple[str, ...]
    focus: tuple[float, float] | None = None
    """Where a face is, in shares of width and height."""
    found: Found | None = dataclasses.field(default=None, repr=False, compare=False)
    mask: Mask | None = None
    """Which of its pixels count in the loss; all of them, if left out."""
    chosen: bool = False
    """Whether it is in the ``eval_share`` of a data set to train on."""

    @cached_property
    def id(self) -> str:
        """Identity of the pair, 16 hexadecimal digits; of the place and the captions while the picture was not read yet."""
        mask = () if self.mask is None else (f"{self.mask.kind} {self.mask.pixels}",)
        return digest(self.pixels or str(self.path), *mask, *self.captions)[:16]

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation and never trained on."""
        return self.chosen or self.dataset.dataset_type == "eval"

    @property
    def mask_pixels(self) -> str:
        """The digest of the bytes that hold its mask, empty while they were not read or when it has none."""
        return "" if self.mask is None else self.mask.pixels or self.pixels

    @property
    def caption(self) -> str:
        """The first caption, or the empty text: what evaluation and reference pictures use."""
        return self.captions[0] if self.captions else ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is left out, or should be looked at, and why."""

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
    source: str = dataclasses.field(default="", compare=False)
    """The file, folder or address that it was discovered from, absolute; empty for entries that came from nowhere."""

    def __str__(self) -> str:
        lines = []
        for dataset in self.datasets:
            count = sum(item.dataset == dataset for item in self.items)
            what = "masks" if dataset.dataset_type == "conditioning" else f"{count} pictures"
            lines.append(f"{dataset.id}: {what} from {dataset.instance_data_dir or dataset.dataset_name}")
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"refused: {p.path}: {p.reason}" for p in self.problems]
        if self.missing_captions:
            lines.append(f"without a caption: {len(self.missing_captions)}, the first is {self.missing_captions[0]}")
        return "\n".join(lines)


def discover(source: str | Path) -> Catalog:
    """Everything in the folders of a ``datasets.yaml``, or in one folder or address with ``.txt`` captions.

    Raises: ConfigError for entries that are wrong; DataError for a folder that is missing or holds no usable picture.
    """
    path = Path(source).expanduser()
    if path.is_dir() or "://" in str(source):
        place = str(source) if "://" in str(source) else str(path)
        found = from_datasets([Dataset(id=path.resolve().name or "pictures", instance_data_dir=place)])
        return dataclasses.replace(found, source=place if "://" in place else str(path.absolute()))
    if path.suffix.lower() not in (".yaml", ".yml"):
        what = "is a file, not a folder" if path.exists() else f"no such folder (from {Path.cwd()})"
        raise DataError(f"{path}: {what}; give a folder of pictures or a datasets.yaml")
    entries, notes = read_datasets(path)
    found = from_datasets(entries, beside=path.parent, notes=notes, edited=overlay.read(path))
    return dataclasses.replace(found, source=str(path.absolute()))


def again(datasets: Sequence[Dataset], source: str) -> Catalog:
    """The catalog of a run's entries, with the captions that were edited beside the file they came from. Raises: DataError."""
    edited = overlay.read(Path(source)) if Path(source).suffix.lower() in (".yaml", ".yml") else None
    return dataclasses.replace(from_datasets(datasets, edited=edited), source=source)


def from_datasets(
    datasets: Sequence[Dataset], *, beside: Path = Path(), notes: tuple[str, ...] = (), edited: overlay.Captions | None = None
) -> Catalog:
    """The catalog of entries already read; relative folders are looked for in ``beside``. Raises: DataError."""
    entries = [dataclasses.replace(d, instance_data_dir=_absolute(d.instance_data_dir, beside)) for d in datasets]
    items: list[Item] = []
    problems: list[Problem] = []
    for dataset in entries:
        if dataset.dataset_type == "conditioning":
            continue
        found = _of_dataset(dataset, (edited or {}).get(dataset.id, {}))
        items += holding.chosen([one for one in found if isinstance(one, Item)], dataset.eval_share)
        problems += [one for one in found if isinstance(one, Problem)]
    same = identities(items)
    items, shared, doubles = _apart(items, same)
    if all(item.held_out for item in items):
        raise DataError("there is nothing to train on: no enabled data set has dataset_type: image" + _listed(shared))
    if all(item.dataset.is_regularisation_data for item in items if not item.held_out):
        raise DataError("there is nothing to learn: every data set to train on has is_regularisation_data: true")
    items = masks.attached(items, entries)
    missing = tuple(item.path for item in items if not item.captions)
    said = overlay.notes(edited or {}, items)
    return Catalog(tuple(entries), tuple(items), (*problems, *shared), missing, (*notes, *said, *doubles))


def _absolute(folder: str, beside: Path) -> str:
    return folder if not folder or "://" in folder else str((beside / folder).resolve())


def identities(items: Sequence[Item]) -> list[str]:
    """A text for each item, equal for equal bytes alone, and made by reading as little as possible.

    Files of different lengths differ; two names of one file are one; only what is left over is read.
    """
    names = [f"{item.path}" if item.found is None or not item.found.size else f"{item.found.size}" for item in items]
    alike: dict[str, dict[tuple[int, int] | str, list[int]]] = {}
    for number, (item, name) in enumerate(zip(items, names, strict=True)):
        place = item.found.place if item.found else str(item.path)
        alike.setdefault(name, {}).setdefault(place, []).append(number)
    for places in alike.values():
        if len(places) > 1:
            edges: dict[str, list[list[int]]] = {}
            for numbers in places.values():
                edges.setdefault(_edges(items[numbers[0]].path), []).append(numbers)
            for edge, rows in edges.items():
                firsts = [items[numbers[0]] for numbers in rows]
                known = {item.path: item.pixels for item in firsts}
                if len(rows) > 1:
                    unread = [item.path for item in firsts if not item.pixels]
                    known |= {path: pixels or problem for path, pixels, problem in digests(unread)}
                for numbers in rows:
                    for number in numbers:
                        names[number] = f"{names[number]} {known[items[numbers[0]].path] if len(rows) > 1 else edge}"
    return names


def _edges(path: Path, length: int = 1 << 16) -> str:
    """A digest of both ends of a file."""
    try:
        with path.open("rb") as opened:
            first = opened.read(length)
            opened.seek(max(0, opened.seek(0, 2) - length))
            return digest(first, opened.read(length))
    except OSError as error:
        return f"{path} {error}"


def _apart(items: list[Item], same: list[str]) -> tuple[list[Item], list[Problem], list[str]]:
    """The items without those to train on whose very bytes are also held out, those as problems, and sentences on doubles."""
    held = {name: item for item, name in zip(items, same, strict=True) if item.held_out}
    kept, shared, said = list[Item](), list[Problem](), list[str]()
    first: dict[tuple[str, str], Item] = {}
    for item, name in zip(items, same, strict=True):
        if not item.held_out and name in held:
            other = held[name]
            shared.append(Problem(item.path, f"is also held out, in data set {other.dataset.id!r} as {other.path.name}; not trained on"))
            continue
        kept.append(item)
        before = first.setdefault((item.dataset.id, name), item)
        if before is not item:
            said.append(f"{item.path} is the same picture as {before.path.name}; it counts twice")
    return kept, shared, [*said[:20], f"and {len(said) - 20} more pictures that stand twice"] if len(said) > 21 else said


def _of_dataset(dataset: Dataset, edited: Mapping[str, tuple[str, ...]]) -> list[Item | Problem]:
    """Items and problems of one data set. Raises: DataError when there is not one item."""
    where = dataset.instance_data_dir or dataset.dataset_name or ""
    files = sample(dataset, sources.find(dataset))
    read = captions.reader(dataset, sources.place(dataset.instance_data_dir))
    seen = Seen(where)
    found = list(_looked_at(dataset, files, read, seen, edited))
    seen.save([file.name for file in files])
    if not any(isinstance(one, Item) for one in found):
        problems = [one for one in found if isinstance(one, Problem)]
        held = f"none of its {len(problems)} pictures can be used:{_listed(problems)}" if problems else "it holds no picture"
        raise DataError(f"data set {dataset.id!r}: {where}: {held}" + ("" if problems else f" ({', '.join(sorted(images.suffixes()))})"))
    return found


def _listed(problems: Sequence[Problem]) -> str:
    return "".join(f"\n  {p.path.name}: {p.reason}" for p in problems[:5])


def sample(dataset: Dataset, files: list[Found]) -> list[Found]:
    """At most ``max_num_samples`` of them: those whose digests of (id, name) are smallest, so that it never depends on order."""
    most = dataset.max_num_samples
    if most is None or len(files) <= most:
        return files
    chosen = sorted(files, key=lambda file: digest(dataset.id, file.name.encode("utf-8", "surrogateescape")))[:most]
    return [file for file in files if file in chosen]


def _looked_at(
    dataset: Dataset, files: list[Found], read: captions.Reader, seen: Seen, edited: Mapping[str, tuple[str, ...]]
) -> Iterator[Item | Problem]:
    """An item for each file, or why it cannot be one."""
    finder = faces.finder() if dataset.crop and dataset.crop_style == "face" else None
    for file in files:
        width, height, pixels, focus = known = seen.get(file) or (0, 0, "", None)
        try:
            if not width:
                width, height = images.size(file.path)
            reason = unsuitable(dataset, width, height)
            if not reason and finder and focus is None:
                focus = finder(file.path)
            if not reason and dataset.read_at_once and not pixels:
                ((_, pixels, reason),) = digests([file.path])
        except images.BROKEN as error:
            yield Problem(file.path, f"not a readable picture ({error})")
            continue
        if (width, height, pixels, focus) != known:
            seen.put(file, (width, height, pixels, focus))
        if reason:
            yield Problem(file.path, reason)
            continue
        try:
            texts = edited[file.name] if file.name in edited else read(file)
        except (ValueError, OSError) as error:
            yield Problem(file.path, str(error))
            continue
        yield Item(dataset, file.path, width, height, pixels, texts, focus, file)


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
