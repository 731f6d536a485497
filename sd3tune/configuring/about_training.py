"""Questions about the model, the card, and how it is trained and looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd3tune import playground
from sd3tune.config import presets
from sd3tune.configuring import outcome
from sd3tune.configuring.checks import choices, setting
from sd3tune.configuring.outcome import NO_PRESET, OTHER
from sd3tune.configuring.questions import Choice, Question

if TYPE_CHECKING:
    from sd3tune.configuring.wizard import Wizard

MODELS = {
    "sd35-medium": "2.5 billion weights, 256 to 1440 px; licence: huggingface.co/stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "8.1 billion weights, better and more delicate; licence: huggingface.co/stabilityai/stable-diffusion-3.5-large",
    "sd3-medium": "the older 2 billion; licence: huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers",
    "playground": "the small model that comes with the package: 64 px, any machine, a few minutes",
    OTHER: "another SD3: a folder in the diffusers layout, or owner/name on the hub",
}
PRECISIONS = {
    "no_change": "as the forward pass: the most memory, the fewest surprises", "int8-quanto": "half the memory, next to no loss",
    "fp8-quanto": "half the memory, somewhat coarser; needs a card that has it", "int4-quanto": "a quarter; builds an extension first",
    "int2-quanto": "an eighth, and it shows", "nf4-bnb": "a quarter, the guide's choice for small cards",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "the usual one", "adamw_bf16": "in bf16 throughout: less memory; the guide's stable choice",
    "stableadamw": "AdamW that damps its own spikes; with 1e-5 for SD3.5 Large", "lion": "half the state; wants a tenth of the rate",
    "adafactor": "next to no state", "prodigy": "finds the rate itself; learning_rate is then a multiplier, 1",
    "schedulefree": "needs no schedule", "bnb-adamw8bit": "AdamW with 8-bit state, CUDA", "bnb-adamw8bit-paged": "the same, paged to RAM",
    "bnb-lion8bit": "Lion with 8-bit state, CUDA", "bnb-lion8bit-paged": "the same, paged: the least memory",
}  # fmt: skip
RATES = {"prodigy": 1.0, "lion": 1e-5, "bnb-lion8bit": 1e-5, "bnb-lion8bit-paged": 1e-5, "adafactor": 1e-3}
TARGETS = {
    "attention": "the picture stream's attention", "attention+context": "the text stream's, too", "all-linear": "every linear layer",
}  # fmt: skip
TRACKERS = {
    "none": "no", "tensorboard": "files for TensorBoard", "wandb": "Weights & Biases, with a login", "trackio": "local, by Hugging Face",
    "all": "every one that is installed",
}  # fmt: skip
OFF_TOPIC = "a lighthouse on a rocky coast at dusk"


def model_question(wizard: Wizard) -> Question:
    """Which base model."""
    small = wizard.found.side <= 128 or wizard.found.place == str(playground.PICTURES / "train")
    best = "playground" if small else "sd35-medium"
    return Question("model", "Which base model?", "The adapter fits this model alone.", "choice", best,
                    tuple(Choice(name, text) for name, text in MODELS.items()))  # fmt: skip


def path_question(wizard: Wizard) -> Question:
    """Where another base model is."""
    return setting(wizard, "pretrained_model_name_or_path", "Which one: a folder, or owner/name on the hub?",
                   "It must be an SD3 in the diffusers layout.", "text", default="stabilityai/stable-diffusion-3.5-medium")  # fmt: skip


def gpu_question(wizard: Wizard) -> Question:
    """Which card, when it is not in this machine."""
    return Question("gpu_gb", "How many GB has the card that will run this? 0 is this machine, which has none.",
                    "Presets are chosen by what fits.", "number", 0,
                    check=lambda gb: "" if 0 <= gb <= 1000 else "gpu_gb: it should be from 0 to 1,000 GB")  # fmt: skip


def fitting(wizard: Wizard) -> Iterator[tuple[str, str, float]]:
    """Name, verdict and bytes in training of each preset for the model."""
    model = wizard.answers["model"]
    for name in presets.names():
        config = presets.load(name)
        if name == "playground" or model not in (config.model.model_flavour, OTHER):
            continue
        need = outcome.need_of(config, max(width for width, _ in config.validation_sizes))
        assert need is not None
        yield name, outcome.verdict(need, wizard.machine, wizard.answers.get("gpu_gb", 0.0)), need.training


def preset_question(wizard: Wizard) -> Question:
    """Which starting point, by what fits."""
    rows = list(fitting(wizard))
    offered = [Choice(name, f"{presets.about(name)} {said}") for name, said, _ in rows]
    offered.append(Choice(NO_PRESET, "every setting at its default"))
    plain = [row for row in rows if (row[0] == "mac" if wizard.machine.apple else row[0].endswith("gb") or row[0] == "low-vram")]
    fits = [row for row in plain if row[1].startswith("fits")]
    best = max(fits, key=lambda row: row[2]) if fits else min(plain, key=lambda row: row[2], default=(NO_PRESET, "", 0.0))
    chosen = "colab-t4" if "T4" in wizard.machine.gpu and any(row[0] == "colab-t4" for row in rows) else best[0]
    return Question("preset", "Which starting point? (fits, tight, no: by the memory formula, for this card)",
                    "A preset holds what is known to work; the next answers change it.", "choice", chosen, tuple(offered))  # fmt: skip


def rate_question(wizard: Wizard) -> Question:
    """The learning rate, with what the update rule wants as its default."""
    config = wizard.config
    chosen = wizard.answers["optimizer"]
    kept = chosen == outcome.base_of(wizard.answers).optimizer.optimizer or wizard.answers["model"] == "playground"
    default = RATES.get(chosen) if not kept or chosen == "prodigy" else None
    if default is None and not kept and config.model.model_flavour == "sd35-large":
        default = 1e-5
    return setting(wizard, "learning_rate", "Which learning rate?", "Too high runs away, too low learns nothing.",
                   default=default)  # fmt: skip


def length_question(wizard: Wizard) -> Question:
    """In what the length is said."""
    offered = Choice("updates", "a number of updates"), Choice("epochs", "a number of passes over the pictures")
    return Question(
        "length", "Say how long by updates or by epochs?", "Both are shown as the times each picture is seen.", "choice", "updates", offered
    )


def updates_question(wizard: Wizard) -> Question:
    """How many updates."""
    return setting(wizard, "max_train_steps", "How many updates?", "It decides how often each picture is seen; 50 to 200 times is usual.",
                   default=wizard.config.max_train_steps or 1000)  # fmt: skip


def epochs_question(wizard: Wizard) -> Question:
    """How many epochs."""
    return setting(wizard, "num_train_epochs", "How many epochs?", "In an epoch every picture is seen once, and `repeats` times more.",
                   default=max(1, math.ceil(1000 / max(1.0, outcome.updates_per_epoch(wizard.answers, wizard.found)))))  # fmt: skip


def prompts_question(wizard: Wizard) -> Question:
    """What is drawn on the way: two captions of one's own, and something else."""
    found, trigger, strategy = wizard.found, wizard.answers.get("instance_prompt", ""), wizard.answers["caption_strategy"]
    if strategy == "instanceprompt":
        own: tuple[str, ...] = (trigger,)
    else:
        texts = found.names if strategy == "filename" else found.captions
        own = tuple(f"{trigger} {text}".strip() for text in texts[:2] if text) or ((trigger,) if trigger else ())
    other = presets.HELD_OUT_PROMPTS[3] if wizard.answers["model"] == "playground" else OFF_TOPIC
    return setting(wizard, "validation_prompt", "What to draw on the way? Several prompts with | between them.",
                   "Two captions of your own show what was learned, one about something else shows what was lost.", "texts",
                   default=(*own, other))  # fmt: skip


