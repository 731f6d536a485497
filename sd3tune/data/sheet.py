"""A plan as a page in a notebook: how many pictures of each size, what is left out and why, and how pictures are cut."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from sd3tune.data.buckets import Placement
from sd3tune.data.catalog import Problem
from sd3tune.data.images import BROKEN, read_rgb
from sd3tune.data.masks import read

if TYPE_CHECKING:
    from sd3tune.data.planning import Plan

SHOWN = 12
"""Pictures of a contact sheet."""

ROWS = 50
"""Rows of a table of problems."""

SIDE = 180
"""Longer side of a picture on a sheet, in pixels."""


def page(plan: Plan) -> str:
    """The whole page, in one piece of HTML without scripts; readable on light and dark."""
    problems = table([*((p, "left out") for p in plan.problems), *((p, "look at") for p in plan.warnings or ())])
    cuts = {str(p.item.path): p for p in plan.train}
    step = max(1, len(cuts) // SHOWN)
    return (
        f"<pre>{escape(_without_problems(str(plan)))}</pre>{histogram(plan)}{problems}"
        f"{sheet([(framed(p), _caption(p)) for p in list(cuts.values())[::step][:SHOWN]])}"
    )


def _without_problems(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(("left out: ", "look at: ")))


def histogram(plan: Plan) -> str:
    """A bar for each size, its length the number of pictures."""
    most = max(plan.buckets.values(), default=1)
    rows = "".join(
        f'<tr><td>{bucket}</td><td style="text-align:left"><div style="width:{max(1, round(300 * count / most))}px;height:0.8em;'
        f'background:currentColor;opacity:0.6"></div></td><td>{count}</td></tr>'
        for bucket, count in plan.buckets.items()
    )
    return f"<table><caption>pictures of each size in an epoch</caption>{rows}</table>"


def table(rows: Sequence[tuple[Problem, str]]) -> str:
    """Problems as a table; nothing when there is none."""
    if not rows:
        return ""
    body = "".join(
        f'<tr><td>{what}</td><td style="text-align:left">{escape(str(p.path))}</td><td style="text-align:left">{escape(p.reason)}</td></tr>'
        for p, what in rows[:ROWS]
    )
    more = f"<p>and {len(rows) - ROWS} more; print the plan to see all</p>" if len(rows) > ROWS else ""
    return f"<table><caption>problems</caption>{body}</table>{more}"


def sheet(cells: Iterable[tuple[Image.Image | None, str]]) -> str:
    """Pictures beside each other, each with a text below."""
    boxes = "".join(
        f'<figure style="display:inline-block;vertical-align:top;width:{SIDE}px;margin:4px">{_picture(picture, text)}'
        f'<figcaption style="font-size:small;overflow-wrap:anywhere">{escape(text)}</figcaption></figure>'
        for picture, text in cells
    )
    return f"<div>{boxes}</div>"


def _picture(picture: Image.Image | None, text: str) -> str:
    if picture is None:
        return "<p>cannot be decoded</p>"
    held = io.BytesIO()
    scale = SIDE / max(picture.size)
    if scale != 1:
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    picture.save(held, "JPEG", quality=85)
    data = base64.b64encode(held.getvalue()).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/jpeg;base64,{data}">'


def framed(placement: Placement) -> Image.Image | None:
    """The whole picture, small, with a frame around what is cut out, and blue where its mask is dark; nothing if it cannot be decoded."""
    (width, height), left, top, bucket, _ = placement.geometry
    scale = SIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    try:
        with placement.item.path.open("rb") as opened:
            small = read_rgb(opened, background=placement.item.dataset.background, wanted=size).resize(size)
        if placement.item.mask is not None:
            small = masked(small, read(placement.item.mask))
    except BROKEN:
        return None
    box = [round(scale * side) for side in (left, top, left + bucket.width, top + bucket.height)]
    shaded = Image.blend(small, Image.new("RGB", size, "white"), 0.6)
    shaded.paste(small.crop(tuple(box)), (box[0], box[1]))  # type: ignore[arg-type]
    ImageDraw.Draw(shaded).rectangle([box[0], box[1], min(box[2], size[0]) - 1, min(box[3], size[1]) - 1], outline="red")
    return shaded


def masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, mixed with blue by how little its mask counts."""
    light = mask.resize(picture.size, Image.Resampling.BOX).point([round(255 - 0.75 * (255 - value)) for value in range(256)])
    return Image.composite(picture, Image.new("RGB", picture.size, "blue"), light)


def _caption(placement: Placement) -> str:
    captions = placement.item.captions
    more = f" (and {len(captions) - 1} more captions)" if len(captions) > 1 else ""
    return f"{placement.item.path.name}, {placement.bucket}: {placement.item.caption}{more}"
