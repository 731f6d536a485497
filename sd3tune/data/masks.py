"""Which pixels of a picture count: masks in a folder of their own, or the pictures' alpha channels. Found and read here, never written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from sd3tune.data import images, sources
from sd3tune.data.datasets import Dataset, links
from sd3tune.data.seen import Seen, digests
from sd3tune.data.sources import Found
from sd3tune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd3tune.data.catalog import Item

SHAPE = 0.02
"""Most that the shape (width / height) of a mask may differ from its picture's, as a share; a pixel of rounding comes on top."""


@dataclass(frozen=True)
class Mask:
    """Where a mask lies. ``pixels`` is the digest of its file; empty for an alpha channel, which lies in the picture's own."""

    path: Path
    kind: Literal["mask", "segmentation", "alpha"]
    pixels: str = ""


def attached(items: Sequence[Item], datasets: Sequence[Dataset]) -> list[Item]:
    """The items with their masks. Mask files are hashed at once: there is one for each picture, and they are small.

    Raises: DataError that names the first picture without a mask and where that was looked for.
    """
    if problems := links(datasets):
        raise DataError("; ".join(problems))
    masks = {d.id: d for d in datasets if d.dataset_type == "conditioning"}
    found: dict[int, Mask] = {}
    for dataset in datasets:
        own = [item for item in items if item.dataset == dataset]
        if dataset.conditioning_data is not None:
            found |= _of_folder(own, dataset, masks[dataset.conditioning_data])
        elif dataset.mask_from_alpha:
            found |= {id(item): _of_alpha(item) for item in own}
    return [replace(item, mask=found[id(item)]) if id(item) in found else item for item in items]


def read(mask: Mask, file: BinaryIO | None = None) -> Image:
    """The whole mask, upright, in 256 greys; what is transparent in a mask file is black. Raises: one of ``images.BROKEN``."""
    with file or mask.path.open("rb") as opened:
        if mask.kind == "alpha":
            return images.read_alpha(opened)
        return images.read_rgb(opened, background="black").convert("L")


def _of_alpha(item: Item) -> Mask:
    with item.path.open("rb") as opened:
        if not images.has_alpha(opened):
            raise DataError(f"{item.path}: it has no alpha channel to be its mask (mask_from_alpha in data set {item.dataset.id!r})")
    return Mask(item.path, "alpha")


def _of_folder(items: Sequence[Item], dataset: Dataset, masks: Dataset) -> dict[int, Mask]:
    """A mask for each item by its identity in memory. Raises: DataError."""
    files = sources.find(masks)
    pairs = list(_paired(items, files, dataset, masks))
    seen = Seen(masks.instance_data_dir)
    known = {file.name: row for _, file in pairs if (row := seen.get(file)) and row[2]}
    unread = {file.name: file for _, file in pairs if file.name not in known}
    for file, (path, pixels, problem) in zip(unread.values(), digests(f.path for f in unread.values()), strict=True):
        try:
            width, height = images.size(path)
        except images.BROKEN as error:
            problem = problem or f"not a readable picture ({error})"
        if problem:
            raise DataError(f"{path}: mask of data set {dataset.id!r}: {problem}")
        known[file.name] = (width, height, pixels, None)
        seen.put(file, known[file.name])
    seen.save([file.name for file in files])
    for item, file in pairs:
        _fits(item, file.path, known[file.name][:2])
    kind = masks.conditioning_type or "mask"
    return {id(item): Mask(file.path, kind, known[file.name][2]) for item, file in pairs}


def _paired(items: Sequence[Item], files: Sequence[Found], dataset: Dataset, masks: Dataset) -> Iterator[tuple[Item, Found]]:
    """Each item with the file of the same name; the same ending comes first. Raises: DataError."""
    by_name: Mapping[str, Found] = {file.name: file for file in files}
    by_stem: dict[str, list[Found]] = {}
    for file in files:
        by_stem.setdefault(os.path.splitext(file.name)[0], []).append(file)
    missing = []
    for item in items:
        name = item.found.name if item.found else item.path.name
        stem = os.path.splitext(name)[0]
        there = [by_name[name]] if name in by_name else by_stem.get(stem, [])
        if len(there) > 1:
            names = " and ".join(file.path.name for file in there)
            raise DataError(f"{item.path}: data set {masks.id!r} has {len(there)} masks for it, {names}; take one away")
        if there:
            yield item, there[0]
        else:
            missing.append((item, f"{masks.instance_data_dir}/{stem}"))
    if missing:
        (first, where), endings = missing[0], ", ".join(sorted(images.suffixes()))
        raise DataError(
            f"{first.path}: it has no mask, nor have {len(missing) - 1} more of the {len(items)} pictures of data set {dataset.id!r}; "
            f"looked for {where} with the endings {endings} (conditioning_data: {masks.id}); a white picture counts everywhere"
        )


def _fits(item: Item, mask: Path, size: tuple[int, int]) -> None:
    """Raises: DataError for a mask of another shape than its picture's."""
    width, height = size
    off = abs(width / height * item.height / item.width - 1)
    if off > SHAPE + 1 / min(width, height):
        raise DataError(
            f"{mask}: it is {width}x{height} px, another shape than its picture {item.path} ({item.width}x{item.height} px); a mask may be "
            "larger or smaller than its picture, but shows the whole of it"
        )
