"""What a trainer is made of, taken out of a configuration and a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sd3tune.cache import Cache, CacheBuilder
from sd3tune.config.optimizers import options_of
from sd3tune.config.rules import spreads_of
from sd3tune.config.schema import RunConfig
from sd3tune.data.buckets import LATENT_FACTOR
from sd3tune.data.catalog import again
from sd3tune.data.datasets import dataset_of
from sd3tune.data.planning import Plan, plan
from sd3tune.errors import CheckpointError, ConfigError, DataError
from sd3tune.files import digest
from sd3tune.models import adapters, components, encoders, lycoris_adapters, starting
from sd3tune.models.lora_files import Verified, save_lora
from sd3tune.models.lora_layouts import Layout
from sd3tune.models.modelspec import modelspec
from sd3tune.processes import Processes
from sd3tune.run_folder import RunFolder
from sd3tune.training.flow import Measure
from sd3tune.training.objective import ALONE
from sd3tune.training.optim import Rule
from sd3tune.training.reflexflow import Reflex
from sd3tune.training.rollout import Rollout
from sd3tune.training.rules import Rules
from sd3tune.training.spreads import Kind, Spread


def spec_of(config: RunConfig) -> adapters.Spec:
    """The adapter that a configuration describes."""
    a = config.adapter
    return adapters.Spec(
        a.lora_targets, a.lora_rank, config.lora_alpha, a.lora_dropout, a.use_dora, a.lora_init_type, a.lora_rank_pattern or {}
    )


def begin(config: RunConfig, weights: Mapping[str, Any]) -> str:
    """Give a new adapter the weights of ``init_lora``, if it is set, and say so. Raises: CheckpointError."""
    path = config.adapter.init_lora
    if path is None:
        return ""
    if config.adapter.lora_type == "lycoris":
        return starting.begin_lycoris(Path(path), weights)
    return starting.begin_with(Path(path), weights, spec_of(config))


def write_adapter(
    path: Path, weights: Mapping[str, torch.Tensor], config: RunConfig, made: Plan, *, network: Any, step: int, layout: Layout
) -> Verified:
    """Write an adapter file, read it back and compare; what was found. Raises: CheckpointError, FileError."""
    notes = {"sd3tune.step": str(step), **modelspec(config, made, path.stem)}
    return write_noted(path, weights, config, notes, network=network, layout=layout)


def write_noted(
    path: Path, weights: Mapping[str, torch.Tensor], config: RunConfig, notes: Mapping[str, str], *, network: Any, layout: Layout
) -> Verified:
    """The same with other notes in the file's metadata."""
    if network is not None:
        lycoris = lycoris_adapters.read_config(config.adapter.lycoris_config)
        return lycoris_adapters.save_lycoris(path, network, weights, notes, lycoris)
    return save_lora(path, weights, spec_of(config), skeleton=components.skeleton(config), notes=notes, layout=layout)


def checkpointing(config: RunConfig, device: torch.device) -> bool:
    """Whether each block's activations are made anew in the backward pass."""
    wanted = config.memory.gradient_checkpointing
    return device.type != "cpu" if wanted == "auto" else wanted


def rules_of(config: RunConfig, made: Plan) -> Rules:
    """The numbers of an update, taken out of the configuration."""
    o, objective = config.optimizer, config.objective
    return Rules(
        seed=config.schedule.seed, accumulation=made.accumulation, sigmoid_scale=config.noise.flow_sigmoid_scale,
        shift=config.flow_schedule_shift, stratified=config.noise.stratified, schedule=o.lr_scheduler, warmup=o.lr_warmup_steps,
        total=made.steps, max_grad_norm=o.max_grad_norm, scaled=config.model.mixed_precision == "fp16",
        ema_decay=config.adapter.ema_decay if config.adapter.use_ema else None, ema_interval=config.adapter.ema_update_interval,
        ema_device=None if config.adapter.ema_device == "accelerator" else "cpu",
        spread=spread_of(config), measure=Measure(objective.loss_type, objective.huber_c), weighting=objective.loss_weighting,
        perturbation=objective.input_perturbation, rule=rule_of(config),
        cycles=o.lr_num_cycles, power=o.lr_power, end=o.lr_end, clip_method=o.grad_clip_method,
        mask_normalise=objective.mask_normalise, regularisation_weight=objective.regularisation_weight,
        rollout=rollout_of(config),
    )  # fmt: skip


def rule_of(config: RunConfig) -> Rule:
    """The optimizer's rule with its numbers."""
    o = config.optimizer
    return Rule(o.optimizer, o.optimizer_beta1, o.optimizer_beta2, tuple(options_of(o.optimizer, o.optimizer_config).items()))


