"""Settings of what leaves the machine: trackers, the hub, webhooks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import MANY, STRICT, about
from sd3tune.config.hooks import as_given


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reporting:
    """Where results go besides the run folder. None of it can stop a run, and no secret is written here."""

    report_to: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio", "all"], about("Tracker of the curves and pictures; all is every installed one.")
    ] = "none"
    tracker_project_name: Annotated[str | None, about("Project of the tracker; sd3tune when left out.")] = None
    tracker_run_name: Annotated[str | None, about("Name of the run in the tracker; the run folder's when left out.")] = None
    push_to_hub: Annotated[bool, about("Upload the final adapter, with a model card, to the Hugging Face hub.")] = False
    push_checkpoints_to_hub: Annotated[bool, about("Upload each checkpoint too, unless a newer one is waiting.")] = False
    hub_model_id: Annotated[str | None, about("Repository on the hub, owner/name or name; the run's name when left out.")] = None
    model_card_private: Annotated[bool, about("Make the repository on the hub a private one.")] = True
    model_card_note: Annotated[str | None, about("A text of your own for the model card.")] = None
    webhook_config: Annotated[
        str | dict[str, Any] | tuple[dict[str, Any], ...] | None,
        BeforeValidator(as_given),
        about("What calls where: a JSON file, a mapping or a list of them, of webhook_type raw (callback_url) or discord (webhook_url)."),
    ] = None
    webhook_reporting_interval: Annotated[
        int | None, about("Updates between two calls about the loss; every update when left out, and none on Discord.", low=1, high=MANY)
    ] = None
