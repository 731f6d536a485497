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
from sd3tune import cli, playground
from sd3tune.cache.states import Text
from sd3tune.config import library
from sd3tune.config.advice import advice
from sd3tune.config.library import parse_size
from sd3tune.models import components
from sd3tune.panels.pictures import in_words as panel_words
from sd3tune.picking import Picker
from sd3tune.records import READING, ImageRecord, NoticeRecord, PreviewRecord, ScoreRecord
from sd3tune.redrawing import verdict
from sd3tune.run_folder import RunFolder
from sd3tune.validation import comfyui
from sd3tune.validation.grids import Grid
from sd3tune.validation.history_grid import MOST, grid_of, rows_of, steps_shown
from sd3tune.validation.painter import Drawn, Failed, Painter, Said
from sd3tune.validation.pictures import Source, about, drawn
from sd3tune.validation.sampler import Guidance
from sd3tune.validation.scoring import Scoring
from sd3tune.validation.shots import Shot, in_words, shots_of, together
from sd3tune.validation.standing import standing

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


def test_skip_layer_guidance_minds_each_prompts_own_guidance() -> None:
    """One of 1 or less is refused and named, one above 4 is advised against; both as for the run's own."""
    library = {"plain": "a pot", "own": {"prompt": "a cup", "guidance": 1}}
    with pytest.raises(st.ConfigError, match="user_prompt_library: 'own': guidance 1 is not above 1"):
        st.presets.playground(validation_guidance_skip_layers=(7,), user_prompt_library=library)
    st.presets.playground(user_prompt_library=library)
    high = {"own": {"prompt": "a cup", "guidance": 5, "steps": 20}}
    for given_library, told in ((high, True), ({"own": "a cup"}, False)):
        config = st.presets.playground(validation_guidance_skip_layers=(7,), user_prompt_library=given_library, validation_prompt="a pot")
        assert any("at most 4" in str(one) for one in advice(config)) is told
    said = in_words(st.presets.playground(
        validation_guidance_skip_layers=(7,), user_prompt_library=high, validation_prompt="a pot", validation_num_inference_steps=28,
    ))  # fmt: skip
    assert "steps 1-5 of 28" in said
    assert "steps 1-3 of 20" in said, "a prompt's own steps count too"


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


def test_the_grid_in_the_folder_is_prompts_by_steps_and_says_what_each_cell_is(run: st.Trainer) -> None:
    """Rows for every step drawn, their labels, all settings inside the PNG, and the same in a JSON file that names each cell's file."""
    told = json.loads(run.folder.grid.with_suffix(".json").read_text())
    with Image.open(run.folder.grid) as opened:
        assert json.loads(opened.info["sd3tune"]) == told
        size = opened.size
    labels = ["base model", *(f"{kind}, step {step}" for step in (3, 6) for kind in ("LoRA", "average"))]
    assert [row["label"] for row in told["rows"]] == labels
    shots, rows = shots_of(run.config), [row["cells"] for row in told["rows"]]
    assert len(told["columns"]) == len(shots)
    for cells in rows:
        assert [cell["shot"]["prompt"] for cell in cells] == [shot.prompt for shot in shots]
        for cell in cells:
            facts = about(run.folder.path / cell["file"])
            assert (facts["adapter"], facts["shot"], facts["kind"]) == (cell["adapter"], cell["shot"], cell["kind"])
    assert {name: told["settings"][name] for name in SLG} == {name: list(v) if isinstance(v, tuple) else v for name, v in SLG.items()}
    assert str(run.folder.path.parent) not in json.dumps(told)
    found = rows_of(run.folder, shots, [3, 6])
    assert size == grid_of(shots, found, run.cache.plan).image().size
    small = [cell for _, row in grid_of(shots, found, run.cache.plan, most=len(rows) * len(shots) * 400).rows[:-1] for cell in row]
    assert all(300 <= cell.width * cell.height <= 440 for cell in small), "of many pictures each is smaller"


