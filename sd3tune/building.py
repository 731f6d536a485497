"""What a trainer is made of, loaded and put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sd3tune.assembly import begin, check_sizes, check_texts, checkpointing, rules_of, spec_of
from sd3tune.cache import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.data.wording import considered
from sd3tune.manifest import Manifest, describe
from sd3tune.models import adapters, capabilities, components, lycoris_adapters
from sd3tune.models.tokens import truncated
from sd3tune.processes import Processes
from sd3tune.training.batches import Batches
from sd3tune.training.engine import Engine
from sd3tune.training.optim import require as require_optimizer
from sd3tune.training.prior import Prior
from sd3tune.training.velocity import SamplerVelocity, TransformerVelocity
from sd3tune.validation.shots import in_words


@dataclass(frozen=True)
class Parts:
    """A model with its adapter, and the engine that trains it."""

    device: torch.device
    transformer: Any
    network: Any
    """The LyCORIS network; nothing for LoRA."""
    engine: Engine
    said: str
    """What was found in ``init_lora``."""


def build(config: RunConfig, cache: Cache, processes: Processes, *, fresh: bool) -> Parts:
    """Load the transformer, add the adapter (with the weights of ``init_lora`` if it is ``fresh``), and make the engine.

    Raises: ConfigError, ModelError, DataError, CacheError, CheckpointError.
    """
    device = processes.device or components.pick_device()
    capabilities.require(config)
    require_optimizer(config.optimizer.optimizer, device)
    check_texts(config, cache)
    transformer = components.load_transformer(config, device)
    if checkpointing(config, device):
        transformer.enable_gradient_checkpointing()
    check_sizes(cache.plan, transformer.config)
    network = None
    if config.adapter.lora_type == "lycoris":
        lycoris = lycoris_adapters.read_config(config.adapter.lycoris_config)
        network, weights = lycoris_adapters.add_lycoris(transformer, lycoris, seed=config.schedule.seed)
    else:
        weights = adapters.add_lora(transformer, spec_of(config), seed=config.schedule.seed)
    said = begin(config, weights) if fresh else ""
    batches = Batches(
        cache, seed=config.schedule.seed, caption_dropout=config.data.caption_dropout_probability, latent_draw=config.data.latent_draw,
        masked_probability=config.objective.masked_loss_probability, dropout_mode=config.data.caption_dropout_mode,
    )  # fmt: skip
    velocity = TransformerVelocity(transformer, components.compute_dtype(config))
    engine = Engine(
        velocity, weights, batches, rules_of(config, cache.plan), prior=Prior(velocity, transformer, network),
        walker=SamplerVelocity(velocity, network), processes=processes,
    )  # fmt: skip
    return Parts(device, transformer, network, engine, said)


def marks_of(config: RunConfig, cache: Cache) -> dict[str, str]:
    """Digests of the models that a run is made of."""
    texts, latents = cache.fingerprints
    return {"text encoders": texts, "autoencoder": latents, "base model": components.transformer_weights(config).sample}


def manifest_of(config: RunConfig, cache: Cache, parts: Parts) -> Manifest:
    """What a run is about to do, measured from what was loaded."""
    engine = parts.engine
    cut_off = tuple(truncated(config, sorted({c for p in cache.plan.train for c in p.item.captions})))
    return describe(
        cache, parts.transformer, engine.weights, engine.rules, engine.batches, truncated=cut_off,
        seconds_per_update=engine.seconds_per_update(), pictures=in_words(config), advice=tuple(map(str, considered(config, cache.plan))),
    )  # fmt: skip
