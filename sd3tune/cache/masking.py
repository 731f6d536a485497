"""A picture's mask in latent size: cut exactly as the picture, then averaged over each latent pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL.Image import Resampling, Transpose

from sd3tune.cache.decoding import Decoded
from sd3tune.data import masks
from sd3tune.data.buckets import LATENT_FACTOR, Placement
from sd3tune.data.catalog import Problem
from sd3tune.data.images import BROKEN
from sd3tune.data.planning import Plan
from sd3tune.files import digest_of

Weights = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def decode_mask(placement: Placement) -> Decoded:
    """Read and cut a mask, and see that its bytes are those that were planned with; ``coverage`` is its mean weight."""
    mask = placement.item.mask
    assert mask is not None
    try:
        with mask.path.open("rb") as opened:
            data = opened.read()
        if digest_of(data) != placement.item.mask_pixels:
            return Decoded(None, {}, f"its mask {mask.path} was changed since it was looked at; discover and plan again")
        weights_HW = cut_mask(placement, io.BytesIO(data))
    except BROKEN as error:
        return Decoded(None, {}, f"its mask {mask.path} cannot be decoded, though its header could be read ({error})")
    return Decoded(None, {"coverage": float(weights_HW.mean(dtype=np.float64))}, "", weights_HW)


def cut_mask(placement: Placement, data: io.BytesIO | None = None) -> Weights:
    """Weights H W of the latent pixels, 0 (ignored) to 1: resized, cut and mirrored as the picture, then the mean of each 8 x 8 pixels.

    A segmentation counts in full wherever any of those is not black. Raises: one of ``BROKEN``.
    """
    mask, (resized, left, top, bucket, mirrored) = placement.item.mask, placement.geometry
    assert mask is not None
    whole = masks.read(mask, data).convert("F")
    if whole.size != resized:
        whole = whole.resize(resized, Resampling.BOX)
    part = whole.crop((left, top, left + bucket.width, top + bucket.height))
    if mirrored:
        part = part.transpose(Transpose.FLIP_LEFT_RIGHT)
    rows, columns = bucket.height // LATENT_FACTOR, bucket.width // LATENT_FACTOR
    pixels = np.asarray(part, dtype=np.float64).reshape(rows, LATENT_FACTOR, columns, LATENT_FACTOR)
    weights_HW = pixels.mean((1, 3)) / 255
    found: Weights = (weights_HW > 0 if mask.kind == "segmentation" else weights_HW).astype(np.float32)
    return found


def without_black(plan: Plan, shares: Mapping[int, float | None]) -> Plan:
    """The plan without pictures whose mask is black in every cut; of those with some black cuts it is said.

    ``shares`` is the mean weight of each cut, by the cut's place in ``plan.cuts``. Raises: DataError when no picture is left.
    """
    cuts: dict[str, list[float]] = {}
    paths = {}
    for number, cut in enumerate(plan.cuts):
        if (share := shares.get(number)) is not None:
            cuts.setdefault(str(cut.item.path), []).append(share)
            paths[str(cut.item.path)] = cut.item.path
    black = {path: "its mask is black in every cut, so nothing of it would count" for path, found in cuts.items() if not any(found)}
    some = [
        Problem(paths[path], f"its mask is black in {found.count(0)} of its {len(found)} cuts; these have no loss")
        for path, found in cuts.items()
        if any(found) and not all(found)
    ]
    plan = plan.without(black)
    return replace(plan, warnings=(*(plan.warnings or ()), *some)) if some else plan