def test_many_steps_are_thinned_for_the_grid(tmp_path: Path) -> None:
    """The first and the last always stay; the base model's own step is no row of its own beside others."""
    folder = RunFolder(tmp_path)
    assert steps_shown(folder, 99) == []
    for step in (0, *range(10, 130, 10)):
        folder.images(step).mkdir(parents=True)
        found = steps_shown(folder, step)
        assert len(found) <= MOST
        assert found == sorted(set(found))
        assert (found[0], found[-1]) == (min(10, step), step)
    assert steps_shown(folder, 30) == [10, 20, 30], "after a rewind later ones do not count"


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
    for path in one_of_a_kind if seeds == 1 else paths:
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


def test_another_precision_after_a_resume_is_another_model(bench: Workbench) -> None:
    """Rows from before and after are each drawn again as they were; the base row stands for the model that draws now."""
    trainer = bench.trainer(max_train_steps=3, lr_warmup_steps=0, learning_rate=1e-2, validation_prompt="lock", num_eval_images=1)
    list(trainer.run(2))
    list(trainer.validation())
    trainer.checkpoint()
    folder, first = trainer.folder, trainer.folder.images(2) / "00.png"
    base = folder.images(0) / "00.png"
    old = (about(base)["model"], Image.open(base).tobytes())
    assert about(first)["model"] == old[0]
    resumed = st.Trainer.resume(folder.path, base_model_precision="int8-quanto")
    assert not [record for record in resumed.run() if getattr(record, "problem", "") or isinstance(record, NoticeRecord)]
    second = folder.images(3) / "00.png"
    assert about(second)["model"] == about(base)["model"] != old[0]
    assert Image.open(base).tobytes() != old[1]
    assert [path.name for path in sorted(folder.images(0).glob("*.png"))] == ["00.png"], "the new one takes the old one's place"
    assert [about(path)["model_settings"]["base_model_precision"] for path in (first, second)] == ["no_change", "int8-quanto"]
    for path in (first, second, base):
        assert list(st.replay(path))[-1].text == f"{path.name}: drawn again, and the same, bit for bit"  # type: ignore[attr-defined]
    assert Picker(folder.path, steps=[2]).price == "all 1 pictures are there", "as the run was at step 2"
    assert Picker(folder.path).price.startswith("1 pictures"), "what another precision drew is no picture of now"


def test_the_verdict_names_what_changed() -> None:
    """Library, device and model, and only where the pictures differ."""
    path, grey = playground.PICTURES / "train" / "key.png", Image.new("RGB", Image.open(playground.PICTURES / "train" / "key.png").size)
    facts = {"versions": {"torch": "1"}, "device": "cuda", "model": "one"}
    then, now = (
        Source(st.presets.playground(), device, "base", 0, "", m, {"torch": v})
        for device, m, v in (("cuda", "one", "1"), ("cpu", "two", "2"))
    )
    assert verdict(path, Image.open(path).convert("RGB"), facts, now).endswith("the same, bit for bit")
    assert verdict(path, grey, facts, then).endswith("of 255")
    assert verdict(path, grey, facts, now).endswith(
        "(torch 1 then, 2 now; cuda then, cpu now; the base model or its encoders are not those of then)"
    )


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


def test_real_pictures_are_scored_by_data_set_and_all_at_once(tmp_path: Path) -> None:
    """``num_eval_images`` of each data set, or of ``eval_dataset_id`` alone, also without an evaluation loss; one call of the scorer."""
    asked: list[list[str]] = []

    class Counted(Scoring):
        def scores(self, config: st.RunConfig, pictures: Any, prompts: Any) -> tuple[float, ...]:
            asked.append(list(prompts))
            return tuple(float(len(text)) / 100 for text in prompts)

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    kinds = {name: SimpleNamespace(id=name, dataset_type="eval") for name in ("a", "b")}
    items = [
        SimpleNamespace(path=tmp_path / ("gone.png" if text == "a2" else "x.png"), caption=text, dataset=kinds[text[0]])
        for text in ("a1", "a2", "a3", "b1", "b2", "b3")
    ]
    plan: Any = SimpleNamespace(evaluation=(), catalog=SimpleNamespace(items=items))
    scoring = Counted(torch.device("cpu"))
    config = st.presets.playground(num_eval_images=2, eval_loss_disable=True)
    assert scoring._reference(config, plan) == pytest.approx(0.02)
    assert asked.pop() == ["a1", "b1", "b2"], "the second cannot be read"
    assert not asked
    scoring._reference(config.replace(eval_dataset_id="b", num_eval_images=3), plan)
    assert asked.pop() == ["b3"], "the others are known"
    judged: Any = SimpleNamespace(evaluation=[SimpleNamespace(item=item) for item in items[2:5]], catalog=plan.catalog)
    Counted(torch.device("cpu"))._reference(config.replace(num_eval_images=1), judged)
    assert asked.pop() == ["a3", "b1", "b2"], "what is judged is what is scored: the plan has cut by data set already"


