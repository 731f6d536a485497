"""Forms: what is typed becomes a configuration, or a sentence at its field; a configuration becomes code."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import sd3tune as st
from sd3tune.config import presets
from sd3tune.config.reading import LEAVES, is_live
from sd3tune.config.schema import RunConfig
from sd3tune.panels import Draft, LearningPanel, ModelPanel, ValidationPanel, codes, fields
from sd3tune.panels.forms import Form


def form_of(*names: str, **settings: Any) -> tuple[Draft, Form]:
    draft = Draft(presets.playground(**settings))
    return draft, Form(draft, names or tuple(LEAVES))


def test_every_setting_has_a_field_that_shows_it_and_reads_it_back() -> None:
    """What a field shows is read as the value that it shows, for every setting of every preset."""
    for name in presets.names():
        for setting, value in presets.load(name).leaves().items():
            assert fields.read(setting, fields.shown(setting, value)) == value, (name, setting)
    draft, form = form_of()
    assert form.apply()
    assert draft.config is draft.origin
    assert set(form.fields) == set(LEAVES)


def test_every_field_says_what_its_setting_means_and_what_it_is_called_elsewhere() -> None:
    _, form = form_of()
    for name, one in form.fields.items():
        said = one.tooltip if "tooltip" in one.traits() else one.description_tooltip
        assert said.startswith(f"{name}: ")
        assert fields.declared(name).description in said
        assert ("May change while training" in said) == is_live(name)
        assert one.description == fields.label(name)
    assert "(above 0 to 1)" in fields.hint("learning_rate")
    assert len({fields.label(name) for name in ModelPanel.GROUPS[0]}) == len(ModelPanel.GROUPS[0])


@pytest.mark.parametrize(
    ("name", "typed", "says"),
    [
        ("validation_guidance_skip_layers", "7, x", "is not a list of block numbers"),
        ("validation_guidance_skip_layers", "7, 7", "different block numbers"),
        ("learning_rate", 0.0, "learning_rate: 0.0 is not allowed"),
        ("learning_rate", 7.0, "learning_rate: 7.0 is not allowed"),
        ("validation_guidance", 99.0, "validation_guidance: 99.0 is not allowed"),
        ("max_train_steps", "ten", "max_train_steps: 'ten' is not allowed"),
        ("lora_alpha", "{", "lora_alpha"),
        ("validation_resolution", "64by64", "validation_resolution"),
    ],
)
def test_a_bad_value_is_a_sentence_at_its_field_and_is_neither_applied_nor_clipped(name: str, typed: Any, says: str) -> None:
    draft, form = form_of(name, "lora_rank")
    form.fields[name].value = typed
    assert says in form.errors[name].value.replace("&#x27;", "'")
    assert form.fields[name].value == typed
    assert draft.config is draft.origin
    assert form.wrong
    form.fields[name].value = fields.shown(name, draft.config.leaves()[name])
    assert not form.wrong


def test_what_is_wrong_between_two_settings_is_said_where_it_was_typed() -> None:
    draft, form = form_of("max_train_steps", "num_train_epochs")
    form.fields["num_train_epochs"].value = "3"
    assert "keep one" in form.errors["num_train_epochs"].value
    form.fields["max_train_steps"].value = ""
    assert not form.wrong
    assert (draft.config.schedule.num_train_epochs, draft.config.max_train_steps) == (3, None)


@pytest.mark.parametrize(("name", "typed"), [("validation_guidance_skip_layers", "7, x"), ("validation_guidance", 99.0)])
@pytest.mark.parametrize("live", [False, True])
def test_a_wrong_field_keeps_no_other_field_of_its_form_back(name: str, typed: Any, live: bool) -> None:
    """Neither when it cannot be read nor when it is out of range, and nothing that was typed is put back by what happens elsewhere."""
    draft, form = form_of(name, "learning_rate", "max_grad_norm")
    draft.live = live
    form.fields[name].value = typed
    form.fields["learning_rate"].value = 5e-4
    assert draft.config.leaves()["learning_rate"] == 5e-4
    assert draft.config.leaves()[name] == draft.origin.leaves()[name]
    assert [key for key, error in form.errors.items() if error.value] == [name]
    assert not form.apply()
    draft.change(max_grad_norm=0.5)
    assert [form.fields[key].value for key in (name, "learning_rate", "max_grad_norm")] == [typed, 5e-4, 0.5]


def test_what_contradicts_a_setting_that_stands_is_said_where_it_was_typed_and_the_rest_is_taken() -> None:
    """Also when the sentence is about a setting that nobody touched just now."""
    walk = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_reflexflow": True, "scheduled_sampling_reflexflow_beta1": 0.0}
    draft = Draft(presets.playground(**walk))
    typed = {"num_train_epochs": 3, "scheduled_sampling_reflexflow_beta2": 0.0, "lora_rank": 4, "learning_rate": 7.0}
    wrong = draft.take(**typed)
    assert set(wrong) == {"learning_rate", "num_train_epochs", "scheduled_sampling_reflexflow_beta2"}
    assert "_beta1 and _beta2 are both 0" in wrong["scheduled_sampling_reflexflow_beta2"]
    assert codes.difference_text(draft.config, draft.origin) == "lora_rank: 16 -> 4"


def test_two_forms_of_a_draft_follow_each_other_but_what_is_typed_and_wrong_stays() -> None:
    draft, one = form_of("learning_rate", "lora_rank")
    other = Form(draft, ("learning_rate",))
    one.fields["learning_rate"].value = 5e-4
    assert other.fields["learning_rate"].value == 5e-4
    other.fields["learning_rate"].value = 9.0
    one.fields["lora_rank"].value = 4
    assert other.fields["learning_rate"].value == 9.0
    assert draft.config.leaves()["learning_rate"] == 5e-4


def test_while_a_run_goes_on_only_what_may_change_can_be_typed() -> None:
    draft, form = form_of()
    draft.live = True
    for name, one in form.fields.items():
        assert one.disabled != is_live(name), name
    assert draft.change(lora_rank=4) == {"lora_rank": "lora_rank cannot change while training"}
    assert draft.change(learning_rate=2e-4) == {}
    draft.live = False
    assert not any(one.disabled for one in form.fields.values())


def test_panels_of_settings_share_a_draft_and_presets_keep_where_files_go() -> None:
    draft = Draft(presets.playground(output_dir="runs/mine"))
    model, learning, drawing = ModelPanel(draft), LearningPanel(draft), ValidationPanel(draft)
    assert not set(model.fields) & set(learning.fields)
    assert not set(learning.fields) & set(drawing.fields)
    learning.preset.value = "sd35-medium-16gb"
    assert draft.config.model.model_flavour == "sd35-medium"
    assert draft.config.run.output_dir == "runs/mine"
    assert model.fields["model_flavour"].value == "sd35-medium"
    assert "Predicted peak" in model.about.value
    drawing._take(st_slg())
    assert drawing.fields["validation_guidance_skip_layers"].value == "7, 8, 9"
    assert "acts in steps 1 to 5 of 28" in drawing.about.value
    draft.live = True
    assert learning.preset.disabled


def test_how_noise_levels_are_drawn_and_sizes_stepped_is_asked_and_two_ways_at_once_are_refused() -> None:
    draft = Draft(presets.playground())
    learning = LearningPanel(draft)
    learning.fields["flow_use_uniform_schedule"].value = True
    learning.fields["flow_sigmoid_scale"].value = 1.5
    learning.fields["aspect_bucket_alignment"].value = 32
    noise = draft.config.noise
    assert (noise.flow_use_uniform_schedule, noise.flow_sigmoid_scale, draft.config.data.aspect_bucket_alignment) == (True, 1.5, 32)
    learning.fields["flow_use_beta_schedule"].value = True
    said = "".join(error.value for form in learning.forms for error in form.errors.values())
    assert "flow_use_beta_schedule" in said
    assert not draft.config.noise.flow_use_beta_schedule
    draft.live = True
    assert learning.fields["gradient_accumulation_steps"].disabled
    assert "fixed for a run" in fields.hint("gradient_accumulation_steps")


def st_slg() -> dict[str, Any]:
    from sd3tune.panels.settings import SLG_MEDIUM

    return {**SLG_MEDIUM, "validation_num_inference_steps": 28}


# --- code ----------------------------------------------------------------------------------------------------------------

CHANGES = some.fixed_dictionaries(
    {},
    optional={
        "learning_rate": some.floats(1e-6, 0.5), "lora_rank": some.integers(1, 64), "lora_alpha": some.none() | some.floats(0.5, 64),
        "validation_prompt": some.lists(some.text(min_size=1, max_size=12), min_size=1, max_size=3).map(tuple),
        "validation_guidance_skip_layers": some.none() | some.sampled_from([(7, 8, 9), (1,)]), "use_ema": some.booleans(),
        "user_prompt_library": some.none() | some.just({"a": "b", "c": {"prompt": "d", "seed": 3}}),
        "lora_targets": some.sampled_from(["attention", ("to_q", "to_k")]), "seed": some.integers(0, 99),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(some.sampled_from(presets.names()), CHANGES)
def test_the_code_of_a_configuration_makes_it_again_and_names_only_what_differs(name: str, changes: dict[str, Any]) -> None:
    config = presets.load(name).replace(**changes)
    code = codes.config_code(config)
    assert eval(code, {"st": st}) == config
    _, changed = codes.nearest_preset(config)
    assert len(changed) <= len(changes)
    assert RunConfig.__name__ not in code


def test_a_difference_says_both_values() -> None:
    config = presets.playground()
    assert codes.difference_text(config, config) == "nothing differs"
    assert codes.difference_text(config.replace(lora_rank=4), config) == "lora_rank: 16 -> 4"
