"""The studio: panels over one draft, on a real run of the playground; nothing here mocks what a person would press."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from PIL import Image
from safetensors import safe_open
from test_trainer import same_state

import sd3tune as st
from sd3tune.config import presets
from sd3tune.errors import CheckpointError, TrainingError
from sd3tune.models.savings import savings
from sd3tune.panels import (
    ComparePanel,
    DataPanel,
    DoctorPanel,
    Draft,
    ExportPanel,
    LearningPanel,
    Studio,
    TrainingPanel,
    codes,
    doctor,
    lab,
    record,
)
from sd3tune.panels.pictures import grid_at, in_words, jpeg, shown_at
from sd3tune.run_folder import RunFolder
from sd3tune.validation.painter import Drawn
from sd3tune.validation.shots import shots_of
from sd3tune.xy import CHECKPOINT, XYGrid

PATIENCE = 120


def pixels(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture(scope="module")
def studio(bench: Workbench) -> Iterator[Studio]:
    """A run of twelve updates that stands at step 6, with a checkpoint at 4."""
    config = bench.config(
        max_train_steps=12, validation_prompt=("lock", "rooster"), checkpoint_step_interval=4, output_dir=str(bench.root / "studio")
    )
    panel = Studio(config, bench.cache(config), data=bench.datasets)
    panel.press("start")
    panel.wait(PATIENCE, until=6)
    panel.press("pause")
    panel.wait(PATIENCE, until="paused")
    yield panel
    if panel.runner.snapshot.live:
        panel.press("stop")
        panel.wait(PATIENCE)


# --- steering ------------------------------------------------------------------------------------------------------------


def test_a_rewound_run_is_the_run_that_never_left(studio: Studio) -> None:
    """Back at step 4 and on to 6 again: the same bits as the first time; what was left stays as a checkpoint that is pinned."""
    folder = RunFolder(Path(studio.runner.snapshot.folder))
    at = studio.runner.snapshot.step
    studio.learning.fields["learning_rate"].value = 5e-4
    studio.wait(PATIENCE, until=lambda now: len(now.steering) == 1)
    studio.checkpoint.value = 4
    studio.press("rewind")
    now = studio.wait(PATIENCE, until=lambda now: now.step == 4)
    assert not now.steering, "the code that does the run again has nothing of what no longer counts"
    assert now.config is not None
    assert now.config.optimizer.learning_rate == 1e-3
    left = folder.checkpoint_folder / f"step-{at:06d}"
    assert (left / "PINNED").exists()
    before = {name: (left / name).read_bytes() for name in ("adapter.safetensors", "optimizer.safetensors")}
    studio.press("go_on")
    studio.wait(PATIENCE, until=at)
    studio.press("pause")
    now = studio.wait(PATIENCE, until="paused")
    steps: dict[int, set[float]] = {}
    for line in folder.history.read_text().splitlines():
        row = json.loads(line)
        if row["type"] == "step":
            steps.setdefault(row["step"], set()).add(row["loss"])
    assert all(len(losses) == 1 for losses in steps.values()), steps
    assert [row["step"] for row in folder.read_history() if row["type"] == "step"] == list(range(1, now.step + 1))
    studio.press("save")
    studio.wait(PATIENCE, until=lambda now: any(f"lora-step-{now.step:06d}" in line for line in now.log))
    if now.step == at:
        again = folder.checkpoint_folder / f"step-{at:06d}"
        assert {name: (again / name).read_bytes() for name in before} == before


def test_a_rewind_to_what_is_not_there_changes_nothing(studio: Studio) -> None:
    step, refusals = studio.runner.snapshot.step, studio.runner.snapshot.refusals
    studio.runner.send("rewind", step=3)
    now = studio.wait(PATIENCE, until=lambda now: now.refusals > refusals)
    assert "there is no checkpoint" in now.refused
    assert (now.step, now.state) == (step, "paused")


def test_a_change_in_any_panel_reaches_the_run_and_new_prompts_are_read(studio: Studio) -> None:
    changes = len(studio.runner.snapshot.changes)
    studio.learning.fields["max_grad_norm"].value = 0.5
    studio.drawing.fields["validation_prompt"].value = "lock\nrooster\nan octopus that nobody encoded"
    now = studio.wait(PATIENCE, until=lambda now: len(now.changes) == changes + 2)
    assert now.config is not None
    assert now.config.optimizer.max_grad_norm == 0.5
    assert now.config.validation.validation_prompt[2] == "an octopus that nobody encoded"
    assert any("reading 1 new prompts" in line for line in now.log)
    assert studio.model.fields["base_model_precision"].disabled
    assert not studio.drawing.fields["validation_guidance_skip_layers"].disabled
    studio.drawing.fields["validation_prompt"].value = "lock\nrooster"
    studio.wait(PATIENCE, until=lambda now: len(now.changes) == changes + 3)


def test_the_grid_lab_draws_with_the_paused_model_and_a_cell_is_taken_over(studio: Studio) -> None:
    board = studio.lab
    board.x.value, board.y.value = "validation_guidance", "validation_adapter_strength"
    board.xs.value, board.ys.value = "1, 3", "0, 1"
    board.price()
    now = studio.wait(PATIENCE, until=lambda now: now.price is not None and now.state == "paused")
    studio.refresh()
    assert not now.cells
    assert f"{now.price.forwards} forwards of the model: about" in board.cost.value
    board.draw()
    now = studio.wait(PATIENCE, until=lambda now: len(now.cells) == 4 and now.state == "paused")
    studio.refresh()
    assert any("4 pictures" in line and "forwards of the model: about" in line for line in now.log)
    assert [cell.settings["validation_guidance"] for cell in now.cells[:2]] == [1.0, 1.0]  # cheapest first: no guidance, one forward
    assert "4 of 4 cells are drawn" in board.note.value
    assert pixels(board.image.value).width > 200
    there = {(cell.row, cell.column): cell.picture for cell in now.cells}
    assert there[0, 1].tobytes() != there[1, 1].tobytes()
    board.cell.value = "1,0"
    board.use()
    studio.wait(PATIENCE, until=lambda now: now.config.validation.validation_guidance == 1.0)
    assert studio.drawing.fields["validation_guidance"].value == 1.0
    studio.drawing.fields["validation_guidance"].value = 3.0


@pytest.mark.parametrize(
    ("axis", "typed", "says"),
    [
        ("validation_guidance", "1, x", "'x' is not a number"),
        ("validation_guidance", " , ", "has no values"),
        ("validation_guidance_skip_layers", "7, b", "is not a list of block numbers"),
    ],
)
def test_a_wrong_axis_is_a_sentence(studio: Studio, axis: str, typed: str, says: str) -> None:
    studio.lab.x.value, studio.lab.y.value = axis, "validation_seed"
    studio.lab.xs.value = typed
    studio.lab.draw()
    assert says in studio.lab.note.value.replace("&#x27;", "'")


def test_values_of_an_axis() -> None:
    assert lab.values_of("validation_guidance_skip_layers", "none; 7, 8, 9; 6") == [None, (7, 8, 9), (6,)]
    assert lab.values_of("validation_seed", "1, 2") == [1, 2]
    assert lab.values_of("validation_guidance", "1; 2.5") == [1.0, 2.5]


def test_a_grid_over_checkpoints_draws_with_each_ones_adapter_and_leaves_the_training_alone(bench: Workbench) -> None:
    """The cells are, bit for bit, what the run drew at those steps; weights and moments stay."""
    trainer = bench.trainer(max_train_steps=6, lr_warmup_steps=0, learning_rate=1e-2, validation_prompt=("lock",))
    drawn: dict[int, Image.Image] = {}
    for step in (2, 4):
        while trainer.steps_done < step:
            trainer.step()
        trainer.checkpoint()
        drawn[step] = next(event.picture for event in trainer.painted(shots_of(trainer.config)) if isinstance(event, Drawn))
    trainer.step()
    before = trainer.state_dict()
    grid = XYGrid(trainer, (CHECKPOINT, [2, 4]), ("validation_seed", [trainer.config.validation_seed]))
    list(grid)
    assert [grid.cells[0, column].picture.tobytes() for column in (0, 1)] == [drawn[2].tobytes(), drawn[4].tobytes()]  # type: ignore[union-attr]
    assert drawn[2].tobytes() != drawn[4].tobytes()
    assert same_state(trainer.state_dict(), before)
    assert list(grid.grid().columns) == ["checkpoint 2", "checkpoint 4"]
    with pytest.raises(st.CheckpointError, match="there is no checkpoint of step 3; there are 2, 4"):
        XYGrid(trainer, (CHECKPOINT, [3]), ("validation_seed", [1]))


def test_the_lab_offers_the_runs_checkpoints(studio: Studio, tmp_path: Path) -> None:
    """As an axis; a cell's checkpoint becomes the one to rewind to, and a step without one is refused in words."""
    board = studio.lab
    assert studio.runner.snapshot.state == "paused"
    board.y.value, board.x.value = "validation_seed", "checkpoint"
    oldest, *_, newest = (step for _, step in studio.checkpoint.options if step >= 0)
    assert board.xs.value.split(", ")[0] == str(oldest)
    board.xs.value = str(oldest)
    board.ys.value = str(studio.config.validation_seed)  # what the run draws stays the same
    board.draw()
    studio.wait(PATIENCE, until=lambda now: bool(now.cells) and now.cells[0].settings.get("checkpoint") == oldest and now.state == "paused")
    studio.refresh()
    board.cell.value = "0,0"
    studio.checkpoint.value = newest
    board.use()
    assert f"Rewind goes back to step {oldest}, and Export can write that step's adapter" in board.note.value.replace("&#x27;", "'")
    studio.refresh()
    export, out = studio.export, tmp_path / "adapter.safetensors"
    export.step.value, export.layout.value, export.target.value = oldest, "comfyui", str(out)
    export.write()
    assert f"{out}: step {oldest}, " in export.said.value
    with safe_open(out, "pt") as file:
        assert file.metadata()["sd3tune.step"] == str(oldest)
    assert studio.checkpoint.value == oldest
    board.xs.value = "99"
    board.draw()
    studio.wait(PATIENCE, until=lambda now: "no checkpoint of step 99" in now.refused)


