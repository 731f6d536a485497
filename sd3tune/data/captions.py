"""Where a picture's caption comes from."""

from __future__ import annotations

from pathlib import Path


def from_textfile(picture: Path) -> str | None:
    """The ``.txt`` file beside the picture, its lines joined; ``None`` when there is none. Raises: ValueError when it is not text."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return " ".join(text.split())


def from_filename(picture: Path) -> str:
    """The file's name without its ending, underscores read as blanks."""
    return " ".join(picture.stem.replace("_", " ").split())
