"""The playground's three tokenizers and text encoders, untrained; they are trained together with the transformer.

Shapes: B images, L text tokens, D joint text width, P pooled text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 16
"""Tokens of each encoder. At SD3's 77 + 77 + 154 the transformer would train 2.5 times slower."""
CLIP_WIDTHS, T5_WIDTH = (64, 96), 192


def clip_tokenizer(captions: list[str]) -> Any:
    """A byte-level BPE of CLIP's kind, trained on the captions."""
    from transformers import CLIPTokenizer

    made = CLIPTokenizer().train_new_from_iterator([captions], vocab_size=1600)
    made.model_max_length = LENGTH
    return made


def t5_tokenizer(captions: list[str]) -> Any:
    """A unigram tokenizer of T5's kind, trained on the captions."""
    from transformers import T5TokenizerFast

    made = T5TokenizerFast(extra_ids=0).train_new_from_iterator([captions], vocab_size=1400)
    made.model_max_length = LENGTH
    return made


@dataclass
class Encoders:
    """Tokenizers and encoders in the pipeline's order: CLIP, CLIP, T5."""

    tokenizers: tuple[Any, Any, Any]
    encoders: nn.ModuleList

    def save(self, folder: Path) -> None:
        """Write the six sub-folders of the diffusers layout."""
        for suffix, tokenizer, encoder in zip(("", "_2", "_3"), self.tokenizers, list[Any](self.encoders), strict=True):
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
            encoder.save_pretrained(folder / f"text_encoder{suffix}")

    def ids(self, captions: list[str], *, t5_length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
        """Padded token ids B L of each encoder."""
        lengths = (LENGTH, LENGTH, t5_length)
        rows = [
            tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for tokenizer, length in zip(self.tokenizers, lengths, strict=True)
        ]
        return rows[0], rows[1], rows[2]

    def __call__(self, ids: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Joint states B L D and pooled B P, put together as diffusers' pipeline does."""
        encoders: list[Any] = list(self.encoders)
        outputs = [encoders[i](ids[i], output_hidden_states=True) for i in (0, 1)]
        clip_BLD = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        t5_BLD = encoders[2](ids[2])[0]
        clip_BLD = nn.functional.pad(clip_BLD, (0, t5_BLD.shape[-1] - clip_BLD.shape[-1]))
        return torch.cat([clip_BLD, t5_BLD], dim=1), torch.cat([o[0] for o in outputs], dim=-1)


def new_encoders(captions: list[str]) -> Encoders:
    """Fresh tokenizers trained on ``captions`` and random encoders to go with them."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(captions), t5_tokenizer(captions)
    encoders: list[Any] = []
    for width in CLIP_WIDTHS:
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=width, intermediate_size=3 * width, projection_dim=width, num_hidden_layers=3,
            num_attention_heads=width // 32, max_position_embeddings=LENGTH, hidden_act="gelu",
            bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
        )))  # fmt: skip
    encoders.append(T5EncoderModel(T5Config(
        vocab_size=len(t5), d_model=T5_WIDTH, d_kv=32, d_ff=384, num_layers=3, num_heads=6, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=t5.pad_token_id, eos_token_id=t5.eos_token_id,
    )))  # fmt: skip
    return Encoders((clip, clip, t5), nn.ModuleList(encoders))
