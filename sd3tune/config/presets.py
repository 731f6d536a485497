"""Named starting points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3tune.config.schema import RunConfig

FILES = Path(__file__).parent / "preset_files"
"""One small YAML file each: only what differs from the defaults, with its sources at the top."""

PREFIX = "preset:"
"""What a preset is called where a file is named: ``RunConfig.load("preset:stable")``, ``extends: preset:stable``."""

HELD_OUT_PROMPTS = ("croissant", "cat face", "pickup truck", "lock", "cherry blossom", "rooster")
"""Captions of pictures that the playground's training folder does not hold."""


def names() -> tuple[str, ...]:
    """The names of all presets."""
    return ("playground", *sorted(path.stem for path in FILES.glob("*.yaml")))


def load(name: str, **settings: Any) -> RunConfig:
    """A preset, with other values for some settings. Raises: ConfigError, with the nearest name when there is none of this one."""
    if name == "playground":
        return playground(**settings)
    return RunConfig.load(PREFIX + name).replace(**settings)


def about(name: str) -> str:
    """What a preset is for, in one line."""
    if name == "playground":
        return "The model that comes with the package, on a CPU, in about a minute and a half."
    return (FILES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def playground(**settings: Any) -> RunConfig:
    """The model that comes with the package, on a CPU, in about a minute and a half. Raises: ConfigError."""
    return RunConfig.make(**{**PLAYGROUND, **settings})


PLAYGROUND: dict[str, Any] = {
    "model_flavour": "playground",
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "tokenizer_max_length": 16,
    "aspect_bucket_alignment": 16,
    "lora_rank": 16,
    "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "norm1_context.linear"),  # attention, and what style moves most
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "train_batch_size": 4,
    "max_train_steps": 150,
    "checkpoint_step_interval": 50,
    "validation_prompt": HELD_OUT_PROMPTS,
    "validation_resolution": "64x64",
    "validation_guidance": 3.0,
    "validation_num_inference_steps": 20,
    "validation_steps": 0,
    "num_eval_images": 24,
    "eval_timesteps": 4,
    "output_dir": "runs/playground",
}
