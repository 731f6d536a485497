"""Settings of how it is judged and where results go."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import MANY, STRICT, about


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Validation:
    """The pictures drawn on the way. Nothing here touches training."""

    validation_prompt: Annotated[str | tuple[str, ...], about("What to draw: one prompt or a list.", live=True)] = ()
    validation_negative_prompt: Annotated[str, about("What the guidance moves away from.", live=True)] = ""
    validation_resolution: Annotated[str, about('Sizes of the pictures, such as "1024x1024,1280x768".')] = "1024x1024"
    validation_guidance: Annotated[float, about("Classifier-free guidance scale; 1 is none.", low=0, high=30, live=True)] = 3.0
    validation_num_inference_steps: Annotated[int, about("Steps of the sampler.", low=1, high=1000, live=True)] = 28
    validation_seed: Annotated[int | None, about("Seed of the pictures' noise; the run's when left out.", low=0, high=2**32 - 1)] = None
    validation_steps: Annotated[
        int, about("Updates between pictures; 0 draws only at the start and the end.", low=0, high=MANY, unit="updates", live=True)
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
    """The loss on held-out pictures: data sets of ``dataset_type: eval``, and an ``eval_share`` of others."""

    eval_steps_interval: Annotated[
        int, about("Updates between evaluations; 0 at the start and the end only.", low=0, high=MANY, unit="updates", live=True)
    ] = 0
    eval_epoch_interval: Annotated[
        float | None,
        about(
            "Epochs between evaluations, such as 0.5; beside eval_steps_interval or alone.", low=0.001, high=MANY, unit="epochs", live=True
        ),
    ] = None
    num_eval_images: Annotated[
        int, about("Held-out pictures of each data set that are judged, the first ones by name.", low=1, high=MANY, unit="images")
    ] = 4
    eval_timesteps: Annotated[int, about("Fixed noise levels at which each picture is judged.", low=1, high=1000)] = 28
    eval_dataset_pooling: Annotated[bool, about("Report all held-out data sets as one number, and not each by itself as well.")] = False
    eval_dataset_id: Annotated[str | None, about("The one data set whose held-out pictures are judged; all of them when left out.")] = None
    eval_loss_disable: Annotated[bool, about("Leave the evaluation loss out.")] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """Where results go."""

    output_dir: Annotated[str, about("Folder of the run; a number is added rather than overwrite one.")] = "runs/run"
    mirror_to: Annotated[
        str | None,
        about("Folder or address (such as s3://bucket/runs) to which each checkpoint is copied in the background, into a folder per run."),
    ] = None
    disk_low_threshold: Annotated[
        float, about("Space that saving leaves free; with less, the run waits until there is room.", low=0, high=10_000, unit="GB")
    ] = 0.2
    num_processes: Annotated[
        int | None,
        about(
            "Processes that train together, each with train_batch_size pictures; as many as torchrun started when left out.",
            low=1,
            high=4096,
        ),
    ] = None
    cache_dir: Annotated[str, about("Folder of encoded pictures and texts; may be shared by all runs.")] = "cache"
