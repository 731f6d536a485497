"""Settings of the loss on held-out pictures and of where results go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import MANY, STRICT, about


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
    evaluation_type: Annotated[
        Literal["none", "clip"], about("Also score how well the pictures that are drawn follow their prompts, by CLIP.", live=True)
    ] = "none"
    pretrained_evaluation_model_name_or_path: Annotated[
        str, about("The CLIP model that scores: a folder or owner/name on the hub. The playground has its own in place of the default.")
    ] = "openai/clip-vit-large-patch14-336"
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
