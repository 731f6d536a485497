"""A run's configuration: the sections together, what follows from them, and what is wrong between them.

From the sections come the check, the YAML reader, ``sd3tune settings`` and the panel's fields. Leaf names are
unique over all sections, so ``learning_rate`` and ``optimizer.learning_rate`` name the same setting.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from sd3tune.config import library
from sd3tune.config.declaring import STRICT
from sd3tune.config.library import Prompt, parse_size
from sd3tune.config.rules import noise_problems, optimizer_problems, reporting_problems, rollout_problems, validation_problems
from sd3tune.config.sections import (
    Adapter,
    Data,
    Evaluation,
    Memory,
    Model,
    Noise,
    Objective,
    Optimizer,
    Reporting,
    Run,
    Schedule,
    Validation,
)

PIXELS, MOST = 1024 * 1024, 16
"""What is drawn together when nothing is said: so many pixels, and so many pictures."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything one run needs to know. Frozen: `replace` makes another."""

    model: Model = Field(default_factory=Model)
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data = Field(default_factory=Data)
    noise: Noise = Field(default_factory=Noise)
    objective: Objective = Field(default_factory=Objective)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    memory: Memory = Field(default_factory=Memory)
    validation: Validation = Field(default_factory=Validation)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    reporting: Reporting = Field(default_factory=Reporting)
    run: Run = Field(default_factory=Run)

    @classmethod
    def make(cls, **settings: Any) -> RunConfig:
        """A configuration from leaf names: ``RunConfig.make(model_flavour="playground", lora_rank=8)``. Raises: ConfigError."""
        from sd3tune.config.reading import build

        return build(settings)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a YAML file, flat or grouped. Raises: ConfigError with every problem at once."""
        from sd3tune.config.reading import load

        return load(Path(path))

    def save(self, path: str | Path) -> None:
        """Write every setting, grouped, so that the file says what ran."""
        from sd3tune.config.reading import dump
        from sd3tune.files import write_text

        write_text(Path(path), dump(self))

    def replace(self, **settings: Any) -> RunConfig:
        """The same with other values for some leaf names. Raises: ConfigError."""
        from sd3tune.config.reading import replaced

        return replaced(self, settings)

    def leaves(self) -> dict[str, Any]:
        """Every leaf name with its value."""
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}

    @property
    def max_train_steps(self) -> int | None:
        """Updates of the run, or ``None`` when epochs decide."""
        if self.schedule.num_train_epochs is not None:
            return None
        return self.schedule.max_train_steps or 1000

    @property
    def lora_alpha(self) -> float:
        """Alpha, which is the rank unless it was set."""
        return self.adapter.lora_alpha or float(self.adapter.lora_rank)

    @property
    def flow_schedule_shift(self) -> float | None:
        """The shift of noise levels, 3 unless it was set; ``None`` when it follows each batch's size."""
        if self.noise.flow_schedule_auto_shift:
            return None
        return 3.0 if self.noise.flow_schedule_shift is None else self.noise.flow_schedule_shift

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What is drawn: the validation prompts, those of the libraries, and no prompt if it is asked for; nothing when switched off."""
        v = self.validation
        if v.validation_disable:
            return ()
        given = (v.validation_prompt,) if isinstance(v.validation_prompt, str) else v.validation_prompt
        found = [Prompt(text, text) for text in given if text]
        if v.validation_prompt_library:
            found += library.PLAYGROUND if self.model.model_flavour == "playground" else library.OURS
        if isinstance(v.user_prompt_library, dict):
            found += library.prompts_of(v.user_prompt_library)
        if found and not v.validation_disable_unconditional:
            found.append(Prompt("no prompt", ""))
        return tuple(dict.fromkeys(found))

    @property
    def validation_texts(self) -> tuple[str, ...]:
        """Every text that the pictures need: prompts and what guidance moves away from."""
        negative = self.validation.validation_negative_prompt
        texts = [text for p in self.prompts for text in (p.prompt, negative if p.negative is None else p.negative)]
        return tuple(dict.fromkeys([*texts, negative]))

    def drawn_together(self, width: int, height: int) -> int:
        """Pictures of one size that are drawn at once."""
        v, pictures = self.validation, len(self.prompts) * self.validation.num_validation_images
        return min(pictures, v.validation_batch_size or max(1, min(MOST, PIXELS // (width * height))))

    @property
    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each validation picture."""
        return tuple(parse_size(part) for part in self.validation.validation_resolution.split(","))

    @property
    def validation_seed(self) -> int:
        """Seed of the validation noise."""
        return self.schedule.seed if self.validation.validation_seed is None else self.validation.validation_seed


def check(config: RunConfig) -> list[str]:
    """What is wrong everywhere with settings that are each legal alone, one sentence each.

    What only this machine cannot do is `sd3tune doctor`'s to say, and refused by ``Trainer``.
    """
    problems: list[str] = []
    if sys.platform == "darwin" and "fp8-quanto" in (config.model.base_model_precision, config.model.text_encoder_3_precision):
        problems.append("fp8-quanto never works on Apple's GPUs; use int8-quanto")
    model, schedule = config.model, config.schedule
    single = (model.pretrained_model_name_or_path or "").endswith(".safetensors")
    if model.model_flavour and model.pretrained_model_name_or_path and not single:
        problems.append("model_flavour and pretrained_model_name_or_path are both set; keep one")
    if single and not model.model_flavour:
        problems.append("pretrained_model_name_or_path is a single file; model_flavour must name the model whose encoders go with it")
    if not model.model_flavour and not model.pretrained_model_name_or_path:
        problems.append("no base model: set model_flavour (such as sd35-medium) or pretrained_model_name_or_path (a folder)")
    if config.adapter.lora_targets == ():
        problems.append("lora_targets is an empty list, so nothing would learn; name layers, or write attention")
    if config.adapter.lora_type == "lycoris" and config.adapter.lora_rank_pattern:
        problems.append("lora_rank_pattern is about LoRA; in lycoris_config it is apply_preset's module_algo_map")
    if config.adapter.lora_type == "standard" and config.adapter.lycoris_config:
        problems.append("lycoris_config is set, but lora_type is standard; set lora_type: lycoris, or remove it")
    if config.adapter.use_dora and config.model.base_model_precision.endswith("quanto"):
        problems.append("use_dora needs the base's weights whole; use base_model_precision: no_change or nf4-bnb, or switch it off")
    if schedule.max_train_steps and schedule.num_train_epochs:
        problems.append("max_train_steps and num_train_epochs are both set; keep one")
    problems += [*noise_problems(config.noise), *rollout_problems(config), *optimizer_problems(config)]
    problems += [*reporting_problems(config.reporting), *validation_problems(config)]
    return problems
