"""Where a picture's captions come from, and what is done to them. Several captions of a picture are drawn by (seed, k)."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sd3tune.data.datasets import CaptionShuffle, Dataset, Parquet
from sd3tune.data.sources import Found, HubRow
from sd3tune.errors import DataError

NAME_COLUMNS = ("file_name", "filename", "image", "path", "name")
"""Columns of a CSV file that may hold the pictures' names; the first that is there counts."""

SEPARATORS = {"comma": (",", ", "), "space": (None, " "), "period": (".", ". ")}
"""``split_on`` -> what to split on, and what to join with."""

Reader = Callable[[Found], tuple[str, ...]]


def reader(dataset: Dataset, folder: Path) -> Reader:
    """A function from a picture to its captions, none when it has none. It raises ValueError for a bad caption file.

    Raises: DataError when a table of captions cannot be read.
    """
    raw = _source(dataset, folder)
    rules = filter_rules(dataset.caption_filter_list, folder)

    def captions_of(picture: Found) -> tuple[str, ...]:
        found = raw(picture)
        if dataset.instance_prompt and dataset.only_instance_prompt:
            found = (dataset.instance_prompt,)
        elif dataset.instance_prompt and dataset.prepend_instance_prompt:
            found = tuple(f"{dataset.instance_prompt} {caption}" for caption in found) or (dataset.instance_prompt,)
        kept = (clean(filtered(caption, rules)) for caption in found)
        made = [variant for caption in kept if caption for variant in shuffled(caption, dataset.caption_shuffle)]
        return tuple(dict.fromkeys(made))

    return captions_of


def _source(dataset: Dataset, folder: Path) -> Reader:
    if dataset.caption_strategy == "filename":
        return lambda picture: (from_filename(picture.path),)
    if dataset.caption_strategy == "instanceprompt":
        return lambda picture: (dataset.instance_prompt or "",)
    if dataset.caption_strategy == "textfile":
        return lambda picture: from_textfile(picture.path, split=not dataset.disable_multiline_split)
    if dataset.caption_strategy == "huggingface":
        return lambda picture: _of_row(picture, dataset)
    if dataset.caption_strategy == "csv":
        names = (dataset.csv_url_column,) if dataset.type == "csv" else NAME_COLUMNS
        table, whole = read_csv(table_file(dataset.csv_file or "", folder), dataset.csv_caption_column, names), True
    else:
        assert dataset.parquet is not None
        file = table_file(dataset.parquet.path, folder)
        rows = read_jsonl(file) if file.suffix.lower() in (".jsonl", ".ndjson", ".json") else read_parquet(file)
        table, whole = as_table(rows, dataset.parquet, file), dataset.parquet.identifier_includes_extension

    def look_up(picture: Found) -> tuple[str, ...]:
        ending = "" if whole else picture.path.suffix
        names = [name.removesuffix(ending) for name in (picture.name, picture.path.name)]
        return next(((table[name],) for name in names if name in table), ())

    return look_up


def _of_row(picture: Found, dataset: Dataset) -> tuple[str, ...]:
    text = cast(HubRow, picture.path).text(dataset.caption_column)
    return tuple(line for line in map(clean, [text] if dataset.disable_multiline_split else text.splitlines()) if line)


def clean(text: str) -> str:
    """Blanks and line ends as single blanks."""
    return " ".join(text.split())


def from_filename(picture: Path) -> str:
    """The file's name without its ending, underscores read as blanks."""
    return clean(picture.stem.replace("_", " "))


def from_textfile(picture: Path, *, split: bool = True) -> tuple[str, ...]:
    """The lines of the ``.txt`` file beside the picture; none when there is no file. Raises: ValueError when it is not text."""
    path = picture.with_suffix(".txt")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        return ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = text.splitlines() if split else [text]
    return tuple(line for line in map(clean, lines) if line)


def table_file(name: str, folder: Path) -> Path:
    """A table's file: as named, or inside the folder, or beside it. Raises: DataError."""
    for candidate in (Path(name), folder / name, folder.parent / name):
        if candidate.is_file():
            return candidate
    raise DataError(f"{name}: no such table of captions (looked here, in {folder}, and beside it)")


def read_csv(path: Path, column: str, names_from: Sequence[str] = NAME_COLUMNS) -> dict[str, str]:
    """File name -> caption. Raises: DataError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    columns = list(rows[0]) if rows else []
    names = next((name for name in names_from if name in columns), None)
    if names is None or column not in columns:
        wanted = f"one of {', '.join(names_from)}" if names is None else f"{column!r} (csv_caption_column)"
        raise DataError(f"{path}: there is no column {wanted}; its first line has {columns}")
    return {str(row[names]): str(row[column] or "") for row in rows}


def read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a file with one on each line. Raises: DataError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    return list(_json_lines(lines, path))


def _json_lines(lines: list[str], path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not an object with names and captions")
        yield row


def read_parquet(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a parquet file. Raises: DataError when it cannot be read or pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'sd3tune[datasets]'") from None
    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from None


def as_table(rows: list[Mapping[str, Any]], columns: Parquet, path: Path) -> dict[str, str]:
    """File name -> caption, by the columns that the data set names. Raises: DataError for a column that is not there."""
    known = set(rows[0]) if rows else set()
    for wanted in (columns.filename_column, columns.caption_column):
        if wanted not in known:
            raise DataError(f"{path}: there is no column {wanted!r}; there are {sorted(map(str, known))}")
    fallback = columns.fallback_caption_column
    return {
        str(row.get(columns.filename_column)): str(row.get(columns.caption_column) or (row.get(fallback) if fallback else "") or "")
        for row in rows
    }


def shuffled(caption: str, how: CaptionShuffle | None) -> list[str]:
    """The caption and its tags in other orders, as ``how`` says; a function of (caption, seed, number)."""
    if how is None or not how.enable:
        return [caption]
    split, join = SEPARATORS[how.split_on]
    tags = [tag for tag in (part.strip() for part in caption.split(split)) if tag]
    made = [caption] if how.include_original else []
    for number in range(how.count):
        rest = tags[how.position_start :]
        random.Random(f"{how.seed} {number} {caption}").shuffle(rest)
        made.append(join.join([*tags[: how.position_start], *rest]))
    return made


def filter_rules(given: str | tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The rules of ``caption_filter_list``, read from its file if it names one. Raises: DataError."""
    if isinstance(given, tuple):
        return given
    path = table_file(given, folder)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rules = json.loads(text) if path.suffix.lower() == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a list of rules ({error})") from None
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise DataError(f"{path}: a filter list is a JSON list of texts, or a text file with one rule a line")
    return tuple(rules)


def filtered(caption: str, rules: tuple[str, ...]) -> str:
    """The caption with each rule applied: ``s/this/that/`` replaces, a text is taken out, else it is a regular expression."""
    for rule in rules:
        replacing = re.fullmatch(r"s/((?:[^/\\]|\\.)+)/((?:[^/\\]|\\.)*)/?", rule)
        try:
            if replacing:
                caption = re.sub(replacing[1], replacing[2].replace("\\/", "/"), caption)
            elif rule in caption:
                caption = caption.replace(rule, "")
            else:
                caption = re.sub(rule, "", caption)
        except (re.error, RecursionError) as error:
            raise DataError(f"caption_filter_list: {rule!r} is not a rule ({error})") from None
    return caption
