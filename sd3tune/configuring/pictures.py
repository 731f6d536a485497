"""What lies in a folder of pictures, as far as it decides what is asked next. Reads headers and captions, and changes nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from sd3tune.data.captions import from_filename
from sd3tune.data.catalog import discover
from sd3tune.errors import ConfigError, DataError

TABLES = (".jsonl", ".csv", ".parquet")
"""Endings of files that may hold captions."""

RESOLUTIONS = (1024, 768, 512, 256)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder."""

    place: str
    sizes: tuple[tuple[int, int], ...]
    captioned: int
    """How many have a text file beside them."""
    captions: tuple[str, ...]
    """Different ones, at most three."""
    names: tuple[str, ...]
    """What their file names say, as captions; empty when they say nothing."""
    tables: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def count(self) -> int:
        """Pictures that can be used."""
        return len(self.sizes)

    @property
    def side(self) -> float:
        """The side of a square of the area that three quarters of them have at least."""
        return sorted(math.sqrt(width * height) for width, height in self.sizes)[self.count // 4]

    @property
    def resolution(self) -> int:
        """The largest usual size to which most need not be enlarged by more than a tenth."""
        return next((size for size in RESOLUTIONS if size <= 1.1 * self.side), max(16, int(self.side) // 16 * 16))

    @property
    def caption_strategy(self) -> str:
        """Where captions may come from, by what lies there."""
        return "textfile" if self.captioned else "filename" if self.names else "instanceprompt"

    @property
    def shapes(self) -> int:
        """How many clearly different shapes (width / height, in steps of a tenth) there are."""
        return len({round(width / height, 1) for width, height in self.sizes})

    def __str__(self) -> str:
        *_, largest = smallest, *_ = sorted(self.sizes, key=lambda size: size[0] * size[1])
        lines = [
            f"{self.count} pictures, from {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]} px, {self.shapes} shapes",
            f"{self.captioned} of them have a .txt file with a caption" + (f", such as {self.captions[0]!r}" if self.captions else ""),
        ]
        lines += [f"tables that may hold captions: {', '.join(self.tables)}"] if self.tables else []
        lines += [f"left out: {problem}" for problem in self.problems[:5]]
        lines += [f"and {len(self.problems) - 5} more that are left out"] if len(self.problems) > 5 else []
        return "\n".join(lines)


def look(place: str) -> Pictures:
    """Look into a folder or address. Raises: DataError when it is none, or holds no usable picture; ConfigError for a file."""
    if Path(place).suffix.lower() in (".yaml", ".yml"):
        raise ConfigError([f"{place}: is a file of data sets already; look at it with: sd3tune plan --data {place}"], "configure")
    home = str(Path(place).expanduser()) if "://" not in place else place
    try:
        found = discover(home)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error})") from None
    lacking = set(found.missing_captions)
    captions = dict.fromkeys(item.caption for item in found.items if item.path not in lacking)
    paths = [item.path for item in found.items]
    telling = [path for path in paths if len(re.findall(r"[^\W\d_]{2,}", path.stem)) >= 2]
    tables = sorted(p.name for p in Path(home).iterdir() if p.suffix.lower() in TABLES) if Path(home).is_dir() else []
    return Pictures(
        place=home if "://" in home else str(Path(home).absolute()), sizes=tuple((item.width, item.height) for item in found.items),
        captioned=len(paths) - len(lacking), captions=tuple(captions)[:3],
        names=tuple(dict.fromkeys(map(from_filename, paths)))[:3] if 2 * len(telling) > len(paths) else (), tables=tuple(tables),
        problems=tuple(f"{problem.path.name}: {problem.reason}" for problem in found.problems),
    )  # fmt: skip