def test_a_score_says_how_to_read_it(run: st.Trainer) -> None:
    """Where the panel shows it, beside the grid; nothing is said where nothing was scored."""
    said = panel_words(run.folder, 6, standing(run.folder, 6))
    assert "CLIP score (adapter) 0." in said
    assert said.endswith(READING)
    assert "CLIP" not in panel_words(run.folder, 7, [])


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
    assert kinds["LoraLoaderModelOnly"]["lora_name"] == "lora-comfyui.safetensors"
    assert 'weight_name="lora.safetensors"' in facts["code"]


@pytest.mark.parametrize(
    ("at", "name", "file"), [(0, "00.png", None), (6, "00.png", "lora.safetensors"), (6, "00-ema.png", "lora-ema.safetensors")]
)
def test_a_workflow_for_comfyui_lies_beside_each_picture(run: st.Trainer, at: int, name: str, file: str | None) -> None:
    """The same as inside it; with the file of the adapter or of its average, or none; and what cannot be matched is listed."""
    path = run.folder.images(at) / name
    facts = about(path)
    assert facts["comfyui"]["workflow"] == path.with_suffix(".comfyui.json").name
    nodes = json.loads((path.parent / facts["comfyui"]["workflow"]).read_text())
    with Image.open(path) as opened:
        assert nodes == json.loads(opened.info["prompt"])
    loaded = [node["inputs"]["lora_name"] for node in nodes.values() if node["class_type"] == "LoraLoaderModelOnly"]
    assert loaded == ([comfyui.lora_name(file)] if file else [])
    assert [f'"{one}"' in facts["code"] for one in ("lora.safetensors", "lora-ema.safetensors")] == [
        file == "lora.safetensors", file == "lora-ema.safetensors",
    ]  # fmt: skip
    listed = json.loads(path.with_suffix(".json").read_text())["comfyui"]["unmatched"]
    assert [line.split(":")[0] for line in listed] == ["T5's length", "Skip-layer guidance", "The base model"] + [
        "The adapter's file"
    ] * bool(file)


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
def test_samples_are_the_runs_own_pictures(run: st.Trainer, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From the run folder, its file, a checkpoint or ComfyUI's layout: within 2 of 255 of what the run drew."""
    path = run.folder.path / file
    settings: dict[str, Any] = {}
    if file == "comfyui":
        path = tmp_path / "lora-comfyui.safetensors"
        run.save(path, layout="comfyui")
        settings = {"config": run.config}
    made = st.sample(path, "lock", out=tmp_path / "samples", num_validation_images=1, **settings)
    assert made.paths[0].name == "0000-lock.png"
    said = "1 of 1 prompts, 64x64, 3 steps, guidance 4; skip-layer guidance on blocks 7, 8 x 2.8, steps 1-2 of 3"
    assert capsys.readouterr().out.splitlines()[0] == said
    with Image.open(run.folder.images(6) / "00.png") as own:
        assert differing(made.pictures[0], own) <= 2
    again = st.sample(path, "lock", out=tmp_path / "samples", num_validation_images=1, **settings)
    assert again.paths[0].name == "0001-lock.png", "nothing is overwritten"
    assert Image.open(made.paths[0]).tobytes() == Image.open(again.paths[0]).tobytes()


SOMEWHERE_ELSE = """
import json, sys
import sd3tune as st
for number, cell in enumerate(json.loads(sys.argv[2])):
    st.sample(sys.argv[1], "lock", out=f"{sys.argv[3]}/{number}", **{k: tuple(v) if isinstance(v, list) else v for k, v in cell.items()})
"""
BY_HAND: tuple[dict[str, Any], ...] = (
    {"validation_guidance": 1.0}, {"validation_guidance": 4.0},
    {"validation_guidance": 4.0, "validation_guidance_skip_layers": (1,), "validation_guidance_skip_layers_stop": 0.9},
)  # fmt: skip


def test_a_fresh_process_draws_what_the_trainer_drew(bench: Workbench, tmp_path: Path) -> None:
    """From the saved adapter: without guidance, with it, and with skip-layer guidance, two sizes, two solvers; within 2 of 255."""
    trainer = bench.trainer(
        max_train_steps=4, validation_prompt=("lock",), validation_resolution="64x64,80x48", validation_num_inference_steps=4,
        learning_rate=1e-2, lr_warmup_steps=0, validation_on_startup=False,
    )  # fmt: skip
    list(trainer.run())
    cells = [{**settings, "validation_noise_scheduler": solver} for solver in ("euler", "dpm") for settings in BY_HAND]
    script, here = tmp_path / "elsewhere.py", list[Image.Image]()
    script.write_text(SOMEWHERE_ELSE)
    for cell in cells:
        assert not trainer.set(**{"validation_guidance_skip_layers": None, **cell}).refused
        drawn = [record for record in trainer.validation() if record.type == "image" and record.kind == "adapter"]  # type: ignore[attr-defined]
        assert len(drawn) == 2
        here += [Image.open(record.path).convert("RGB") for record in drawn]  # type: ignore[attr-defined]
    fresh.run([str(script), str(trainer.folder.lora), json.dumps(cells), str(tmp_path)], tmp_path / "said.txt")
    there = [Image.open(path) for number in range(len(cells)) for path in sorted((tmp_path / str(number)).glob("*.png"))]
    assert [one.size for one in here] == [one.size for one in there] == [(64, 64), (80, 48)] * len(cells)
    assert max(differing(one, other) for one, other in zip(here, there, strict=True)) <= 2
    kinds = [one.tobytes() for one in here]
    assert len({*kinds}) == len(kinds), "no two settings draw the same"


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
    said = (tmp_path / "said.txt").read_text()
    assert "skip-layer guidance on blocks 7, 8 x 2.8, steps 1-2 of 3" in said
    assert said.index("steps 1-2 of 3") < said.index("0000-lock.png"), "before it is drawn"
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
        "validation_guidance": 4.0, "validation_guidance_skip_layers": (7, 8), "validation_guidance_skip_layers_start": 0.01,
        "validation_guidance_skip_layers_stop": 0.9, "validation_guidance_skip_scale": 2.8, "validation_num_inference_steps": 4,
    }  # fmt: skip
    assert not run.set(**grid.choose(0, 0)).refused
    assert run.config.validation.validation_guidance_skip_layers is None
    run.set(**SLG, validation_num_inference_steps=3)
    assert list(grid)[1:] == [], "what is drawn stays drawn"
    assert all(torch.equal(weight, before[name]) for name, weight in run.engine.weights.items())
    with pytest.raises(st.TrainingError, match="no picture in row 9"):
        grid.choose(9, 0)


