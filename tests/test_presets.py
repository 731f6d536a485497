"""Presets are legal, say where they come from, and fit the cards that they are named by; advice appears where it applies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench

import sd3tune as st
from sd3tune import cli
from sd3tune.config.advice import ROWS, about_data, advice, in_short
from sd3tune.config.presets import FILES
from sd3tune.config.reading import LEAVES, read_yaml
from sd3tune.models import memory

DEFAULTS = st.RunConfig.make(model_flavour="sd35-medium").leaves()
SIDES = {"low-vram": 512, "colab-t4": 512, "mac": 512}
"""Pictures that a preset is about, where they are not of 1024 px."""


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*.yaml")))
def test_a_preset_holds_what_differs_and_says_why(name: str) -> None:
    """Every value is another than the default, the comment names a source, and the whole is a legal configuration."""
    text = (FILES / f"{name}.yaml").read_text()
    given = read_yaml(FILES / f"{name}.yaml")
    assert text.startswith("# ")
    assert "# Source: " in text
    assert len(given) >= 5
    loaded = st.presets.load(name)
    free = {"model_flavour", "train_batch_size", "gradient_accumulation_steps"}
    said = {"learning_rate": "1e-4", "validation_guidance_skip_layers_start": "", "validation_guidance_skip_layers_stop": "",
            "validation_guidance_skip_scale": ""}  # fmt: skip  # the guide's own values, which are defaults here
    for key, value in given.items():
        assert key in LEAVES
        assert key in free or key in said or loaded.leaves()[key] != DEFAULTS[key], key
        assert loaded.leaves()[key] == (tuple(value) if isinstance(value, list) else value)
    assert st.RunConfig.load(f"preset:{name}") == loaded


def test_presets_extend_and_are_extended(tmp_path: Path) -> None:
    """A file may begin with one, settings may replace its own, and a wrong name is met with the nearest."""
    (tmp_path / "run.yaml").write_text("extends: preset:stable\nlora_rank: 4\n")
    made = st.RunConfig.load(tmp_path / "run.yaml")
    assert (made.adapter.lora_rank, made.optimizer.optimizer) == (4, "adamw_bf16")
    assert st.presets.load("stable", lora_rank=4) == made
    with pytest.raises(st.ConfigError, match=r"there is no preset 'stabel'; did you mean 'stable'\?"):
        st.presets.load("stabel")
    with pytest.raises(st.ConfigError, match="there is no preset 'x'; there are colab-t4, "):
        (tmp_path / "run.yaml").write_text("extends: preset:x\n")
        st.RunConfig.load(tmp_path / "run.yaml")


def test_the_command_line_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    """With what each is for."""
    assert cli.main(["settings", "--presets"]) == 0
    shown = capsys.readouterr().out
    assert "preset:low-vram: SD3.5 Large in as little GPU memory" in shown
    assert len(shown.splitlines()) == len(st.presets.names())


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*gb.yaml")))
def test_a_preset_fits_the_card_that_it_is_named_by(name: str) -> None:
    """By the formula, with a tenth to spare; twice the weights would not go unnoticed."""
    found = re.search(r"(\d+)gb", name)
    assert found is not None
    need = memory.predict(st.presets.load(name))
    assert need.peak < 0.9 * int(found[1]) * 1e9, str(need)
    assert need.training > 0.25 * int(found[1]) * 1e9, "another preset would use this card better"


def test_what_does_not_fit_is_said_not_to() -> None:
    """Large without quantisation and with all activations is beyond 24 GB; T4 and the guide's cards hold their presets."""
    whole = st.RunConfig.make(model_flavour="sd35-large", gradient_checkpointing=False)
    assert memory.predict(whole).training > 24e9
    assert memory.predict(st.presets.load("colab-t4"), side=512).peak < 12e9  # also in its RAM, on the way
    assert memory.predict(st.presets.load("low-vram"), side=512).peak < 10e9


