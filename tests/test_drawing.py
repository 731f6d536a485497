"""What is drawn: libraries, shots, batches, failures, the base model's row, replays, samples, scores and the skip-layer grid."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
from conftest import Workbench
from hypothesis import given, settings
from hypothesis import strategies as st_
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

import sd3tune as st
from sd3tune import cli
from sd3tune.cache.states import Text
from sd3tune.config import library
from sd3tune.config.library import parse_size
from sd3tune.models import components
from sd3tune.records import ImageRecord, NoticeRecord, PreviewRecord, ScoreRecord
from sd3tune.run_folder import RunFolder
from sd3tune.validation import comfyui
from sd3tune.validation.grids import Grid
from sd3tune.validation.painter import Drawn, Failed, Painter, Said
from sd3tune.validation.pictures import about, drawn
from sd3tune.validation.sampler import Guidance
from sd3tune.validation.shots import Shot, shots_of, together

SLG: dict[str, Any] = {"validation_guidance_skip_layers": (7, 8), "validation_guidance_skip_layers_stop": 0.9, "validation_guidance": 4.0}
LIBRARY: dict[str, Any] = {"half": {"prompt": "lock", "strength": 0.5, "steps": 2}, "wide": {"prompt": "croissant", "size": "96x64"}}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)], ids=["one seed", "two seeds"])
def run(bench: Workbench, request: pytest.FixtureRequest) -> st.Trainer:
    """A short run that draws everything there is: two libraries, an average, seeds, skip-layer guidance, no prompt, scores."""
    trainer = bench.trainer(
        model_flavour="playground", max_train_steps=6, validation_steps=3, validation_prompt=("lock",), user_prompt_library=LIBRARY,
        num_validation_images=request.param,
        validation_disable_unconditional=False, use_ema=True, evaluation_type="clip", validation_preview=True, validation_preview_steps=2,
        **SLG,
    )  # fmt: skip
    trainer.records = list(trainer.run())  # type: ignore[attr-defined]
    return trainer


def records(run: st.Trainer, kind: type) -> list[Any]:
    return [record for record in run.records if isinstance(record, kind)]  # type: ignore[attr-defined]


# --- what is to be drawn ---------------------------------------------------------------------------------------------


def test_sizes_are_pixels_or_megapixels() -> None:
    """Below 16 a number is in megapixels, and makes a square of multiples of 64."""
    assert [parse_size(text) for text in ("1280x768", " 1024 ", "1", "0.5", ".25", "64")] == [
        (1280, 768), (1024, 1024), (1024, 1024), (704, 704), (512, 512), (64, 64),
    ]  # fmt: skip
    for wrong in ("big", "0", "1024x", "-1", "1e3"):
        if wrong == "0":
            assert parse_size(wrong) == (0, 0), "refused by the check that follows"
            continue
        with pytest.raises(ValueError, match="megapixels"):
            parse_size(wrong)


def test_a_library_is_a_file_or_a_mapping(tmp_path: Path) -> None:
    """Both forms give the same settings, which hold the prompts themselves: the file may go."""
    held = {"pot": "a clay pot", "cup": {"prompt": "a cup", "seed": 7, "guidance": 5, "steps": 9, "size": "64x96", "negative": "blurry"}}
    (tmp_path / "library.json").write_text(json.dumps(held))
    (tmp_path / "library.yaml").write_text(
        "pot: a clay pot\ncup: {caption: a cup, seed: 7, guidance: 5, steps: 9, size: 64x96, negative: blurry}"
    )
    made = [st.presets.playground(user_prompt_library=given) for given in (held, *map(str, sorted(tmp_path.iterdir())))]
    assert shots_of(made[0]) == shots_of(made[1]) == shots_of(made[2])
    cup = shots_of(made[0])[-1]
    assert (cup.name, cup.seed, cup.guidance.scale, cup.steps, cup.width, cup.height, cup.negative) == ("cup", 7, 5, 9, 64, 96, "blurry")
    assert {"a clay pot", "a cup", "blurry"} <= set(made[0].validation_texts)
    made[1].save(tmp_path / "run.yaml")
    (tmp_path / "library.json").unlink()
    assert st.RunConfig.load(tmp_path / "run.yaml") == made[1]


WRONG: list[tuple[Any, str]] = [
    ({}, "is no mapping of names to prompts"),
    (["a"], "should be"),
    ({"a": {"seed": 1}}, "'a': has no prompt"),
    ({"a": {"prompt": "x", "sede": 1}}, "unknown key 'sede'; did you mean 'seed'?"),
    ({"a": {"prompt": "x", "seed": True}}, "seed True is no whole number from 0"),
    ({"a": {"prompt": "x", "strength": 11}}, "strength 11 is no number from 0 to 10"),
    ({"a": {"prompt": "x", "size": "65x64"}}, "65x64 is not a multiple of 16"),
    ({"a": {"prompt": 3}}, "prompt 3 is no text"),
    ({"a": ["x"]}, "is neither a prompt nor a mapping"),
    ({1: "x"}, "should be a valid string"),
    ("no/such/library.json", "there is no such file"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_a_wrong_library_is_explained(given: Any, said: str) -> None:
    with pytest.raises(st.ConfigError, match="user_prompt_library") as error:
        st.presets.playground(user_prompt_library=given)
    assert said in str(error.value)


KEYS = st_.sampled_from(["prompt", "caption", "negative", "seed", "steps", "guidance", "strength", "size", "other", ""])
VALUES = st_.one_of(
    st_.none(), st_.booleans(), st_.integers(), st_.floats(), st_.text(max_size=9), st_.sampled_from(["64x64", "0.5", "96"])
)


@given(st_.one_of(VALUES, st_.dictionaries(st_.one_of(st_.text(max_size=5), VALUES), st_.one_of(VALUES, st_.dictionaries(KEYS, VALUES)))))
@settings(max_examples=300, deadline=None)
def test_any_library_is_read_or_explained(found: Any) -> None:
    """What has no problems makes shots; nothing raises anything else."""
    if not library.problems(found):
        for prompt in library.prompts_of(found):
            assert isinstance(prompt.prompt, str)
            assert prompt.size is None or all(side % 16 == 0 for side in parse_size(prompt.size))
            assert prompt.seed is None or 0 <= prompt.seed < 2**32


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"shot": {}, "batch": []}', '{"shot": {"guidance": 1}, "batch": 7}'])
def test_a_picture_with_damaged_settings_is_explained(tmp_path: Path, text: str) -> None:
    info = PngInfo()
    info.add_text("sd3tune", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(st.FileError, match="holds no settings of sd3tune that can be read"):
        about(tmp_path / "x.png")


def test_our_library_has_about_fifty_prompts() -> None:
    """Different names and texts; the playground's are the captions of its held-out pictures."""
    assert 50 <= len({p.name for p in library.OURS}) == len({p.prompt for p in library.OURS}) == len(library.OURS) <= 60
    real = st.RunConfig.make(model_flavour="sd35-medium", validation_prompt_library=True)
    assert real.prompts == library.OURS
    assert len(st.presets.playground(validation_prompt=(), validation_prompt_library=True).prompts) == 24


