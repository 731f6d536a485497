"""What answers amount to: a configuration, an entry of datasets.yaml, and what should be looked at. A function of the answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sd3tune.config import presets
from sd3tune.config.advice import advice
from sd3tune.config.reading import LEAVES, build, replaced
from sd3tune.config.schema import RunConfig
from sd3tune.data.datasets import Dataset, contradictions, dataset_of
from sd3tune.errors import ConfigError

if TYPE_CHECKING:
    from sd3tune.configuring.machine import Machine
    from sd3tune.configuring.pictures import Pictures
    from sd3tune.models.memory import Need

Answers = Mapping[str, Any]

OTHER, NO_PRESET = "other", "none"
KNOWN = ("sd35-medium", "sd35-large", "sd3-medium", "playground")

SLG: dict[str, Any] = {
    "validation_guidance": 4.0, "validation_guidance_skip_layers": (7, 8, 9), "validation_guidance_skip_layers_start": 0.01,
    "validation_guidance_skip_layers_stop": 0.2, "validation_guidance_skip_scale": 2.8,
}  # fmt: skip
"""Skip-layer guidance of SD3.5 Medium, as Stability AI and the guide have it."""

CROPS: dict[str, dict[str, Any]] = {
    "keep": {},
    "square": {"crop": True, "crop_aspect": "square", "crop_style": "center"},
    "random": {"crop": True, "crop_aspect": "square", "crop_style": "random", "crop_variants": 4},
    "face": {"crop": True, "crop_aspect": "square", "crop_style": "face"},
}
"""Answer -> keys of datasets.yaml."""

LATENT_BYTES, TEXT_BYTES = 2 * 2 * 16 / 64, 1.6e6
"""Bytes that the cache keeps for a pixel (mean and deviation in bf16, a 64th of the pixels, 16 channels), and at most for a text."""


def base_of(answers: Answers) -> RunConfig:
    """What the answers change: a preset, or the defaults."""
    name = answers.get("preset", NO_PRESET)
    return RunConfig() if name == NO_PRESET else presets.load(name)


def settings_of(answers: Answers) -> dict[str, Any]:
    """Leaf name -> value, of everything that the answers decide."""
    found = {name: value for name, value in answers.items() if name in LEAVES}
    model = answers.get("model", "playground")
    found["model_flavour"] = None if model == OTHER else model
    if model == OTHER:
        found.setdefault("pretrained_model_name_or_path", "owner/name")  # until it is answered
    if model == "playground":
        found = {**presets.PLAYGROUND, **found}
    if answers.get("slg") is not None:
        found |= SLG if answers["slg"] else {"validation_guidance_skip_layers": None, "validation_guidance": 3.0}
    if answers.get("length") == "epochs":
        found["max_train_steps"] = None
    steps = found.get("max_train_steps")
    if steps and steps < 100:
        found["lr_warmup_steps"] = steps // 5
    if "lycoris_config" in found:
        found["lycoris_config"] = found["lycoris_config"] or None
    if answers.get("optimizer") == "prodigy":
        found.setdefault("learning_rate", 1.0)
    if answers.get("optimizer") == "schedulefree":
        found["lr_scheduler"] = "constant_with_warmup"
    return found


def config_of(answers: Answers) -> RunConfig:
    """The configuration as far as the answers go. Raises: ConfigError with what is wrong between them."""
    base, settings = base_of(answers), settings_of(answers)
    return build(settings) if answers.get("preset", NO_PRESET) == NO_PRESET else replaced(base, settings)


def entry_of(answers: Answers, pictures: Pictures | None) -> dict[str, Any]:
    """The keys of the one entry of datasets.yaml, as far as the answers go."""
    place = pictures.place if pictures else "pictures"
    name = re.sub(r"[^\w.-]+", "-", Path(place).name).strip("-.") or "pictures"
    found: dict[str, Any] = {"id": name, "instance_data_dir": place}
    strategy = answers.get("caption_strategy", "textfile")
    found["caption_strategy"] = strategy
    table = next((t for t in (pictures.tables if pictures else ()) if t.endswith(f".{strategy}")), None)
    if strategy == "csv":
        found["csv_file"] = table
    elif strategy in ("jsonl", "parquet"):
        found["parquet"] = {"path": table}
    if prompt := answers.get("instance_prompt"):
        found["instance_prompt"] = prompt
        if strategy != "instanceprompt":
            found["prepend_instance_prompt"] = True
    elif strategy == "instanceprompt":
        found["instance_prompt"] = "a picture"  # until it is answered
    found["resolution"] = answers.get("resolution", 1024)
    found["resolution_type"] = "pixel_area"
    found |= CROPS[answers.get("crop", "keep")]
    found |= {name: answers[name] for name in ("repeats", "eval_share", "flip") if answers.get(name)}
    return found


def dataset_from(answers: Answers, pictures: Pictures | None) -> Dataset:
    """The same, checked. Raises: ConfigError."""
    try:
        made = dataset_of(entry_of(answers, pictures))
    except ValidationError as error:
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Input should be ')}" for one in error.errors()]
        raise ConfigError(said, "configure") from None
    if problems := contradictions(made):
        raise ConfigError(problems, "configure")
    return made


def learned_from(answers: Answers, pictures: Pictures) -> int:
    """Pictures to train on: those that are not held out."""
    return max(1, pictures.count - int(pictures.count * float(answers.get("eval_share", 0.0)) + 0.5))


def updates_per_epoch(answers: Answers, pictures: Pictures) -> float:
    """Updates that show every picture as often as ``repeats`` says, if sizes fill their batches."""
    config = config_of(answers)
    batch = config.data.train_batch_size * config.data.gradient_accumulation_steps
    return learned_from(answers, pictures) * (1 + int(answers.get("repeats", 0))) / batch


# --- memory ----------------------------------------------------------------------------------------------------------


@cache
def _predicted(config: RunConfig, side: int) -> Need:
    from sd3tune.models import memory

    return memory.predict(config, side=side)


def need_of(config: RunConfig, side: int) -> Need | None:
    """What a configuration needs in memory; ``None`` for a model whose size is not known here, and for the playground, which fits."""
    return _predicted(config, side) if config.model.model_flavour not in (None, "playground") else None


def verdict(need: Need, machine: Machine, gpu_gb: float = 0.0) -> str:
    """Whether it fits: ``fits``, ``tight`` (more than nine tenths of what there is), or ``no``; with the figures."""
    there = gpu_gb * 1e9 or machine.gpu_bytes
    wanted, whose = (need.peak, "the card's") if there else (need.peak + need.held, "this machine's")
    there = there or machine.memory_bytes
    word = "fits" if wanted < 0.9 * there else "tight" if wanted < there else "no"
    return f"{word}: needs {wanted / 1e9:.1f} of {whose} {there / 1e9:.1f} GB"


# --- what should be looked at ----------------------------------------------------------------------------------------


def cautions(answers: Answers, pictures: Pictures, machine: Machine) -> tuple[str, ...]:
    """What a person should know before this runs; nothing of it forbids writing the files."""
    config, side = config_of(answers), int(answers.get("resolution", 1024))
    said = [f"{one}" for one in advice(config)]
    said += _of_data(config, answers, pictures)
    said += [*hindrances(config, machine), *machine.trackers(config), *machine.access(config)]
    if (need := need_of(config, side)) is not None:
        fits = verdict(need, machine, answers.get("gpu_gb", 0.0))
        if not fits.startswith("fits"):
            said.append(f"memory: {fits}; choose a smaller preset, a smaller resolution, or fewer bits for the base")
    if config.model.model_flavour != "playground" and not (machine.gpu or answers.get("gpu_gb")):
        said.append("there is no GPU here, and a CPU is enough for the playground alone; run the files where there is one")
    if not config.prompts:
        said.append("no validation prompt: nothing will be drawn, so what was learned can only be read from numbers")
    return tuple(said)


def _of_data(config: RunConfig, answers: Answers, pictures: Pictures) -> list[str]:
    said, count = [], learned_from(answers, pictures)
    together = config.data.train_batch_size * config.data.gradient_accumulation_steps
    shown = count * (1 + answers.get("repeats", 0))
    if shown < together:
        said.append(
            f"{shown} pictures an epoch are fewer than the {together} of one update (train_batch_size x gradient_accumulation_steps); "
            f"repeats: {math.ceil(together / count) - 1} fills it"
        )
    if answers.get("crop", "keep") == "keep" and config.data.train_batch_size > 1 and pictures.shapes > 1:
        said.append(
            "pictures of different shapes stand in batches of their own; none is dropped, but a shape with few pictures makes short "
            "batches (sd3tune plan names them)"
        )
    size = float(answers.get("resolution", 1024))
    if size > 1.5 * pictures.side:
        said.append(f"at {size:g} px a quarter of the pictures or more is enlarged by more than a half, which teaches blur")
    if size < 512 and config.model.model_flavour != "playground":
        said.append(f"the released models were made for 512 px and more; at {size:g} px they draw worse, with any adapter")
    if pictures.problems:
        said.append(f"{len(pictures.problems)} pictures are left out; sd3tune plan says which, and why")
    if config.data.allow_missing_captions and pictures.captioned < pictures.count:
        said.append(f"{pictures.count - pictures.captioned} pictures have no caption and are trained on the empty text")
    return said


def hindrances(config: RunConfig, machine: Machine) -> list[str]:
    """What this machine cannot do of what is asked: number formats and the update rule."""
    from sd3tune.models import capabilities

    said = capabilities.problems(config, machine.tried(capabilities.needed(config)))
    if why := machine.unusable(config.optimizer.optimizer):
        said.append(f"optimizer {config.optimizer.optimizer} {why}")
    return said


def disk(answers: Answers, pictures: Pictures, machine: Machine, folder: Path) -> tuple[str, ...]:
    """Whether cache and checkpoints have room where they go."""
    config, side = config_of(answers), int(answers.get("resolution", 1024))
    variants = CROPS[answers.get("crop", "keep")].get("crop_variants", 1)
    wanted = pictures.count * (side * side * LATENT_BYTES * variants + TEXT_BYTES)
    if (need := need_of(config, side)) is not None:
        wanted += (need.adapter + need.optimizer) * (config.schedule.checkpoints_total_limit + 2)
    free = machine.free_bytes(folder)
    if wanted < 0.9 * free:
        return ()
    return (
        f"disk: cache and checkpoints take about {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room, or move output_dir",
    )