def test_stable_values_are_the_guides() -> None:
    """Optimizer, shift, rate, batch, norm, precision and skipped blocks of its list."""
    made = st.presets.load("stable")
    assert made.flow_schedule_shift == 1
    assert (made.optimizer.optimizer, made.optimizer.learning_rate, made.optimizer.max_grad_norm) == ("adamw_bf16", 1e-4, 0.1)
    assert made.data.train_batch_size * made.data.gradient_accumulation_steps == 12
    assert made.model.base_model_precision == "int8-quanto"
    assert made.validation.validation_guidance_skip_layers == (7, 8, 9)


@pytest.mark.parametrize(("updates", "rate"), [(12, 5e-3), pytest.param(60, 2e-3, marks=pytest.mark.full)])
def test_the_stable_values_learn(grown: Workbench, updates: int, rate: float) -> None:
    """On the playground, with its own rate: the held-out loss falls below the base's."""
    values = {"optimizer": "adamw_bf16", "max_grad_norm": 0.1, "flow_schedule_shift": 1.0, "base_model_precision": "int8-quanto"}
    trainer = grown.trainer(**values, max_train_steps=60, learning_rate=rate, eval_timesteps=4)
    before = trainer.evaluate().loss
    for _ in range(updates):
        trainer.step()
    assert trainer.evaluate().loss < 0.97 * before


@pytest.mark.full
def test_the_stable_values_learn_with_their_own_rate(grown: Workbench) -> None:
    """Rate, batch 12, norm, shift, int8 and warmup of the preset, on the playground: 60 updates take 4 % or more off the held-out loss."""
    preset = st.presets.load("stable").leaves()
    names = (
        "optimizer", "learning_rate", "max_grad_norm", "flow_schedule_shift", "base_model_precision", "train_batch_size",
        "gradient_accumulation_steps", "lr_scheduler", "lr_warmup_steps",
    )  # fmt: skip
    config = grown.config(**{name: preset[name] for name in names}, max_train_steps=400, eval_timesteps=8, num_eval_images=24)
    path = Path(__file__).parent.parent / "datasets.yaml"
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(path), config), st.encoders(config)).build())
    before = trainer.evaluate().loss
    for _ in range(60):
        trainer.step()
    assert trainer.evaluate().loss < 0.96 * before


# --- advice ----------------------------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {"model_flavour": "sd35-large", "base_model_precision": "int8-quanto", "train_batch_size": 12, "max_grad_norm": 0.1,
                         "learning_rate": 1e-5}  # fmt: skip
MEDIUM: dict[str, Any] = {"model_flavour": "sd35-medium"}
SLG = {"validation_guidance": 4.0}
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("4e-5 may blow up", {**LARGE, "learning_rate": 4e-5}, {**LARGE, "learning_rate": 3e-5}),
    ("larger batches help", {**LARGE, "train_batch_size": 11}, LARGE),
    ("dangerous updates", {**LARGE, "max_grad_norm": 1.0}, LARGE),
    ("is no cure", {**LARGE, "base_model_precision": "no_change"}, LARGE),
    ("less guidance", {**MEDIUM, "validation_guidance_skip_layers": (7,), "validation_guidance": 5.0},
     {**MEDIUM, "validation_guidance_skip_layers": (7,), **SLG}),
    ("2.8 x 2^(n - 3)", {**MEDIUM, **SLG, "validation_guidance_skip_layers": (6, 7, 8, 9)},
     {**MEDIUM, **SLG, "validation_guidance_skip_layers": (6, 7, 8, 9), "validation_guidance_skip_scale": 5.6}),
    ("shift 1 goes with", {**MEDIUM, "flow_use_uniform_schedule": True},
     {**MEDIUM, "flow_use_uniform_schedule": True, "flow_schedule_shift": 1.0}),
    ("gives each its own shift", {**MEDIUM, "validation_resolution": "1024x1024,512x512"},
     {**MEDIUM, "validation_resolution": "1024x1024,512x512", "flow_schedule_auto_shift": True}),
    ("77 tokens", {**MEDIUM, "tokenizer_max_length": 77}, MEDIUM),
    ("zeros for no text", {**MEDIUM, "sd3_t5_uncond_behaviour": "zero"}, MEDIUM),
    ("a tenth of AdamW's rate", {**MEDIUM, "optimizer": "lion"}, {**MEDIUM, "optimizer": "lion", "learning_rate": 1e-5}),
    ("no picture is ever rolled out", {**MEDIUM, "scheduled_sampling_max_step_offset": 2, "scheduled_sampling_prob_end": 0.5},
     {**MEDIUM, "scheduled_sampling_max_step_offset": 2, "scheduled_sampling_ramp_steps": 5}),
    ("scheduled sampling is off", {**MEDIUM, "scheduled_sampling_probability": 0.5},
     {**MEDIUM, "scheduled_sampling_probability": 0.5, "scheduled_sampling_max_step_offset": 2}),
)  # fmt: skip


