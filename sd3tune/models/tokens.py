"""How many tokens each text encoder counts in a text, and what it does not see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.config.sections import Model
from sd3tune.models.components import TEXT_NAMES
from sd3tune.models.encoders import tokenizers

SAID = 80
"""Characters of what is lost that are shown."""


@dataclass(frozen=True)
class Tokens:
    """What one encoder makes of a text. Its marks for beginning and end count."""

    encoder: str
    count: int
    limit: int
    lost: str

    def __str__(self) -> str:
        lost = self.lost if len(self.lost) <= SAID else self.lost[:SAID] + "…"
        return f"{self.encoder} {min(self.count, self.limit)} of {self.count} tokens" + (f', without "{lost}"' if self.lost else "")


class Counter:
    """Counts while a person types: the tokenizers of a model are loaded once."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._pairs: list[tuple[Any, int]] = []

    @property
    def ready(self) -> bool:
        """Whether counting loads nothing, as long as the model stays the same."""
        return self._model is not None

    def count(self, config: RunConfig, text: str) -> tuple[Tokens, ...]:
        """What the three encoders see of a text. Raises: ModelError when a tokenizer cannot be loaded."""
        if self._model != config.model:
            self._model, self._pairs = None, tokenizers(config)
            self._model = config.model
        return tuple(tokens_of(name, one, limit, text) for name, (one, limit) in zip(TEXT_NAMES, self._pairs, strict=True))


def count_tokens(config: RunConfig, texts: Sequence[str]) -> list[tuple[Tokens, ...]]:
    """For each text what the three encoders see of it. Raises: ModelError when a tokenizer cannot be loaded."""
    pairs = tokenizers(config)
    return [
        tuple(tokens_of(name, tokenizer, limit, text) for name, (tokenizer, limit) in zip(TEXT_NAMES, pairs, strict=True)) for text in texts
    ]


def tokens_of(name: str, tokenizer: Any, limit: int, text: str) -> Tokens:
    """What an encoder that takes ``limit`` tokens makes of a text."""
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    if count <= limit:
        return Tokens(name, count, limit, "")
    seen = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=tokenizer.is_fast)
    end = max((end for _, end in seen["offset_mapping"]), default=0) if tokenizer.is_fast else 0
    return Tokens(name, count, limit, text[end:].strip() or text[-1:])


def truncated(config: RunConfig, texts: Sequence[str]) -> list[str]:
    """A sentence for each text of which an encoder sees only the beginning."""
    rows = zip(texts, count_tokens(config, texts), strict=True)
    return [f'"{text}": {"; ".join(str(t) for t in counts if t.lost)}' for text, counts in rows if any(t.lost for t in counts)]