def sizes_question(wizard: Wizard) -> Question:
    """At which sizes it is drawn."""
    side = int(wizard.answers["resolution"]) // 16 * 16 or 16
    return setting(wizard, "validation_resolution", "At which sizes, such as 1024x1024 or 1024x1024,1280x768?",
                   "Judge at the size that will be used.", "text", default=f"{side}x{side}")  # fmt: skip


def slg_question(wizard: Wizard) -> Question:
    """Whether with skip-layer guidance."""
    return Question("slg", "Draw with skip-layer guidance (blocks 7, 8, 9 from 1 to 20 % of the steps, 2.8, guidance 4)?",
                    "Stability AI recommends it for SD3.5 Medium; training is untouched.", "yes/no", True)  # fmt: skip


def output_question(wizard: Wizard) -> Question:
    """Where the run goes."""
    name = outcome.entry_of(wizard.answers, wizard.pictures)["id"]
    return setting(wizard, "output_dir", "Into which folder with the run?", "A number is added rather than overwrite one.", "text",
                   default=f"runs/{name}")  # fmt: skip


def precision_question(wizard: Wizard) -> Question:
    """In how many bits the base is kept."""
    return setting(wizard, "base_model_precision", "In which numbers to keep the frozen base?", "It is most of the memory.", "choice",
                   choices=choices("base_model_precision", PRECISIONS))  # fmt: skip