def test_pictures_scrub_by_step_and_the_wipe_lays_the_adapter_over_the_base(studio: Studio) -> None:
    count = studio.runner.snapshot.pictures
    studio.press("validate")
    studio.wait(PATIENCE, until=lambda now: now.pictures > count and now.state == "paused")
    studio.refresh()
    view, folder = studio.pictures, RunFolder(Path(studio.runner.snapshot.folder))
    step = studio.runner.snapshot.step
    assert view.steps[0] == 0
    view.go(step)
    assert f"Step {step}: 2 pictures of the LoRA: lock, rooster." in view.said.value
    whole = view.image.value
    view.go(0)
    assert view.image.value != whole
    view.go(step)
    view.which.value = 0
    ours = Image.open(shown_at(folder, step)[0].path).convert("RGB")
    base = Image.open(folder.images(0) / "00.png").convert("RGB")
    for share, wanted in ((100, ours), (0, base)):
        view.wipe.value = share
        seen, wanted = pixels(view.image.value), pixels(jpeg(wanted))
        apart = torch.frombuffer(bytearray(seen.tobytes()), dtype=torch.uint8).float() - torch.frombuffer(
            bytearray(wanted.tobytes()), dtype=torch.uint8
        )
        assert apart.abs().mean() < 4  # JPEG
    view.which.value = -1
    first, second, third, fourth = view.shown.buttons
    assert [one.description for one in (first, fourth)] == ["lock, base model: full size", f"rooster, LoRA, step {step}: full size"]
    for clicked, wanted in ((first, base), (fourth, Image.open(shown_at(folder, step)[1].path).convert("RGB"))):
        clicked.click()
        assert view.image.value == jpeg(wanted)
        (back,) = view.shown.buttons
        assert back.description == "all pictures again"
        back.click()
        assert view.image.value == whole
        assert view.shown.buttons == (first, second, third, fourth)


