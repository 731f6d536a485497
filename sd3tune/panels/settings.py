"""Panels of settings: the model, how it learns, what is drawn. Each stands alone, or shares its draft with others."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from sd3tune.config import presets
from sd3tune.config.advice import advice
from sd3tune.config.schema import RunConfig
from sd3tune.errors import Sd3TuneError
from sd3tune.panels.base import Panel
from sd3tune.panels.draft import Draft
from sd3tune.panels.forms import Form
from sd3tune.panels.looks import button, column, put, row, sentence, small, tip
from sd3tune.shown import size_in_words
from sd3tune.validation.shots import guidance_of

SLG_MEDIUM: dict[str, Any] = {
    "validation_guidance_skip_layers": (7, 8, 9), "validation_guidance_skip_layers_start": 0.01,
    "validation_guidance_skip_layers_stop": 0.2, "validation_guidance_skip_scale": 2.8, "validation_guidance": 4.0,
}  # fmt: skip
"""Skip-layer guidance of SD3.5 Medium (SimpleTuner's SD3 guide; Stability AI's sd3.5)."""

SLG_OFF: dict[str, Any] = {"validation_guidance_skip_layers": None}


class SettingsPanel(Panel):
    """A form of some settings with what should be thought of, in columns."""

    GROUPS: tuple[tuple[str, ...], ...] = ()

    def __init__(self, config: RunConfig | Draft) -> None:
        super().__init__(config)
        self.forms = [Form(self.draft, names) for names in self.GROUPS]
        self.fields: dict[str, Any] = {name: one for form in self.forms for name, one in form.fields.items()}
        self.about = widgets.HTML()
        parts = row(*(column(form.widget) for form in self.forms))
        self.widget = widgets.VBox([*self._above(), self.note, parts, self.about], layout=widgets.Layout(width="100%", max_width="1100px"))
        self.draft.observe(lambda _: self.refresh(), ["config", "live"])
        self.refresh()

    def _above(self) -> list[Any]:
        return []

    def refresh(self) -> None:
        """Bring what stands below the fields up to date."""
        put(self.about, self._below())

    def _below(self) -> str:
        return small(advice(self.config))

    def _take(self, settings: dict[str, Any]) -> None:
        """Take several settings over at once."""
        problems = self.draft.change(**settings)
        self.say("; ".join(problems.values()), bad=bool(problems))


class ModelPanel(SettingsPanel):
    """Which model, in which numbers, and what that takes of the memory."""

    GROUPS = (
        ("model_flavour", "pretrained_model_name_or_path", "mixed_precision", "base_model_precision", "modulation_precision"),
        ("text_encoder_1_precision", "text_encoder_2_precision", "text_encoder_3_precision", "use_t5", "tokenizer_max_length"),
        ("gradient_checkpointing", "vae_dtype", "vae_enable_tiling", "vae_enable_slicing", "attention_mechanism"),
    )  # fmt: skip

    def _below(self) -> str:
        return sentence(forecast(self.config)) + small(advice(self.config))


class LearningPanel(SettingsPanel):
    """A preset to begin with, the adapter, the optimizer, the noise and the length of the run."""

    GROUPS = (
        ("learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "max_grad_norm", "max_train_steps", "num_train_epochs", "seed"),
        ("lora_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "use_dora", "use_ema", "init_lora"),
        (
            "train_batch_size", "gradient_accumulation_steps", "aspect_bucket_alignment", "caption_dropout_probability",
            "checkpoint_step_interval", "checkpoint_minutes", "output_dir",
        ),
        (
            "flow_schedule_shift", "flow_schedule_auto_shift", "flow_sigmoid_scale", "flow_use_uniform_schedule", "flow_use_beta_schedule",
            "flow_beta_schedule_alpha", "flow_beta_schedule_beta",
        ),
    )  # fmt: skip

    def _above(self) -> list[Any]:
        options = [("choose one", "")] + [(f"{name}: {presets.about(name)}", name) for name in presets.names()]
        self.preset: Any = tip(
            widgets.Dropdown(
                options=options, value="", description="Preset", style={"description_width": "120px"}, layout={"width": "98%"}
            ),
            "begin anew with a preset; where files go stays as it is",
        )
        self.preset.observe(lambda change: self._begin(change["new"]), "value")
        return [self.preset]

    def _begin(self, name: str) -> None:
        if not name:
            return
        if self.draft.live:
            self.say("a preset cannot be taken while a run goes on", bad=True)
            return
        self.draft.start_over(presets.load(name))
        self.say(f"These are the settings of the preset {name}.")

    def refresh(self) -> None:
        """Bring what stands below the fields up to date."""
        super().refresh()
        self.preset.disabled = self.draft.live


class ValidationPanel(SettingsPanel):
    """What is drawn, how it is guided, and with which skip-layer guidance; nothing of it touches the training."""

    GROUPS = (
        ("validation_prompt", "validation_prompt_library", "validation_negative_prompt", "validation_resolution", "num_validation_images"),
        (
            "validation_guidance", "validation_num_inference_steps", "validation_noise_scheduler", "validation_shift", "validation_seed",
            "validation_steps", "validation_adapter_strength", "ema_validation", "validation_preview", "validation_preview_steps",
        ),
        (
            "validation_guidance_skip_layers", "validation_guidance_skip_scale", "validation_guidance_skip_layers_start",
            "validation_guidance_skip_layers_stop",
        ),
    )  # fmt: skip

    def _above(self) -> list[Any]:
        medium = button(
            "SLG as for SD3.5 Medium", lambda: self._take(SLG_MEDIUM), "layers 7, 8, 9 from 1 to 20 % of the steps, scale 2.8, guidance 4"
        )
        off = button("No SLG", lambda: self._take(SLG_OFF), "skip-layer guidance off")
        return [row(medium, off)]

    def _below(self) -> str:
        return sentence(guidance_words(self.config)) + small(advice(self.config))


def guidance_words(config: RunConfig) -> str:
    """In which steps of the sampler skip-layer guidance acts, and what it compares."""
    v = config.validation
    layers = v.validation_guidance_skip_layers
    if not layers:
        return "Skip-layer guidance is off: SLG layers names no blocks."
    guidance = guidance_of(config)
    active = guidance.active_steps(v.validation_num_inference_steps)
    if not active:
        return f"Skip-layer guidance acts in no step of {v.validation_num_inference_steps}: widen SLG start and stop."
    span = f"step {active[0]}" if len(active) == 1 else f"steps {active[0]} to {active[-1]}"
    blocks = f"block {layers[0]}" if len(layers) == 1 else f"blocks {', '.join(map(str, layers))}"
    acts = f"acts in {span} of {v.validation_num_inference_steps}: away from the model without {blocks}"
    return f"Skip-layer guidance {acts}. It never touches training."


def forecast(config: RunConfig) -> str:
    """What a configuration is predicted to take of the memory, beside what this machine has."""
    from sd3tune.models import memory, room
    from sd3tune.models.components import pick_device
    from sd3tune.models.savings import batches

    side = max(max(size) for size in config.validation_sizes)
    try:
        need = memory.predict(config, side=side)
    except Sd3TuneError as error:
        return f"The memory cannot be predicted: {str(error).splitlines()[0]}"
    there, where = room.free_on(pick_device())
    fits = (
        "it fits"
        if need.peak < there
        else "that is too much: see what saves memory in Base precision, Batch size and Gradient checkpointing"
    )
    peak = f"Predicted peak {size_in_words(need.peak)} of {size_in_words(there)} free ({where}): {fits}."
    return f"{peak} {batches(config, side=side, room=there)}".strip() + f"\n{need}"
