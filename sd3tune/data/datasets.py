"""The keys of ``datasets.yaml``, each declared once: meaning, default, range."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import STRICT


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
    instance_data_dir: Annotated[
        str, about("Folder (a relative one is looked for beside datasets.yaml), or an address such as s3://bucket/folder.")
    ] = ""
    type: Annotated[
        Literal["local", "csv", "huggingface"], about("What holds the pictures: a folder or address, a table of addresses, or the hub.")
    ] = "local"
    dataset_type: Annotated[
        Literal["image", "eval", "conditioning"], about("To train on, held out, or (conditioning) masks for the pictures of other entries.")
    ] = "image"
    eval_share: Annotated[
        float, about("Share of these pictures to hold out for the evaluation loss; which ones follows from their bytes.", low=0, high=0.9)
    ] = 0.0
    conditioning_type: Annotated[
        Literal["mask", "segmentation"] | None,
        about(
            "Of masks. mask: black is ignored, grey counts by its brightness, white in full; segmentation: all that is not black counts."
        ),
    ] = None
    conditioning_data: Annotated[
        str | None, about("Id of the entry with this one's masks: files of the same names, each with any ending of a picture.")
    ] = None
    mask_from_alpha: Annotated[bool, about("Masks are the pictures' own alpha channels: what is transparent is ignored.")] = False
    is_regularisation_data: Annotated[
        bool, about("Pictures on which the model should stay as it is: their target is what the base model predicts.")
    ] = False
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
        Literal["center", "random", "corner", "face"],
        about("Where to cut: the middle, anywhere, the lower right corner, or around the largest face."),
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
        Literal["textfile", "filename", "instanceprompt", "csv", "jsonl", "parquet", "huggingface"], about("Where captions come from.")
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
    csv_url_column: Annotated[str, about("Its column of files or addresses, for type csv.")] = "url"
    dataset_name: Annotated[str | None, about("type huggingface: its name on the hub, or a folder that the datasets library reads.")] = None
    split: Annotated[str, about("type huggingface: which part.")] = "train"
    image_column: Annotated[str, about("type huggingface: the column of pictures.")] = "image"
    caption_column: Annotated[str, about("caption_strategy huggingface: the column of captions.")] = "caption"
    parquet: Annotated[Parquet | None, about("Table for caption_strategy parquet and jsonl.")] = None

    repeats: Annotated[int, about("Extra passes in each epoch: 1 shows every picture twice.", low=0, high=10_000)] = 0
    probability: Annotated[float, about("Weight with which batches of this data set come earlier in an epoch.", above=0, high=1e6)] = 1.0
    max_num_samples: Annotated[int | None, about("Use only so many pictures, chosen by their names and the id.", low=1)] = None
    train_batch_size: Annotated[int | None, about("Batch size of this data set.", low=1, high=1024)] = None
    start_step: Annotated[int, about("Updates of the run after which this data set joins.", low=0, high=10_000_000)] = 0
    end_step: Annotated[int | None, about("Updates of the run after which it leaves.", low=1, high=10_000_000)] = None
    start_epoch: Annotated[int, about("First epoch in which it is seen.", low=1, high=10_000_000)] = 1
    end_epoch: Annotated[int | None, about("Last epoch in which it is seen.", low=1, high=10_000_000)] = None
    timestep_sampling_offset: Annotated[
        float, about("Moves this data set's noise levels, before the shift: above 0 noisier. In the unit of the logit.", low=-10, high=10)
    ] = 0.0

    @property
    def drawn_by_content(self) -> bool:
        """Whether cuts are drawn at random, which is a function of the picture's bytes."""
        return self.crop and (self.crop_style == "random" or self.crop_aspect == "random")

    @property
    def read_at_once(self) -> bool:
        """Whether the pictures' bytes decide something before anything is encoded."""
        return self.drawn_by_content or self.eval_share > 0

    @property
    def always(self) -> bool:
        """Whether it is seen from the first update to the last."""
        return (self.start_step, self.end_step, self.start_epoch, self.end_epoch) == (0, None, 1, None)


def dataset_of(values: Mapping[str, Any]) -> Dataset:
    """An entry from plain data such as YAML or JSON holds. Raises: pydantic.ValidationError."""
    return TypeAdapter(Dataset).validate_json(json.dumps(values, default=str))  # strict, but a list is a tuple there


def links(datasets: Sequence[Dataset]) -> list[str]:
    """What is wrong between pictures and masks of different entries, one sentence each."""
    masks = {d.id for d in datasets if d.dataset_type == "conditioning"}
    named = {d.conditioning_data for d in datasets}
    problems = [
        f"data set {d.id!r}: conditioning_data: there is no enabled data set {d.conditioning_data!r} with dataset_type: conditioning"
        for d in datasets
        if d.conditioning_data is not None and d.conditioning_data not in masks
    ]
    return problems + [
        f"data set {one!r}: its masks belong to no data set; write conditioning_data: {one} on that of their pictures, or disabled: true"
        for one in sorted(masks - named)
    ]


def _of_masks(d: Dataset) -> list[str]:
    """What is wrong with keys of masks and of regularisation."""
    problems = []
    masks = d.dataset_type == "conditioning"
    if masks and d.conditioning_type is None:
        problems.append("conditioning_type is missing: mask or segmentation")
    if masks and d.type != "local":
        problems.append("masks are files in a folder or at an address: type local")
    if not masks and d.conditioning_type is not None:
        problems.append("conditioning_type belongs to the entry with the masks; name that entry here with conditioning_data")
    if d.conditioning_data is not None and d.mask_from_alpha:
        problems.append("conditioning_data and mask_from_alpha both say where masks come from; set one")
    if d.is_regularisation_data and d.dataset_type == "eval":
        problems.append("is_regularisation_data is for pictures to train on, not for dataset_type eval")
    if d.eval_share and (d.dataset_type != "image" or d.is_regularisation_data):
        problems.append("eval_share is for pictures to learn from (dataset_type image, no regularisation); remove it here")
    return problems


def contradictions(d: Dataset) -> list[str]:
    """What is wrong with keys that are each legal alone, one sentence each."""
    problems = _of_masks(d)
    if d.type != "huggingface" and not d.instance_data_dir and not (d.type == "csv" and d.csv_file):
        problems.append("instance_data_dir is missing: the folder of its pictures")
    if d.type == "huggingface" and not (d.dataset_name or d.instance_data_dir):
        problems.append("type huggingface needs dataset_name, for example bghira/pseudo-camera-10k")
    if d.type == "csv" and not d.csv_file:
        problems.append("type csv needs csv_file, the table of files or addresses")
    if d.caption_strategy == "huggingface" and d.type != "huggingface":
        problems.append("caption_strategy huggingface needs type huggingface")
    if d.type == "huggingface" and d.caption_strategy in ("textfile", "csv", "jsonl", "parquet"):
        problems.append(f"type huggingface has no files for caption_strategy {d.caption_strategy}; write huggingface or instanceprompt")
    if d.end_step is not None and d.end_step <= d.start_step:
        problems.append("end_step is not above start_step, so it would never be seen")
    if d.end_epoch is not None and d.end_epoch < d.start_epoch:
        problems.append("end_epoch is below start_epoch, so it would never be seen")
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