def test_the_chosen_cell_draws_what_the_grid_drew(run: st.Trainer) -> None:
    """Begin, end, a scale of 0 and whatever else was given: with the cell's settings the run draws the same bits."""
    before, grid = run.config, st.slg_grid(
        run, layers=(2,), scales=[0.0, 2.8], cfgs=[4.0], prompt="lock", validation_seed=5, validation_guidance_skip_layers_start=0.3,
        validation_guidance_skip_layers_stop=1.0,
    )  # fmt: skip
    cells = [record for record in grid if record.type == "cell"]
    assert [cell.skip_scale for cell in cells] == [2.8, 0.0, 2.8], "the run's own in the row without"
    assert grid.choose(1, 0)["validation_guidance_skip_scale"] == 0.0
    try:
        for row in range(3):
            assert not run.set(**grid.choose(row, 0)).refused
            shot = next(shot for shot in shots_of(run.config) if shot.prompt == "lock")
            assert (shot.seed, shot.guidance.skip_start, shot.guidance.skip_stop) == (5, 0.3, 1.0)
            (again,) = [event.picture for event in run.painted([shot]) if isinstance(event, Drawn)]
            assert again.tobytes() == cells[row].picture.tobytes()
    finally:
        run.set(**{name: before.leaves()[name] for name in grid.choose(0, 0)})
    assert run.config == before


