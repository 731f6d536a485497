"""What an adapter's file says of itself, in the keys that other programs show. Source: Stability's ModelSpec 1.0.1."""

from __future__ import annotations

from collections.abc import Iterable

from sd3tune.config.reading import dump
from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.files import digest

ARCHITECTURES = {
    "sd3-medium": "stable-diffusion-3-medium", "sd35-medium": "stable-diffusion-3.5-medium", "sd35-large": "stable-diffusion-3.5-large",
}  # fmt: skip

TEXTS = ("tokenizer_max_length", "t5_padding", "use_t5", "sd3_clip_uncond_behaviour", "sd3_t5_uncond_behaviour")
"""Settings that a program which draws with the file should have, too."""


def modelspec(config: RunConfig, plan: Plan, title: str) -> dict[str, str]:
    """Title, architecture, resolution, trigger phrase, how texts were read, and a digest of the settings."""
    largest = max((placement.bucket for placement in plan.train), key=lambda bucket: bucket.width * bucket.height)
    return described(config, title, str(largest), [d.instance_prompt for d in plan.catalog.datasets if d.instance_prompt])


def described(config: RunConfig, title: str, resolution: str, phrases: Iterable[str]) -> dict[str, str]:
    """The same where there is no plan; the resolution may be unknown (empty)."""
    base = config.model.model_flavour or config.model.pretrained_model_name_or_path or ""
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES.get(base, 'stable-diffusion-3')}/{'lora' if not _lycoris(config) else 'lycoris'}",
        "modelspec.title": title,
        "modelspec.prediction_type": "flow",
        "sd3tune.base": base,
        **{f"sd3tune.{name}": str(getattr(config.model, name)) for name in TEXTS},
        "sd3tune.config_sha256": digest(dump(config)),
    }
    known = sorted(set(phrases))
    found |= {"modelspec.resolution": resolution} if resolution else {}
    return found | ({"modelspec.trigger_phrase": ", ".join(known)} if known else {})


def _lycoris(config: RunConfig) -> bool:
    return config.adapter.lora_type == "lycoris"
