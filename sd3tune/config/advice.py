"""What is known to matter for a configuration that is legal: a condition, a sentence, and where it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sd3tune.config.schema import RunConfig

GUIDE = "SimpleTuner's SD3 guide"


@dataclass(frozen=True)
class Advice:
    """One sentence, and who says so."""

    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"


@dataclass(frozen=True)
class Row:
    """One thing to think of: when, what, who says so, and which settings it is about."""

    condition: Callable[[RunConfig], bool]
    text: str
    source: str
    settings: tuple[str, ...]
    steadies: bool = False
    """Whether it is about runs that become unstable."""


def _large(config: RunConfig) -> bool:
    name = config.model.pretrained_model_name_or_path or ""
    return config.model.model_flavour == "sd35-large" or re.search(r"3\.5[-_]large", name.lower()) is not None


def _batch(config: RunConfig) -> int:
    return config.data.train_batch_size * config.data.gradient_accumulation_steps


def _skipped(config: RunConfig) -> int:
    return len(config.validation.validation_guidance_skip_layers or ())


def _highest_guidance(config: RunConfig) -> float:
    """Of all that is drawn: a prompt of a library may have its own."""
    own = [prompt.guidance for prompt in config.prompts if prompt.guidance is not None]
    return max([config.validation.validation_guidance, *own])


def _lion(config: RunConfig) -> bool:
    return "lion" in config.optimizer.optimizer


def _never_rolled(config: RunConfig) -> bool:
    o = config.objective
    highest = max(o.scheduled_sampling_prob_start, o.scheduled_sampling_prob_end)
    return o.scheduled_sampling_max_step_offset > 0 and not (
        highest if o.scheduled_sampling_ramp_steps else o.scheduled_sampling_probability
    )


def _rollouts_off(config: RunConfig) -> bool:
    o = config.objective
    asked = o.scheduled_sampling_probability > 0 or o.scheduled_sampling_ramp_steps > 0 or o.scheduled_sampling_reflexflow
    return not o.scheduled_sampling_max_step_offset and asked


ROWS: tuple[Row, ...] = (
    Row(
        lambda c: _large(c) and not _lion(c) and c.optimizer.optimizer != "prodigy" and c.optimizer.learning_rate >= 4e-5,
        "SD3.5 Large is sensitive to the rate: 1e-5 works with stableadamw, 4e-5 may blow up", GUIDE,
        ("learning_rate", "optimizer", "model_flavour"), steadies=True,
    ),
    Row(
        lambda c: _large(c) and _batch(c) < 12, "larger batches help SD3.5 Large a lot; its stable values use 4 images x 3 GPUs", GUIDE,
        ("train_batch_size", "gradient_accumulation_steps"), steadies=True,
    ),
    Row(
        lambda c: _large(c) and c.optimizer.max_grad_norm > 0.1,
        "max_grad_norm 0.1 is the stable value of SD3.5 Large; a higher one lets dangerous updates through", GUIDE,
        ("max_grad_norm",), steadies=True,
    ),
    Row(
        lambda c: _large(c) and (c.model.base_model_precision == "no_change" or c.model.base_model_default_dtype == "fp32"),
        "a base that is not quantised, or pure fp32, is no cure for SD3.5 Large's instability", GUIDE,
        ("base_model_precision", "base_model_default_dtype"), steadies=True,
    ),
    Row(
        lambda c: bool(_skipped(c)) and _highest_guidance(c) > 4.0,
        "skip-layer guidance wants less guidance: at most 4", "Stability AI's sd3.5",
        ("validation_guidance", "validation_guidance_skip_layers"),
    ),
    Row(
        lambda c: _skipped(c) > 3 and c.validation.validation_guidance_skip_scale < 2.8 * 2 ** (_skipped(c) - 3),
        "with more than three skipped blocks the guide doubles the scale for each: 2.8 x 2^(n - 3)", GUIDE,
        ("validation_guidance_skip_scale", "validation_guidance_skip_layers"),
    ),
    Row(
        lambda c: c.noise.flow_use_uniform_schedule and not c.noise.flow_schedule_auto_shift and c.flow_schedule_shift != 1,
        "shift 1 goes with the uniform schedule", GUIDE,
        ("flow_use_uniform_schedule", "flow_schedule_shift", "flow_schedule_auto_shift"),
    ),
    Row(
        lambda c: len(set(c.validation_sizes)) > 1 and not c.noise.flow_schedule_auto_shift,
        "with several sizes flow_schedule_auto_shift gives each its own shift", GUIDE,
        ("flow_schedule_auto_shift", "validation_resolution"),
    ),
    Row(
        lambda c: c.model.model_flavour != "playground" and c.model.use_t5 and c.model.tokenizer_max_length < 154,
        "texts of 77 tokens save space and cost quality", GUIDE,
        ("tokenizer_max_length",),
    ),
    Row(
        lambda c: "zero" in (c.model.sd3_clip_uncond_behaviour, c.model.sd3_t5_uncond_behaviour),
        "with zeros for no text, other programs draw the same only when they are given zeros as negative_prompt_embeds",
        "diffusers' StableDiffusion3Pipeline encodes the empty text",
        ("sd3_clip_uncond_behaviour", "sd3_t5_uncond_behaviour"),
    ),
    Row(
        lambda c: _lion(c) and c.optimizer.learning_rate >= 5e-5,
        "Lion wants about a tenth of AdamW's rate: 1e-5 rather than 1e-4", "Chen et al. 2023, section 5",
        ("learning_rate", "optimizer"), steadies=True,
    ),
    Row(
        _never_rolled, "no picture is ever rolled out: scheduled_sampling_probability is 0, and there is no ramp",
        "the settings themselves",
        (
            "scheduled_sampling_probability", "scheduled_sampling_prob_start", "scheduled_sampling_prob_end",
            "scheduled_sampling_ramp_steps", "scheduled_sampling_max_step_offset",
        ),
    ),
    Row(
        _rollouts_off, "scheduled sampling is off, whatever its other settings say: scheduled_sampling_max_step_offset is 0",
        "the settings themselves",
        (
            "scheduled_sampling_max_step_offset", "scheduled_sampling_probability", "scheduled_sampling_ramp_steps",
            "scheduled_sampling_reflexflow",
        ),
    ),
)  # fmt: skip


def advice(config: RunConfig, about: Collection[str] = ()) -> tuple[Advice, ...]:
    """What should be thought of, or only what is ``about`` some settings; nothing of it forbids a run."""
    rows = [row for row in ROWS if not about or {*about} & {*row.settings}]
    return tuple(Advice(row.text, row.source) for row in rows if row.condition(config))


def about_data(config: RunConfig, *, sizes: int, masks: bool, regularisation: bool) -> tuple[Advice, ...]:
    """What should be thought of because of what is trained on: pictures of so many sizes, with masks or to stay as they are."""
    said = []
    if sizes > 1 and not config.noise.flow_schedule_auto_shift and config.noise.flow_custom_timesteps is None:
        said.append(Advice(f"{sizes} sizes share one shift; flow_schedule_auto_shift: true gives each its own", GUIDE))
    if kinds := " and ".join(name for name, there in (("masks", masks), ("regularisation pictures", regularisation)) if there):
        said.append(Advice(f"what {kinds} do to the stability of SD3.5 is not known: watch the first evaluations", GUIDE))
    return tuple(said)


def in_short(config: RunConfig) -> str:
    """What should be thought of when a run has become unstable, as one line."""
    said = "; ".join(str(Advice(row.text, row.source)) for row in ROWS if row.steadies and row.condition(config))
    return f"Advice: {said}" if said else ""


def about_setting(name: str) -> tuple[Advice, ...]:
    """What should be thought of when a setting is chosen, whatever the others are."""
    return tuple(Advice(row.text, row.source) for row in ROWS if name in row.settings)
