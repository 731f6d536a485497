"""A cut picture, and what was noticed while it was decoded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ImageFilter, ImageStat
from PIL.Image import Resampling, Transpose

from sd3tune.data.buckets import Placement
from sd3tune.data.images import BROKEN, read_rgb
from sd3tune.files import digest_of

if TYPE_CHECKING:
    from PIL.Image import Image

LOOKED_AT = 256
"""Side, in pixels, at which sharpness is measured."""


class Decoded(NamedTuple):
    """A cut picture (or the weights H W of its mask) with facts about it, or why there is none."""

    picture: Image | None
    facts: Mapping[str, int | float]
    problem: str = ""
    weights_HW: Any = None


def decode(placement: Placement) -> Decoded:
    """Read and cut a picture, and see that its bytes are those that were planned with."""
    item = placement.item
    try:
        with item.path.open("rb") as opened:
            data = opened.read()
        if item.pixels and digest_of(data) != item.pixels:
            return Decoded(None, {}, "was changed since it was looked at; discover and plan again")
        picture = cut(placement, io.BytesIO(data))
    except BROKEN as error:
        return Decoded(None, {}, f"cannot be decoded, though its header could be read ({error})")
    return Decoded(picture, look(picture))


def cut(placement: Placement, data: io.BytesIO | None = None) -> Image:
    """The picture as it is encoded: upright, on its background, resized once with Lanczos, cut to its bucket, mirrored if asked.

    Raises: one of ``BROKEN``.
    """
    resized, left, top, bucket, mirrored = placement.geometry
    with data or placement.item.path.open("rb") as opened:
        picture = read_rgb(opened, background=placement.item.dataset.background, wanted=resized)
    if picture.size != resized:
        picture = picture.resize(resized, Resampling.LANCZOS)
    picture = picture.crop((left, top, left + bucket.width, top + bucket.height))
    return picture.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def look(picture: Image) -> dict[str, int | float]:
    """Two facts about a cut picture.

    ``hash``: 64 bits that say where brightness rises from left to right on a grid of 9 x 8, nearly equal for pictures that look
    alike (difference hash, Krawetz 2013). ``sharpness``: the variance of the Laplacian at about 256 px, low for blurred ones.
    """
    grey = picture.convert("L")
    grey = grey.reduce(max(1, min(picture.size) // LOOKED_AT))
    rows = list(grey.resize((9, 8), Resampling.BOX).tobytes())
    bits = "".join("1" if rows[9 * y + x] < rows[9 * y + x + 1] else "0" for y in range(8) for x in range(8))
    edges = grey.filter(ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128))
    inner = edges.crop((1, 1, edges.width - 1, edges.height - 1))
    return {"hash": int(bits, 2), "sharpness": round(ImageStat.Stat(inner).var[0], 2)}
