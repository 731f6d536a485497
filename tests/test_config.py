"""Settings: strict reading, one report, layering, round trips."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from sd3tune.config import RunConfig, check, presets
from sd3tune.config.optimizers import options_of
from sd3tune.config.reading import LEAVES
from sd3tune.config.schema import parse_size
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.errors import ConfigError

DEFAULTS: dict[str, Any] = {
    "scheduled_sampling_max_step_offset": 0, "scheduled_sampling_strategy": "uniform", "scheduled_sampling_probability": 0.0,
    "scheduled_sampling_prob_start": 0.0, "scheduled_sampling_prob_end": 0.5, "scheduled_sampling_ramp_steps": 0,
    "scheduled_sampling_start_step": 0, "scheduled_sampling_ramp_shape": "linear", "scheduled_sampling_sampler": "unipc",
    "scheduled_sampling_order": 2, "scheduled_sampling_reflexflow": False, "scheduled_sampling_reflexflow_alpha": 1.0,
    "scheduled_sampling_reflexflow_beta1": 10.0, "scheduled_sampling_reflexflow_beta2": 1.0,
    "mask_normalise": True, "masked_loss_probability": 1.0, "regularisation_weight": 1.0,
    "mixed_precision": "bf16", "base_model_precision": "no_change", "tokenizer_max_length": 154,
    "lora_rank": 16, "lora_alpha": None, "lora_dropout": 0.0, "lora_targets": "attention",
    "train_batch_size": 1, "gradient_accumulation_steps": 1, "vae_batch_size": 4, "text_encoder_batch_size": 16,
    "t5_padding": "unmodified", "use_t5": True, "sd3_clip_uncond_behaviour": "empty_string", "sd3_t5_uncond_behaviour": "empty_string",
    "caption_dropout_mode": "joint", "caption_dropout_probability": 0.1, "aspect_bucket_alignment": 64, "small_bucket": "short",
    "flow_schedule_shift": None, "flow_schedule_auto_shift": False, "flow_sigmoid_scale": 1.0, "flow_use_uniform_schedule": False,
    "flow_use_beta_schedule": False, "flow_beta_schedule_alpha": 2.0, "flow_beta_schedule_beta": 2.0, "flow_cubic_schedule_weights": None,
    "flow_custom_timesteps": None, "flow_timesteps_mode": "fixed-list", "stratified": True,
    "loss_type": "l2", "huber_c": 0.1, "loss_weighting": "none", "input_perturbation": 0.0,
    "optimizer_config": None, "optimizer_beta1": None, "optimizer_beta2": None, "grad_clip_method": "norm",
    "lr_num_cycles": 1, "lr_power": 0.8, "lr_end": 4e-7,
    "optimizer": "adamw", "learning_rate": 1e-4, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20, "max_grad_norm": 1.0,
    "num_train_epochs": None, "seed": 42, "checkpoint_step_interval": 250, "checkpoints_total_limit": 3,
    "validation_prompt": (), "validation_negative_prompt": "", "validation_resolution": "1024x1024", "validation_guidance": 3.0,
    "validation_num_inference_steps": 28, "validation_steps": 100, "validation_seed": None, "validation_shift": 3.0,
    "validation_guidance_skip_layers": None, "validation_guidance_skip_layers_start": 0.01, "validation_guidance_skip_layers_stop": 0.2,
    "validation_guidance_skip_scale": 2.8, "num_eval_images": 4, "eval_timesteps": 28, "eval_loss_disable": False, "cache_dir": "cache",
    "eval_epoch_interval": None, "eval_dataset_pooling": False, "eval_dataset_id": None,
    "report_to": "none", "tracker_project_name": None, "tracker_run_name": None, "webhook_config": None, "push_to_hub": False,
    "push_checkpoints_to_hub": False, "hub_model_id": None, "model_card_private": True,
}  # fmt: skip
"""The guide's defaults, written out once more."""

