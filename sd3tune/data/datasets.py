"""The entries of ``datasets.yaml``: every key, declared once, and what becomes of keys that other tools know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sd3tune.config.reading import nearest, read_yaml
from sd3tune.config.schema import STRICT
from sd3tune.errors import ConfigError


def about(meaning: str, *, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """What a person should know of a key."""
    return Field(description=meaning, ge=low, le=high, gt=above)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptionShuffle:
    """Captions made of a list of tags, in other orders."""

    enable: Annotated[bool, about("Whether to shuffle.")] = True
    count: Annotated[int, about("Orders made of each caption.", low=1, high=1000)] = 1
    seed: Annotated[int, about("Seed of the orders.", low=0, high=2**32 - 1)] = 0
    split_on: Annotated[Literal["comma", "space", "period"], about("What stands between two tags.")] = "comma"
    position_start: Annotated[int, about("Tags at the beginning that stay where they are.", low=0, high=1000)] = 0
    include_original: Annotated[bool, about("Keep the caption as it is written, too.")] = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parquet:
    """A table of captions: a parquet or JSONL file."""

    path: Annotated[str, about("The file; a relative one is looked for in the folder, then beside datasets.yaml.")]
    filename_column: Annotated[str, about("Column of the file names.")] = "file_name"
    caption_column: Annotated[str, about("Column of the captions.")] = "caption"
    fallback_caption_column: Annotated[str | None, about("Column that is used where the other is empty.")] = None
    width_column: Annotated[str | None, about("Not used: sizes are read from the pictures.")] = None
    height_column: Annotated[str | None, about("Not used: sizes are read from the pictures.")] = None
    identifier_includes_extension: Annotated[bool, about("Whether the names in the table have their ending.")] = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dataset:
    """One entry of ``datasets.yaml``: a folder of pictures, how they are cut, and where their captions come from."""

    id: Annotated[str, Field(description="Name in reports.", min_length=1)]
    instance_data_dir: Annotated[str, Field(description="Folder; a relative one is looked for beside datasets.yaml.", min_length=1)]
    type: Annotated[Literal["local"], about("Where the folder is.")] = "local"
    dataset_type: Annotated[Literal["image", "eval"], about("To train on, or held out.")] = "image"
    disabled: Annotated[bool, about("Leave this entry out.")] = False

    resolution: Annotated[float, about("Size to train at, in the unit of resolution_type.", above=0, high=8192)] = 1024
    resolution_type: Annotated[
        Literal["pixel", "area", "pixel_area"],
        about("pixel: the shorter side in px; area: megapixels; pixel_area: the side in px of a square of the same area."),
    ] = "pixel_area"
    crop: Annotated[bool, about("Cut to crop_aspect; without it a picture keeps its shape but for what a bucket needs.")] = False
    crop_aspect: Annotated[
        Literal["square", "preserve", "closest", "random"],
        about("Shape to cut to: a square, its own, or one of crop_aspect_buckets."),
    ] = "square"
    crop_aspect_buckets: Annotated[tuple[float, ...], about("Shapes (width / height) for closest and random.")] = ()
    crop_style: Annotated[
        Literal["center", "random", "corner"], about("Where to cut: the middle, anywhere, or the lower right corner.")
    ] = "center"
    crop_variants: Annotated[int, about("Random cuts of each picture that are encoded; epochs go through them.", low=1, high=100)] = 1
    background: Annotated[str, about("Colour behind transparent pictures: a name or #rrggbb.")] = "white"
    flip: Annotated[Literal["none", "horizontal"], about("horizontal: each picture is also seen mirrored.")] = "none"
    max_upscale_threshold: Annotated[
        float | None, about("closest and random leave out shapes that need more enlargement: 0.2 is 20 %.", low=0, high=10)
    ] = None
    minimum_image_size: Annotated[float | None, about("Smaller pictures are left out; unit of resolution_type.", low=0, high=8192)] = None
    maximum_image_size: Annotated[
        float | None, about("Larger pictures are first scaled to target_downsample_size, then cut.", above=0, high=65536)
    ] = None
    target_downsample_size: Annotated[float | None, about("See maximum_image_size; unit of resolution_type.", above=0, high=8192)] = None
    minimum_aspect_ratio: Annotated[float, about("Narrower pictures (width / height) are left out.", above=0, high=100)] = 0.25
    maximum_aspect_ratio: Annotated[float, about("Wider pictures (width / height) are left out.", above=0, high=100)] = 4.0

    caption_strategy: Annotated[
        Literal["textfile", "filename", "instanceprompt", "csv", "jsonl", "parquet"], about("Where captions come from.")
    ] = "textfile"
    instance_prompt: Annotated[str | None, about("Caption of instanceprompt, and what is put before the others.")] = None
    prepend_instance_prompt: Annotated[bool, about("Put instance_prompt before every caption.")] = False
    only_instance_prompt: Annotated[bool, about("Use instance_prompt instead of the captions.")] = False
    disable_multiline_split: Annotated[bool, about("Read a text file as one caption, not as one for each line.")] = False
    caption_shuffle: Annotated[CaptionShuffle | None, about("Captions in other orders of their tags.")] = None
    caption_filter_list: Annotated[
        str | tuple[str, ...], about("Texts or regular expressions to take out, or s/this/that/; a list, or a text or JSON file.")
    ] = ()
    caption_dropout: Annotated[float | None, about("caption_dropout_probability of this data set.", low=0, high=1)] = None
    csv_file: Annotated[str | None, about("Table for caption_strategy csv.")] = None
    csv_caption_column: Annotated[str, about("Its column of captions.")] = "caption"
    parquet: Annotated[Parquet | None, about("Table for caption_strategy parquet and jsonl.")] = None

    repeats: Annotated[int, about("Extra passes in each epoch: 1 shows every picture twice.", low=0, high=10_000)] = 0
    probability: Annotated[float, about("Weight with which batches of this data set come earlier in an epoch.", above=0, high=1e6)] = 1.0
    max_num_samples: Annotated[int | None, about("Use only so many pictures, chosen by their names and the id.", low=1)] = None
    train_batch_size: Annotated[int | None, about("Batch size of this data set.", low=1, high=1024)] = None


UNNECESSARY = {
    "cache_dir_vae": "the cache is shared and keyed by content (cache_dir in the run's settings)",
    "cache_dir": "the cache is shared and keyed by content (cache_dir in the run's settings)",
    "text_embeds": "texts are encoded once for all data sets",
    "image_embeds": "latents are encoded once for all data sets",
    "default": "texts are encoded once for all data sets",
    "write_batch_size": "every entry is written by itself, whole or not at all",
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
}
"""Keys whose job the content-addressed cache has made unnecessary: accepted, and said to be so once."""

EMBEDS = {"text_embeds": "texts", "image_embeds": "latents"}
"""Kinds of entries that only said where other tools keep what they encode."""

_NOTHING_IS_DELETED = "files are never deleted; pictures that cannot be used are listed and left out"
REFUSED = {
    "delete_unwanted_images": _NOTHING_IS_DELETED,
    "delete_problematic_images": _NOTHING_IS_DELETED,
    "delete_nsfw_images": _NOTHING_IS_DELETED,
    "slider_strength": "slider training is out of scope",
    "video": "video is out of scope",
    "audio": "audio is out of scope",
    "webshart": "webshart data sets are out of scope; unpack them into a folder",
    "grounding": "grounding is out of scope",
    "ignore_epochs": "use max_train_steps or num_train_epochs in the run's settings",
}
"""Keys that are never obeyed, with the reason."""

_LATER = "is not there yet in this version; remove it"
LATER = (
    "conditioning", "conditioning_data", "conditioning_type", "source_dataset_id", "is_regularisation_data", "is_regularization_data",
    "timestep_sampling_offset", "start_step", "end_step", "start_epoch", "end_epoch", "dataset_name", "image_column", "caption_column",
    "split", "csv_url_column", "csv_cache_dir", "aws_bucket_name", "aws_endpoint_url", "aws_data_prefix", "aws_access_key_id",
    "aws_secret_access_key", "aws_region_name",
)  # fmt: skip
"""Keys of data sets that this version cannot serve: refused, so that nobody trains on something else."""

VALUES = {
    ("dataset_type", "conditioning"): _LATER,
    ("dataset_type", "video"): "is out of scope",
    ("dataset_type", "audio"): "is out of scope",
    ("dataset_type", "caption"): "is out of scope; use caption_strategy",
    ("dataset_type", "conditioning_image_embeds"): "is out of scope",
    ("type", "aws"): _LATER.replace("remove it", "copy the pictures into a folder"),
    ("type", "csv"): _LATER.replace("remove it", "copy the pictures into a folder"),
    ("type", "huggingface"): _LATER.replace("remove it", "copy the pictures into a folder"),
    ("type", "webshart"): "is out of scope; unpack it into a folder",
    ("caption_strategy", "huggingface"): _LATER.replace("remove it", "write the captions into a table"),
    ("crop_style", "face"): _LATER.replace("remove it", "use center or random"),
    ("conditioning_type", "mask"): _LATER,
    ("conditioning_type", "segmentation"): _LATER,
}
"""Values that other tools know, and why they are refused."""

ALIASES = {"disable": "disabled", "is_regularization_data": "is_regularisation_data", "conditioning_data": "conditioning_data"}


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
    if problems:
        raise ConfigError(problems, str(path))
    return [d for d in found if not d.disabled], tuple(sorted(unnecessary))


def _entry(rows: Mapping[str, Any], unnecessary: set[str]) -> tuple[Dataset | None, list[str]]:
    """An entry, or what is wrong with it; what need not be said any more is added to ``unnecessary``."""
    known = [f.name for f in dataclasses.fields(Dataset)]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for given, value in rows.items():
        key = ALIASES.get(given, given)
        if key in REFUSED:
            problems += [f"{given}: {REFUSED[key]}"] if value not in (None, False) else []
        elif key in LATER:
            problems.append(f"{given} {_LATER}")
        elif key in UNNECESSARY:
            unnecessary.add(f"{given} is not needed: {UNNECESSARY[key]}")
        elif key not in known:
            problems.append(f"unknown key {given!r}{nearest(given, [*known, *UNNECESSARY, *LATER])}")
        elif isinstance(value, str) and (key, value) in VALUES:
            problems.append(f"{given} {value} {VALUES[key, value]}")
        elif key in values:
            problems.append(f"{key} is set twice")
        else:
            values[key] = value
    try:
        made = dataset_of(values)
    except (ValueError, TypeError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            return None, [*problems, f"is not plain data ({error})"]
        refused = {problem.split(" ")[0].rstrip(":") for problem in problems}
        wrong = {".".join(map(str, _where(one["loc"]))): one["msg"].removeprefix("Input should be ") for one in error.errors()}
        return None, problems + [f"{leaf}: {wanted}" for leaf, wanted in wrong.items() if leaf.split(".")[0] not in refused]
    return (None, problems) if problems else (made, contradictions(made))


def dataset_of(values: Mapping[str, Any]) -> Dataset:
    """An entry from plain data such as YAML or JSON holds. Raises: pydantic.ValidationError."""
    return TypeAdapter(Dataset).validate_json(json.dumps(values, default=str))  # strict, but a list is a tuple there


def _where(location: tuple[int | str, ...]) -> list[int | str]:
    return [part for part in location if not (isinstance(part, str) and ("[" in part or part in ("str", "CaptionShuffle", "Parquet")))]


def contradictions(d: Dataset) -> list[str]:
    """What is wrong with keys that are each legal alone, one sentence each."""
    problems = []
    if d.crop and d.crop_aspect in ("closest", "random") and not d.crop_aspect_buckets:
        problems.append(f"crop_aspect {d.crop_aspect} needs crop_aspect_buckets, for example [0.75, 1.0, 1.33]")
    if any(not 0.05 <= shape <= 20 for shape in d.crop_aspect_buckets):
        problems.append("crop_aspect_buckets: each is width / height, from 0.05 to 20")
    if (d.maximum_image_size is None) != (d.target_downsample_size is None):
        problems.append("maximum_image_size and target_downsample_size belong together; set both or none")
    elif d.maximum_image_size is not None and d.target_downsample_size is not None and d.target_downsample_size > d.maximum_image_size:
        problems.append("target_downsample_size is larger than maximum_image_size")
    if d.target_downsample_size is not None and d.target_downsample_size < d.resolution:
        problems.append("target_downsample_size is below resolution: pictures would be scaled down and up again")
    try:
        ImageColor.getrgb(d.background)
    except ValueError:
        problems.append(f"background: {d.background!r} is not a colour; write a name such as white, or #rrggbb")
    if d.crop_variants > 1 and not (d.crop and d.crop_style == "random"):
        problems.append("crop_variants needs crop: true and crop_style: random")
    if d.resolution_type == "area" and d.resolution > 16:
        problems.append(f"resolution {d.resolution:g} with resolution_type area is {d.resolution:g} megapixels; did you mean pixel_area?")
    if d.resolution_type != "area" and d.resolution < 16:
        problems.append(f"resolution {d.resolution:g} is in px with resolution_type {d.resolution_type}; did you mean area (megapixels)?")
    if d.minimum_aspect_ratio > d.maximum_aspect_ratio:
        problems.append("minimum_aspect_ratio is above maximum_aspect_ratio")
    wants_prompt = d.caption_strategy == "instanceprompt" or d.prepend_instance_prompt or d.only_instance_prompt
    if wants_prompt and not d.instance_prompt:
        problems.append("instance_prompt is missing")
    if d.caption_strategy == "csv" and not d.csv_file:
        problems.append("caption_strategy csv needs csv_file")
    if d.caption_strategy in ("parquet", "jsonl") and d.parquet is None:
        problems.append(f"caption_strategy {d.caption_strategy} needs parquet: {{path: ...}}, the table of captions")
    return problems
