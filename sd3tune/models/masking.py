"""Masks for a folder of pictures, written into a folder of their own: from alpha channels, a box, or a segmentation model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from sd3tune.data import images, sources
from sd3tune.data.datasets import Dataset
from sd3tune.errors import DataError, ModelError
from sd3tune.files import make_folder, write_with
from sd3tune.secrets import without_secrets

CENTRE = (0.15, 0.15, 0.85, 0.85)
"""The box that counts when none is given: left, top, right, bottom in shares of width and height; about half of the area."""

BACKGROUND = frozenset({"background", "bg", "other", "unlabeled", "unlabelled", "void"})
"""Labels that are not the subject."""

Maker = Callable[[Path], Image.Image]


@dataclass(frozen=True)
class Written:
    """What became of one picture: the mask's name, and the share of it that counts; or why there is none."""

    name: str
    share: float = 0.0
    problem: str = ""


def masks_of(folder: str | Path, out: str | Path, make: Maker) -> Iterator[Written]:
    """Write a PNG of 256 greys for each picture of a folder, under the same name, into another folder; files there are never overwritten.

    Raises: DataError for a folder without pictures, two pictures of one name, or masks inside the pictures' folder; FileError.
    """
    source, goal = Path(folder), Path(out)
    if goal.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{goal}: lies in the folder of the pictures, where they would be taken for pictures; choose another one")
    files = sources.find(Dataset(id="masks", instance_data_dir=str(folder)))
    if not files:
        raise DataError(f"{folder}: it holds no picture")
    names = [str(Path(file.name).with_suffix(".png")) for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise DataError(f"{folder}: several pictures would have the mask {twice[0]}; give them different names")
    for file, name in zip(files, names, strict=True):
        if (goal / name).exists():
            yield Written(name, problem="is already there, and stays as it is")
            continue
        try:
            mask = make(file.path)
        except images.BROKEN as error:
            yield Written(name, problem=f"not a readable picture ({error})")
            continue
        make_folder((goal / name).parent)
        write_with(goal / name, lambda draft, mask=mask: mask.save(draft, "PNG"))  # type: ignore[misc]
        yield Written(name, sum(value * count for value, count in enumerate(mask.histogram())) / 255 / mask.width / mask.height)


def alpha(picture: Path) -> Image.Image:
    """What is opaque counts; a picture without an alpha channel is white. Raises: one of ``images.BROKEN``."""
    with picture.open("rb") as opened:
        return images.read_alpha(opened)


def box(sides: Sequence[float] = CENTRE) -> Maker:
    """White inside a box of shares of width and height, black outside. Raises: DataError when it is none."""
    if len(sides) != 4 or not (0 <= sides[0] < sides[2] <= 1 and 0 <= sides[1] < sides[3] <= 1):
        raise DataError(f"{','.join(map(str, sides))}: a box is left,top,right,bottom in shares from 0 to 1, such as 0.25,0,0.75,1")

    def make(picture: Path) -> Image.Image:
        width, height = images.size(picture)
        mask = Image.new("L", (width, height))
        left, top, right, bottom = (round(share * side) for share, side in zip(sides, (width, height) * 2, strict=True))
        mask.paste(255, (left, top, max(right, left + 1), max(bottom, top + 1)))
        return mask

    return make


def model(name: str, labels: Sequence[str] = ()) -> Maker:
    """White where a segmentation model of the hub, or of a folder, sees one of ``labels``; without any, all but background.

    The model is one for transformers' pipeline image-segmentation. Raises: ModelError.
    """
    pipe = _pipeline(name)
    known = sorted(pipe.model.config.id2label.values())
    if unknown := [label for label in labels if label not in known]:
        raise ModelError(f"{name}: it has no label {unknown[0]!r}; it has {', '.join(known[:40])}")

    def make(picture: Path) -> Image.Image:
        with picture.open("rb") as opened:
            seen = images.read_rgb(opened)
        mask = Image.new("L", seen.size)
        for found in pipe(seen):
            label = str(found["label"])
            if label in labels or (not labels and label.lower() not in BACKGROUND):
                mask = ImageChops.lighter(mask, found["mask"].convert("L"))
        return mask

    return make


def _pipeline(name: str) -> Any:
    import torch
    from transformers import pipeline

    try:
        return pipeline("image-segmentation", model=name, device="cuda" if torch.cuda.is_available() else "cpu")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name}: cannot be loaded as an image-segmentation model ({without_secrets(str(error))})") from None