def test_the_report_of_a_run_needs_no_kernel_and_stays_small(studio: Studio) -> None:
    html = record.report(studio.runner.snapshot, studio.code(), studio.diff())
    assert len(html) < 300_000
    assert html.count('type="radio"') == len(studio.pictures.steps)
    assert "<script" not in html
    assert html.count(" checked") == 1
    assert "max_grad_norm: 1.0 -&gt; 0.5" in html
    said = in_words(RunFolder(Path(studio.runner.snapshot.folder)), 0, shown_at(RunFolder(Path(studio.runner.snapshot.folder)), 0))
    assert said.startswith("Step 0: 2 pictures of the base model alone: lock, rooster.")
    assert grid_at(RunFolder(Path(studio.runner.snapshot.folder)), 0).rows[0][0] == "base model"


def test_watching_ends_with_an_interrupt_and_the_run_goes_on(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupted)
        assert studio.watch().state == "paused"
    assert "Not watched any more; the run goes on" in studio.note.value


def test_a_run_steered_by_hand_is_done_again_by_its_code(bench: Workbench, tmp_path: Path) -> None:
    """The code that the panel shows gives the same adapter, bit for bit."""
    config = bench.config(max_train_steps=6, validation_disable=True, output_dir=str(tmp_path / "hand"))
    panel = Studio(config, bench.cache(config), data=bench.datasets)
    panel.press("start")
    panel.press("pause")
    panel.wait(PATIENCE, until="paused")
    panel.learning.fields["learning_rate"].value = 5e-4
    panel.press("go_on")
    panel.wait(PATIENCE, until=3)
    panel.learning.fields["max_grad_norm"].value = 0.1
    end = panel.wait(PATIENCE)
    assert len(end.steering) >= 1
    told: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(panel.code(), told)
    one, other = (Path(end.folder) / "lora.safetensors", told["trainer"].folder.lora)
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_stopped_run_goes_on_from_its_checkpoint(bench: Workbench, tmp_path: Path) -> None:
    config = bench.config(max_train_steps=5, validation_disable=True, output_dir=str(tmp_path / "run"))
    panel = Studio(config, bench.cache(config), data=bench.datasets)
    panel.press("start")
    panel.wait(PATIENCE, until=2)
    panel.press("stop")
    stopped = panel.wait(PATIENCE)
    panel.refresh()
    assert not panel.buttons["go_on"].disabled
    panel.press("go_on")
    end = panel.wait(PATIENCE)
    assert (end.state, end.step, end.folder) == ("finished", 5, stopped.folder)
    assert "st.replay(" in panel.code()


