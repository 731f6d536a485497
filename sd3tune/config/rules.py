"""What is wrong with settings of noise levels, rollouts, the update rule, pictures and reporting that are each legal alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd3tune.config.hooks import hook_problems
from sd3tune.config.library import problems as library_problems
from sd3tune.config.library import size_problems
from sd3tune.config.optimizers import OPTIMIZERS, options_of

if TYPE_CHECKING:
    from sd3tune.config.schema import RunConfig
    from sd3tune.config.sections import Noise, Optimizer, Reporting

REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")
"""A name on the hub."""

PRODIGY_LEAST = 0.01
"""A multiplier below this is a learning rate that was meant for another rule."""


def spreads_of(noise: Noise) -> list[str]:
    """The settings that choose how noise levels spread; more than one contradict each other, none is the logit-normal."""
    chosen = {
        "flow_custom_timesteps": noise.flow_custom_timesteps is not None,
        "flow_cubic_schedule_weights": noise.flow_cubic_schedule_weights is not None,
        "flow_use_uniform_schedule": noise.flow_use_uniform_schedule,
        "flow_use_beta_schedule": noise.flow_use_beta_schedule,
    }
    return [name for name, is_set in chosen.items() if is_set]


def noise_problems(noise: Noise) -> Iterator[str]:
    """Sentences about noise levels."""
    chosen = spreads_of(noise)
    if len(chosen) > 1:
        yield f"{' and '.join(chosen)} each choose how noise levels spread; keep one"
    if noise.flow_schedule_auto_shift and noise.flow_schedule_shift is not None:
        yield "flow_schedule_shift and flow_schedule_auto_shift are both set; keep one"
    if noise.flow_custom_timesteps == ():
        yield "flow_custom_timesteps is an empty list; name timesteps, or remove it"
    weights = noise.flow_cubic_schedule_weights
    if weights is not None and (len(weights) < 2 or not any(weights)):
        yield f"flow_cubic_schedule_weights: {list(weights)} is no density; give at least two weights, one of them above 0"


def rollout_problems(config: RunConfig) -> Iterator[str]:
    """Sentences about scheduled sampling."""
    o, steps = config.objective, config.max_train_steps
    if not o.scheduled_sampling_max_step_offset:
        return
    if steps and o.scheduled_sampling_start_step >= steps:
        yield (
            f"scheduled_sampling_start_step ({o.scheduled_sampling_start_step}) is not before the end of the run (max_train_steps = "
            f"{steps}), so nothing would be rolled out; lower it"
        )
    if o.scheduled_sampling_reflexflow and not o.scheduled_sampling_reflexflow_beta1 + o.scheduled_sampling_reflexflow_beta2:
        yield (
            "scheduled_sampling_reflexflow_beta1 and _beta2 are both 0, so a rolled picture would teach nothing; raise one, or switch "
            "scheduled_sampling_reflexflow off"
        )


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """Sentences about the update rule and the course of its rate."""
    o = config.optimizer
    try:
        options_of(o.optimizer, o.optimizer_config)
    except ValueError as error:
        yield str(error)
    if OPTIMIZERS[o.optimizer].betas is None and (o.optimizer_beta1 is not None or o.optimizer_beta2 is not None):
        yield f"optimizer {o.optimizer} has no betas; remove optimizer_beta1 and optimizer_beta2"
    if o.optimizer == "adamw_bf16" and config.model.base_model_default_dtype == "fp32":
        yield "optimizer adamw_bf16 keeps the adapter in bf16, and base_model_default_dtype is fp32; use adamw"
    if o.optimizer == "prodigy" and o.learning_rate < PRODIGY_LEAST:
        yield f"optimizer prodigy finds its own rate and multiplies it by learning_rate ({o.learning_rate:g}); set learning_rate: 1"
    if o.optimizer == "schedulefree":
        if o.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield f"optimizer schedulefree replaces a schedule, and lr_scheduler is {o.lr_scheduler}; use constant_with_warmup"
        if o.optimizer_beta1 == 0:
            yield "optimizer schedulefree averages by optimizer_beta1, which is 0; use 0.9"
    yield from _course_problems(o, config.max_train_steps)


def _course_problems(o: Optimizer, steps: int | None) -> Iterator[str]:
    if o.lr_scheduler != "constant" and steps and o.lr_warmup_steps > steps:
        yield f"lr_warmup_steps ({o.lr_warmup_steps}) is longer than the run (max_train_steps = {steps})"
    if o.lr_scheduler == "polynomial" and o.lr_end > o.learning_rate:
        yield f"lr_end ({o.lr_end:g}) is above learning_rate ({o.learning_rate:g}), so the rate would rise; lower it"


def reporting_problems(reporting: Reporting) -> Iterator[str]:
    """Sentences about the hub and webhooks."""
    if reporting.push_checkpoints_to_hub and not reporting.push_to_hub:
        yield "push_checkpoints_to_hub is on and push_to_hub is off; switch both on"
    name = reporting.hub_model_id
    if name is not None and not REPOSITORY.fullmatch(name):
        yield f"hub_model_id: {name!r} is not owner/name or name; letters, digits, '-', '_' and '.' are allowed"
    yield from hook_problems(reporting.webhook_config)


def validation_problems(config: RunConfig) -> Iterator[str]:
    """Sentences about the pictures that are drawn on the way."""
    v, wrong = config.validation, list[str]()
    yield from (f"validation_resolution: {problem}" for problem in size_problems(v.validation_resolution))
    if v.user_prompt_library is not None:
        wrong = list(library_problems(v.user_prompt_library))
        yield from (f"user_prompt_library: {problem}" for problem in wrong)
    if v.validation_preview and v.validation_disable:
        yield "validation_preview is on and validation_disable is on, so nothing is ever drawn; switch one off"
    layers = v.validation_guidance_skip_layers
    if layers is None:
        return
    if not layers or len(set(layers)) != len(layers):
        yield f"validation_guidance_skip_layers: {list(layers)} is not a list of different block numbers from 0"
    if v.validation_guidance <= 1:
        yield (
            f"validation_guidance ({v.validation_guidance:g}) is not above 1, and without guidance diffusers never runs "
            "skip-layer guidance; raise it, or remove validation_guidance_skip_layers"
        )
    for prompt in () if wrong else config.prompts:
        if prompt.guidance is not None and prompt.guidance <= 1:
            yield (
                f"user_prompt_library: {prompt.name!r}: guidance {prompt.guidance:g} is not above 1, so skip-layer guidance would not act "
                "there; raise it, or remove validation_guidance_skip_layers"
            )
    if v.validation_guidance_skip_layers_start >= v.validation_guidance_skip_layers_stop:
        yield "validation_guidance_skip_layers_start is not below validation_guidance_skip_layers_stop"