SCHEMAS: dict[str, dict[str, Any]] = {
    name: schema for cls in SECTION_CLASSES.values() for name, schema in TypeAdapter(cls).json_schema()["properties"].items()
}


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(**values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        RunConfig.make(**{"model_flavour": "playground", **values})
    return caught.value.problems


def test_defaults_are_the_documented_ones() -> None:
    """Every default equals the table of the guide."""
    leaves = RunConfig().leaves()
    assert {name: leaves[name] for name in DEFAULTS} == DEFAULTS
    assert all(type(leaves[name]) is type(value) for name, value in DEFAULTS.items())


def test_defaults_that_follow_other_settings() -> None:
    """Alpha is the rank, the validation seed the run's, the shift 3, and 1000 updates are made when nothing is said."""
    config = RunConfig()
    assert config.flow_schedule_shift == 3.0
    assert RunConfig.make(model_flavour="playground", flow_schedule_shift=1.0).flow_schedule_shift == 1.0
    assert RunConfig.make(model_flavour="playground", flow_schedule_auto_shift=True).flow_schedule_shift is None
    assert (config.lora_alpha, config.validation_seed, config.max_train_steps) == (16.0, 42, 1000)
    changed = presets.playground(lora_rank=8, seed=0, max_train_steps=None, num_train_epochs=3)
    assert (changed.lora_alpha, changed.validation_seed, changed.max_train_steps) == (8.0, 0, None)
    assert presets.playground(lora_alpha=4.0, validation_seed=0).lora_alpha == 4.0
    assert presets.playground(validation_seed=0).validation_seed == 0


def test_every_setting_is_described_and_bounded() -> None:
    """Every leaf has a meaning; every number has both ends of its range, every other one its choices or is free text."""
    assert len(LEAVES) == sum(len(dataclasses.fields(cls)) for cls in SECTION_CLASSES.values()), "leaf names are unique"
    for name in LEAVES:
        schema = SCHEMAS[name]
        assert len(schema["description"]) > 10, name
        for part in [schema, *schema.get("anyOf", [])]:
            if part.get("type") in ("integer", "number"):
                low = part.get("minimum", part.get("exclusiveMinimum", schema.get("minimum", schema.get("exclusiveMinimum"))))
                high = part.get("maximum", schema.get("maximum"))
                assert low is not None, name
                assert high is not None, name


def test_a_configuration_is_frozen() -> None:
    """Neither a section nor a leaf can be assigned."""
    config = presets.playground()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data = config.data  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.train_batch_size = 2  # type: ignore[misc]
    assert hash(config) == hash(presets.playground())


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"lernin_rate": 1}, "'learning_rate'"),
        ({"optimizer.lernin_rate": 1}, "'learning_rate'"),
        ({"schedule": {"max_train_step": 5}}, "'max_train_steps'"),
        ({"shedule": {"max_train_steps": 5}}, "'schedule'"),
        ({"shedule.max_train_steps": 5}, "'schedule'"),
        ({"model.learning_rate": 1e-4}, "unknown setting 'model.learning_rate'"),
        ({"zzzzzz": 1}, "sd3tune settings"),
        ({"model": 5}, "model is a section"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(given: dict[str, Any], nearest: str) -> None:
    """A name that does not exist is an error that offers the most similar one."""
    (problem,) = problems_of(**given)
    assert nearest in problem


@pytest.mark.parametrize("name", ["full", "controlnet", "train_text_encoder"])
def test_what_is_out_of_scope_is_refused_by_name(name: str) -> None:
    """Nothing that is not done is ignored."""
    assert "out of scope" in problems_of(**{name: True})[0]


def test_all_mistakes_are_in_one_report(tmp_path: Path) -> None:
    """An unknown name, a bad value and a contradiction between settings are reported together."""
    path = written(tmp_path, "model_flavour: playground\nlora_rnk: 4\nlearning_rate: fast\nmax_train_steps: 10\nnum_train_epochs: 2\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 3 problems")
    assert len(caught.value.problems) == 3
    for part in ("did you mean 'lora_rank'", "learning_rate: 'fast' is not allowed", "max_train_steps and num_train_epochs are both set"):
        assert part in message


def test_several_bad_values_of_one_section() -> None:
    """Each bad value gets its own sentence with the name, the value and what is allowed."""
    problems = problems_of(learning_rate=-1.0, lr_scheduler="sine", max_grad_norm=True)
    assert len(problems) == 3
    assert problems[0] == "learning_rate: -1.0 is not allowed: it should be greater than 0"
    assert "'cosine_with_restarts' or 'polynomial'" in problems[1]
    assert "max_grad_norm: True" in problems[2]


def test_a_rule_is_not_hidden_by_a_longer_name() -> None:
    """A bad validation_guidance does not silence a rule about validation_guidance_skip_layers."""
    problems = problems_of(validation_guidance="high", validation_guidance_skip_layers=(1, 1))
    assert len(problems) == 2
    assert "[1, 1]" in problems[1]


@pytest.mark.parametrize(
    "values",
    [
        {"max_train_steps": True},
        {"stratified": 1},
        {"stratified": "true"},
        {"lora_rank": "8"},
        {"lora_rank": 8.0},
        {"seed": -1},
        {"caption_dropout_probability": 1.5},
        {"flow_schedule_shift": 0},
        {"flow_schedule_shift": float("nan")},
        {"learning_rate": float("inf")},
        {"lora_rank": 0},
        {"validation_prompt": 5},
        {"mixed_precision": False},
        {"max_train_steps": 0},
        {"tokenizer_max_length": 513},
        {"validation_guidance_skip_layers": (-1,)},
        {"validation_guidance_skip_layers": (True,)},
        {"lora_rank": 16**5000},
        {"optimizer": "sgd"},
        {"flow_beta_schedule_alpha": 0},
        {"flow_custom_timesteps": (1001,)},
        {"flow_cubic_schedule_weights": (-1.0, 1.0)},
        {"optimizer_config": 5},
        {"model_flavour": "sd4"},
    ],
)
def test_values_are_strict(values: dict[str, Any]) -> None:
    """``true`` is not a number, text is not a number, a float is not a count, and every range holds."""
    (problem,) = problems_of(**values)
    assert problem.startswith(f"{next(iter(values))}")
    assert "it should be" in problem


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pretrained_model_name_or_path": "x"}, "both set; keep one"),
        ({"model_flavour": None}, "no base model"),
        ({"max_train_steps": 5, "num_train_epochs": 5}, "both set; keep one"),
        ({"max_train_steps": 5}, "lr_warmup_steps (20) is longer"),
        ({"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True}, "flow_use_uniform_schedule and flow_use_beta_schedule each"),
        ({"flow_custom_timesteps": (5,), "flow_cubic_schedule_weights": (1, 2)}, "flow_custom_timesteps and flow_cubic_schedule_weights"),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3.0}, "flow_schedule_auto_shift are both set; keep one"),
        ({"flow_custom_timesteps": ()}, "an empty list"),
        ({"flow_cubic_schedule_weights": (0, 0)}, "is no density"),
        ({"flow_cubic_schedule_weights": (1,)}, "is no density"),
        ({"optimizer": "adamw_bf16", "base_model_default_dtype": "fp32"}, "base_model_default_dtype is fp32; use adamw"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "set learning_rate: 1"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "lr_scheduler is cosine; use constant_with_warmup"),
        ({"optimizer": "schedulefree", "lr_scheduler": "constant", "optimizer_beta1": 0}, "use 0.9"),
        ({"optimizer": "adafactor", "optimizer_beta1": 0.5}, "adafactor has no betas"),
        ({"optimizer_config": "weight_decy=0.1"}, "adamw has no 'weight_decy'; did you mean 'weight_decay'?"),
        ({"optimizer": "lion", "optimizer_config": "eps=0.1"}, "lion has no 'eps'; it knows weight_decay, decouple_lr"),
        ({"optimizer_config": {"betas": 0.9}}, "set optimizer_beta1 and optimizer_beta2"),
        ({"optimizer_config": "weight_decay=much"}, "weight_decay=much is not a number; adamw has weight_decay=0.01"),
        ({"optimizer_config": "amsgrad=1"}, "amsgrad=1 is not true or false"),
        ({"optimizer_config": "eps"}, "eps= is not a number"),
        ({"lr_scheduler": "polynomial", "lr_end": 0.5}, "lr_end (0.5) is above learning_rate (0.0001)"),
        ({"validation_resolution": "100x64"}, "100x64 is not a multiple of 16"),
        ({"validation_resolution": "64,64x"}, "a size is written"),
        ({"validation_resolution": "0x64"}, "not a multiple"),
        ({"validation_guidance_skip_layers": ()}, "is not a list"),
        ({"validation_guidance_skip_layers": (1,), "validation_guidance": 1.0}, "never runs skip-layer guidance"),
        ({"validation_guidance_skip_layers": (1,), "validation_guidance_skip_layers_stop": 0.01}, "is not below"),
    ],
)
def test_rules_between_settings(values: dict[str, Any], says: str) -> None:
    """Settings that are each legal but contradict each other are refused with one sentence."""
    (problem,) = problems_of(**values)
    assert says in problem