def test_shots_are_every_prompt_at_every_size_and_seed() -> None:
    config = st.presets.playground(
        validation_prompt=("a", "b"), validation_resolution="64x64,96x64", num_validation_images=2, validation_disable_unconditional=False
    )
    found = [(shot.prompt, shot.width, shot.seed) for shot in shots_of(config)]
    assert found == [(prompt, width, seed) for prompt in ("a", "b", "") for width in (64, 96) for seed in (42, 43)]
    assert shots_of(config.replace(validation_disable=True)) == ()
    assert Shot.of(json.loads(json.dumps(shots_of(config)[0].as_dict()))) == shots_of(config)[0]


def test_batches_hold_what_is_alike() -> None:
    """As many as have the pixels of one of 1024 x 1024; each shot once, never two sizes together."""
    config = st.presets.playground(validation_prompt=tuple("abcdefg"), validation_resolution="512x512,1024x1024,1280x1280")
    batches = list(together(shots_of(config)))
    assert [len(batch) for batch in batches] == [4, 3] + 7 * [1] + 7 * [1]
    assert sorted(shot.prompt + str(shot.width) for batch in batches for shot in batch) == sorted(
        shot.prompt + str(shot.width) for shot in shots_of(config)
    )
    assert [len(batch) for batch in together(shots_of(config), 3)] == 3 * [3, 3, 1]