def test_another_kernels_panel_takes_up_a_run_that_was_left(bench: Workbench, tmp_path: Path) -> None:
    """With the settings that the run has, whatever the cell says, and with what is changed from then on."""
    config = bench.config(max_train_steps=5, validation_disable=True, output_dir=str(tmp_path / "run"))
    panel = TrainingPanel(config, bench.cache(config), data=bench.datasets)
    panel.press("start")
    panel.press("pause")
    panel.wait(PATIENCE, until="paused")
    panel.fields["learning_rate"].value = 5e-4
    panel.press("stop")
    stopped = panel.wait(PATIENCE)
    again = TrainingPanel(config, bench.cache(config), data=bench.datasets)
    assert f"{stopped.folder}: stopped at step {stopped.step} of 5; newest checkpoint: step {stopped.step}. Go on" in again.note.value
    assert (again.runner.snapshot.state, again.checkpoint.value) == ("stopped", stopped.step)
    assert again.fields["learning_rate"].value == 1e-3, "the cell's, until it goes on"
    again.fields["max_grad_norm"].value = 0.5
    assert not again.buttons["go_on"].disabled
    again.press("go_on")
    end = again.wait(PATIENCE)
    assert (end.state, end.step, end.folder) == ("finished", 5, stopped.folder)
    assert end.config is not None
    assert (end.config.optimizer.learning_rate, end.config.optimizer.max_grad_norm) == (5e-4, 0.5)
    once_more = TrainingPanel(config, bench.cache(config), data=bench.datasets)
    assert (once_more.runner.snapshot.state, once_more.note.value) == ("idle", ""), "it is finished"


# --- memory --------------------------------------------------------------------------------------------------------------


def test_what_saves_memory_is_ranked_and_those_that_go_on_come_first() -> None:
    config = st.presets.load("sd35-medium-16gb").replace(gradient_checkpointing=False, base_model_precision="no_change", train_batch_size=2)
    found = savings(config, side=1024)
    assert [one.goes_on for one in found] == sorted((one.goes_on for one in found), reverse=True)
    going = [one.bytes for one in found if one.goes_on]
    assert going == sorted(going, reverse=True)
    assert all(one.bytes > 0 for one in found)
    assert next(iter(found[0].settings)) == "gradient_checkpointing"
    from sd3tune.models import memory

    for one in found:
        assert one.bytes == memory.predict(config, side=1024).peak - memory.predict(config.replace(**one.settings), side=1024).peak


