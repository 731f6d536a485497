"""SimpleTuner's files become ours, and every key has its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import picture
from test_datasets import SEED

import sd3tune as st3
from sd3tune.data.simpletuner import Imported, from_simpletuner, plain_name, read_settings
from sd3tune.errors import ConfigError, FileError

GUIDE = {
    "model_type": "lora", "model_family": "sd3", "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large",
    "output_dir": "/home/user/outputs/models", "validation_resolution": "1024x1024,1280x768", "validation_guidance": 3.0,
    "validation_prompt": "your main test prompt here", "user_prompt_library": "config/user_prompt_library.json",
}  # fmt: skip
SLG = {
    "--validation_guidance_skip_layers": [7, 8, 9], "--validation_guidance_skip_layers_start": 0.01,
    "--validation_guidance_skip_layers_stop": 0.2, "--validation_guidance_skip_scale": 2.8, "--validation_guidance": 4.0,
    "--flow_use_uniform_schedule": True, "--flow_schedule_auto_shift": True,
}  # fmt: skip
ENV = """
# choices: int8-quanto, int4-quanto, int2-quanto, fp8-quanto
export TRAINER_EXTRA_ARGS="--base_model_precision=int8-quanto"
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --text_encoder_1_precision=no_change --text_encoder_2_precision=no_change"
export OPTIMIZER="adamw_bf16"
export MODEL_TYPE='lora'
MODEL_FAMILY=sd3
export PRETRAINED_MODEL_NAME_OR_PATH="some/folder"
export LEARNING_RATE=4e-5 # high
export VALIDATION_PROMPT="a pot, 3"
"""


def imported(folder: Path, given: dict[str, Any], backend: str = SEED) -> Imported:
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "multidatabackend.json").write_text(backend)
    return from_simpletuner(folder / "config.json")


def fates(made: Imported) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in made.report:
        found.setdefault(line.where + line.key, set()).add(line.fate)
    return found


def test_the_guides_configuration(tmp_path: Path) -> None:
    """Its values are ours, its data set reads and plans, and each of its keys has a line."""
    made = imported(tmp_path, {**GUIDE, "data_backend_config": "config/multidatabackend.json"})
    assert made.config.model.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3.5-large"
    assert made.config.validation_sizes == ((1024, 1024), (1280, 768))
    assert made.config.validation.validation_prompt in ("your main test prompt here",)
    found = fates(made)
    assert {plain_name(key) for key in GUIDE} < set(found)
    assert found["validation_guidance"] == {"already the default"}
    assert found["output_dir"] == {"taken over"}
    assert found["user_prompt_library"] == {"no counterpart"}
    assert {key for key in found if key.startswith("text-embeds.")} == {f"text-embeds.{key}" for key in json.loads(SEED)[1]}
    assert {key for key in found if key.startswith("pseudo")} == {f"pseudo-camera-10k-sd3.{key}" for key in json.loads(SEED)[0]}
    run, datasets = made.save(tmp_path / "new")
    assert st3.RunConfig.load(run) == made.config
    picture(tmp_path / "new" / "in" / "a_pot.png", 1200, 1200)
    catalog = st3.discover(datasets)
    assert [i.captions for i in catalog.items] == [("a pot",)]
    assert not catalog.notes, "what is not needed was left out"
    assert str(st3.plan(catalog, made.config)).startswith("1 images")


def test_the_guides_skip_layer_block(tmp_path: Path) -> None:
    """The list form works here and is said to have been ignored there; what is not there yet is said."""
    made = imported(tmp_path, {**GUIDE, **SLG, "sd3_clip_uncond_behaviour": "zero"} | {"validation_guidance": 4.0})
    assert made.config.validation.validation_guidance_skip_layers == (7, 8, 9)
    assert made.config.validation.validation_guidance == 4.0
    found = fates(made)
    assert found["validation_guidance_skip_layers"] == {"taken over", "was silently ignored there"}
    assert found["validation_guidance_skip_scale"] == {"already the default"}
    assert found["flow_use_uniform_schedule"] == found["flow_schedule_auto_shift"] == {"taken over"}
    assert made.config.noise.flow_use_uniform_schedule
    assert made.config.flow_schedule_shift is None
    assert found["sd3_clip_uncond_behaviour"] == {"taken over", "was silently ignored there"}
    assert found["sd3_t5_uncond_behaviour"] == {"taken over"}
    assert (made.config.model.sd3_clip_uncond_behaviour, made.config.model.sd3_t5_uncond_behaviour) == ("zero", "zero")
    as_text = imported(tmp_path, {**GUIDE, "validation_guidance": "4.0", "validation_guidance_skip_layers": "[7,8,9]"})
    assert as_text.config.validation.validation_guidance_skip_layers == (7, 8, 9)
    assert fates(as_text)["validation_guidance_skip_layers"] == {"taken over"}


def test_the_guides_env_block(tmp_path: Path) -> None:
    """Names in capitals, comments, quotes, and flags that are put together from two lines."""
    (tmp_path / "config.env").write_text(ENV)
    (tmp_path / "multidatabackend.json").write_text(SEED)
    made = from_simpletuner(tmp_path / "config.env")
    assert made.config.model.base_model_precision == "int8-quanto"
    assert made.config.optimizer.learning_rate == 4e-5
    assert made.config.validation.validation_prompt in ("a pot, 3",)
    found = fates(made)
    assert made.config.optimizer.optimizer == "adamw_bf16"
    assert found["text_encoder_2_precision"] == {"already the default"}
    assert "theirs has no working momentum" in str(made)


def test_noise_levels_and_rules_mean_the_same_here(tmp_path: Path) -> None:
    """What won in silence there is said; other names are ours; what cannot be meant has a line; an unset clip is by element."""
    made = imported(tmp_path, {**GUIDE, "flow_use_uniform_schedule": "true", "flow_use_beta_schedule": "true", "flow_schedule_shift": "0"})
    assert made.config.noise.flow_use_uniform_schedule
    assert not made.config.noise.flow_use_beta_schedule
    assert made.config.flow_schedule_shift == 1.0
    assert fates(made)["flow_use_beta_schedule"] == {"was silently ignored there"}
    assert (made.config.optimizer.grad_clip_method, made.config.optimizer.max_grad_norm) == ("value", 2.0)
    assert fates(made)["grad_clip_method"] == {"taken over"}
    assert "not set, which means value there" in str(made)
    made = imported(tmp_path, {**GUIDE, "flow_schedule_auto_shift": True, "flow_schedule_shift": 3, "grad_clip_method": "norm"})
    assert made.config.flow_schedule_shift is None
    assert fates(made)["flow_schedule_shift"] == {"was silently ignored there"}
    assert made.config.optimizer.grad_clip_method == "norm"
    assert fates(made)["grad_clip_method"] == {"already the default"}
    for listed in ("801,694,548", [801, 694, 548], "[801, 694, 548]"):
        made = imported(tmp_path, {**GUIDE, "flow_custom_timesteps": listed, "flow_timesteps_mode": "round-robin"})
        assert made.config.noise.flow_custom_timesteps == (801, 694, 548)
    made = imported(tmp_path, {**GUIDE, "flow_cubic_schedule_weights": "[0, 1, 2.5]", "lr_scheduler": "sine", "adam_beta1": 0.9})
    assert made.config.noise.flow_cubic_schedule_weights == (0, 1, 2.5)
    assert fates(made)["lr_scheduler"] == {"no counterpart"}
    assert fates(made)["adam_beta1"] == {"was silently ignored there"}
    for theirs, ours in (("optimi-lion", "lion"), ("adamw_schedulefree", "schedulefree"), ("bnb-lion8bit-paged", "bnb-lion8bit-paged")):
        made = imported(tmp_path, {**GUIDE, "optimizer": theirs, "optimizer_config": "weight_decay=0.25", "optimizer_beta1": 0.8})
        assert (made.config.optimizer.optimizer, made.config.optimizer.optimizer_config) == (ours, "weight_decay=0.25")
    made = imported(tmp_path, {**GUIDE, "optimizer": "prodigy", "optimizer_config": "nonsense=1"})
    assert made.config.optimizer.optimizer_config is None
    assert "prodigy has no 'nonsense'" in str(made)


def test_where_results_go_is_carried_over(tmp_path: Path) -> None:
    """Trackers, hub and webhooks; what has no counterpart is said; a secret never gets into our files."""
    theirs = {
        "report_to": "wandb", "tracker_project_name": "pots", "tracker_run_name": "first", "push_to_hub": "true",
        "push_checkpoints_to_hub": "true", "model_card_private": "false", "model_card_note": "Mine.", "push_to_hub_background": "true",
        "webhook_config": "config/webhook.json", "webhook_reporting_interval": "5",
    }  # fmt: skip
    made = imported(tmp_path, {**GUIDE, **theirs})
    ours = made.config.reporting
    assert (ours.report_to, ours.tracker_project_name, ours.tracker_run_name) == ("wandb", "pots", "first")
    assert (ours.push_to_hub, ours.push_checkpoints_to_hub, ours.model_card_private, ours.model_card_note) == (True, True, False, "Mine.")
    assert ours.hub_model_id == "pots", "theirs falls back on the project"
    assert (ours.webhook_config, ours.webhook_reporting_interval) == ("config/webhook.json", 5)
    assert fates(made)["push_to_hub_background"] == {"not needed"}
    assert "tracker_project_name there: 'pots'" in str(made)
    hook = {"webhook_type": "raw", "callback_url": "https://x.example/y", "log_level": "error"}
    for form in (hook, json.dumps(hook)):
        assert imported(tmp_path, {**GUIDE, "webhook_config": form}).config.reporting.webhook_config == hook
    secret = {"webhook_type": "discord", "webhook_url": "https://discord.example/api/webhooks/1/s3cr3t"}
    made = imported(tmp_path, {**GUIDE, "webhook_config": [hook, secret], "report_to": "comet_ml", "push_checkpoints_to_hub": True})
    assert made.config.reporting.webhook_config is None
    assert fates(made)["webhook_config"] == fates(made)["report_to"] == {"no counterpart"}
    assert "webhook_url is a secret" in str(made)
    assert "s3cr3t" not in str(made)
    assert fates(made)["push_checkpoints_to_hub"] == {"was silently ignored there"}


def test_one_meaning_in_every_form(tmp_path: Path) -> None:
    """JSON typed or as texts, with or without dashes, TOML and env give the same configuration."""
    typed = {
        "pretrained_model_name_or_path": "x",
        "learning_rate": 5e-5,
        "lora_rank": 8,
        "max_train_steps": 70,
        "num_train_epochs": 0,
        "seed": 3,
    }
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in typed.items())
    forms = {
        "a.json": json.dumps(typed), "b.json": json.dumps({f"--{key}": str(value) for key, value in typed.items()}),
        "c.json": json.dumps({key.upper(): value for key, value in typed.items()}), "d.toml": toml,
        "e.env": "".join(f"export {key.upper()}={value}\n" for key, value in typed.items()),
        "f.env": 'TRAINER_EXTRA_ARGS="' + " ".join(f"--{key.replace('_', '-')} {value}" for key, value in typed.items()) + '"\n',
    }  # fmt: skip
    made = []
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        made.append(from_simpletuner(tmp_path / name).config)
    assert all(config == made[0] for config in made)
    assert made[0].optimizer.learning_rate == 5e-5
    assert (made[0].max_train_steps, made[0].adapter.lora_rank, made[0].schedule.seed) == (70, 8, 3)


def test_what_is_not_sd3_is_refused(tmp_path: Path) -> None:
    """Another family or full training is not translated into something else."""
    with pytest.raises(ConfigError, match=r"model_family is 'flux'; sd3tune trains Stable Diffusion 3 and 3\.5"):
        imported(tmp_path, {**GUIDE, "model_family": "flux"})
    with pytest.raises(ConfigError, match=re.escape("model_type is 'full'; sd3tune trains adapters (lora)")):
        imported(tmp_path, {**GUIDE, "--model_type": "full"} | {"model_type": "full"})


def test_data_sets_that_cannot_be_served(tmp_path: Path) -> None:
    """A key that is not obeyed has a line with its reason; an entry that cannot be read at all is written disabled."""
    rows = [
        {"id": "a", "type": "local", "instance_data_dir": "in", "delete_problematic_images": True, "crop_style": "face", "crop": True,
         "is_regularisation_data": True, "resolutoin": 3, "caption_strategy": "filename", "repeats": "7"},
        {"id": "b", "type": "aws", "instance_data_dir": "in", "aws_bucket_name": "x"},
    ]  # fmt: skip
    made = imported(tmp_path, GUIDE, json.dumps(rows))
    found = fates(made)
    assert {key for key, fate in found.items() if key.startswith("a.") and fate == {"no counterpart"}} == {
        "a.delete_problematic_images", "a.resolutoin", "a.repeats",
    }  # fmt: skip
    assert made.datasets[0] == {
        "id": "a",
        "type": "local",
        "instance_data_dir": "in",
        "crop_style": "face",
        "crop": True,
        "is_regularisation_data": True,
        "caption_strategy": "filename",
    }
    assert made.datasets[1] == {"id": "b", "type": "aws", "instance_data_dir": "in", "aws_bucket_name": "x"}
    assert "files are never deleted" in str(made)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A file that is already there stops the import before anything is written."""
    made = imported(tmp_path, GUIDE)
    (tmp_path / "datasets.yaml").write_text("mine")
    with pytest.raises(FileError, match=r"datasets\.yaml: is already there; nothing was written"):
        made.save(tmp_path)
    assert (tmp_path / "datasets.yaml").read_text() == "mine"
    assert not (tmp_path / "run.yaml").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, broken, of another shape: one error that names the file."""
    for name, text, says in (
        ("a.json", "{", "cannot be read"), ("a.json", "[]", "not a mapping"), ("a.toml", "= 3", "cannot be read"),
        ("a.env", "export X", "line 1: 'X' is not NAME=value"), ("a.env", "X='", "line 1: No closing quotation"),
        ("a.env", 'TRAINER_EXTRA_ARGS="x"', "'x' belongs to no flag"), ("a.json", '{"seed": 1, "--seed": 2}', "seed is set twice"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as caught:
            from_simpletuner(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert says in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such file"):
        from_simpletuner(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="not a list of data sets"):
        imported(tmp_path, GUIDE, "{}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3)
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *GUIDE,
                *SLG,
                "seed",
                "max_train_steps",
                "x",
                "optimizer",
                "lora_alpha",
                "flow_custom_timesteps",
                "optimizer_config",
                "flow_schedule_shift",
                "optimizer_beta1",
            ]
        ),
        VALUES,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=200)
def test_any_settings_are_translated_or_refused(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> None:
    """No value escapes as another exception, and every key has a line."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(given))
    try:
        known = read_settings(path)
        made = from_simpletuner(path, None)
    except ConfigError:
        return
    assert set(known) <= {line.key for line in made.report}
