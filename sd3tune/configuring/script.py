"""Which question comes next: a function of the answers so far. What a question offers depends on them, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sd3tune.configuring import about_pictures as pictures
from sd3tune.configuring import about_training as training
from sd3tune.configuring import outcome
from sd3tune.configuring.checks import choices, setting
from sd3tune.configuring.outcome import OTHER
from sd3tune.configuring.questions import Question

if TYPE_CHECKING:
    from sd3tune.configuring.wizard import Wizard


class Step(NamedTuple):
    """A question that comes when it applies, in the order of `STEPS`."""

    name: str
    make: Callable[[Wizard], Question]
    applies: Callable[[Wizard], bool] = lambda wizard: True


def next_question(wizard: Wizard) -> Question | None:
    """The first question that applies and has no answer yet."""
    return next((step.make(wizard) for step in STEPS if step.name not in wizard.answers and step.applies(wizard)), None)


def _simple(leaf: str, asks: str, why: str, kind: str = "number", meanings: dict[str, str] | None = None, default: Any = None) -> Step:
    def make(wizard: Wizard) -> Question:
        offered = choices(leaf, meanings or {}) if kind == "choice" else ()
        return setting(wizard, leaf, asks, why, kind, default=default, choices=offered)

    return Step(leaf, make)


def _has(name: str, *values: Any) -> Callable[[Wizard], bool]:
    return lambda wizard: wizard.answers.get(name) in values


def _incomplete(wizard: Wizard) -> bool:
    answers = wizard.answers
    return answers["caption_strategy"] == "textfile" and not answers["instance_prompt"] and wizard.found.captioned < wizard.found.count


STEPS: tuple[Step, ...] = (
    Step("instance_data_dir", pictures.folder_question),
    Step("caption_strategy", pictures.captions_question),
    Step("instance_prompt", pictures.trigger_question),
    Step("allow_missing_captions", pictures.missing_question, _incomplete),
    Step("eval_share", pictures.held_out_question),
    Step("model", training.model_question),
    Step("pretrained_model_name_or_path", training.path_question, _has("model", OTHER)),
    Step("gpu_gb", training.gpu_question, lambda w: not w.machine.gpu and w.answers["model"] != "playground"),
    Step("preset", training.preset_question, lambda w: w.answers["model"] != "playground"),
    Step("base_model_precision", training.precision_question),
    Step("text_encoder_3_precision", lambda w: setting(
        w, "text_encoder_3_precision", "In which numbers to keep T5, the largest text encoder?",
        "It is read once, before training, and needs the most memory then.", "choice",
        choices=choices("text_encoder_3_precision", training.PRECISIONS),
    ), lambda w: w.answers["model"] != "playground"),
    Step("lora_type", lambda w: setting(
        w, "lora_type", "LoRA, or one of LyCORIS' kinds?", "LoRA is what every program reads.", "choice",
        choices=choices("lora_type", {"standard": "LoRA", "lycoris": "LoKr, LoHa and others, by a JSON file"}),
    )),
    Step("lycoris_config", lambda w: Question(
        "lycoris_config", "The LyCORIS file? Nothing means SimpleTuner's example.", "It says which kind, and on which layers.", "text", "",
        check=lambda path: "" if not path or Path(path).is_file() else f"lycoris_config: {path}: there is no such file",
    ), _has("lora_type", "lycoris")),
    Step("lora_rank", lambda w: setting(
        w, "lora_rank", "Which rank?", "More rank holds more detail, and more of what should not be learned.",
    ), _has("lora_type", "standard")),
    Step("lora_targets", lambda w: setting(
        w, "lora_targets", "Which layers learn?", "Attention is enough for most; all layers change style more.", "choice",
        default="attention", choices=choices("lora_targets", training.TARGETS)[:3],
    ), lambda w: w.answers["lora_type"] == "standard" and w.answers["model"] != "playground"),
    Step("resolution", pictures.resolution_question),
    Step("crop", pictures.crop_question),
    _simple("train_batch_size", "How many pictures in one forward pass?", "More is calmer and faster, and costs memory."),
    _simple("gradient_accumulation_steps", "How many forward passes in one update?", "The same calm as a larger batch, for time."),
    Step("repeats", pictures.repeats_question),
    _simple("optimizer", "Which update rule?", "It is most of the memory beside the base.", "choice",
            training.OPTIMIZERS),
    Step("learning_rate", training.rate_question),
    Step("length", training.length_question),
    Step("max_train_steps", training.updates_question, _has("length", "updates")),
    Step("num_train_epochs", training.epochs_question, _has("length", "epochs")),
    Step("validation_prompt", training.prompts_question),
    Step("validation_resolution", training.sizes_question, lambda w: bool(w.answers["validation_prompt"])),
    Step("slg", training.slg_question, lambda w: w.answers["model"] == "sd35-medium" and bool(w.answers["validation_prompt"])),
    _simple("checkpoint_step_interval", "How many updates between checkpoints?", "A run that is cut off goes on from the newest."),
    _simple("checkpoints_total_limit", "How many checkpoints to keep?", "The best and pinned ones stay besides."),
    _simple("report_to", "Follow the curves in a tracker?", "None is needed: the run folder has a report of its own.", "choice",
            training.TRACKERS),
    Step("push_to_hub", lambda w: setting(
        w, "push_to_hub", "Upload the adapter to the Hugging Face hub at the end?", "The repository is made private.", "yes/no",
    )),
    Step("hub_model_id", lambda w: setting(
        w, "hub_model_id", "Into which repository: owner/name, or name?", "It is made private, and holds adapter and card.", "text",
        default=Path(outcome.entry_of(w.answers, w.pictures)["id"]).name,
    ), _has("push_to_hub", True)),
    Step("output_dir", training.output_question),
)  # fmt: skip
"""Every question, in order."""