def test_legal_edges_pass() -> None:
    """The ends of ranges are legal, and short warm-ups, one-block guidance and whole numbers for floats too."""
    config = presets.playground(
        caption_dropout_probability=1, lr_warmup_steps=150, seed=2**32 - 1, validation_guidance_skip_layers=[0, 3], validation_guidance=2
    )
    assert config.validation.validation_guidance_skip_layers == (0, 3)
    assert check(config) == []
    assert presets.playground(lr_scheduler="constant", max_train_steps=1).max_train_steps == 1


def test_what_a_rule_is_told_may_be_text_or_a_mapping() -> None:
    """``optimizer_config`` reads the same either way, stays hashable and comes back from its file."""
    text = presets.playground(
        optimizer="prodigy", optimizer_config="d_coef=0.5, use_bias_correction=true,beta3=none,slice_p=2", learning_rate=1.0
    )
    mapping = presets.playground(
        optimizer="prodigy", optimizer_config={"d_coef": 0.5, "use_bias_correction": True, "beta3": None, "slice_p": 2}, learning_rate=1.0
    )
    read = [options_of("prodigy", config.optimizer.optimizer_config) for config in (text, mapping)]
    assert read[0] == read[1]
    assert {key: read[0][key] for key in ("d_coef", "use_bias_correction", "beta3", "slice_p", "d0")} == {
        "d_coef": 0.5, "use_bias_correction": True, "beta3": None, "slice_p": 2, "d0": 1e-6,
    }  # fmt: skip
    assert type(read[0]["slice_p"]) is int
    assert hash(mapping) == hash(mapping.replace())


