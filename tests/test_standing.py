"""Which pictures of a run count: the view, the report and the comparison follow the history, not what lies on the disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_panel import fake, live  # noqa: F401
from test_runner import FakeTrainer

from sd3tune.config import presets
from sd3tune.history import History
from sd3tune.panels import TrainingPanel, compare, record
from sd3tune.panels.pictures import PicturesView
from sd3tune.records import SegmentRecord
from sd3tune.run_folder import RunFolder
from sd3tune.validation.history_grid import rows_of, steps_shown
from sd3tune.validation.pictures import Kind, Places, Source, write_picture, write_problem
from sd3tune.validation.shots import shots_of
from sd3tune.validation.standing import standing, steps_drawn


class Drawing:
    """A run folder that is drawn into without a model: each drawing is of one colour."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.folder, self.segment = RunFolder(path), 0

    def draw(self, step: int, colour: str, *prompts: str, fails: bool = False, kind: Kind | None = None) -> None:
        config = presets.playground(validation_prompt=prompts or ("lock", "rooster"))
        kind = kind or ("adapter" if step else "base")
        place, history = Places(self.folder, step, kind), History(self.folder.history, segment=self.segment)
        for shot in shots_of(config):
            source = Source(config, "cpu", kind, step)
            if fails:
                history.append(write_problem(place(shot), shot, source, "no memory"))
            else:
                history.append(write_picture(place(shot), Image.new("RGB", (64, 64), colour), shot, [shot], source))
        history.close()

    def go_back(self, step: int) -> SegmentRecord:
        self.segment += 1
        history, gone = History(self.folder.history, segment=self.segment), SegmentRecord(step=step, from_step=step, parent=0, why="rewind")
        history.append(gone)
        history.close()
        return gone


@pytest.fixture
def run(tmp_path: Path) -> Drawing:
    """Drawings at 0, 10 and 20."""
    made = Drawing(tmp_path / "drawn")
    for step, colour in ((0, "black"), (10, "red"), (20, "blue")):
        made.draw(step, colour)
    return made


def colour_of(view: PicturesView) -> Any:
    """The one strong colour in what is shown."""
    picture = Image.open(io.BytesIO(view.image.value)).convert("RGB")
    strong = {tuple(level > 128 for level in pixel) for _, pixel in picture.getcolors(1 << 20)}  # type: ignore[union-attr, misc]
    names = {(True, False, False): "red", (False, True, False): "lime", (False, False, True): "blue"}
    return ", ".join(sorted(names[one] for one in strong & names.keys()))


def test_after_a_rewind_the_grid_of_the_folder_has_no_row_that_was_left(run: Drawing) -> None:
    """Neither as a step of its own, nor as a cell of a step that was drawn again with fewer prompts."""
    config, left = presets.playground(validation_prompt=("lock", "rooster")), RunFolder(run.folder.path)
    shots = shots_of(config)
    assert [label for label, _ in rows_of(left, shots, steps_shown(left, 30))] == ["base model", "LoRA, step 10", "LoRA, step 20"]
    run.go_back(5)
    run.draw(20, "lime", "lock")
    assert steps_shown(left, 30) == [20]
    (_, base), (label, cells) = rows_of(left, shots, [20])
    assert label == "LoRA, step 20"
    assert [one is not None for one in base] == [True, True]
    assert [one is not None for one in cells] == [True, False]


def test_a_click_shows_exactly_the_picture_that_was_clicked(tmp_path: Path) -> None:
    """Also the base model's above one that failed, and the average's; the wipe is afterwards what it was."""
    made, view = Drawing(tmp_path / "drawn"), PicturesView()
    made.draw(0, "lime")
    view.look(made.folder.path)
    assert [one.description for one in view.shown.buttons] == ["lock, base model: full size", "rooster, base model: full size"]
    view.shown.buttons[1].click()
    assert (view.which.label, colour_of(view)) == ("rooster", "lime")
    view.shown.buttons[0].click()
    made.draw(10, "red", fails=True)
    made.draw(10, "blue", kind="ema")
    view.look(made.folder.path)
    assert [label for label, _ in view.which.options] == ["all, small", "lock", "rooster", "lock, average", "rooster, average"]
    view.wipe.value = 30
    named = {one.description: one for one in view.shown.buttons}
    assert [*named] == [f"{prompt}, {row}: full size" for row in ("base model", "average, step 10") for prompt in ("lock", "rooster")]
    for name, colour in (("lock, base model", "lime"), ("rooster, average, step 10", "blue")):
        named[f"{name}: full size"].click()
        assert colour_of(view) == colour
        view.shown.buttons[0].click()
        assert (view.which.value, view.wipe.value) == (-1, 30)
    named["lock, base model: full size"].click()
    view.wipe.value = 40
    view.shown.buttons[0].click()
    assert view.wipe.value == 40, "a person has moved it"
    named["lock, base model: full size"].click()
    view.which.value = -1
    assert view.wipe.value == 40, "also by the list"
    view.go(0)
    for late in named.values():  # of another step
        late.click()
        assert (view.step, view.which.value, len(view.shown.buttons)) == (0, -1, 2)