def test_previews_need_pictures() -> None:
    with pytest.raises(st.ConfigError, match="validation_preview is on and validation_disable is on"):
        st.presets.playground(validation_preview=True, validation_disable=True)


def test_skip_layer_guidance_brings_its_own_guidance() -> None:
    """4.0 unless it is set; the seed's JSON form works; an unset one stays 3.0."""
    assert st.RunConfig.make(model_flavour="sd35-medium", validation_guidance_skip_layers=[7, 8, 9]).validation.validation_guidance == 4.0
    assert st.RunConfig.make(model_flavour="sd35-medium").validation.validation_guidance == 3.0
    assert st.presets.playground(validation_guidance_skip_layers=(7,)).validation.validation_guidance == 3.0, "the preset sets it"


# --- when something fails --------------------------------------------------------------------------------------------


class Vae:
    """Gives grey pictures, and needs more memory than there is for some batches."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, shift_factor=0.0)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, most: int, *, tiles: bool = False) -> None:
        self.most, self.use_tiling, self.tiles = most, False, tiles

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def decode(self, raw_BCHW: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        if len(raw_BCHW) > self.most and not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (torch.zeros(len(raw_BCHW), 3, 8 * raw_BCHW.shape[2], 8 * raw_BCHW.shape[3]),)


class Transformer:
    """Predicts nothing, for batches of at most so many."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self, most: int = 99) -> None:
        self.most, self.seen = most, list[int]()

    def __call__(self, *, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        if len(hidden_states) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(len(hidden_states))
        return (torch.zeros_like(hidden_states),)


def painter(transformer: Any, vae: Any) -> Painter:
    def text(prompt: str) -> Text:
        if prompt == "bad":
            raise st.CacheError("this text was never read")
        return Text(torch.zeros(2, 3), torch.zeros(3))

    def scheduler(solver: str, shift: float) -> Any:
        return components.load_scheduler(st.presets.playground(), solver, shift)

    return Painter(transformer, vae, scheduler, text, nullcontext(), torch.float32, torch.device("cpu"))


def four(*prompts: str) -> list[Shot]:
    return [Shot(prompt, prompt, "", 16, 16, 0, 2, Guidance(1.0)) for prompt in (prompts or ("a", "b", "c", "d"))]


def test_out_of_memory_falls_back_to_one_picture() -> None:
    """Said once, all drawn; the batch that each names is what it was drawn in."""
    events = list(painter(Transformer(most=1), Vae(99)).draw(four()))
    assert [event.shot.prompt for event in events if isinstance(event, Drawn)] == ["a", "b", "c", "d"]
    assert all(event.batch == (event.shot,) for event in events if isinstance(event, Drawn))
    assert [event.text for event in events if isinstance(event, Said)] == [
        "4 pictures at once need more memory than there is; one by one now"
    ]


def test_decoding_falls_back_to_one_picture_and_then_to_tiles() -> None:
    """The sampler does not walk again, and the autoencoder is as it was."""
    model = Transformer()
    events = list(painter(model, Vae(1)).draw(four()))
    assert len([event for event in events if isinstance(event, Drawn)]) == 4
    assert model.seen == [4, 4], "two steps of the sampler, together"
    assert [event.text[:40] for event in events if isinstance(event, Said)] == ["decoding 4 pictures at once needs more m"]
    vae = Vae(0)
    events = list(painter(Transformer(), vae).draw(four("a")))
    assert len([event for event in events if isinstance(event, Drawn)]) == 1
    assert "in tiles now" in next(event.text for event in events if isinstance(event, Said))
    assert vae.use_tiling is False


def test_one_bad_picture_is_told_and_the_others_are_drawn() -> None:
    events = list(painter(Transformer(), Vae(99)).draw(four("a", "bad", "c")))
    assert [event.shot.prompt for event in events if isinstance(event, Drawn)] == ["a", "c"]
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.shot.prompt, event.why) for event in failed] == [("bad", "this text was never read")]