def test_prodigy_multiplies_by_one_when_nothing_is_said() -> None:
    """Its learning rate is a multiplier: 1 when left out, and what was meant for another rule is refused, also on a change."""
    base = {"model_flavour": "playground"}
    assert RunConfig.make(**base, optimizer="prodigy").optimizer.learning_rate == 1.0
    assert RunConfig.make(**base).optimizer.learning_rate == 1e-4
    with pytest.raises(ConfigError, match="set learning_rate: 1"):
        RunConfig.make(**base).replace(optimizer="prodigy")


def test_sizes_are_read() -> None:
    """Sizes are written ``1024`` or ``1280x768``, several with commas."""
    assert parse_size(" 1280 x 768 ") == (1280, 768)
    assert presets.playground(validation_resolution="64, 96x32").validation_sizes == ((64, 64), (96, 32))


def test_flat_grouped_and_dotted_are_the_same(tmp_path: Path) -> None:
    """One setting has one meaning however it is written."""
    flat = written(tmp_path, "model_flavour: playground\nlearning_rate: 2e-4\noptimizer: adamw\n", "flat.yaml")
    grouped = written(
        tmp_path, "model: {model_flavour: playground}\noptimizer:\n  learning_rate: 2e-4\n  optimizer: adamw\n", "grouped.yaml"
    )
    dotted = written(
        tmp_path, "model.model_flavour: playground\noptimizer.learning_rate: 2e-4\noptimizer.optimizer: adamw\n", "dotted.yaml"
    )
    assert RunConfig.load(flat) == RunConfig.load(grouped) == RunConfig.load(dotted)
    assert RunConfig.load(flat).optimizer.learning_rate == 2e-4


