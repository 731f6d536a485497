"""Texts of other libraries, shown without what must not be seen."""

from __future__ import annotations

import os
import re

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
"""Variables of the environment that hold tokens."""

HIDDEN = "***"


def without_secrets(text: str) -> str:
    """A text with every token of the environment, every token of the hub and every password in an address made unreadable."""
    for name in NAMES:
        if value := os.environ.get(name, "").strip():
            text = text.replace(value, HIDDEN)
    text = re.sub(r"\bhf_[A-Za-z0-9]{6,}", HIDDEN, text)
    text = re.sub(r"([?&](?:token|access_token|api_key)=)[^&\s\"')]+", rf"\1{HIDDEN}", text)
    return re.sub(r"(\w://)[^/\s@]+@", rf"\1{HIDDEN}@", text)
