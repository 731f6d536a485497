"""Settings of how it is trained: batches, noise, loss, update rule, and how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import MANY, STRICT, about
from sd3tune.config.optimizers import OPTIMIZERS, as_text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """How pictures are put into batches."""

    train_batch_size: Annotated[int, about("Pictures of one forward pass.", low=1, high=1024, unit="images")] = 1
    gradient_accumulation_steps: Annotated[
        int, about("Forward passes of one update; fixed for a run, whose order of batches follows from it.", low=1, high=1024)
    ] = 1
    vae_batch_size: Annotated[int, about("Pictures encoded together.", low=1, high=1024, unit="images")] = 4
    write_batch_size: Annotated[int, about("Entries of one file of the cache.", low=1, high=10_000, unit="entries")] = 128
    latent_draw: Annotated[
        Literal["mean", "sample"], about("What stands for a picture: the mean of the autoencoder's posterior, or a new draw each time.")
    ] = "mean"
    text_encoder_batch_size: Annotated[int, about("Captions encoded together.", low=1, high=1024, unit="captions")] = 16
    caption_dropout_probability: Annotated[float, about("Share of training images seen without their caption.", low=0, high=1)] = 0.1
    caption_dropout_mode: Annotated[
        Literal["joint", "per_encoder"],
        about("Drop a caption for all encoders, or for each by itself at the cube root of that share, as in the SD3 paper (0.1: 46.4 %)."),
    ] = "joint"
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
    """What an error costs. The evaluation loss is always the plain square, by the area of masks, so that runs compare."""

    loss_type: Annotated[
        Literal["l2", "huber", "smooth_l1"],
        about("Cost of an error e: e^2; 2c(sqrt(e^2 + c^2) - c), less for outliers; or that divided by c; c is huber_c."),
    ] = "l2"
    huber_c: Annotated[float, about("Error from which huber and smooth_l1 grow like |e| and no longer like e^2.", above=0, high=100)] = 0.1
    loss_weighting: Annotated[
        Literal["none", "cosmap", "mode", "sigma_squared"],
        about(
            "Weight of a noise level in the gradient: two formulas of the SD3 paper, or the error of the picture, as diffusers' example."
        ),
    ] = "none"
    input_perturbation: Annotated[float, about("Extra noise that the model sees and need not find, as a share.", low=0, high=1)] = 0.0
    mask_normalise: Annotated[
        bool, about("Divide a masked loss by the area of its mask; otherwise pictures with small masks count little.")
    ] = True
    masked_loss_probability: Annotated[
        float, about("Share of the times a picture is seen that its mask counts; else all of it does.", low=0, high=1)
    ] = 1.0
    regularisation_weight: Annotated[
        float, about("What pictures of is_regularisation_data count in the gradient, beside 1 for the others.", low=0, high=1000)
    ] = 1.0
    scheduled_sampling_max_step_offset: Annotated[
        int,
        about("Most steps of a 28-step sampler that the model walks a picture itself before it learns there; 0 is off.", low=0, high=28),
    ] = 0
    scheduled_sampling_strategy: Annotated[
        Literal["uniform", "biased_early", "biased_late"], about("How many of them: any number alike, rather few, or rather many.")
    ] = "uniform"
    scheduled_sampling_probability: Annotated[
        float, about("Share of the pictures that are rolled out like this, when there is no ramp.", low=0, high=1)
    ] = 0.0
    scheduled_sampling_prob_start: Annotated[float, about("That share where the ramp begins.", low=0, high=1)] = 0.0
    scheduled_sampling_prob_end: Annotated[float, about("That share where the ramp ends, and from then on.", low=0, high=1)] = 0.5
    scheduled_sampling_ramp_steps: Annotated[
        int, about("Updates from one to the other; 0 means no ramp.", low=0, high=MANY, unit="updates")
    ] = 0
    scheduled_sampling_start_step: Annotated[
        int, about("Updates before which nothing is rolled out; a ramp begins here.", low=0, high=MANY, unit="updates")
    ] = 0
    scheduled_sampling_ramp_shape: Annotated[Literal["linear", "cosine"], about("A straight ramp, or one with soft ends.")] = "linear"
    scheduled_sampling_sampler: Annotated[
        Literal["unipc", "euler", "dpm"], about("What walks: UniPC, Euler, or DPM-Solver++; a first step is the same with each.")
    ] = "unipc"
    scheduled_sampling_order: Annotated[int, about("Order of unipc and dpm; euler is of order 1.", low=1, high=2)] = 2
    scheduled_sampling_target: Annotated[
        Literal["reaimed", "straight"],
        about("Velocity to find where a picture was rolled to: straight from there to the picture, or noise minus picture as ever."),
    ] = "reaimed"
    scheduled_sampling_reflexflow: Annotated[
        bool, about("ReflexFlow on rolled pictures: learn the direction back, and weigh errors by what the walk changed.")
    ] = False
    scheduled_sampling_reflexflow_alpha: Annotated[
        float, about("How much more frequencies count in which the walk changed the prediction.", low=0, high=1000)
    ] = 1.0
    scheduled_sampling_reflexflow_beta1: Annotated[
        float, about("What the direction back counts in a rolled picture's loss, in proportion to beta2.", low=0, high=1000)
    ] = 10.0
    scheduled_sampling_reflexflow_beta2: Annotated[
        float, about("What the velocity's error counts in it, in proportion to beta1.", low=0, high=1000)
    ] = 1.0


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
    guard_policy: Annotated[
        Literal["stop", "skip", "rollback"],
        about("When an update is not finite or runs away: stop, leave its pictures out, or go back to a checkpoint with half the rate."),
    ] = "stop"
    guard_rollbacks: Annotated[int, about("How often rollback may go back before the run stops.", low=1, high=100)] = 3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Schedule:
    """How long, and how often to save."""

    max_train_steps: Annotated[
        int | None, about("Updates of the whole run (1000 when no epochs are given).", low=1, high=MANY, unit="updates", live=True)
    ] = None
    num_train_epochs: Annotated[int | None, about("Passes over the data, instead of updates.", low=1, high=MANY, unit="epochs")] = None
    seed: Annotated[int, about("Everything random about batch k is a function of this and k.", low=0, high=2**32 - 1)] = 42
    checkpoint_step_interval: Annotated[int, about("Updates between checkpoints.", low=1, high=MANY, unit="updates", live=True)] = 250
    checkpoint_minutes: Annotated[
        float, about("Save at least this often too; 0 only counts updates.", low=0, high=100_000, unit="minutes", live=True)
    ] = 5.0
    checkpoints_total_limit: Annotated[
        int, about("Newest checkpoints that are kept, besides the best and those with a file PINNED in them.", low=1, high=MANY)
    ] = 3
    checkpoint_keep_best: Annotated[bool, about("Also save and keep the state with the lowest loss on held-out pictures.")] = True