def test_an_interrupt_comes_through() -> None:
    class Stopped(Transformer):
        def __call__(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(painter(Stopped(), Vae(99)).draw(four()))


def test_a_failed_cell_stands_in_the_grid(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the grid, in the history and beside the pictures; the run goes on."""
    trainer = bench.trainer(max_train_steps=6, validation_on_startup=False)
    whole = trainer.cache.text
    monkeypatch.setattr(trainer.cache, "text", lambda prompt: whole(prompt) if prompt != "lock" else whole("never read by anyone"))
    found = [record for record in trainer.run() if isinstance(record, ImageRecord)]
    assert len(found) == 4, "the base model's and the adapter's"
    assert {record.prompt for record in found if record.problem} == {"lock"}
    assert trainer.done
    assert "is not encoded yet" in next(record.problem for record in found if record.problem)
    row = next(cells for label, cells in trainer.grid().rows if label == "LoRA, step 6")
    assert isinstance(row[0], str)
    assert isinstance(row[1], Image.Image)
    said = [line for line in trainer.folder.read_history() if line["type"] == "image" and line["problem"]]
    assert said
    trainer.grid().image()


def test_what_cannot_be_loaded_costs_the_pictures_alone(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the autoencoder in mid-run, or for the scorer: a notice, and the run ends with its adapter."""
    trainer = bench.trainer(
        model_flavour="playground", max_train_steps=6, validation_on_startup=False, evaluation_type="clip", num_eval_images=1
    )
    trainer.run(1).__next__()
    list(trainer.run(2))

    def full(*_: Any) -> Any:
        raise st.ModelError("the autoencoder needs more memory than there is")

    with monkeypatch.context() as patched:
        patched.setattr(components, "load_vae", full)
        said = [record.text for record in trainer.run() if isinstance(record, NoticeRecord)]
    assert said == ["no pictures were drawn: the autoencoder needs more memory than there is"]
    assert trainer.folder.lora.exists()
    monkeypatch.setattr("sd3tune.models.clip.Scorer.load", full)
    found = list(trainer.validation())
    assert [record.text for record in found if isinstance(record, NoticeRecord)] == [
        "pictures are not scored: the autoencoder needs more memory than there is"
    ]
    assert len([record for record in found if isinstance(record, ImageRecord)]) >= 2


def test_a_sentence_fits_into_its_cell() -> None:
    grid = Grid((("a", ("a very long reason " * 40, None)),), ("x", "y"))
    assert grid.image().size == Grid((("a", (None, None)),), ("x", "y")).image().size


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_draws_each_row(run: st.Trainer) -> None:
    """The base once, at its full strength; at each validation the adapter and its average; the file names say which."""
    images = records(run, ImageRecord)
    shots = len(shots_of(run.config))
    assert shots == 4 * run.config.validation.num_validation_images, "a prompt, two of the library, and none, with each seed"
    rows = [(record.step, record.kind) for record in images]
    assert {row: rows.count(row) for row in rows} == {
        (0, "base"): shots, **{(step, kind): shots for step in (3, 6) for kind in ("adapter", "ema")},
    }  # fmt: skip
    assert {found.shot.strength for found in drawn(run.folder, 0)} == {1.0}
    assert {path.name for path in run.folder.images(3).glob("*.png")} == {f"{n:02d}{e}.png" for n in range(shots) for e in ("", "-ema")}
    assert [label for label, _ in run.grid().rows][:3] == ["base model", "LoRA, step 6", "average, step 6"]
    assert all(isinstance(cell, Image.Image) for label, row in run.grid().rows for cell in row if label != "reference")


def test_the_base_row_is_without_the_adapter_whenever_it_is_drawn(bench: Workbench) -> None:
    """After some updates the base model's picture is that of before them, and another seed gives another one."""
    settings: dict[str, Any] = {"validation_prompt": "lock", "validation_seed": 777, "num_validation_images": 2, "learning_rate": 1e-2}
    trainer = bench.trainer(max_train_steps=6, validation_on_startup=False, num_eval_images=1, **settings)
    before = [event.picture for event in trainer.painted(shots_of(trainer.config)) if isinstance(event, Drawn)]
    for _ in range(5):
        trainer.step()
    list(trainer.validation())
    base = [Image.open(found.path) for found in drawn(trainer.folder, 0)]
    own = [Image.open(found.path) for found in drawn(trainer.folder, 5)]
    assert [one.tobytes() == other.convert("RGB").tobytes() for one, other in zip(before, base, strict=True)] == [True, True]
    assert [one.tobytes() == other.convert("RGB").tobytes() for one, other in zip(before, own, strict=True)] == [False, False]
    assert before[0].tobytes() != before[1].tobytes()


def test_every_picture_is_drawn_again_bit_for_bit(run: st.Trainer) -> None:
    """Base, adapter and average, at half strength, of two sizes, with skip-layer guidance and without a prompt."""
    paths = sorted(path for at in (0, 3, 6) for path in run.folder.images(at).glob("*.png"))
    seeds = run.config.validation.num_validation_images
    assert len(paths) == seeds * (4 + 8 + 8)
    one_of_a_kind = [run.folder.images(at) / name for at, name in ((0, "03.png"), (3, "01.png"), (6, "02-ema.png"))]
    for path in one_of_a_kind if seeds == 1 else (*paths[:8:3], *paths[8::5]):
        assert list(st.replay(path))[-1].text == f"{path.name}: drawn again, and the same, bit for bit"  # type: ignore[attr-defined]


def test_a_replay_sees_a_difference(run: st.Trainer, tmp_path: Path) -> None:
    """A picture that was touched differs; an adapter that is gone, and a picture from elsewhere, are explained."""
    path = run.folder.images(3) / "00.png"
    kept, facts = path.read_bytes(), about(path)
    touched = Image.open(path).convert("RGB")
    touched.putpixel((3, 3), (255, 0, 0) if touched.getpixel((3, 3)) != (255, 0, 0) else (0, 0, 0))
    info = PngInfo()
    info.add_text("sd3tune", json.dumps(facts))
    touched.save(path, pnginfo=info)
    try:
        assert "differs by up to" in list(st.replay(path))[-1].text  # type: ignore[attr-defined]
    finally:
        path.write_bytes(kept)
    adapter = run.folder.adapters / f"{facts['adapter']}.safetensors"
    adapter.rename(adapter.with_suffix(".away"))
    try:
        with pytest.raises(st.CheckpointError, match="the adapter of this picture is gone"):
            list(st.replay(path))
    finally:
        adapter.with_suffix(".away").rename(adapter)
    (tmp_path / "x.png").write_bytes(kept)
    with pytest.raises(st.FileError, match="lies in no run folder"):
        list(st.replay(tmp_path / "x.png"))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(st.FileError, match="holds no settings of sd3tune that can be read"):
        list(st.replay(tmp_path / "plain.png"))
    with pytest.raises(st.FileError, match="there is no such picture"):
        list(st.replay(tmp_path / "none.png"))


def test_adapters_stay_as_long_as_their_pictures(run: st.Trainer) -> None:
    """One file for each row that was drawn, a checkpoint's linked; what no picture names goes."""
    named = {about(path)["adapter"] for step in (3, 6) for path in run.folder.images(step).glob("*.png")}
    assert {path.stem for path in run.folder.adapters.iterdir()} == named
    assert len(named) == 4
    checkpoint = run.folder.checkpoints()[-1] / "adapter.safetensors"
    assert any(path.samefile(checkpoint) for path in run.folder.adapters.iterdir())
    assert {about(path)["adapter"] for path in run.folder.images(0).glob("*.png")} == {""}
    stray = run.folder.adapters / f"{'0' * 64}.safetensors"
    stray.write_bytes(b"")
    run.folder.drop_adapters()
    assert {path.stem for path in run.folder.adapters.iterdir()} == named


def test_previews_come_every_so_many_steps(run: st.Trainer) -> None:
    """After sampler step 2 of 3, one JPEG for each picture of the batch, and nothing at the others."""
    previews = records(run, PreviewRecord)
    assert {(record.sampler_step, len(record.previews) == record.count) for record in previews if record.previews} == {(2, True)}
    assert all(len(record.prompts) == record.count for record in previews)
    assert {(record.width, record.height) for record in previews} == {(64, 64), (96, 64)}
    assert {(r.sampler_step, r.timestep == 1000.0) for r in previews} >= {(1, True), (2, False)}, "the walk begins in noise"
    assert all(0 < r.timestep <= 1000 for r in previews if r.timestep is not None)
    assert None not in {r.timestep for r in previews}
    assert all(preview[:3] == b"\xff\xd8\xff" for record in previews for preview in record.previews)
    assert not [line for line in run.folder.read_history() if line["type"] == "preview"]


def test_scores_leave_no_prompt_out(run: st.Trainer) -> None:
    """Base, adapter and average, each beside the base's mean and that of the real held-out pictures."""
    scores = records(run, ScoreRecord)
    assert [(record.step, record.kind) for record in scores] == [
        (0, "base"), (3, "adapter"), (3, "ema"), (6, "adapter"), (6, "ema"),
    ]  # fmt: skip
    for record in scores:
        assert sorted(set(record.names)) == ["half", "lock", "wide"]
        assert record.min <= record.mean <= record.max <= 1
        assert record.mean == pytest.approx(sum(record.scores) / len(record.scores))
        assert record.base == pytest.approx(scores[0].mean, abs=1e-6)
    assert len({record.reference for record in scores}) == 1
    assert scores[0].reference is not None
    assert [line["mean"] for line in run.folder.read_history() if line["type"] == "clip"] == [record.mean for record in scores]


def test_a_picture_says_how_to_draw_it_elsewhere(run: st.Trainer) -> None:
    """Settings, versions, code and a ComfyUI workflow are inside, and no place of this machine."""
    path = run.folder.images(6) / "00.png"
    facts = about(path)
    assert "max_sequence_length=16" in facts["code"]
    assert "skip_guidance_layers=[7, 8]" in facts["code"]
    assert facts["shot"]["guidance"]["skip_layers"] == [7, 8]
    assert str(run.folder.path.parent) not in json.dumps(facts)
    with Image.open(path) as opened:
        nodes = json.loads(opened.info["prompt"])
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert kinds["SkipLayerGuidanceSD3"]["layers"] == "7, 8"
    assert kinds["KSampler"]["cfg"] == 4.0
    assert "LoraLoaderModelOnly" in kinds


def test_the_base_row_is_drawn_once_for_all_runs(run: st.Trainer, bench: Workbench) -> None:
    """A second run takes the pictures over, bit for bit; another guidance, or another prompt, is drawn when it is first needed."""
    settings = {k: v for k, v in run.config.leaves().items() if k.startswith(("validation_", "user_prompt", "num_validation"))}
    second = bench.trainer(model_flavour="playground", **{**settings, "validation_preview": False})
    found = list(second.validation())
    assert not [record for record in found if isinstance(record, PreviewRecord)], "nothing went through the model"
    rows = [{one.shot: one.path for one in drawn(trainer.folder, 0)} for trainer in (run, second)]
    assert rows[0].keys() == rows[1].keys()
    for shot, path in rows[0].items():
        assert Image.open(path).tobytes() == Image.open(rows[1][shot]).tobytes()
        assert about(path)["batch"] == about(rows[1][shot])["batch"]
    count = len(drawn(second.folder, 0))
    assert not second.set(validation_guidance=2.0, validation_guidance_skip_layers=None).refused
    list(second.validation())
    assert len(drawn(second.folder, 0)) == 2 * count
    list(second.validation())
    assert len(drawn(second.folder, 0)) == 2 * count, "and only once"


# --- samples ---------------------------------------------------------------------------------------------------------


def differing(one: Image.Image, other: Image.Image) -> int:
    return max(int(band.getextrema()[1]) for band in ImageChops.difference(one.convert("RGB"), other.convert("RGB")).split())


@pytest.mark.parametrize("file", ["", pytest.param("lora.safetensors", marks=pytest.mark.full), "checkpoints/step-000006", "comfyui"])
def test_samples_are_the_runs_own_pictures(run: st.Trainer, tmp_path: Path, file: str) -> None:
    """From the run folder, its file, a checkpoint or ComfyUI's layout: within 2 of 255 of what the run drew."""
    path = run.folder.path / file
    settings: dict[str, Any] = {}
    if file == "comfyui":
        path = tmp_path / "lora-comfyui.safetensors"
        run.save(path, layout="comfyui")
        settings = {"config": run.config}
    made = st.sample(path, "lock", out=tmp_path / "samples", num_validation_images=1, **settings)
    assert made.paths[0].name == "0000-lock.png"
    with Image.open(run.folder.images(6) / "00.png") as own:
        assert differing(made.pictures[0], own) <= 2
    again = st.sample(path, "lock", out=tmp_path / "samples", num_validation_images=1, **settings)
    assert again.paths[0].name == "0001-lock.png", "nothing is overwritten"
    assert Image.open(made.paths[0]).tobytes() == Image.open(again.paths[0]).tobytes()


def test_strength_scales_the_change(run: st.Trainer, tmp_path: Path) -> None:
    """0 is the base model, bit for bit; 1 is not."""
    base = next(found.path for found in drawn(run.folder, 0) if found.shot.prompt == "lock" and found.shot.steps == 3)
    none, whole = (
        st.sample(run.folder.path, "lock", out=tmp_path, validation_adapter_strength=s, num_validation_images=1).pictures[0]
        for s in (0.0, 1.0)
    )
    assert differing(none, Image.open(base)) <= 1, "drawn alone, and there in a batch"
    assert differing(whole, Image.open(base)) > 1


def test_what_is_no_adapter_is_explained(run: st.Trainer, tmp_path: Path) -> None:
    with pytest.raises(st.CheckpointError, match="there is no such file; name a"):
        st.sample(tmp_path / "none.safetensors", "lock")
    with pytest.raises(st.CheckpointError, match="holds no adapter"):
        st.sample(tmp_path, "lock")
    loose = tmp_path / "loose.safetensors"
    loose.write_bytes(run.folder.lora.read_bytes())
    with pytest.raises(st.ConfigError, match="lies in no run folder, so the base model must be named"):
        st.sample(loose, "lock", out=tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(st.CheckpointError, match="cannot be read as safetensors"):
        st.sample(tmp_path / "broken.safetensors", "lock", out=tmp_path, config=run.config)


def test_the_command_line_draws_and_replays(run: st.Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of a fresh process is the run's own; a wrong block is one sentence."""
    rest = ["--out", str(tmp_path), "--set", "num_validation_images=1"]
    assert "0000-lock.png" in fresh.run(["-m", "sd3tune", "sample", str(run.folder.path), "lock", *rest], tmp_path / "said.txt")
    with Image.open(run.folder.images(6) / "00.png") as own:
        assert differing(Image.open(tmp_path / "0000-lock.png"), own) <= 2
    assert cli.main(["sample", str(run.folder.path), "lock", "--slg", "7,x"]) == 1
    assert "write the numbers of blocks with commas" in capsys.readouterr().err
    assert cli.main(["sample", str(run.folder.path), "lock", "--slg", "99", "--out", str(tmp_path)]) == 1
    assert "beyond this model's blocks, 0 to 11" in capsys.readouterr().err
    picture = run.folder.images(6) / "01.png"
    assert cli.main(["replay", str(picture)]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out


# --- skip-layer guidance ---------------------------------------------------------------------------------------------


def test_scale_0_is_no_skip_layer_guidance(run: st.Trainer) -> None:
    """Bit for bit, and the positive prompt's forward is what is skipped."""
    plain, zero = (
        next(event.picture for event in run.painted([shot]) if isinstance(event, Drawn))
        for shot in (
            Shot("lock", "lock", "", 64, 64, 1, 4, Guidance(4.0)),
            Shot("lock", "lock", "", 64, 64, 1, 4, Guidance(4.0, (7, 8), 0.0, 1.0, 0.0)),
        )
    )
    assert plain.tobytes() == zero.tobytes()


@pytest.mark.parametrize(
    ("layers", "cfg", "said"),
    [((99,), 4.0, "beyond this model's blocks, 0 to 11"), ((1, 1), 4.0, "different block numbers"), ((7,), 1.0, "is not above 1")],
)
def test_the_grid_refuses_what_cannot_be(run: st.Trainer, layers: tuple[int, ...], cfg: float, said: str) -> None:
    with pytest.raises(st.ConfigError, match="validation_guidance") as error:
        st.slg_grid(run, layers=layers, cfgs=[cfg])
    assert said in str(error.value)


def test_the_grid_shows_its_price_scores_and_hands_settings_back(run: st.Trainer) -> None:
    """Row 0 is without; scores and differences stand in each cell; the chosen one is settings, and training is untouched."""
    before = {name: weight.detach().clone() for name, weight in run.engine.weights.items()}
    grid = st.slg_grid(run, layers=[(7, 8), (2,)], scales=[2.8], cfgs=[3.0, 4.0], prompt="lock", validation_num_inference_steps=4)
    assert grid.forwards == 6 * 4 * 2 + 4 * 3, "two for guidance in each step, and one more in steps 1 to 3"
    assert "6 pictures, 60 forwards of the model: about" in grid.price
    assert "active in steps 1 to 3 of 4" in grid.price
    found = list(grid)
    assert isinstance(found[0], NoticeRecord)
    cells = [record for record in found if record.type == "cell"]
    assert [record.difference is None for record in cells] == [True, True, False, False, False, False]
    assert all(record.difference > 0.005 for record in cells[2:])
    assert all(0 <= record.clip <= 1 for record in cells)
    assert grid.choose(1, 1) == {
        "validation_guidance": 4.0, "validation_guidance_skip_layers": (7, 8), "validation_guidance_skip_scale": 2.8,
    }  # fmt: skip
    assert not run.set(**grid.choose(0, 0)).refused
    assert run.config.validation.validation_guidance_skip_layers is None
    run.set(**SLG)
    assert list(grid)[1:] == [], "what is drawn stays drawn"
    assert all(torch.equal(weight, before[name]) for name, weight in run.engine.weights.items())
    with pytest.raises(st.TrainingError, match="no picture in row 9"):
        grid.choose(9, 0)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("steps", [20, 28])
def test_comfyui_steps_through_the_same_noise_levels(steps: int) -> None:
    """Its scheduler ``normal`` goes evenly from timestep 1000 to 1000 x the least level, and shifts that once more; so does diffusers."""
    least = 1000 * shifted(1 / 1000, 3.0)
    times = [1000 + i * (least - 1000) / (steps - 1) for i in range(steps)]
    scheduler = components.load_scheduler(st.presets.playground(), "euler", 3.0)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.tolist() == pytest.approx([*(shifted(t / 1000, 3.0) for t in times), 0.0], abs=1e-6)


def test_a_workflow_is_whole() -> None:
    """Every input names a node that is there, and what cannot be matched is listed."""
    config = st.RunConfig.make(model_flavour="sd35-medium", validation_prompt="a pot", validation_guidance_skip_layers=(7, 8, 9))
    for adapter in (True, False):
        nodes = comfyui.workflow(config, shots_of(config)[0], adapter=adapter)
        links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert all(name in nodes for name, _ in links)
        assert ("3" in nodes) is adapter
    assert any("max" in line or "T5" in line for line in comfyui.UNMATCHED)


def test_a_wrong_run_leaves_no_samples(tmp_path: Path) -> None:
    """Nothing is written before the adapter was read."""
    with pytest.raises(st.CheckpointError):
        st.sample(tmp_path / "nothing", "lock", out=tmp_path / "samples")
    assert not (tmp_path / "samples").exists()
    assert not RunFolder(tmp_path).adapters.exists()