def test_after_a_rewind_the_view_shows_what_the_run_stands_on(run: Drawing) -> None:
    view = PicturesView()
    view.look(run.folder.path)
    assert (view.steps, view.step, colour_of(view)) == ([0, 10, 20], 20, "blue")
    view.go(10)
    assert colour_of(view) == "red"
    view.go(20)
    run.go_back(5)
    view.look(run.folder.path)
    assert (view.steps, view.step) == ([0], 0)
    run.draw(10, "lime")
    view.look(run.folder.path)
    assert (view.steps, view.step, colour_of(view)) == ([0, 10], 10, "lime")
    view.which.value, view.wipe.value = 0, 0
    view.wipe.value = 100
    assert colour_of(view) == "lime"


def test_a_person_who_looks_at_an_earlier_step_stays_there_when_later_ones_go(run: Drawing) -> None:
    view = PicturesView()
    view.look(run.folder.path)
    view.go(0)
    run.draw(30, "lime")
    view.look(run.folder.path)
    assert view.step == 0
    view.go(10)
    run.go_back(15)
    view.look(run.folder.path)
    assert (view.steps, view.step) == ([0, 10], 10)
    assert colour_of(view) == "red"


def test_a_new_prompts_picture_of_the_base_model_joins_step_0(run: Drawing) -> None:
    view = PicturesView()
    view.look(run.folder.path)
    view.go(0)
    width = Image.open(io.BytesIO(view.image.value)).width
    run.draw(0, "black", "lock", "rooster", "octopus")
    view.look(run.folder.path)
    assert "Step 0: 3 pictures" in view.said.value
    assert Image.open(io.BytesIO(view.image.value)).width > width
    view.which.value = 2
    assert view.which.label == "octopus"


def test_of_a_step_that_is_drawn_anew_only_the_new_pictures_count(run: Drawing) -> None:
    """Before the run went back there were two prompts; the one that is drawn no more lies there still."""
    run.go_back(5)
    run.draw(10, "lime", "rooster")
    assert [one.shot.prompt for one in standing(run.folder, 10)] == ["rooster"]
    run.draw(10, "lime", "octopus", fails=True)
    assert [(one.shot.prompt, one.problem) for one in standing(run.folder, 10)] == [("rooster", ""), ("octopus", "no memory")]
    assert standing(run.folder, 20) == []


def test_a_folder_without_a_history_shows_what_lies_there(run: Drawing) -> None:
    run.folder.history.unlink()
    assert steps_drawn(run.folder) == [0, 10, 20]
    assert len(standing(run.folder, 20)) == 2


def test_report_and_comparison_leave_out_what_was_left_behind(run: Drawing, tmp_path: Path) -> None:
    run.go_back(5)
    run.draw(10, "lime")
    html = record.scrubber(run.folder.path)
    assert ("step 10" in html, "step 20" in html) == (True, False)
    other = Drawing(tmp_path / "other")
    other.draw(10, "red")
    grid = compare.pair_grid([run.folder, other.folder], ["one", "other"])
    assert grid is not None
    assert [label for label, _ in grid.rows] == ["one\nstep 10", "other\nstep 10"]


def test_the_panel_looks_again_when_the_run_went_back(live: TrainingPanel, fake: FakeTrainer) -> None:  # noqa: F811
    there = Drawing(fake.folder.path)
    there.draw(0, "black")
    there.draw(10, "red")
    live.runner._put(folder=str(fake.folder.path), pictures=4)
    live.refresh()
    assert live.pictures.steps == [0, 10]
    live.runner._take(there.go_back(5))
    live.refresh()
    assert live.pictures.steps == [0]
