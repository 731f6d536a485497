"""Where pictures lie: a folder, an address that fsspec knows, a table of addresses, or a data set of the hub. Read only."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from sd3tune.data import images
from sd3tune.data.datasets import Dataset
from sd3tune.errors import DataError

LITTER = frozenset({".ipynb_checkpoints", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "@eadir"})
"""Names, in lower case, that systems leave in folders; passed over like everything that begins with a point."""


class Found(NamedTuple):
    """A picture file. ``name`` is relative to its data set; ``place`` is the same for two names of one file."""

    path: Path
    name: str
    size: int
    time: int
    place: tuple[int, int] | str


@dataclass(frozen=True)
class HubRow:
    """A picture in a row of a data set of the hub; stands where other pictures have a path."""

    name: str
    number: int
    column: str
    rows: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

    def __lt__(self, other: HubRow) -> bool:
        return (self.name, self.number) < (other.name, other.number)

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the name."""
        return Path(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """The picture's bytes. Raises: OSError when the row holds none."""
        value = self.rows[self.number][self.column]
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if not value.get("path"):
            raise OSError("the row holds no picture")
        return place(value["path"]).open("rb")

    def text(self, column: str) -> str:
        """The text in another column of the row. Raises: ValueError when there is no such column."""
        row: Mapping[str, Any] = self.rows[self.number]
        if column not in row:
            raise ValueError(f"there is no column {column!r}; there are {sorted(row)}")
        return str(row[column] or "")


def place(address: str) -> Path:
    """A path, or what stands for one at an address such as ``s3://bucket/folder``. Raises: DataError."""
    if "://" not in address:
        return Path(address)
    try:
        from upath import UPath

        return cast(Path, UPath(address))
    except ImportError as error:
        raise DataError(f"{address}: reading addresses needs {error.name or 'universal-pathlib'}; pip install 'sd3tune[remote]'") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{address}: not an address that can be read ({error})") from None


def find(dataset: Dataset) -> list[Found]:
    """Every picture file of a data set, in order of name. Raises: DataError when its place cannot be read."""
    if dataset.type == "huggingface":
        return list(_of_hub(dataset))
    folder = place(dataset.instance_data_dir)
    try:
        if dataset.type == "csv":
            return list(_of_table(dataset, folder))
        if "://" in dataset.instance_data_dir:
            return sorted(_of_address(folder), key=lambda found: found.name)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"data set {dataset.id!r}: {dataset.instance_data_dir} cannot be read ({error})") from None
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data set {dataset.id!r}: {folder} {what}; correct instance_data_dir")
    return sorted(_of_folder(folder), key=lambda found: found.name.split(os.sep))


def _of_folder(folder: Path) -> Iterator[Found]:
    """Picture files below a folder, linked folders included, each real folder once; litter is passed over."""
    seen: set[tuple[int, int]] = set()
    for name, below, files in os.walk(folder, followlinks=True):
        mark = os.stat(name)
        if (mark.st_dev, mark.st_ino) in seen:
            below.clear()
            continue
        seen.add((mark.st_dev, mark.st_ino))
        below[:] = sorted(d for d in below if not is_litter(d))
        for file in files:
            if os.path.splitext(file)[1].lower() in images.suffixes() and not is_litter(file):
                path = os.path.join(name, file)
                try:
                    found = os.stat(path)
                except OSError:  # a link to nothing, or gone meanwhile: reading it will say so
                    yield Found(Path(path), os.path.relpath(path, folder), 0, 0, path)
                else:
                    shown = Path(path)
                    yield Found(shown, path[len(str(folder)) + 1 :], found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))


def is_litter(name: str) -> bool:
    """Whether systems leave files or folders of this name behind."""
    return name.startswith(".") or name.lower() in LITTER


def _of_address(folder: Any) -> Iterator[Found]:
    """Picture files below an address, from one listing."""
    if not folder.exists():
        raise ValueError("there is nothing there")
    root = folder.path.rstrip("/")
    for name, row in folder.fs.find(folder.path, detail=True).items():
        relative = name.removeprefix(root.lstrip("/") if not name.startswith("/") else root).lstrip("/")
        parts = relative.split("/")
        if os.path.splitext(relative)[1].lower() in images.suffixes() and not any(map(is_litter, parts)):
            yield Found(folder.joinpath(*parts), relative, int(row.get("size") or 0), _time(row), str(folder / relative))


def _time(row: Mapping[str, Any]) -> int:
    """When a remote file was last changed, in nanoseconds; 0 when the listing does not say."""
    for name in ("LastModified", "mtime", "last_modified", "updated", "created"):
        value = row.get(name)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, (int, float)):
            return int(value * 1e9)
    return 0


def _of_table(dataset: Dataset, folder: Path) -> Iterator[Found]:
    """The files and addresses in a column of a CSV file."""
    from sd3tune.data.captions import table_file

    file = table_file(dataset.csv_file or "", folder)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        for row in csv.DictReader(opened):
            name = row.get(dataset.csv_url_column)
            if name is None:
                raise ValueError(f"{file.name} has no column {dataset.csv_url_column!r} (csv_url_column); there are {list(row)}")
            path = place(name) if "://" in name else folder / name
            try:
                found = path.stat()
                yield Found(path, name, found.st_size, int((found.st_mtime or 0) * 1e9), str(path))
            except OSError:
                yield Found(path, name, 0, 0, str(path))


def _of_hub(dataset: Dataset) -> Iterator[Found]:
    """The rows of a data set of the hub, or of a folder in a layout that the `datasets` library reads."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"data set {dataset.id!r}: type huggingface needs the datasets library; pip install 'sd3tune[datasets]'") from None
    name = dataset.dataset_name or dataset.instance_data_dir
    try:
        rows = datasets.load_dataset(name, split=dataset.split)
        if dataset.image_column not in rows.column_names:
            raise DataError(
                f"data set {dataset.id!r}: no column {dataset.image_column!r} (image_column); there are {sorted(rows.column_names)}"
            )
        rows = rows.cast_column(dataset.image_column, datasets.Image(decode=False))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set {dataset.id!r}: {name} ({dataset.split}) cannot be loaded ({error})") from None
    for number in range(len(rows)):
        value = rows[number][dataset.image_column] or {}
        shown = os.path.basename(value.get("path") or "") or f"{number:08d}"
        row = HubRow(f"{number:08d} {shown}" if value.get("path") else shown, number, dataset.image_column, rows)
        size = len(value.get("bytes") or b"") or (os.path.getsize(value["path"]) if os.path.exists(value.get("path") or "") else 0)
        yield Found(cast(Path, row), row.name, size, 0, f"{name} {number}")