def test_the_same_setting_twice_is_refused() -> None:
    """Flat and grouped at once is a contradiction, not a choice."""
    assert problems_of(**{"seed": 1, "schedule.seed": 2}) == ("seed is set twice",)


def test_yaml_is_read_as_version_1_2(tmp_path: Path) -> None:
    """``no`` stays text and ``1e-4`` is a number."""
    config = RunConfig.load(written(tmp_path, "model_flavour: playground\nmixed_precision: no\nlearning_rate: 1e-4\nstratified: false\n"))
    assert (config.model.mixed_precision, config.optimizer.learning_rate, config.noise.stratified) == ("no", 1e-4, False)
    with pytest.raises(ConfigError, match="stratified: 'no' is not allowed"):
        RunConfig.load(written(tmp_path, "model_flavour: playground\nstratified: no\n"))


def test_layers(tmp_path: Path) -> None:
    """``extends`` reads the other file first, beside this one, and what is above wins whatever its form."""
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", "model_flavour: playground\nseed: 1\nlora_rank: 4\n", "lowest.yaml")
    written(tmp_path / "base", "extends: lowest.yaml\nschedule: {seed: 2}\nlora_dropout: 0.5\n", "middle.yaml")
    config = RunConfig.load(written(tmp_path, "extends: base/middle.yaml\nlora_dropout: 0.25\n"))
    assert (config.schedule.seed, config.adapter.lora_rank, config.adapter.lora_dropout) == (2, 4, 0.25)


@pytest.mark.parametrize("target", ["run.yaml", "./run.yaml", "folder/../run.yaml", "other.yaml"])
def test_circles_are_refused(tmp_path: Path, target: str) -> None:
    """A file that extends itself, directly or through another, is an error and not a hang."""
    (tmp_path / "folder").mkdir()
    written(tmp_path, "extends: run.yaml\n", "other.yaml")
    with pytest.raises(ConfigError, match="goes round in a circle"):
        RunConfig.load(written(tmp_path, f"extends: {target}\n"))


