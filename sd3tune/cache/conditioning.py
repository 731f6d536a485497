"""What the transformer is given of texts, and what stands where one is left out: the one owner of both.

Shapes: L text tokens, D text width, P pooled text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sd3tune.cache.states import TextStates

Words = str | tuple[str, str, str]
"""A text, or what CLIP-L, CLIP-G and T5 each read of it (prompt, prompt_2 and prompt_3 of diffusers' pipeline)."""

Unconditional = Literal["empty_string", "zero"]
"""What an encoder gives for no text: what it makes of the empty one, or zeros."""


@dataclass(frozen=True)
class Conditioning:
    """How texts reach the transformer, the same in training, evaluation and validation.

    ``clip_l`` is how many columns of CLIP's states and of the pooled vector are CLIP-L's; the rest are CLIP-G's.
    """

    clip_l: tuple[int, int]
    length: int = 154
    """Tokens of T5."""
    padding: Literal["unmodified", "zero"] = "unmodified"
    """What follows a text's T5 states up to that length."""
    use_t5: bool = True
    clip: Unconditional = "empty_string"
    t5: Unconditional = "empty_string"

    def __str__(self) -> str:
        pads = "as T5 makes them" if self.padding == "unmodified" else "zero"
        read = f"T5 of {self.length} tokens, pads {pads}" if self.use_t5 else "no T5"
        said = {"empty_string": "that of the empty text", "zero": "zeros"}
        return f"{read}; for no text CLIP gives {said[self.clip]}, T5 {said[self.t5]}"

    def states(self, words: Words, stored: Callable[[str], TextStates]) -> TextStates:
        """The states of a text; ``stored`` looks up what the encoders gave for one. Its tensors are not changed."""
        import torch

        texts = (words, words, words) if isinstance(words, str) else words
        if len(set(texts)) == 1 and (texts[0].strip() or "zero" not in (self.clip, self.t5)):
            return stored(texts[0])
        of_l, of_g, of_t5 = (_given(text, what, stored) for text, what in zip(texts, (self.clip, self.clip, self.t5), strict=True))
        width, pooled = self.clip_l
        clip_LD = torch.cat([of_l.clip_LD[:, :width], of_g.clip_LD[:, width:]], dim=1)
        return TextStates(clip_LD, of_t5.t5_LD, torch.cat([of_l.pooled_P[:pooled], of_g.pooled_P[pooled:]]))

    def differs(self, other: Conditioning) -> list[str]:
        """The settings in which two of them differ."""
        names = {
            "tokenizer_max_length": self.length == other.length, "t5_padding": self.padding == other.padding,
            "use_t5": self.use_t5 == other.use_t5, "sd3_clip_uncond_behaviour": self.clip == other.clip,
            "sd3_t5_uncond_behaviour": self.t5 == other.t5,
        }  # fmt: skip
        return [name for name, same in names.items() if not same]


def _given(text: str, what: Unconditional, stored: Callable[[str], TextStates]) -> TextStates:
    import torch

    states = stored(text)
    return TextStates(*map(torch.zeros_like, states)) if what == "zero" and not text.strip() else states
