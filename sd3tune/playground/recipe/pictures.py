"""The pictures of the playground: Noto emoji for the base model, Fluent emoji 3D to fine-tune on.

Both come from npm packages that a person unpacks once (see the folder's README.md). Pictures are composited on
white, because SD3 has no alpha; the shipped fine-tuning PNGs keep theirs.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sd3tune.models.components import pixels

SIZE = 64
PNG_SIDE = 224
"""Pixels of the shipped fine-tuning pictures: large enough to look at, small enough to ship."""
WIDE, TALL = (80, 48), (48, 80)
"""Sizes in pixels, (width, height): the aspect buckets of a 64 px model with a 16 px grid and sides of at most 2:1."""

TUNING_CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
SIGNS = ("alphanum", "arrow", "geometric", "keycap")
"""Left out of the base model: letters and marks that differ in a few pixels."""
TRAIN_COUNT, HELDOUT_COUNT, OBLONG_COUNT = 72, 24, 8


@dataclass(frozen=True)
class Emoji:
    """One emoji that both sets draw."""

    code: str
    name: str
    category: str
    noto: Path
    fluent: Path


def read(npm: Path) -> tuple[Emoji, ...]:
    """Every emoji in both packages, without flags, bare signs and the variants joined by U+200D."""
    google = npm / "emoji-datasource-google-16.0.0" / "package"
    assets = npm / "lobehub-fluent-emoji-3d-1.1.0" / "package" / "assets"
    found: dict[str, Emoji] = {}
    for row in json.loads((google / "emoji.json").read_text()):
        code = row["image"].removesuffix(".png").lower()
        noto = google / "img" / "google" / "64" / row["image"]
        fluent = next((p for c in (code, code.replace("-fe0f", "")) if (p := assets / f"{c}.webp").exists()), None)
        name = (row["name"] or row["short_name"]).lower().strip()
        if row["category"] in ("Flags", "Component") or row["subcategory"] in SIGNS or "200d" in code:
            continue
        if fluent is None or not noto.exists():
            continue
        found.setdefault(name, Emoji(code, name, row["category"], noto, fluent))
    return tuple(sorted(found.values(), key=lambda e: e.code))


def on_white(path: Path, size: tuple[int, int] = (SIZE, SIZE), *, crop: bool = False) -> Image.Image:
    """The picture on white at ``size``; ``crop`` first cuts the transparent border away."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    if crop:
        picture = picture.crop(picture.getchannel("A").getbbox())
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return white.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def oblong(path: Path) -> tuple[int, int] | None:
    """``WIDE`` or ``TALL`` when what is drawn is at least 1.4 times as long as broad, else ``None``."""
    with Image.open(path) as opened:
        box = opened.convert("RGBA").getchannel("A").getbbox()
    if box is None:
        return None
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    return WIDE if aspect >= 1.4 else TALL if aspect <= 1 / 1.4 else None


def tuning_set(emoji: tuple[Emoji, ...]) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...]]:
    """The emoji to fine-tune on and those held out: things that both sets draw alike, a few of them oblong.

    "Alike" is the correlation of the two pictures in pixels, so that what a LoRA has to learn is the style.
    """
    candidates = [e for e in emoji if e.category in TUNING_CATEGORIES]
    noto = pixels([on_white(e.noto) for e in candidates]).flatten(1)
    fluent = pixels([on_white(e.fluent) for e in candidates]).flatten(1)
    noto, fluent = noto - noto.mean(1, keepdim=True), fluent - fluent.mean(1, keepdim=True)
    alike = (torch.nn.functional.normalize(noto) * torch.nn.functional.normalize(fluent)).sum(1).tolist()
    ranked = [e for _, e in sorted(zip(alike, candidates, strict=True), key=lambda pair: -pair[0])][:300]
    random.Random(3).shuffle(ranked)
    long = [e for e in ranked if oblong(e.fluent) and oblong(e.noto)][:OBLONG_COUNT]
    rest = [e for e in ranked if e not in long][: TRAIN_COUNT + HELDOUT_COUNT - len(long)]
    return tuple(long + rest[: TRAIN_COUNT - len(long)]), tuple(rest[TRAIN_COUNT - len(long) :])


def write_tuning_set(emoji: tuple[Emoji, ...], folder: Path) -> None:
    """Write PNGs with their alpha, each with a caption beside it; oblong ones are cut to what is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    for e in emoji:
        with Image.open(e.fluent) as opened:
            picture = opened.convert("RGBA")
        if oblong(e.fluent) and oblong(e.noto):
            picture = picture.crop(picture.getchannel("A").getbbox())
        scale = PNG_SIDE / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        stem = "".join(c if c.isalnum() else "-" for c in e.name)
        picture.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(e.name + "\n")