def test_a_failed_cell_of_the_skip_layer_grid_stands_in_its_place(run: st.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are drawn; it is no choice; iterating again draws it alone."""
    grid, whole = st.slg_grid(run, layers=(2,), scales=[1.0, 2.0], cfgs=[4.0], prompt="lock", validation_num_inference_steps=2), run.painted
    bad = {1.0}

    def painted(shots: list[Shot]) -> Any:
        return [Failed(shots[0], "no room")] if shots[0].guidance.skip_scale in bad else whole(shots)

    monkeypatch.setattr(run, "painted", painted)
    cells = [record for record in grid if record.type == "cell"]
    assert [cell.problem for cell in cells] == ["", "no room", ""]
    assert cells[2].difference is not None
    assert [row[1][0] for row in grid.grid().rows][1] == "no room"
    assert "could not be drawn: no room" in str(grid)
    grid.grid().image()
    with pytest.raises(st.TrainingError, match="could not be drawn: no room"):
        grid.choose(1, 0)
    bad.clear()
    assert [record.skip_scale for record in grid if record.type == "cell"] == [1.0]
    assert grid.choose(1, 0)["validation_guidance_skip_scale"] == 1.0


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
    for adapter in ("lora.safetensors", None):
        nodes = comfyui.workflow(config, shots_of(config)[0], adapter)
        links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert all(name in nodes for name, _ in links)
        assert ("3" in nodes) is (adapter is not None)


def test_what_comfyui_cannot_match_is_listed() -> None:
    """Each line stands there because of a setting, and goes when it does."""
    plain: dict[str, Any] = {"model_flavour": "sd35-medium", "validation_prompt": "a pot", "mixed_precision": "no", "use_t5": True}
    because: dict[str, dict[str, Any]] = {
        "Skip-layer guidance": {"validation_guidance_skip_layers": (7, 8, 9)}, "Noise": {"mixed_precision": "bf16"},
        "UniPC and DPM-Solver++": {"validation_noise_scheduler": "unipc"},
        "Zeros for no text": {"sd3_clip_uncond_behaviour": "zero"},
        "A quantised base (int8-quanto)": {"base_model_precision": "int8-quanto"},
    }  # fmt: skip

    def listed(adapter: str | None = None, **settings: Any) -> list[str]:
        config = st.RunConfig.make(**{**plain, **settings})
        return comfyui.unmatched(config, shots_of(config)[0], adapter)

    (length,) = listed()
    assert length.startswith("T5's length")
    assert "always 154" in length
    assert any("Zeros" in line for line in listed(use_t5=False))
    for begins, given_settings in because.items():
        assert [line.startswith(begins) for line in listed(**given_settings)] == [False, True], given_settings
    assert "sd3tune lora convert lora-ema.safetensors --to comfyui --out lora-ema-comfyui.safetensors" in listed("lora-ema.safetensors")[1]


def test_a_wrong_run_leaves_no_samples(tmp_path: Path) -> None:
    """Nothing is written before the adapter was read."""
    with pytest.raises(st.CheckpointError):
        st.sample(tmp_path / "nothing", "lock", out=tmp_path / "samples")
    assert not (tmp_path / "samples").exists()
    assert not RunFolder(tmp_path).adapters.exists()