def test_out_of_memory_offers_what_helps_and_one_click_goes_on_from_the_checkpoint(
    grown: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that runs out of memory after a checkpoint; the click resumes there with what saves memory."""
    from sd3tune.training.engine import Engine

    config = grown.config(
        max_train_steps=4,
        lr_warmup_steps=0,
        checkpoint_step_interval=2,
        gradient_checkpointing=False,
        validation_disable=True,
        output_dir=str(tmp_path / "run"),
    )
    panel, update = Studio(config, grown.cache(config), data=grown.datasets), Engine.update

    def short(self: Engine, **rules: Any) -> Any:
        if self.updates == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return update(self, **rules)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "update", short)
        panel.press("start")
        with pytest.raises(TrainingError, match="out of memory"):
            panel.wait(PATIENCE)
    panel.refresh()
    offered = [child.children[0] for child in panel.relief.widget.children[1:]]
    checkpointing = next(one for one in offered if one.description == "gradient_checkpointing = True")
    checkpointing.click()
    end = panel.wait(PATIENCE)
    panel.refresh()
    assert (end.state, end.step) == ("finished", 4)
    assert end.config is not None
    assert end.config.memory.gradient_checkpointing is True
    assert not panel.relief.widget.children
    told = [row for row in RunFolder(Path(end.folder)).read_history() if row["type"] == "command" and row["name"] == "set"]
    assert told[-1]["value"] == {"gradient_checkpointing": True}
    assert st.Trainer.resume(end.folder, grown.cache(config)).config.memory.gradient_checkpointing is True


# --- data, machine, files ------------------------------------------------------------------------------------------------


def test_the_data_panel_shows_what_is_there_and_keeps_edits_beside_it(bench: Workbench, tmp_path: Path) -> None:
    import shutil

    for name in ("train", "heldout"):
        shutil.copytree(bench.datasets.parent / name, tmp_path / name)
    data = tmp_path / "datasets.yaml"
    data.write_bytes(bench.datasets.read_bytes())
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    panel = DataPanel(bench.config(), data)
    panel.look()
    assert panel.plan is not None
    assert "updates per epoch" in panel.found.value
    assert panel.pages.value.count("<img") == len(panel.cuts) <= 24
    panel.picture.value = 1
    old = panel.caption.value
    panel.caption.value = "a caption of <b>mine</b>"
    assert "1 captions are edited" in panel.kept.value
    panel.picture.value = 0
    panel.picture.value = 1
    assert panel.caption.value == "a caption of <b>mine</b>"
    panel.count()
    assert "CLIP-L" in panel.counted.value
    panel.save()
    assert panel.plan.catalog.items
    assert "a caption of <b>mine</b>" in [cut.item.caption for cut in panel.cuts]
    assert "<b>mine" not in panel.pages.value
    panel.folder.value = str(tmp_path / "texts")
    panel.export()
    written = sorted((tmp_path / "texts").rglob("*.txt"))
    assert len(written) == len(panel.cuts)
    assert "a caption of <b>mine</b>\n" in [path.read_text() for path in written]
    panel.export()
    assert "is there already" in panel.note.value
    assert {path: path.read_bytes() for path in before} == before
    assert old != "a caption of <b>mine</b>"


@pytest.mark.parametrize("whole", [False, True])
def test_a_picture_with_several_captions_keeps_them_all(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Shown one a line, saved one a line, exported one a line into one's home; one caption where the data set reads a text file whole."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(sorted((bench.datasets.parent / "train").glob("*.png"))[:2]):
        shutil.copy(picture, pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a lock\na <i>padlock</i>\n")
    data = tmp_path / "datasets.yaml"
    data.write_text(f"- {{id: two, instance_data_dir: pictures, resolution: 64, disable_multiline_split: {str(whole).lower()}}}\n")
    panel = DataPanel(bench.config(), data)
    panel.look()
    assert panel.caption.value == ("a lock a <i>padlock</i>" if whole else "a lock\na <i>padlock</i>")
    assert ("2 captions, one a line" in panel.kept.value) != whole
    panel.caption.value += "\n"
    assert not panel.edits, "an empty line is no caption"
    panel.caption.value = "a  lock\n\na bolt"
    panel.count()
    assert panel.counted.value.count("CLIP-L") == 2
    panel.save()
    assert "The captions of 1 pictures are kept in" in panel.note.value
    wanted = [("a lock a bolt",), ("a lock a <i>padlock</i>",)] if whole else [("a lock", "a bolt"), ("a lock", "a <i>padlock</i>")]
    assert [item.captions for item in st.discover(data).items] == wanted
    panel.folder.value = "~/texts"
    panel.export()
    assert [(tmp_path / f"home/texts/two/{k}.txt").read_text().splitlines() for k in (0, 1)] == [list(one) for one in wanted]
    assert "a lock / a bolt" in panel.pages.value or whole


def test_captions_saved_in_a_studio_are_trained_on_and_unsaved_ones_hinder_a_start(bench: Workbench, tmp_path: Path) -> None:
    """Also in a studio that was given a cache of the words before."""
    data = Path(shutil.copytree(bench.datasets.parent, tmp_path / "data")) / "datasets.yaml"
    config = bench.config(max_train_steps=1, lr_warmup_steps=0, validation_disable=True, output_dir=str(tmp_path / "run"))
    panel = Studio(config, st.CacheBuilder(st.plan(st.discover(data), config), st.encoders(config)).build())
    panel.data.look()
    old = panel.data.caption.value
    panel.data.caption.value = "a caption that nobody encoded"
    panel.press("start")
    assert panel.runner.snapshot.state == "idle"
    assert "Not started: 1 captions are edited and not saved; under Data, Captions, press Save edits or Undo edits." in panel.note.value
    panel.data.undo()
    assert (panel.data.caption.value, panel.hindrance) == (old, "")
    panel.data.caption.value = "a caption that nobody encoded"
    panel.data.save()
    panel.press("start")
    manifest = json.loads(RunFolder(Path(panel.wait(PATIENCE).folder)).manifest.read_text())
    assert "a caption that nobody encoded" in manifest["first_captions"]
    resumed = st.Trainer.resume(panel.runner.snapshot.folder, max_train_steps=2)  # the edits are a part of what the run trains on
    assert resumed.cache.plan.catalog.items[0].caption == "a caption that nobody encoded"
    assert resumed.steps_done == 1


def test_the_data_panel_says_what_is_wrong(bench: Workbench, tmp_path: Path) -> None:
    panel = DataPanel(bench.config(), tmp_path / "nowhere")
    panel.look()
    assert "no such folder" in panel.note.value
    assert panel.plan is None


def test_tokens_are_counted_as_one_types_once_they_were_asked_for(bench: Workbench) -> None:
    panel = DataPanel(bench.config(), bench.datasets)
    panel.look()
    panel.caption.value = "a lamp"
    assert panel.counted.value == "", "no tokenizer is loaded before somebody asks"
    panel.count()
    two = panel.counted.value
    panel.caption.value = "a lamp beside a very long and very wide table"
    more = panel.counted.value
    assert [int(one) for one in re.findall(r"of (\d+) tokens", more)] > [int(one) for one in re.findall(r"of (\d+) tokens", two)]
    panel.caption.value = "a lamp\na lamp beside a very long and very wide table"
    assert re.findall(r"of (\d+) tokens", panel.counted.value) == re.findall(r"of (\d+) tokens", two + more)
    panel.picture.value = 1
    panel.caption.value = "a lamp"
    assert panel.counted.value == two


def test_a_folder_is_described_with_its_repeats_and_mirrored(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    panel = DataPanel(bench.config(), shutil.copytree(bench.datasets.parent / "train", tmp_path / "pots"))
    panel.look()
    form = panel.folder_form
    form.write()
    (plain,) = st.discover(panel.source.value).datasets
    assert (plain.repeats, plain.flip) == (0, "none")
    panel.source.value = str(tmp_path / "pots")
    form.repeats.value, form.flip.value = 2, True
    form.write()
    (told,) = st.discover(panel.source.value).datasets
    assert (told.repeats, told.flip) == (2, "horizontal")
    panel.source.value = str(tmp_path / "pots")
    form.repeats.value = -1
    form.write()
    assert "repeats" in form.note.value


def test_a_folder_alone_is_described_and_its_missing_captions_are_written_in_the_panel(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder, one picture of which has no caption, to a file that a run starts with; the folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    pictures = Path(shutil.copytree(bench.datasets.parent / "train", tmp_path / "my pots!"))
    texts = sorted(pictures.glob("*.txt"))
    texts[1].unlink()
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    panel = DataPanel(bench.config(), tmp_path / "nowhere")
    panel.source.value = str(pictures)
    form = panel.folder_form
    assert form.widget.layout.display == ""
    assert (form.captions.value, form.side.value) == ("textfile", 64)
    assert f"1 of {len(texts)} pictures have no caption, the first is {texts[1].stem}.png, and no run starts like that" in panel.note.value
    panel.picture.value = next(k for name, k in panel.picture.options if name.endswith("(no caption)"))
    panel.caption.value = "a pot of mine"
    form.share.value = 7
    panel.save()
    assert "eval_share" in form.note.value
    form.share.value = 0.25
    panel.save()
    assert panel.source.value == str(tmp_path / "my-pots.yaml")
    assert "The captions of 1 pictures are kept in" in panel.note.value
    assert panel.cuts[panel.picture.value].item.path.stem == texts[1].stem, "the next picture to write about is near this one"
    assert form.widget.layout.display == "none"
    assert panel.plan is not None
    assert "a pot of mine" in {item.caption for item in panel.plan.catalog.items}
    assert sum(item.held_out for item in panel.plan.catalog.items) == 3
    assert st.plan(st.discover(panel.source.value), bench.config()).train
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before
    panel.source.value = str(pictures)
    form.captions.value = "filename"
    form.write()
    assert panel.source.value == str(tmp_path / "my-pots-2.yaml"), "nothing is overwritten"
    assert f"Written to {tmp_path / 'my-pots-2.yaml'}" in panel.note.value


def test_the_doctor_shows_what_stands_in_the_way_first_and_no_token(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.Report(
        (doctor.Finding("ok", "Python", "3.11"), doctor.Finding("bad", "hub", "the token hf_abcdefghijklmnopqrstuvwxyz0123456789 is wrong"))
    )
    monkeypatch.setattr(doctor, "doctor", lambda config: report)
    panel = DoctorPanel(bench.config())
    panel.look()
    assert panel.wait(PATIENCE) is report
    assert "1 things stand in the way" in panel.note.value
    assert panel.table.value.index("in the way") < panel.table.value.index("Python")
    assert "hf_abc" not in panel.table.value


def test_two_runs_are_compared_in_numbers_settings_words_and_pictures(studio: Studio, bench: Workbench) -> None:
    """The studio's run beside another of the same folder."""
    other = bench.trainer(
        max_train_steps=2, lr_warmup_steps=0, lora_rank=4, validation_prompt=("lock",), output_dir=str(bench.root / "other")
    )
    for _ in other.run():
        pass
    panel = ComparePanel(bench.root)
    names = [name for name, _ in panel.first.options]
    assert {"studio", "other"} <= set(names)
    panel.first.value, panel.second.value = str(bench.root / "studio"), str(bench.root / "other")
    assert "lora_rank" in panel.settings.value
    assert "settings differ" in panel.note.value
    assert "loss, smoothed studio" in panel.curves.value
    assert pixels(panel.image.value).height > 200
    panel.second.value = panel.first.value
    assert "Choose two runs" in panel.note.value


def test_export_writes_for_another_program_verified_and_never_over_a_file(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = bench.trainer(max_train_steps=1, lr_warmup_steps=0, validation_disable=True, output_dir=str(tmp_path / "run"))
    for _ in trainer.run():
        pass
    panel = ExportPanel(trainer.folder.path)
    panel.look()
    assert "rank" in panel.said.value
    monkeypatch.setenv("HOME", str(tmp_path))
    panel.source.value = "~/run"
    panel.layout.value, panel.target.value = "comfyui", "~/out.safetensors"
    panel.write()
    assert "tensors" in panel.said.value
    size = os.path.getsize(tmp_path / "out.safetensors")
    panel.write()
    assert "is there already" in panel.note.value
    assert os.path.getsize(tmp_path / "out.safetensors") == size
    panel.report()
    panel.card()
    assert trainer.folder.report.exists()
    assert trainer.folder.card.exists()
    panel.source.value = str(tmp_path)
    panel.look()
    assert "not a run folder" in panel.note.value
    with pytest.raises(CheckpointError, match="not a run folder"):
        _ = panel.file


def test_a_panel_says_its_code_and_what_differs(bench: Workbench) -> None:
    draft = Draft(bench.config())
    panel = Studio(draft, data="pictures.yaml")
    draft.change(lora_rank=4)
    assert panel.diff().startswith("lora_rank: ")
    assert "st.discover('pictures.yaml')" in panel.code()
    assert codes.config_code(panel.config) in panel.code()
    assert panel.code() in unescape(panel.retold.widget.value)


def test_what_differs_from_the_preset_and_from_the_last_run(tmp_path: Path) -> None:
    """By name; the last run is the newest other one beside where this one's runs go, and never the run that the panel shows."""
    config = presets.load("sd35-medium-16gb", lora_rank=64, output_dir=str(tmp_path / "mine"))
    panel = TrainingPanel(config)
    assert panel.diff() == "nothing differs"
    assert "beside the preset sd35-medium-16gb:\n" in panel.diff("preset")
    assert f"lora_rank: {presets.load('sd35-medium-16gb').adapter.lora_rank} -> 64" in panel.diff("preset")
    assert panel.diff("last") == f"there is no other run in {tmp_path}"
    for age, (name, rank) in enumerate((("new", 8), ("old", 16), ("mine", 32))):
        (tmp_path / name).mkdir()
        config.replace(lora_rank=rank, output_dir=str(tmp_path / name)).save(tmp_path / name / "config.yaml")
        os.utime(tmp_path / name / "config.yaml", (1e9 - age, 1e9 - age))
    assert panel.diff("last").splitlines() == [
        "beside the run new:", "lora_rank: 8 -> 64", f"output_dir: {str(tmp_path / 'new')!r} -> {str(tmp_path / 'mine')!r}",
    ]  # fmt: skip
    panel.draft.folder = str(tmp_path / "new")
    assert "beside the run old:\nlora_rank: 16 -> 64" in panel.diff("last")
    panel.fields["learning_rate"].value = 3e-5
    shown = unescape(panel.retold.widget.value)
    for said in (panel.diff("preset"), panel.diff("last"), panel.code()):
        assert "3e-05" in said
        assert said in shown
    (tmp_path / "old" / "config.yaml").write_text("lora_rank: many\n")
    panel.fields["learning_rate"].value = 4e-5
    assert "lora_rank: 'many' is not allowed" in unescape(panel.retold.widget.value)
    with pytest.raises(st.ConfigError, match="say preset or last"):
        panel.diff("first")


def test_the_code_names_the_data_that_the_cache_was_made_of_and_that_the_run_was_trained_on(bench: Workbench, tmp_path: Path) -> None:
    config = bench.config(output_dir=str(tmp_path / "mine"))
    panel = Studio(config, bench.cache(config))
    assert f"st.discover({str(bench.datasets)!r})" in panel.code()
    assert panel.data.source.value == str(bench.datasets)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"source": "pots.yaml"}))
    panel.runner._put(folder=str(tmp_path / "run"), began_with=config, steering=((1, {"learning_rate": 1e-5}),))
    panel.data.source.value = str(tmp_path / "others.yaml")
    assert "st.discover('pots.yaml')" in panel.code(), "what is chosen now is for the next run"


