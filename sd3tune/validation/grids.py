"""Pictures side by side: one labelled row per state of the adapter, one column per prompt."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sd3tune.files import write_bytes, write_text

MARGIN, LABEL, CELL = 8, 120, 128
"""Pixels: between cells, width of the row labels, least width of a cell."""

TOP = 2 * MARGIN + 34
"""Pixels above the first row: two lines of a column's title."""

KEY = "sd3tune"
"""The PNG's text that holds what a picture or a grid was drawn from."""


@dataclass(frozen=True)
class Grid:
    """Rows of pictures with their labels. Displays itself in a notebook."""

    rows: tuple[tuple[str, tuple[Image.Image | str | None, ...]], ...]
    """Label (of one or more lines) and cells: a picture, a sentence that says why there is none, or nothing."""
    columns: tuple[str, ...]

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of every cell in pixels: those of the largest picture."""
        pictures = [p for _, row in self.rows for p in row if isinstance(p, Image.Image)]
        return max([CELL, *(p.width for p in pictures)]), max([CELL, *(p.height for p in pictures)])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole grid in pixels."""
        x, y = self.corner(len(self.rows), len(self.columns))
        return x + MARGIN, y

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Where a cell begins, in pixels from the left and from the top."""
        width, height = self.cell
        return LABEL + column * (width + MARGIN), TOP + row * (height + MARGIN)

    def image(self) -> Image.Image:
        """The whole grid as one picture; a missing cell stays grey, and one that failed says why."""
        width, height = self.cell
        font = ImageFont.load_default(14)
        whole = Image.new("RGB", self.size, "white")
        pen = ImageDraw.Draw(whole)
        for c, title in enumerate(self.columns):
            _write(pen, _wrap(title, width, font), (self.corner(0, c)[0], MARGIN), font)
        for r, (label, row) in enumerate(self.rows):
            y = self.corner(r, 0)[1]
            words = [line for part in label.split("\n") for line in _wrap(part, LABEL - 2 * MARGIN, font)]
            _write(pen, words, (MARGIN, y + height // 2 - 8 * len(words)), font)
            for c, picture in enumerate(row):
                x = self.corner(r, c)[0]
                if not isinstance(picture, Image.Image):
                    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=(235, 235, 235))
                    lines = _wrap(picture or "", width - 8, font, most=(height - 8) // 17)
                    _write(pen, lines, (x + 4, y + 4), font)
                    continue
                scale = min(width / picture.width, height / picture.height)
                shown = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
                whole.paste(shown, (x + (width - shown.width) // 2, y + (height - shown.height) // 2))
        return whole

    def png(self, described: str = "") -> bytes:
        """The grid as a PNG file's bytes, with a description inside."""
        stream, info = io.BytesIO(), PngInfo()
        if described:
            info.add_text(KEY, described)
        self.image().save(stream, "PNG", pnginfo=info)
        return stream.getvalue()

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the grid as PNG; what it is ``about`` goes inside it, and beside it as JSON. Raises: FileError."""
        described = "" if about is None else json.dumps(about, indent=1, default=str)
        write_bytes(Path(path), self.png(described))
        if described:
            write_text(Path(path).with_suffix(".json"), described + "\n")

    def _repr_png_(self) -> bytes:
        return self.png()


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, most: int = 2) -> list[str]:
    """Up to ``most`` lines of ``text`` that fit ``width`` pixels."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return lines


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    for i, line in enumerate(lines):
        pen.text((at[0], at[1] + 17 * i), line, fill="black", font=font)
