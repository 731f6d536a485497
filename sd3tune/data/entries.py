"""Reading ``datasets.yaml``, and what becomes of keys that people know from other tools: obeyed, said to be unnecessary, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sd3tune.config.reading import nearest, read_yaml
from sd3tune.data.datasets import Dataset, contradictions, dataset_of, links
from sd3tune.errors import ConfigError

UNNECESSARY = {
    "cache_dir_vae": "the cache is shared and keyed by content (cache_dir in the run's settings)",
    "cache_dir": "the cache is shared and keyed by content (cache_dir in the run's settings)",
    "text_embeds": "texts are encoded once for all data sets",
    "image_embeds": "latents are encoded once for all data sets",
    "default": "texts are encoded once for all data sets",
    "write_batch_size": "write_batch_size is a setting of the run",
    "vae_batch_size": "vae_batch_size is a setting of the run",
    "text_encoder_batch_size": "text_encoder_batch_size is a setting of the run",
    "skip_file_discovery": "looking is quick and never writes into the folder",
    "metadata_backend": "sizes are read from the pictures' headers",
    "preserve_data_backend_cache": "there is no list of files that could be out of date",
    "vae_cache_clear_each_epoch": "a cache that is keyed by content is never out of date",
    "vae_cache_ondemand": "only what is missing is encoded, before training",
    "vae_cache_disable": "only what is missing is encoded, before training",
    "text_cache_ondemand": "only what is missing is encoded, before training",
    "text_cache_disable": "only what is missing is encoded, before training",
    "aspect_resolution_map": "sizes follow from the shapes alone; `sd3tune plan` shows them",
    "hash_filenames": "entries are named by content",
    "cache_file_suffix": "entries are named by content",
    "csv_cache_dir": "pictures are read through, and encoded once",
    "aws_region_name": "s3 addresses are read with the usual environment (AWS_DEFAULT_REGION)",
}
"""Keys whose job the content-addressed cache has made unnecessary: accepted, and said to be so once."""

EMBEDS = {"text_embeds": "texts", "image_embeds": "latents"}
"""Kinds of entries that only said where other tools keep what they encode."""

_NOTHING_IS_DELETED = "files are never deleted; pictures that cannot be used are listed and left out"
REFUSED = {
    "delete_unwanted_images": _NOTHING_IS_DELETED,
    "delete_problematic_images": _NOTHING_IS_DELETED,
    "delete_nsfw_images": _NOTHING_IS_DELETED,
    "conditioning": "nothing is made of pictures while they are read; `sd3tune data masks` writes masks, conditioning_data names them",
    "source_dataset_id": "write conditioning_data with this entry's id on the data set of the pictures",
    "slider_strength": "slider training is out of scope",
    "video": "video is out of scope",
    "audio": "audio is out of scope",
    "webshart": "webshart data sets are out of scope; unpack them into a folder",
    "grounding": "grounding is out of scope",
    "aws_access_key_id": "secrets do not belong into this file; s3 addresses are read with the usual environment (AWS_ACCESS_KEY_ID)",
    "aws_secret_access_key": "secrets do not belong into this file; s3 addresses are read with the usual environment",
    "aws_endpoint_url": "set it in the usual environment (AWS_ENDPOINT_URL)",
    "ignore_epochs": "use max_train_steps or num_train_epochs in the run's settings",
}
"""Keys that are never obeyed, with the reason."""

MASKS = frozenset({"id", "type", "instance_data_dir", "dataset_type", "conditioning_type", "disabled"})
"""Keys that count on an entry of masks; how they are cut is up to their pictures."""

VALUES = {
    ("dataset_type", "video"): "is out of scope",
    ("dataset_type", "audio"): "is out of scope",
    ("dataset_type", "caption"): "is out of scope; use caption_strategy",
    ("dataset_type", "conditioning_image_embeds"): "is out of scope",
    ("type", "webshart"): "is out of scope; unpack it into a folder",
}
"""Values that other tools know, and why they are refused."""

ALIASES = {"disable": "disabled", "is_regularization_data": "is_regularisation_data"}


def read_datasets(path: Path) -> tuple[list[Dataset], tuple[str, ...]]:
    """The entries of a ``datasets.yaml`` that are not disabled, and what should be said of them.

    Raises: ConfigError with every problem at once.
    """
    content = read_yaml(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ConfigError(["the file is not a list of data sets"], str(path))
    found: list[Dataset] = []
    problems: list[str] = []
    ids: list[str] = []
    unnecessary: set[str] = set()
    for number, row in enumerate(content, start=1):
        rows = {str(key): value for key, value in row.items()}
        name = f"data set {rows.get('id', number)!r}"
        embeds = rows.get("dataset_type")
        if isinstance(embeds, str) and embeds in EMBEDS:
            unnecessary.add(f"dataset_type {embeds}: {EMBEDS[embeds]} are kept in one cache, keyed by content; the entry is not needed")
            continue
        ids.append(str(rows.get("id", number)))
        made, wrong = _entry(rows, unnecessary)
        problems += [f"{name}: {problem}" for problem in wrong]
        if made:
            found.append(made)
    problems += [f"id {twice!r} is used twice" for twice in sorted({i for i in ids if ids.count(i) > 1})]
    kept = [d for d in found if not d.disabled]
    if problems := problems or links(kept):
        raise ConfigError(problems, str(path))
    return kept, tuple(sorted(unnecessary))


def unneeded_on_masks(row: Mapping[str, Any], key: str) -> bool:
    """Whether it is a key of pictures on an entry of masks."""
    return row.get("dataset_type") == "conditioning" and key in Dataset.__dataclass_fields__ and key not in MASKS


def _entry(rows: Mapping[str, Any], unnecessary: set[str]) -> tuple[Dataset | None, list[str]]:
    """An entry, or what is wrong with it; what need not be said any more is added to ``unnecessary``."""
    known = [f.name for f in dataclasses.fields(Dataset)]
    values: dict[str, Any] = {}
    problems: list[str] = []
    if rows.get("type") == "aws":
        rows, problems = _of_bucket(rows)
    for given, value in rows.items():
        key = ALIASES.get(given, given)
        if key in REFUSED:
            problems += [f"{given}: {REFUSED[key]}"] if value not in (None, False) else []
        elif unneeded_on_masks(rows, key):
            unnecessary.add(f"{given} is not needed on masks: they are cut as their pictures")
        elif key in UNNECESSARY:
            unnecessary.add(f"{given} is not needed: {UNNECESSARY[key]}")
        elif key not in known:
            problems.append(f"unknown key {given!r}{nearest(given, [*known, *UNNECESSARY])}")
        elif isinstance(value, str) and (key, value) in VALUES:
            problems.append(f"{given} {value} {VALUES[key, value]}")
        elif key in values:
            problems.append(f"{key} is set twice")
        else:
            values[key] = value[0] if key == "conditioning_data" and isinstance(value, list) and len(value) == 1 else value
    try:
        made = dataset_of(values)
    except (ValueError, TypeError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            return None, [*problems, f"is not plain data ({error})"]
        refused = {problem.split(" ")[0].rstrip(":") for problem in problems}
        wrong = {".".join(map(str, _where(one["loc"]))): one["msg"].removeprefix("Input should be ") for one in error.errors()}
        return None, problems + [f"{leaf}: {wanted}" for leaf, wanted in wrong.items() if leaf.split(".")[0] not in refused]
    return (None, problems) if problems else (made, contradictions(made))


def _of_bucket(rows: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An entry of type aws as one with an s3 address, and what is wrong with it."""
    bucket, prefix = rows.get("aws_bucket_name"), str(rows.get("aws_data_prefix") or "").strip("/")
    kept = {key: value for key, value in rows.items() if key not in ("type", "aws_bucket_name", "aws_data_prefix")}
    if not bucket:
        return kept, ["aws_bucket_name is missing; or write instance_data_dir: s3://bucket/folder, without type"]
    return {**kept, "instance_data_dir": f"s3://{bucket}/{prefix}".rstrip("/")}, []


def entry_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of another tool's entry that are obeyed here, and the others with the reason; unnecessary ones are left out."""
    known = {key: value for key, value in row.items() if key not in UNNECESSARY}
    kept = {ALIASES.get(key, key): value for key, value in known.items() if not unneeded_on_masks(row, ALIASES.get(key, key))}
    refused: dict[str, str] = {}
    while True:
        _, problems = _entry(kept, set())
        found = {_key_of(problem, kept): problem for problem in problems}
        refused |= found
        if not set(found) & set(kept):
            return kept, refused
        kept = {key: value for key, value in kept.items() if key not in found}


def _key_of(problem: str, row: Mapping[str, Any]) -> str:
    """The key that a sentence is about: the first of the row's that stands in it, else the first word."""
    words = [word.strip("'.:;,()") for word in problem.replace("unknown key ", "").split()]
    return next((word.split(".")[0] for word in words if word.split(".")[0] in row), words[0].split(".")[0])


def _where(location: tuple[int | str, ...]) -> list[int | str]:
    return [part for part in location if not (isinstance(part, str) and ("[" in part or part in ("str", "CaptionShuffle", "Parquet")))]