def test_the_code_encodes_prompts_that_were_new_and_stops_where_a_change_is_refused(bench: Workbench, tmp_path: Path) -> None:
    config = bench.config(
        max_train_steps=2,
        lr_warmup_steps=0,
        validation_prompt=("lock",),
        validation_on_startup=False,
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "run"),
    )
    steering = [(1, {"validation_prompt": ("lock", "words that nobody encoded")}), (1, {"lora_rank": 4})]
    told: dict[str, Any] = {}
    with pytest.raises(AssertionError, match="lora_rank"):
        exec(codes.run_code(config, steering, bench.datasets), told)
    assert told["trainer"].config.validation.validation_prompt[1] == "words that nobody encoded"
    assert told["trainer"].cache.states("words that nobody encoded") is not None


class Shell:
    """A notebook's shell, as far as new cells go."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def set_next_input(self, code: str) -> None:
        self.cells.append(code)


def test_to_cell_inserts_the_panels_code_and_prints_it_outside_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    panel, shell = LearningPanel(presets.load("sd35-medium-16gb").replace(lora_rank=64)), Shell()
    with monkeypatch.context() as patched:
        patched.setattr("IPython.get_ipython", lambda: shell)
        panel.to_cell()
    told: dict[str, Any] = {}
    exec(shell.cells[0], told)
    assert told["config"] == panel.config
    panel.to_cell()
    assert capsys.readouterr().out.strip() == shell.cells[0].strip()
    assert len(shell.cells) == 1


def test_the_wizard_as_a_panel_asks_the_same_and_writes_nothing_before_its_last_button(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd3tune.configuring import Machine, Wizard
    from sd3tune.panels import configure

    panel = configure(tmp_path, Machine(memory_bytes=16e9))
    panel.answer(str(tmp_path / "nowhere"))
    assert 'role="alert"' in panel.note.value
    assert panel.wizard.answers == {}
    panel.answer(str(bench.datasets.parent / "train"))
    assert "12" in panel.found.value  # pictures found
    asked = 1
    while panel.wizard.question is not None:
        question = panel.wizard.question
        assert question.asks.split()[0] in panel.asks.value
        if question.name == "model":
            panel.answer("playground")
        elif question.default is None:
            panel.answer("a picture")
        else:
            panel.default()
        asked += 1
        assert len(panel.wizard.answers) == asked, (question, panel.note.value)
    panel.go_back()
    assert len(panel.wizard.answers) == asked - 1
    panel.default()
    assert not list(tmp_path.glob("*.yaml"))
    with pytest.raises(st.ConfigError, match="not written yet"):
        panel.to_cell()
    panel.save()
    made = {path.name for path in tmp_path.glob("*.yaml")}
    assert made == {"run.yaml", "datasets.yaml"}
    assert st.plan(st.discover(tmp_path / "datasets.yaml"), st.RunConfig.load(tmp_path / "run.yaml")).train
    panel.save()
    assert len(list(tmp_path.glob("run*.yaml"))) == 2  # beside the first, under another name
    assert isinstance(panel.wizard, Wizard)
    shell = Shell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    panel.to_cell()
    (cell,) = shell.cells
    named = [tmp_path / "run-2.yaml", tmp_path / "datasets-2.yaml"]  # what was written last, and nothing that is not there
    assert [path for path in map(Path, re.findall(r'"(.*?)"', cell)) if path.suffix == ".yaml"] == named
    assert all(path.exists() for path in named)
    assert cell in unescape(panel.files.value)
    panel.go_back()
    panel.default()
    with pytest.raises(st.ConfigError, match="not written yet"):
        panel.to_cell()
