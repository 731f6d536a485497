"""What SimpleTuner means by its settings of noise, rollouts, optimizer, clipping, evaluation and reporting, where ours need other words."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from sd3tune.config.hooks import as_given, hook_problems
from sd3tune.config.library import problems
from sd3tune.config.optimizers import OPTIMIZERS, options_of
from sd3tune.config.reading import read_yaml
from sd3tune.config.rules import REPOSITORY
from sd3tune.errors import ConfigError

OPTIMIZER_NAMES = {
    "torch-adamw": "adamw", "optimi-stableadamw": "stableadamw", "optimi-lion": "lion", "torch-adafactor": "adafactor",
    "adamw_schedulefree": "schedulefree",
}  # fmt: skip
"""Their name of an update rule -> ours, where they differ."""

SPREADS = ("flow_custom_timesteps", "flow_cubic_schedule_weights", "flow_use_uniform_schedule", "flow_use_beta_schedule")
"""Their settings of how noise levels spread; there the first that is set wins."""

UNCONDITIONAL = ("sd3_clip_uncond_behaviour", "sd3_t5_uncond_behaviour")
"""What stands for no text; there the second follows the first when it is not set."""

CLIPPING = {"grad_clip_method": "value", "max_grad_norm": 2.0}
"""What theirs are when they are not set."""

SAMPLER_STEPS = 28
"""Steps of the sampler that our rollouts count in."""

SOLVERS = {
    "flow_matching": "euler", "flow_match_euler": "euler", "flow_match_heun": "heun", "flow_unipc": "unipc", "dpm++": "dpm",
}  # fmt: skip
"""Their names of samplers -> ours."""

Fate = Literal["taken over", "renamed", "already the default", "not needed", "no counterpart", "was silently ignored there"]
Notes = dict[str, tuple[Fate, str]]
"""Setting -> what became of it and why."""


def settled(flat: dict[str, Any], masks: Collection[str] = (), beside: Path = Path()) -> tuple[dict[str, Any], Notes]:
    """Their settings as ours mean the same, and a note for each one that is not simply taken over.

    ``masks`` are the kinds in the data sets, ``beside`` the folder of their file.
    """
    made, notes = dict(flat), Notes()
    if masks:
        _masks(made, notes, masks)
    _unconditional(made, notes)
    _noise(made, notes)
    _rollout(made, notes)
    _optimizer(made, notes)
    _evaluation(made, notes)
    _pictures(made, notes, beside)
    _reporting(made, notes)
    unset = [name for name in CLIPPING if name not in made]
    for name in unset:
        made[name] = CLIPPING[name]
        notes[name] = ("taken over", f"it is not set, which means {CLIPPING[name]} there: each element is limited, and hardly one ever is")
    if "grad_clip_method" in unset:
        notes["grad_clip_method"] = ("taken over", "it is not set, which means value there: each element is clamped to max_grad_norm")
    return made, notes


def _masks(made: dict[str, Any], notes: Notes, masks: Collection[str]) -> None:
    made["mask_normalise"] = False
    notes["mask_normalise"] = ("taken over", "False: there a masked loss is not divided by its mask's area; true lets small masks count")
    if "masked_loss_probability" in made and "segmentation" not in masks:
        made.pop("masked_loss_probability")
        notes["masked_loss_probability"] = (
            "was silently ignored there",
            "only conditioning_type segmentation reads it",
        )


def _unconditional(made: dict[str, Any], notes: Notes) -> None:
    clip, t5 = UNCONDITIONAL
    if made.get(t5) not in (None, "", "none", "None"):
        return
    if made.get(clip) == "zero":
        made[t5] = "zero"
        notes[t5] = ("taken over", "it is not set, which means what CLIP's says: zero")
    elif t5 in made:
        made.pop(t5)
        notes[t5] = ("not needed", "none means what CLIP's says, which is the default")


def _noise(made: dict[str, Any], notes: Notes) -> None:
    chosen = [name for name in SPREADS if made.get(name)]
    for name in chosen[1:]:
        made.pop(name)
        notes[name] = ("was silently ignored there", f"{chosen[0]} wins over it")
    for name in ("flow_custom_timesteps", "flow_cubic_schedule_weights"):
        if isinstance(given := made.get(name), str):
            parts = given.strip("[]() ").replace(";", ",").split(",")
            made[name] = tuple(float(part) for part in parts) if all(map(_is_number, parts)) else given
    if made.get("flow_schedule_auto_shift") is True and "flow_schedule_shift" in made:
        made.pop("flow_schedule_shift")
        notes["flow_schedule_shift"] = ("was silently ignored there", "flow_schedule_auto_shift wins over it")
    elif made.get("flow_schedule_shift") == 0 and made["flow_schedule_shift"] is not False:
        made["flow_schedule_shift"] = 1.0
        notes["flow_schedule_shift"] = ("taken over", "0 switched it off there; flow_schedule_shift = 1.0 does here")


def _rollout(made: dict[str, Any], notes: Notes) -> None:
    """There a step is a timestep of 1000, each walk is Euler's, the target stays noise - picture, and ReflexFlow comes by itself."""
    prefix = "scheduled_sampling_"
    offset = made.get(f"{prefix}max_step_offset")
    reflex = f"{prefix}reflexflow"
    if made.get(reflex, True) is None:
        made.pop(reflex)
    if not isinstance(offset, int) or offset <= 0:
        return
    steps = max(1, min(round(offset * SAMPLER_STEPS / 1000), SAMPLER_STEPS))
    made[f"{prefix}max_step_offset"] = steps
    said = f"{offset} timesteps of 1000 there; here it counts steps of a {SAMPLER_STEPS}-step sampler, of which the nearest is {steps}"
    notes[f"{prefix}max_step_offset"] = ("taken over", said)
    if reflex not in made:
        made[reflex] = True
        said = (
            "it is not set, which means on there as soon as pictures are rolled out; here it acts on those alone, and false leaves it out"
        )
        notes[reflex] = ("taken over", said)
    made[f"{prefix}target"] = "straight"
    notes[f"{prefix}target"] = ("taken over", "straight: there the target stays noise - picture; reaimed leads back to the picture")
    for name in ("sampler", "order"):
        if f"{prefix}{name}" in made:
            notes[f"{prefix}{name}"] = ("taken over", "there SD3 walks by Euler whatever it says; here it is obeyed")
    if made.get(f"{prefix}ramp_steps") and not made.get(f"{prefix}prob_start"):
        share = made.get(f"{prefix}probability", 0.0)
        said = f"a start of 0 means scheduled_sampling_probability ({share:g}) there, so the ramp began at that; here 0 is 0"
        notes[f"{prefix}prob_start"] = ("taken over", said)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _optimizer(made: dict[str, Any], notes: Notes) -> None:
    name = made.get("optimizer")
    if isinstance(name, str) and name in OPTIMIZER_NAMES:
        made["optimizer"] = OPTIMIZER_NAMES[name]
        notes["optimizer"] = ("renamed", f"optimizer = {OPTIMIZER_NAMES[name]!r}")
    if name == "adamw_bf16":
        notes["optimizer"] = (
            "taken over",
            "a correct one: theirs has no working momentum and longer steps, so learning rates do not carry over",
        )
    rule = made.get("optimizer", "adamw")
    if isinstance(given := made.get("optimizer_config"), str) and rule in OPTIMIZERS:
        try:
            options_of(rule, given)
        except ValueError as error:
            made.pop("optimizer_config")
            notes["optimizer_config"] = ("no counterpart", str(error))


