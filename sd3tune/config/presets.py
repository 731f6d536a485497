"""Named starting points."""

from __future__ import annotations

from typing import Any

from sd3tune.config.schema import RunConfig

HELD_OUT_PROMPTS = ("croissant", "cat face", "pickup truck", "lock", "cherry blossom", "rooster")
"""Captions of pictures that the playground's training folder does not hold."""


def playground(**settings: Any) -> RunConfig:
    """The model that comes with the package, on a CPU, in about three minutes. Raises: ConfigError."""
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
    "max_train_steps": 300,
    "checkpoint_step_interval": 100,
    "validation_prompt": HELD_OUT_PROMPTS,
    "validation_resolution": "64x64",
    "validation_guidance": 3.0,
    "validation_num_inference_steps": 20,
    "validation_steps": 0,
    "num_eval_images": 24,
    "eval_timesteps": 8,
    "output_dir": "runs/playground",
}
