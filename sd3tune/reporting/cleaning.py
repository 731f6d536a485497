"""What may leave the machine: settings and sentences without secrets, addresses and a person's paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.models.components import base_name

PRIVATE = ("output_dir", "cache_dir", "mirror_to", "init_lora", "lycoris_config", "webhook_config")
"""Settings that are paths or addresses."""

WORDS = ("validation_prompt", "validation_negative_prompt", "user_prompt_library", "model_card_note")
"""Settings that are a person's own words."""

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Variables of the environment whose values are secrets."""

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?<=/api/webhooks/)[^\s\"']+")
ADDRESS = re.compile(r"(https?://)([^\s/@]+@)?([^\s/?#'\")]+)[^\s'\")]*")
PLACE = re.compile(r"(?<![\w.:<>/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",;:()\[\]/\\]+[/\\])*([^\s'\",;:()\[\]/\\]+)")


def without_tokens(text: str) -> str:
    """A text with ``***`` for what is, or looks like, a token."""
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return TOKEN.sub("***", text)


def without_secrets(text: str) -> str:
    """A sentence without tokens, and of addresses with the host alone."""
    return ADDRESS.sub(r"\1\3", without_tokens(text))


def without_places(text: str, folder: Path) -> str:
    """A sentence with paths relative to the run folder, and of others the last part alone; without secrets, too."""
    for place in (folder, Path.cwd(), Path.home()):
        text = text.replace(f"{place}/", "").replace(f"{place}\\", "").replace(str(place), place.name)
    return PLACE.sub(r"\1", without_secrets(text))


def shareable(config: RunConfig) -> dict[str, Any]:
    """Every setting that another person may see; of texts that are paths the last part."""
    found = {name: value for name, value in config.leaves().items() if name not in PRIVATE}
    found["pretrained_model_name_or_path"] = base_name(config) if config.model.pretrained_model_name_or_path else None
    return {name: PLACE.sub(r"\1", v) if isinstance(v, str) and name not in WORDS else v for name, v in found.items()}