def test_a_large_model_by_its_path_gets_the_advice_of_large() -> None:
    """The hub's name and a file's name mean the same model as the flavour."""
    for name in ("stabilityai/stable-diffusion-3.5-large", "/models/sd3.5_large"):
        by_path = st.RunConfig.make(pretrained_model_name_or_path=name, learning_rate=4e-5)
        assert any("4e-5 may blow up" in one.text for one in advice(by_path))
        assert "4e-5 may blow up" in in_short(by_path)
    medium = st.RunConfig.make(pretrained_model_name_or_path="stabilityai/stable-diffusion-3.5-medium", learning_rate=4e-5)
    assert not any("may blow up" in one.text for one in advice(medium))


def test_advice_that_only_the_data_can_give() -> None:
    """Several sizes with one shift, masks and regularisation pictures."""
    one_shift, by_size = st.RunConfig.make(**MEDIUM), st.RunConfig.make(**MEDIUM, flow_schedule_auto_shift=True)
    none = {"masks": False, "regularisation": False}
    assert [one.text[:7] for one in about_data(one_shift, sizes=3, **none)] == ["3 sizes"]
    assert not about_data(one_shift, sizes=1, **none)
    assert not about_data(by_size, sizes=3, **none)
    (both,) = about_data(one_shift, sizes=1, masks=True, regularisation=True)
    assert both.text.startswith("what masks and regularisation pictures do to the stability of SD3.5 is not known")


@pytest.mark.parametrize(("words", "there", "absent"), CASES, ids=[case[0] for case in CASES])
def test_each_row_appears_where_it_applies(words: str, there: dict[str, Any], absent: dict[str, Any]) -> None:
    """And nowhere else."""
    assert [words in str(one) for one in advice(st.RunConfig.make(**there))].count(True) == 1
    assert not any(words in str(one) for one in advice(st.RunConfig.make(**absent)))


def test_every_row_has_a_case() -> None:
    """A row without one would be text that nobody has seen."""
    assert len(CASES) == len(ROWS)


def test_advice_is_shown(grown: Workbench) -> None:
    """In the manifest, with its source."""
    trainer = grown.trainer(optimizer="lion", learning_rate=1e-3)
    assert "advice    Lion wants about a tenth of AdamW's rate: 1e-5 rather than 1e-4 (Chen et al. 2023, section 5)" in str(
        trainer.manifest
    )
    assert [said.partition(";")[0] for said in grown.trainer().manifest.advice] == ["2 sizes share one shift"]
    assert not grown.trainer(flow_schedule_auto_shift=True).manifest.advice


def test_the_panel_shows_it_as_the_form_changes(grown: Workbench) -> None:
    """It comes and goes with the fields' values, and changes nothing."""
    from sd3tune import panels

    config = grown.config()
    panel = panels.TrainingPanel(config, grown.cache(config))
    assert panel.advice.value == ""
    panel.fields["validation_guidance_skip_layers"].value = "3"
    panel.fields["validation_guidance"].value = 6.0
    assert "skip-layer guidance wants less guidance: at most 4 (Stability AI" in panel.advice.value
    panel.fields["validation_guidance"].value = 4.0
    assert panel.advice.value == ""


def test_the_plan_says_what_the_run_needs(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory by formula, and advice."""
    arguments = ["plan", "--data", str(bench.datasets), "--set", f"cache_dir={bench.root / 'cache'}", "--set", "optimizer=lion"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "memory, predicted: training 0." in shown
    assert "advice: Lion wants about a tenth of AdamW's rate" in shown
