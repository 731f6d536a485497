"""Every setting, declared once: default, meaning, unit, range, and whether it may change while training.

From this one declaration come the check, the YAML reader, ``sd3tune settings`` and the panel's fields. Leaf names are
unique over all sections, so ``learning_rate`` and ``optimizer.learning_rate`` name the same setting.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from sd3tune.config.optimizers import OPTIMIZERS, as_text
from sd3tune.config.rules import noise_problems, optimizer_problems

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""``true`` is not a number of steps, and ``"8"`` is not 8."""
MANY = 10_000_000
"""Upper end of counts that nothing else limits."""


Precision = Literal["no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]
"""Formats in which frozen weights can be kept."""


def about(
    meaning: str, *, low: float | None = None, high: float | None = None, above: float | None = None, unit: str = "", live: bool = False
) -> Any:
    """What a person should know of a setting; ``live`` ones may change between two updates."""
    return Field(description=meaning, ge=low, le=high, gt=above, json_schema_extra={"unit": unit, "live": live})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Which base model, and in which numbers."""

    model_flavour: Annotated[
        Literal["playground", "sd3-medium", "sd35-medium", "sd35-large"] | None, about("A known model; leave it out when a path is given.")
    ] = None
    pretrained_model_name_or_path: Annotated[
        str | None,
        about(
            "A folder in the diffusers layout, owner/name on the hub, or a .safetensors file with the transformer, beside model_flavour."
        ),
    ] = None
    revision: Annotated[str | None, about("Which version of a model of the hub: a branch, a tag or a commit.")] = None
    variant: Annotated[str | None, about("Which of several files of the transformer's weights, such as fp16.")] = None
    mixed_precision: Annotated[Literal["bf16", "fp16", "no"], about("Number format of the forward pass; the adapter stays in fp32.")] = (
        "bf16"
    )
    base_model_precision: Annotated[Precision, about("Number format in which the frozen base weights are kept.")] = "no_change"
    base_model_default_dtype: Annotated[
        Literal["bf16", "fp32"], about("Format of base weights that are not quantised; bf16 means that of the forward pass.")
    ] = "bf16"
    modulation_precision: Annotated[
        Literal["same", "bf16"], about("The AdaLN linears, a third of all weights: quantised like the rest, or left alone.")
    ] = "same"
    text_encoder_1_precision: Annotated[Precision, about("Number format of CLIP-L's weights.")] = "no_change"
    text_encoder_2_precision: Annotated[Precision, about("Number format of CLIP-G's weights.")] = "no_change"
    text_encoder_3_precision: Annotated[Precision, about("Number format of T5's weights.")] = "no_change"
    use_t5: Annotated[bool, about("Read texts with T5 too; without it zeros stand in its place.")] = True
    tokenizer_max_length: Annotated[int, about("Length of every text for T5.", low=1, high=512, unit="tokens")] = 154
    t5_padding: Annotated[
        Literal["unmodified", "zero"], about("What follows a text's T5 states up to that length: what T5 makes of pads, or zeros.")
    ] = "unmodified"
    vae_dtype: Annotated[Literal["bf16", "fp16", "fp32"], about("Number format of the autoencoder.")] = "bf16"
    vae_enable_tiling: Annotated[bool, about("Encode and decode in tiles: less memory, values that differ slightly at their edges.")] = (
        False
    )
    vae_enable_slicing: Annotated[bool, about("Encode and decode one picture at a time: less memory.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Adapter:
    """The part that learns."""

    lora_type: Annotated[Literal["standard", "lycoris"], about("LoRA, or one of LyCORIS' kinds as lycoris_config says.")] = "standard"
    lycoris_config: Annotated[str | None, about("A JSON file like SimpleTuner's lycoris_config.json; its example when left out.")] = None
    lora_rank: Annotated[int, about("Rank of the two factors of each weight change.", low=1, high=1024)] = 16
    lora_alpha: Annotated[float | None, about("The change is scaled by alpha / rank; the rank when left out.", above=0, high=1e5)] = None
    lora_dropout: Annotated[float, about("Share of the adapter's inputs set to zero while training.", low=0, high=0.9)] = 0.0
    lora_targets: Annotated[
        Literal["attention", "attention+context", "all-linear"] | tuple[str, ...],
        about("Which linear layers get an adapter: the picture stream's attention, the text stream's too, all, or a list of name endings."),
    ] = "attention"
    lora_init_type: Annotated[
        Literal["default", "gaussian"], about("How A begins: as peft does (Kaiming), or as a Gaussian; B begins with zeros.")
    ] = "default"
    lora_rank_pattern: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=1024)]] | None, about("Other ranks for layers whose name ends so, such as {to_out.0: 4}.")
    ] = None
    init_lora: Annotated[str | None, about("A LoRA file to begin with, of any tool; LyCORIS needs one of the same kind.")] = None
    use_ema: Annotated[bool, about("Also keep a running average of the adapter, saved beside it.")] = False
    ema_decay: Annotated[float, about("How much of the average stays at each of its updates, at most.", low=0, high=1)] = 0.995
    ema_update_interval: Annotated[int, about("Updates between two of the average's.", low=1, high=10_000, unit="updates")] = 1
    ema_device: Annotated[Literal["accelerator", "cpu"], about("Where the average is kept.")] = "accelerator"
    use_dora: Annotated[bool, about("Learn each weight's length and direction apart; about a third slower.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """How pictures are put into batches."""

    train_batch_size: Annotated[int, about("Pictures of one forward pass.", low=1, high=1024, unit="images")] = 1
    gradient_accumulation_steps: Annotated[int, about("Forward passes of one update.", low=1, high=1024)] = 1
    vae_batch_size: Annotated[int, about("Pictures encoded together.", low=1, high=1024, unit="images")] = 4
    write_batch_size: Annotated[int, about("Entries of one file of the cache.", low=1, high=10_000, unit="entries")] = 128
    latent_draw: Annotated[
        Literal["mean", "sample"], about("What stands for a picture: the mean of the autoencoder's posterior, or a new draw each time.")
    ] = "mean"
    text_encoder_batch_size: Annotated[int, about("Captions encoded together.", low=1, high=1024, unit="captions")] = 16
    caption_dropout_probability: Annotated[float, about("Share of training images seen without their caption.", low=0, high=1)] = 0.1
    aspect_bucket_alignment: Annotated[
        int, about("Sides of a bucket are multiples of this; 16 suits pictures below 128 px.", low=16, high=256, unit="px")
    ] = 64
    small_bucket: Annotated[
        Literal["short", "merge", "drop", "error"],
        about("What becomes of a size with fewer pictures than a batch: a short batch, the nearest size, left out, or an error."),
    ] = "short"
    allow_dataset_oversubscription: Annotated[bool, about("Repeat the pictures of a size that does not fill a batch until they do.")] = (
        False
    )
    allow_missing_captions: Annotated[bool, about("Train pictures without a caption on the empty text instead of stopping.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Noise:
    """Where between picture (0) and noise (1) the model is trained."""

    flow_schedule_shift: Annotated[
        float | None, about("Moves noise levels up; 3 when left out, and 1 leaves them alone.", above=0, high=20)
    ] = None
    flow_schedule_auto_shift: Annotated[
        bool, about("Shift each batch by its size: 1.88 at 512 px, 3.16 at 1024 px; in place of flow_schedule_shift.")
    ] = False
    flow_sigmoid_scale: Annotated[float, about("Spread of the logit-normal noise levels.", above=0, high=10)] = 1.0
    flow_use_uniform_schedule: Annotated[bool, about("Draw noise levels evenly instead of from the logit-normal.")] = False
    flow_use_beta_schedule: Annotated[bool, about("Draw noise levels from a beta distribution instead.")] = False
    flow_beta_schedule_alpha: Annotated[float, about("First exponent of the beta distribution; more favours noise.", low=0.1, high=100)] = (
        2.0
    )
    flow_beta_schedule_beta: Annotated[
        float, about("Second exponent of the beta distribution; more favours the picture.", low=0.1, high=100)
    ] = 2.0
    flow_cubic_schedule_weights: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None,
        about("Density of noise levels at equal steps from 0 to 1, such as [0, 1, 3, 1]; a smooth curve runs through them."),
    ] = None
    flow_custom_timesteps: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1000)], ...] | None,
        about("Noise levels to train at, not shifted: timesteps of 0 to 1000, or 0 to 1 when none is above 1."),
    ] = None
    flow_timesteps_mode: Annotated[
        Literal["fixed-list", "round-robin"], about("Take one of those timesteps at random, or go through them in order.")
    ] = "fixed-list"
    stratified: Annotated[bool, about("Spread each batch evenly over the noise levels: the same distribution, calmer.")] = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Objective:
    """What an error costs. The evaluation loss is always the plain square, so that runs compare."""

    loss_type: Annotated[
        Literal["l2", "huber", "smooth_l1"],
        about("Cost of an error e: e^2; 2c(sqrt(e^2 + c^2) - c), less for outliers; or that divided by c; c is huber_c."),
    ] = "l2"
    huber_c: Annotated[float, about("Error from which huber and smooth_l1 grow like |e| and no longer like e^2.", above=0, high=100)] = 0.1
    loss_weighting: Annotated[
        Literal["none", "cosmap", "mode"], about("Weight of a noise level in the gradient, by the formulas of the SD3 paper.")
    ] = "none"
    input_perturbation: Annotated[float, about("Extra noise that the model sees and need not find, as a share.", low=0, high=1)] = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    """How the adapter is updated."""

    optimizer: Annotated[
        Literal[
            "adamw", "adamw_bf16", "stableadamw", "lion", "adafactor", "prodigy", "schedulefree", "bnb-adamw8bit", "bnb-adamw8bit-paged",
            "bnb-lion8bit", "bnb-lion8bit-paged",
        ],
        about("The update rule. " + "; ".join(f"{name}: {known}" for name, known in OPTIMIZERS.items())),
    ] = "adamw"  # fmt: skip
    optimizer_config: Annotated[
        str | None, BeforeValidator(as_text), about('What the rule should do otherwise, such as "weight_decay=0.1,eps=1e-6", or a mapping.')
    ] = None
    optimizer_beta1: Annotated[
        float | None, about("How much of the mean gradient stays; the rule's own when left out.", low=0, high=0.9999)
    ] = None
    optimizer_beta2: Annotated[
        float | None,
        about("How much of the mean square stays (of the mean, for lion); the rule's own when left out.", low=0, high=0.999999),
    ] = None
    learning_rate: Annotated[
        float,
        about(
            "Peak learning rate; for prodigy a multiplier, 1 when left out; for adafactor relative to the weights; lion wants a tenth.",
            above=0,
            high=1,
            live=True,
        ),
    ] = 1e-4
    lr_scheduler: Annotated[
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        about("Course of the learning rate; all but the first warm up."),
    ] = "constant_with_warmup"
    lr_warmup_steps: Annotated[int, about("Updates over which the rate rises from zero.", low=0, high=MANY, unit="updates")] = 20
    lr_num_cycles: Annotated[int, about("Cosines of cosine_with_restarts.", low=1, high=1000)] = 1
    lr_power: Annotated[float, about("Power of polynomial; 1 is a straight line.", above=0, high=10)] = 0.8
    lr_end: Annotated[float, about("Rate at which polynomial ends.", low=0, high=1)] = 4e-7
    max_grad_norm: Annotated[float, about("Longer gradients are scaled down to this length.", above=0, high=1_000_000, live=True)] = 1.0
    grad_clip_method: Annotated[
        Literal["norm", "value"], about("Hold max_grad_norm against the length of the whole gradient, or against each element.")
    ] = "norm"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """How long, and how often to save."""

    max_train_steps: Annotated[
        int | None, about("Updates of the whole run (1000 when no epochs are given).", low=1, high=MANY, unit="updates")
    ] = None
    num_train_epochs: Annotated[int | None, about("Passes over the data, instead of updates.", low=1, high=MANY, unit="epochs")] = None
    seed: Annotated[int, about("Everything random about batch k is a function of this and k.", low=0, high=2**32 - 1)] = 42
    checkpoint_step_interval: Annotated[int, about("Updates between checkpoints.", low=1, high=MANY, unit="updates")] = 250
    checkpoints_total_limit: Annotated[int, about("Newest checkpoints that are kept.", low=1, high=MANY)] = 3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Memory:
    """What is traded for memory."""

    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        about("Make each block's activations anew in the backward pass: a third slower, a tenth of their memory; auto on GPUs."),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Validation:
    """The pictures drawn on the way. Nothing here touches training."""

    validation_prompt: Annotated[str | tuple[str, ...], about("What to draw: one prompt or a list.")] = ()
    validation_negative_prompt: Annotated[str, about("What the guidance moves away from.", live=True)] = ""
    validation_resolution: Annotated[str, about('Sizes of the pictures, such as "1024x1024,1280x768".')] = "1024x1024"
    validation_guidance: Annotated[float, about("Classifier-free guidance scale; 1 is none.", low=0, high=30, live=True)] = 3.0
    validation_num_inference_steps: Annotated[int, about("Steps of the sampler.", low=1, high=1000, live=True)] = 28
    validation_seed: Annotated[int | None, about("Seed of the pictures' noise; the run's when left out.", low=0, high=2**32 - 1)] = None
    validation_steps: Annotated[
        int, about("Updates between pictures; 0 draws only at the start and the end.", low=0, high=MANY, unit="updates")
    ] = 100
    validation_shift: Annotated[float, about("Shift of the sampler's noise levels.", above=0, high=20)] = 3.0
    validation_guidance_skip_layers: Annotated[
        tuple[Annotated[int, Field(ge=0, le=999)], ...] | None,
        about("Blocks left out in skip-layer guidance; none switches it off.", live=True),
    ] = None
    validation_guidance_skip_layers_start: Annotated[
        float, about("Share of the steps after which skip-layer guidance begins.", low=0, high=1, live=True)
    ] = 0.01
    validation_guidance_skip_layers_stop: Annotated[
        float, about("Share of the steps at which skip-layer guidance ends.", low=0, high=1, live=True)
    ] = 0.2
    validation_lycoris_strength: Annotated[
        float, about("How much of a LyCORIS adapter's change the pictures are drawn with.", low=0, high=10, live=True)
    ] = 1.0
    validation_guidance_skip_scale: Annotated[float, about("Strength of skip-layer guidance.", low=0, high=30, live=True)] = 2.8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluation:
    """The loss on held-out pictures (data sets of ``dataset_type: eval``)."""

    eval_steps_interval: Annotated[
        int, about("Updates between evaluations; 0 at the start and the end only.", low=0, high=MANY, unit="updates")
    ] = 0
    num_eval_images: Annotated[int, about("Held-out pictures that are used.", low=1, high=MANY, unit="images")] = 4
    eval_timesteps: Annotated[int, about("Fixed noise levels at which each picture is judged.", low=1, high=1000)] = 28
    eval_loss_disable: Annotated[bool, about("Leave the evaluation loss out.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """Where results go."""

    output_dir: Annotated[str, about("Folder of the run; a number is added rather than overwrite one.")] = "runs/run"
    cache_dir: Annotated[str, about("Folder of encoded pictures and texts; may be shared by all runs.")] = "cache"


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
    def prompts(self) -> tuple[str, ...]:
        """The validation prompts as a tuple."""
        given = self.validation.validation_prompt
        return ((given,) if given else ()) if isinstance(given, str) else given

    @property
    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each validation picture."""
        return tuple(parse_size(part) for part in self.validation.validation_resolution.split(","))

    @property
    def validation_seed(self) -> int:
        """Seed of the validation noise."""
        return self.schedule.seed if self.validation.validation_seed is None else self.validation.validation_seed


def parse_size(text: str) -> tuple[int, int]:
    """``"1280x768"`` or ``"1024"`` as (width, height). Raises: ValueError."""
    match = re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", text)
    if not match:
        raise ValueError(f'a size is written "1024" or "1280x768", not {text.strip()!r}')
    return int(match[1]), int(match[2] or match[1])


SECTION_CLASSES: dict[str, type] = {
    "model": Model, "adapter": Adapter, "data": Data, "noise": Noise, "objective": Objective, "optimizer": Optimizer, "schedule": Schedule,
    "memory": Memory,
    "validation": Validation, "evaluation": Evaluation, "run": Run,
}  # fmt: skip


def check(config: RunConfig) -> list[str]:
    """What is wrong everywhere with settings that are each legal alone, one sentence each.

    What only this machine cannot do is `sd3tune doctor`'s to say, and refused by ``Trainer``.
    """
    problems: list[str] = []
    if sys.platform == "darwin" and "fp8-quanto" in (config.model.base_model_precision, config.model.text_encoder_3_precision):
        problems.append("fp8-quanto never works on Apple's GPUs; use int8-quanto")
    model, schedule, validation = config.model, config.schedule, config.validation
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
    problems += [*noise_problems(config.noise), *optimizer_problems(config)]
    try:
        for width, height in config.validation_sizes:
            if width % 16 or height % 16 or not width or not height:
                problems.append(f"validation_resolution: {width}x{height} is not a multiple of 16 px on both sides")
    except ValueError as error:
        problems.append(f"validation_resolution: {error}")
    layers = validation.validation_guidance_skip_layers
    if layers is not None:
        if not layers or len(set(layers)) != len(layers):
            problems.append(f"validation_guidance_skip_layers: {list(layers)} is not a list of different block numbers from 0")
        if validation.validation_guidance <= 1:
            problems.append(
                f"validation_guidance ({validation.validation_guidance:g}) is not above 1, and without guidance diffusers never "
                "runs skip-layer guidance; raise it, or remove validation_guidance_skip_layers"
            )
        if validation.validation_guidance_skip_layers_start >= validation.validation_guidance_skip_layers_stop:
            problems.append("validation_guidance_skip_layers_start is not below validation_guidance_skip_layers_stop")
    return problems