def test_one_report_over_layers(tmp_path: Path) -> None:
    """A mistake in the base, one in the file and a bad value come together, the base's under its name."""
    written(tmp_path, "model_flavour: playground\nsed: 1\n", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(written(tmp_path, "extends: base.yaml\nlora_rnk: 3\nseed: x\n"))
    assert len(caught.value.problems) == 3
    assert caught.value.problems[0].startswith("base.yaml: unknown setting 'sed'")


@pytest.mark.parametrize("base", ["5", "[a.yaml]", "absent.yaml", "''", '"\\0"', "x" * 300])
def test_bad_bases_are_refused(tmp_path: Path, base: str) -> None:
    """``extends`` of anything but one readable file is a ConfigError."""
    with pytest.raises(ConfigError):
        RunConfig.load(written(tmp_path, f"extends: {base}\nmodel_flavour: playground\n"))


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: 1\na: 2",
        "a: !!bool x",
        "a: !!float ''",
        "a: !!int ''",
        "[" * 3000,
        "!!python/object x",
        "2020-99-99",
        "- 1",
        "text",
        "\x00",
        "0x" + "f" * 5000,
        "1: 2",
        "? [a]\n: 1",
        "&a {b: *a}",
        "---\na: 1\n---\nb: 1",
        "model: {[x]: 1}",
        "seed: &a [*a]",
        "0x" + "f" * 5000 + ": 1",
        'validation_prompt: "\\uDC00"',
        "lr_warmup_steps: 0x" + "f" * 5000,
    ],
)
def test_broken_yaml_is_a_config_error(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with the text, the error names the file."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are not text are ConfigErrors."""
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(ConfigError, match=str(path)):
            RunConfig.load(path)


def test_replace_validates() -> None:
    """``replace`` makes another configuration, checked like the first, from flat, dotted or grouped names."""
    config = presets.playground()
    other = config.replace(seed=7, **{"optimizer.learning_rate": 1e-5})
    assert (other.schedule.seed, other.optimizer.learning_rate, config.schedule.seed) == (7, 1e-5, 42)
    assert config.replace(optimizer={"learning_rate": 1e-5}) == config.replace(learning_rate=1e-5)
    assert config.replace() == config
    with pytest.raises(ConfigError, match="2 problems"):
        config.replace(lora_rank=0, num_train_epochs=1)
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        config.replace(sed=1)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def configurations(draw: st.DrawFn) -> RunConfig:
    """Legal configurations, with texts and numbers that YAML could misread."""
    chosen = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-300, 1),
                "max_grad_norm": st.floats(1e-9, 1e6),
                "lora_alpha": st.none() | st.floats(1e-3, 1e5),
                "lora_rank": st.integers(1, 1024),
                "seed": st.integers(0, 2**32 - 1),
                "validation_prompt": TEXT | st.tuples(TEXT, TEXT),
                "validation_negative_prompt": TEXT
                | st.sampled_from(["no", "1e-4", "null", "~", "0x1", "a: b", "# x", "\x85", "\n", "1_0"]),
                "output_dir": TEXT,
                "stratified": st.booleans(),
                "validation_seed": st.none() | st.integers(0, 9),
                "validation_guidance_skip_layers": st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(tuple),
                "flow_schedule_shift": st.floats(0, 20, exclude_min=True),
                "caption_dropout_probability": st.floats(0, 1),
            },
        )
    )
    return presets.playground(**chosen)


@given(configurations())
@example(presets.playground(validation_negative_prompt="a\x85b"))
@settings(max_examples=60, deadline=None)
def test_saved_and_loaded_is_the_same(config: RunConfig) -> None:
    """A configuration equals what its file is read back as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        config.save(path)
        assert RunConfig.load(path) == config
        assert RunConfig.load(path).leaves() == config.leaves()


def loads_or_config_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(data)
        with contextlib.suppress(ConfigError):
            assert isinstance(RunConfig.load(path), RunConfig)


SNIPPETS = [
    "a: ",
    "- ",
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!timestamp ",
    "!!set ",
    "&a ",
    "*a",
    "{",
    "}",
    "[",
    "]",
    "? ",
    "\n",
    "  ",
    "'",
    '"',
    "|",
    ">",
    "%YAML 1.1\n",
    "---",
    "...",
    "seed",
    "extends: ",
    "run.yaml",
    "<<: ",
    "0x",
    "1e",
    ".inf",
    "~",
    "\\x",
    "model: ",
    ": ",
    "2001-01-01",
]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(SNIPPETS), max_size=10).map(lambda parts: "".join(parts).encode()))
@settings(max_examples=250, deadline=None)
def test_arbitrary_bytes(data: bytes) -> None:
    """Any file is a configuration or a ConfigError."""
    loads_or_config_error(data)


KEYS = st.sampled_from([*SECTION_CLASSES, *LEAVES, "extends", "model.model_flavour", "x"]) | TEXT
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["playground", "64x64"])
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=5), max_leaves=12
)


@given(st.dictionaries(KEYS, TREES, max_size=6) | TREES)
@settings(max_examples=150, deadline=None)
def test_arbitrary_documents(document: Any) -> None:
    """Any YAML document is a configuration or a ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.yaml"
        YAML(typ="safe", pure=True).dump(document, path)
        data = path.read_bytes()
    loads_or_config_error(data)
