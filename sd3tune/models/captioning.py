"""Captions by a model, into one file for a person to read and correct before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.data import sources
from sd3tune.data.datasets import Dataset
from sd3tune.data.images import BROKEN, read_rgb
from sd3tune.errors import DataError, ModelError
from sd3tune.files import write_text
from sd3tune.secrets import without_secrets


@dataclass(frozen=True)
class Captioned:
    """One picture's caption, or why there is none."""

    file_name: str
    caption: str
    problem: str = ""


def captions_of(folder: str | Path, model: str, *, prompt: str = "", length: int = 60) -> Iterator[Captioned]:
    """Caption every picture of a folder with an image-to-text model of the hub or of a folder. Raises: DataError, ModelError.

    ``prompt`` is put to models that take one; ``length`` is the most new tokens.
    """
    files = sources.find(Dataset(id="captions", instance_data_dir=str(folder)))
    if not files:
        raise DataError(f"{folder}: it holds no picture")
    processor, network = _load(model)
    for file in files:
        try:
            with file.path.open("rb") as opened:
                picture = read_rgb(opened)
        except BROKEN as error:
            yield Captioned(file.name, "", f"not a readable picture ({error})")
            continue
        words = {"text": prompt} if prompt else {}
        inputs = processor(images=picture, return_tensors="pt", **words).to(network.device)
        made = processor.batch_decode(network.generate(**inputs, max_new_tokens=length, do_sample=False), skip_special_tokens=True)[0]
        caption = " ".join(made.removeprefix(prompt).split())
        yield Captioned(file.name, caption, "" if caption else "the model gave no caption")


def _load(model: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        network = AutoModelForImageTextToText.from_pretrained(model).eval()
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: cannot be loaded as an image-to-text model ({without_secrets(str(error))})") from None
    return processor, network.to("cuda" if torch.cuda.is_available() else "cpu")


def save(rows: list[Captioned], path: Path) -> None:
    """Write captions as one JSON object a line, for ``caption_strategy: jsonl``. Raises: DataError when the file is there; FileError."""
    if path.exists():
        raise DataError(f"{path}: is already there, perhaps with corrections; give another name with --out")
    lines = [json.dumps({"file_name": row.file_name, "caption": row.caption}, ensure_ascii=False) for row in rows if row.caption]
    write_text(path, "\n".join(lines) + "\n")
