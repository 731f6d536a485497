"""CLIP score: how well a picture follows its prompt, by a CLIPModel of the hub or of a folder.

Shapes: B pictures, H x W pixels, L text tokens, P width of the joint space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd3tune.errors import ModelError
from sd3tune.models import hub, room
from sd3tune.models.components import named, pixels
from sd3tune.models.freeing import give_back
from sd3tune.models.tokens import tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

INSTEAD = "set pretrained_evaluation_model_name_or_path to a CLIP model of the hub, such as openai/clip-vit-base-patch32, or to its folder"
"""What else can be done when a scorer cannot be loaded."""

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Kinds of weights in the order in which they are taken."""

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue where a model does not say others. Source: openai/CLIP."""
BICUBIC = 3
"""Pillow's number, and transformers'."""


@dataclass(frozen=True)
class Summary:
    """Scores in figures; ``std`` is that of the population."""

    count: int
    min: float
    max: float
    mean: float
    std: float

    @property
    def error(self) -> float:
        """Standard error of the mean, infinite for one score."""
        return self.std / math.sqrt(self.count - 1) if self.count > 1 else math.inf

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:.3f} (1 picture)"
        return f"{self.mean:.3f} ± {self.error:.3f} ({self.count} pictures, {self.min:.3f} to {self.max:.3f})"


def summary(scores: Sequence[float]) -> Summary:
    """Least, most, mean and deviation of at least one score."""
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
    return Summary(len(scores), min(scores), max(scores), mean, math.sqrt(variance))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes what the model sees: its shortest side in pixels, the square that is cut from its middle, the colours."""

    side: int
    square: int
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION
    resample: int = BICUBIC

    @classmethod
    def of_folder(cls, folder: Path, side: int) -> Preprocessing:
        """As ``preprocessor_config.json`` says; without one, OpenAI's with the model's own ``side``. Raises: ModelError."""
        path = next((path for name in ("preprocessor", "processor") if (path := folder / f"{name}_config.json").is_file()), None)
        found = hub.table(path, INSTEAD) if path else {}
        found = found.get("image_processor", found)
        try:
            return cls(
                _side(found.get("size", side), "shortest_edge"), _side(found.get("crop_size", side), "height"),
                tuple(found.get("image_mean", MEAN)), tuple(found.get("image_std", DEVIATION)), int(found.get("resample", BICUBIC)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: says nothing clear about pictures ({error!r}); download or copy the model again") from None

    def __call__(self, pictures: Sequence[Image]) -> Tensor:
        """Pictures of any sizes as B 3 H W."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        return ((pixels([self._cut(picture) for picture in pictures]) + 1) / 2 - mean) / deviation

    def _cut(self, picture: Image) -> Image:
        short = min(picture.size)
        width, height = (int(self.side * side / short) for side in picture.size)
        left, top = (width - self.square) // 2, (height - self.square) // 2
        resized = picture.convert("RGB").resize((width, height), self.resample)
        return resized.crop((left, top, left + self.square, top + self.square))


def _side(size: Any, name: str) -> int:
    """Pixels from a number, or from a table of sides."""
    return int(size[name] if isinstance(size, dict) else size)


class Scorer:
    """A CLIPModel with its tokenizer, in single precision, kept on the device where it was loaded between two uses."""

    def __init__(self, model: Any, tokenizer: Any, preprocessing: Preprocessing) -> None:
        self._model, self._tokenizer, self._preprocessing = model, tokenizer, preprocessing

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu") -> Scorer:
        """The scorer in a folder or of the hub. Raises: ModelError that says what is the matter, and what to set."""
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        folder = hub.folder_of(str(name), weights=WEIGHTS, instead=INSTEAD)
        kind = hub.table(folder / "config.json", INSTEAD).get("model_type")
        if kind != "clip":
            raise ModelError(f"{folder}: no CLIP model, but one of type {kind}; {INSTEAD}")
        with named(folder):
            with torch.device("meta"):
                empty = CLIPModel(CLIPConfig.from_pretrained(folder))
            _require(empty, torch.device(device))
            model, found = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder)
        if absent := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
            raise ModelError(
                f"{folder}: {len(absent)} tensors are missing or do not fit, {absent[0]} first; download or copy the model again"
            )
        preprocessing = Preprocessing.of_folder(folder, model.config.vision_config.image_size)
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, preprocessing)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self._model.logit_scale.device
        return found

    @contextmanager
    def on(self, device: str | torch.device) -> Iterator[Scorer]:
        """A scope in which the model is on a device; then it goes back and its memory is given back. Raises: ModelError without room."""
        before, there = self.device, torch.device(device)
        if there.type != before.type:
            _require(self._model, there)
        try:
            self._model.to(there)
            yield self
        finally:
            self._model.to(before)
            give_back()

    @property
    def limit(self) -> int:
        """The most tokens of a text that are seen, with the marks for beginning and end."""
        return min(int(self._tokenizer.model_max_length), int(self._model.config.text_config.max_position_embeddings))

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """A sentence for each prompt of which only the beginning is scored."""
        rows = ((prompt, tokens_of("the scorer", self._tokenizer, self.limit, prompt)) for prompt in prompts)
        return [f'"{prompt}": {tokens}' for prompt, tokens in rows if tokens.lost]

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image], prompts: Sequence[str], batch: int = 8) -> tuple[float, ...]:
        """For each picture the cosine between it and its prompt, from 0 to 1: a negative one counts as 0, and nothing is multiplied by 100.

        Source: Hessel et al. 2021 (CLIPScore); torchmetrics' clip_score is 100 times this. A prompt is cut at ``limit`` tokens.
        """
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts; each picture needs its own")
        found: list[float] = []
        for start in range(0, len(pictures), batch):
            rows = slice(start, start + batch)
            cosine_B = (self._of_pictures(pictures[rows]) * self._of_texts(prompts[rows])).sum(-1)
            found += cosine_B.clamp(0, 1).tolist()
        return tuple(found)

    def _of_pictures(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors B P of pictures."""
        pixels_BCHW = self._preprocessing(pictures).to(self.device)
        pooled = self._model.vision_model(pixel_values=pixels_BCHW).pooler_output
        return torch.nn.functional.normalize(self._model.visual_projection(pooled), dim=-1)

    def _of_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors B P of texts."""
        padded = self._tokenizer(list(texts), padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt")
        inputs = {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return torch.nn.functional.normalize(self._model.text_projection(self._model.text_model(**inputs).pooler_output), dim=-1)


def _require(model: Any, device: torch.device) -> None:
    """Raises: ModelError when a device has no room for a model in single precision."""
    need, (free, where) = 4 * sum(p.numel() for p in model.parameters()), room.free_on(device)
    if need > free:
        raise ModelError(
            f"the CLIP scorer needs {need / 1e9:.2g} GB of {where}, {free / 1e9:.2g} GB free; {INSTEAD}, or evaluation_type: none"
        )