def rollout_of(config: RunConfig) -> Rollout | None:
    """The rollouts that a configuration asks for; nothing when they are off."""
    o = config.objective
    if not o.scheduled_sampling_max_step_offset:
        return None
    reflex = Reflex(
        o.scheduled_sampling_reflexflow_alpha, o.scheduled_sampling_reflexflow_beta1, o.scheduled_sampling_reflexflow_beta2
    )  # fmt: skip
    return Rollout(
        o.scheduled_sampling_max_step_offset, o.scheduled_sampling_strategy, probability=o.scheduled_sampling_probability,
        prob_start=o.scheduled_sampling_prob_start, prob_end=o.scheduled_sampling_prob_end, ramp_steps=o.scheduled_sampling_ramp_steps,
        start_step=o.scheduled_sampling_start_step, cosine=o.scheduled_sampling_ramp_shape == "cosine",
        sampler=o.scheduled_sampling_sampler, order=o.scheduled_sampling_order, reaimed=o.scheduled_sampling_target == "reaimed",
        reflex=reflex if o.scheduled_sampling_reflexflow else None,
    )  # fmt: skip


def spread_of(config: RunConfig) -> Spread:
    """How a configuration spreads noise levels."""
    noise = config.noise
    listed = noise.flow_custom_timesteps or ()
    unit = 1000 if max(listed, default=0) > 1 else 1
    kinds: dict[str, Kind] = {
        "flow_custom_timesteps": noise.flow_timesteps_mode, "flow_cubic_schedule_weights": "cubic", "flow_use_uniform_schedule": "uniform",
        "flow_use_beta_schedule": "beta",
    }  # fmt: skip
    chosen = next(iter(spreads_of(noise)), None)
    return Spread(
        kind=kinds[chosen] if chosen else "logit-normal", scale=noise.flow_sigmoid_scale, alpha=noise.flow_beta_schedule_alpha,
        beta=noise.flow_beta_schedule_beta, weights=noise.flow_cubic_schedule_weights or (), levels=tuple(t / unit for t in listed),
    )  # fmt: skip


def check_sizes(made: Plan, model: Any) -> None:
    """Raises: DataError for a size that is beyond the model's table of positions."""
    most = model.pos_embed_max_size * model.patch_size * LATENT_FACTOR
    beyond = sorted({p.bucket for p in (*made.train, *made.evaluation) if max(p.bucket) > most})
    if beyond:
        raise DataError(
            f"{', '.join(map(str, beyond))} px: this model knows sides of at most {most} px; lower resolution, or narrow "
            "minimum_aspect_ratio and maximum_aspect_ratio in datasets.yaml"
        )


def check_texts(config: RunConfig, cache: Cache) -> None:
    """Raises: ConfigError when the cache would give other texts than the configuration says, and its LoRA would say."""
    if wrong := cache.conditioning.differs(encoders.encoders(config).conditioning):
        raise ConfigError([f"{', '.join(wrong)}: the cache was made with another setting; build it from this configuration"], "cache")


def plan_digest(made: Plan) -> str:
    """Digest of what decides the order of the data, whatever the number of updates."""
    rows = []
    for p in made.train:
        own = f" in batches of {made.batch_size_of(p.item.dataset)}" if p.item.dataset.train_batch_size else ""
        rows.append(f"{p.item.id} {p.bucket} {p.copy}" + " stays" * p.item.dataset.is_regularisation_data + own)
    return digest(str(made.batch_size * made.processes), str(made.accumulation), *rows)


def encoded(config: RunConfig, made: Plan, processes: Processes = ALONE) -> Cache:
    """The cache of a plan; several processes share out what is missing. Raises: DataError, ModelError, FileError."""
    handle = encoders.encoders(config)
    if processes.count > 1:
        share = CacheBuilder(made, handle, part=(processes.rank, processes.count))
        for _ in share:
            pass
        made = share.plan  # with the digests of its pictures
        processes.wait()
    return CacheBuilder(made, handle).build()


def rebuild_cache(folder: RunFolder, config: RunConfig, processes: Processes = ALONE) -> Cache:
    """The cache of a run folder, from the data sets that its manifest names. Raises: CheckpointError, DataError."""
    try:
        manifest = json.loads(folder.manifest.read_text())
        datasets, source = [dataset_of(row) for row in manifest["datasets"]], manifest.get("source", "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.manifest}: cannot be read ({error}); pass the cache to Trainer.resume") from None
    return encoded(config, plan(again(datasets, source), config), processes)