def _evaluation(made: dict[str, Any], notes: Notes) -> None:
    """There ``num_eval_images`` counts batches."""
    intervals = ("eval_steps_interval", "eval_epoch_interval")
    for name in intervals:
        if name in made and not made[name]:
            notes[name] = ("not needed", f"{made.pop(name)!r} means that it is not set")
    batches, size = made.get("num_eval_images", 4), made.get("train_batch_size", 1)
    counts = isinstance(batches, int) and isinstance(size, int) and size > 1
    if counts and ("num_eval_images" in made or any(name in made for name in intervals)):
        made["num_eval_images"] = batches * size
        said = f"{batches} batches of {size} there; here it counts the pictures of each data set, {batches * size}"
        notes["num_eval_images"] = ("taken over", said)


def _pictures(made: dict[str, Any], notes: Notes, beside: Path) -> None:
    """Prompts of a library come along; the sampler and attention have other names."""
    if isinstance(named := made.get("user_prompt_library"), str):
        file = next((p for p in (Path(named), beside / named, beside / Path(named).name) if p.is_file()), None)
        try:
            found = None if file is None else read_yaml(file)
        except ConfigError as error:
            found, file = None, None
            notes["user_prompt_library"] = ("no counterpart", "; ".join(error.problems))
        if found is None or problems(found):
            made.pop("user_prompt_library")
            why = f"{named}: " + ("there is no such file" if file is None else "; ".join(problems(found)))
            notes.setdefault("user_prompt_library", ("no counterpart", why))
        else:
            made["user_prompt_library"] = found
            notes["user_prompt_library"] = ("taken over", f"{len(found)} prompts of {file}; the settings hold them now")
    solver = made.get("validation_noise_scheduler")
    if isinstance(solver, str) and solver in SOLVERS:
        made["validation_noise_scheduler"] = SOLVERS[solver]
    if made.get("attention_mechanism") in ("diffusers", "native"):
        made["attention_mechanism"] = "auto"
        notes["attention_mechanism"] = ("taken over", "auto: torch's own, as there")


def _reporting(made: dict[str, Any], notes: Notes) -> None:
    project = str(made.get("tracker_project_name") or "")
    if made.get("push_to_hub") is True and not made.get("hub_model_id") and REPOSITORY.fullmatch(project):
        made["hub_model_id"] = project
        notes["hub_model_id"] = ("taken over", f"it is not set, which means tracker_project_name there: {project!r}")
    if made.get("push_checkpoints_to_hub") is True and made.get("push_to_hub") is not True:
        made.pop("push_checkpoints_to_hub")
        notes["push_checkpoints_to_hub"] = ("was silently ignored there", "push_to_hub is off")
    given = as_given(made.get("webhook_config"))
    rows = given if isinstance(given, tuple) else (given,)
    if all(isinstance(row, dict) for row in rows) and (problems := hook_problems(given)):
        made.pop("webhook_config")
        notes["webhook_config"] = ("no counterpart", "; ".join(problems))
