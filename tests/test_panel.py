"""The training panel: a view that asks, tells, and never blocks."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_runner import PATIENCE, FakeTrainer

from sd3tune.config import presets
from sd3tune.errors import ConfigError, TrainingError
from sd3tune.inbox import Command
from sd3tune.panels import TrainingPanel, record, run, showing, taking
from sd3tune.panels.clicking import KEPT, Clickable, Part, part_of
from sd3tune.panels.lab import GridLab
from sd3tune.panels.pictures import jpeg
from sd3tune.shown import duration
from sd3tune.snapshot import LEGAL, TERMINAL, Gauges, Snapshot
from sd3tune.validation.grids import Grid
from sd3tune.xy import PriceRecord, XYRecord, grid_of, label


@pytest.fixture
def fake(tmp_path: Path) -> FakeTrainer:
    return FakeTrainer(tmp_path / "run")


def panel_of(fake: FakeTrainer) -> TrainingPanel:
    config = presets.playground(output_dir=str(fake.folder.path))

    def make(config: Any, cache: Any) -> Any:
        fake.config = config
        return fake

    return TrainingPanel(config, None, make=make)  # type: ignore[arg-type]


@pytest.fixture
def live(fake: FakeTrainer) -> Any:
    """A panel whose run stands before its first update."""
    fake.gates["update"].clear()
    panel = panel_of(fake)
    panel.start()
    panel.wait(PATIENCE, until="training")
    assert fake.reached["update"].wait(PATIENCE)
    yield panel
    fake.gates["update"].set()
    panel.runner.send("stop")
    panel.wait(PATIENCE)


# --- run -----------------------------------------------------------------------------------------------------------------


def test_buttons_follow_the_table(live: TrainingPanel) -> None:
    for state in LEGAL:
        live.runner._put(state=state)
        live.refresh()
        enabled = {name for name, button in live.buttons.items() if not button.disabled}
        assert enabled == ({"start"} if state in TERMINAL else set(LEGAL[state]) - {"set", "look", "rewind"})  # there is no checkpoint
    live.runner._put(state="training")


def test_handlers_only_enqueue(live: TrainingPanel, fake: FakeTrainer) -> None:
    for name in ("pause", "go_on", "save", "validate"):
        live.buttons[name].click()
    live.fields["learning_rate"].value = 0.5
    assert fake.calls == []
    assert live.runner._inbox.queue.qsize() == 5


def test_a_field_changed_while_training_reaches_the_trainer(live: TrainingPanel, fake: FakeTrainer) -> None:
    assert live.fields["base_model_precision"].disabled
    live.fields["learning_rate"].value = 0.5
    fake.gates["update"].set()
    end = live.wait(PATIENCE)
    assert fake.calls == [("set", {"learning_rate": 0.5})]
    assert end.learning_rate == 0.5
    assert not live.fields["base_model_precision"].disabled


def test_what_the_trainer_refuses_is_a_sentence_in_the_panel(live: TrainingPanel, fake: FakeTrainer) -> None:
    live.fields["validation_guidance_skip_layers"].value = "40"
    fake.gates["update"].set()
    live.wait(PATIENCE, until=lambda now: now.refusals > 0)
    live.wait(PATIENCE)
    assert "beyond this model" in live.note.value


def test_running_the_cell_again_attaches(live: TrainingPanel, fake: FakeTrainer) -> None:
    again = panel_of(fake)
    assert again.runner is live.runner
    assert "Attached" in again.note.value
    again.start()
    assert [t.name for t in threading.enumerate()].count("sd3tune-trainer") == 1


def test_start_after_the_end_is_another_run(fake: FakeTrainer) -> None:
    panel = panel_of(fake)
    panel.start()
    panel.wait(PATIENCE)
    first, fake.steps_done = panel.runner, 0
    panel.start()
    assert panel.wait(PATIENCE).state == "finished"
    assert panel.runner is not first


def test_a_failure_is_red_text_and_wait_raises_it(fake: FakeTrainer) -> None:
    fake.fails_at, fake.error = 2, RuntimeError("<script>out of memory</script>")
    panel = panel_of(fake)
    panel.start()
    with pytest.raises(TrainingError, match="out of memory"):
        panel.wait(PATIENCE)
    assert "color:#d32f2f" in panel.status.value
    assert "RuntimeError: &lt;script&gt;out of memory" in panel.status.value


# --- going on ------------------------------------------------------------------------------------------------------------


def stopped(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingPanel, list[dict[str, Any]]]:
    """A panel whose run was stopped at its second update, with a checkpoint; what it is gone on with is noted."""
    given = list[dict[str, Any]]()

    def resumed(folder: str, cache: Any, changes: dict[str, Any]) -> FakeTrainer:
        assert folder == str(fake.folder.path)
        given.append(changes)
        return fake

    monkeypatch.setattr(run, "resumed", resumed)
    fake.gates["update"].clear()
    panel = panel_of(fake)
    panel.start()
    assert fake.reached["update"].wait(PATIENCE)
    panel.press("stop")
    fake.gates["update"].set()
    panel.wait(PATIENCE)
    leave_checkpoints(fake, 1)
    panel.runner._note("saved")
    panel.refresh()
    assert not panel.buttons["go_on"].disabled
    return panel, given


def test_what_was_changed_in_the_form_after_a_stop_is_what_the_run_goes_on_with(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    panel, given = stopped(fake, monkeypatch)
    panel.fields["learning_rate"].value = 0.5
    panel.draft.change(gradient_checkpointing=True, validation_prompt=("unread",))
    panel.press("go_on")
    end = panel.wait(PATIENCE)
    assert (end.state, end.learning_rate) == ("finished", 0.5)
    assert given == [{"gradient_checkpointing": True}]
    assert ("set", {"learning_rate": 0.5, "validation_prompt": ("unread",)}) in fake.calls
    assert fake.new_prompts == ["unread"]
    assert panel.config.optimizer.learning_rate == 0.5


def test_a_run_that_goes_on_unchanged_is_told_nothing(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    panel, given = stopped(fake, monkeypatch)
    panel.press("go_on")
    panel.wait(PATIENCE)
    assert given == [{}]
    assert not [call for call in fake.calls if call[0] == "set"]


def test_a_setting_that_needs_a_new_run_is_named_and_nothing_goes_on(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    panel, given = stopped(fake, monkeypatch)
    rank = panel.config.adapter.lora_rank
    panel.draft.change(lora_rank=2 * rank)
    panel.press("go_on")
    assert f"Not gone on: LoRA rank ({rank}) cannot change when a run goes on" in panel.note.value
    assert (given, panel.runner.snapshot.state, panel.config.adapter.lora_rank) == ([], "stopped", 2 * rank)
    with pytest.raises(ConfigError, match="press Start for a new run"):
        panel.resume()
    panel.draft.change(lora_rank=rank)
    panel.press("go_on")
    assert panel.wait(PATIENCE).state == "finished"


def test_a_wrong_field_holds_a_run_back_that_would_go_on(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    panel, given = stopped(fake, monkeypatch)
    panel.fields["learning_rate"].value = -1
    assert panel.form.wrong
    panel.press("go_on")
    assert "Not started" in panel.note.value
    assert given == []


def test_what_a_failed_run_changed_after_its_checkpoint_is_told_again(fake: FakeTrainer, tmp_path: Path) -> None:
    leave_checkpoints(fake, 2, 4)
    (fake.folder.path / "checkpoints" / "latest.json").write_text('{"step": 4, "folder": "step-000004"}')
    steering = ((2, {"max_grad_norm": 0.5}), (5, {"learning_rate": 0.5}))
    assert taking.undone(Snapshot(state="failed", folder=str(fake.folder.path), steering=steering)) == {"learning_rate"}
    assert taking.undone(Snapshot(state="stopped", folder=str(fake.folder.path), steering=steering)) == set()
    found = taking.changed(fake.config, fake.config, frozenset({"learning_rate"}))
    assert found == taking.Changed({}, {"learning_rate": fake.config.optimizer.learning_rate}, {})


def test_a_length_in_updates_takes_the_place_of_one_in_epochs() -> None:
    epochs = presets.playground(max_train_steps=None, num_train_epochs=3, lr_warmup_steps=0)
    found = taking.changed(epochs.replace(max_train_steps=9, num_train_epochs=None), epochs)
    assert (found.live, found.fixed) == ({"max_train_steps": 9}, {})


# --- what is chosen ------------------------------------------------------------------------------------------------------


def leave_checkpoints(fake: FakeTrainer, *steps: int) -> None:
    for step in steps:
        state = fake.folder.path / "checkpoints" / f"step-{step:06d}" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")


def test_a_rewind_goes_to_the_checkpoint_that_was_chosen_whatever_is_written_since(live: TrainingPanel, fake: FakeTrainer) -> None:
    leave_checkpoints(fake, 4, 8)
    live.runner._note("saved")
    live.refresh()
    assert live.checkpoint.value == 8, "the newest is offered first"
    live.checkpoint.value = 4
    leave_checkpoints(fake, 2, 12)
    live.runner._note("saved")
    live.refresh()
    assert [step for _, step in live.checkpoint.options] == [2, 4, 8, 12]
    assert live.checkpoint.value == 4
    live.press("rewind")
    fake.gates["update"].set()
    live.wait(PATIENCE)
    assert ("rewind", 4) in fake.calls


def test_a_checkpoint_that_is_gone_leaves_its_place_to_the_newest(live: TrainingPanel, fake: FakeTrainer) -> None:
    leave_checkpoints(fake, 4, 8)
    live.runner._note("saved")
    live.refresh()
    live.checkpoint.value = 4
    leave_checkpoints(fake, 12)
    (fake.folder.path / "checkpoints" / "step-000004" / "state.json").unlink()
    live.runner._note("saved")
    live.refresh()
    assert ([step for _, step in live.checkpoint.options], live.checkpoint.value) == ([8, 12], 12)


def cells_of(guidances: list[float]) -> list[XYRecord]:
    """A row of a grid over guidance, each cell of which could not be drawn."""
    x, y = ("validation_guidance", guidances), ("validation_seed", [1])
    return [
        XYRecord(step=1, row=0, column=k, settings={x[0]: one, y[0]: 1}, clip=None, seconds=0.1, problem="none", x=x, y=y)
        for k, one in enumerate(guidances)
    ]


def test_cell_and_prompt_of_the_lab_stay_chosen_while_others_come(fake: FakeTrainer) -> None:
    panel = panel_of(fake)
    board = GridLab(panel)
    cells = cells_of([0.0, 1.0, 2.0])
    board.look(Snapshot(state="validating", cells=tuple(cells[:2])))
    board.cell.value = "0,1"
    board.look(Snapshot(state="validating", cells=tuple(cells)))
    assert (len(board.cell.options), board.cell.value) == (3, "0,1")
    board.look(Snapshot(state="validating", cells=tuple(cells_of([5.0, 6.0]))))
    assert (len(board.cell.options), board.cell.value) == (2, "0,0"), "another grid"
    panel.draft.change(validation_prompt=("lock", "rooster"))
    board.prompt.value = "rooster"
    panel.draft.change(validation_prompt=("lock", "pot", "rooster"))
    assert (len(board.prompt.options), board.prompt.value) == (4, "rooster")


def test_a_grid_keeps_its_labels_whatever_is_typed_while_it_is_drawn(live: TrainingPanel) -> None:
    board = GridLab(live)
    board.x.value, board.y.value = "validation_guidance", "validation_seed"
    board.xs.value, board.ys.value = "1, 3", "1"
    board.draw()
    assert "Asked" in board.note.value
    assert live.runner._inbox.queue.get_nowait().name == "look"
    live.runner._put(state="validating")
    board.xs.value = "1, 2.5, 4"
    board.draw()
    assert "Not asked: the run is validating" in board.note.value
    assert live.runner._inbox.queue.empty()
    first, *_ = cells = cells_of([1.0, 3.0])
    board.look(Snapshot(state="validating", cells=(first,)))
    assert "1 of 2 cells are drawn" in board.note.value
    assert board.image.value == jpeg(grid_of(first.x, first.y, {(0, 0): first}).image())
    board.look(Snapshot(state="training", cells=tuple(cells)))
    names = [", ".join(label(name, value) for name, value in one.settings.items()) for one in cells]
    assert list(board.cell.options) == [(names[0], "0,0"), (names[1], "0,1")]
    assert [one.description for one in board.shown.buttons] == [f"use {name}" for name in names]
    board.shown.buttons[1].click()
    assert board.cell.value == "0,1"
    assert f"Taken over: {names[1]}" in board.note.value
    assert live.config.validation.validation_guidance == 3.0
    live.runner._put(state="training")


def test_the_lab_says_why_the_run_drew_nothing(live: TrainingPanel) -> None:
    board = GridLab(live)
    board.draw()
    assert live.runner._inbox.queue.get_nowait().name == "look"
    live.runner._refuse(Command("look", {}), "validation_guidance_skip_layers: beyond this model's blocks")
    board.look(live.runner.snapshot)
    assert "Not done: validation_guidance_skip_layers: beyond this model" in board.note.value


def test_the_lab_says_the_price_before_anything_is_drawn(fake: FakeTrainer) -> None:
    panel = panel_of(fake)
    board = GridLab(panel)
    board.x.value, board.y.value = "validation_guidance", "validation_seed"
    board.xs.value, board.ys.value = "1, 3", "1, 2"
    steps = panel.config.validation.validation_num_inference_steps
    assert f"4 pictures, {6 * steps} forwards of the model; Price says how long that takes." in board.cost.value
    board.look(Snapshot(state="training", price=PriceRecord(step=1, pictures=1, forwards=10, seconds=20.0)))
    panel.price.value = 3.0
    seconds = 2.0 * 6 * steps
    assert f"{6 * steps} forwards of the model: about {duration(seconds)}, {seconds / 1200:.2f} to pay." in board.cost.value
    board.xs.value = "1, x"
    assert board.cost.value == ""


# --- what is shown -------------------------------------------------------------------------------------------------------


def every(widget: Any) -> list[Any]:
    """A widget and all inside it."""
    return [widget, *(one for child in getattr(widget, "children", ()) for one in every(child))]


def test_a_long_run_sends_few_messages_and_keeps_its_size(fake: FakeTrainer) -> None:
    """20,000 updates on a simulated clock: at most 6 changes a second, and no growth once the curve is full."""
    import gc
    import tracemalloc

    from test_runner import step_record

    panel, sent = panel_of(fake), list[str]()
    for widget in every(panel.widget):
        widget.observe(lambda change: sent.append(change.name))
    panel.runner._put(state="training", total_steps=20_000)
    tracemalloc.start()  # from the first update on: what is freed later must count, too
    clock, seconds, tick, sizes = 0.0, 0.05, run.TICK, list[int]()
    for step in range(1, 20_001):
        panel.runner._take(step_record(step, 1e-3, loss=1 / step))
        clock += seconds
        if clock >= tick:
            tick += run.TICK
            if step % 5000 < 20 or step < 300:  # drawing every time would take minutes; these are the ends and the beginning
                panel.refresh(clock)
        if step == 5000:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    gc.collect()
    sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert panel.runner.snapshot.count == 20_000
    assert sizes[1] - sizes[0] < 200_000, sizes
    looked = 300 * seconds + 4 * 20 * seconds
    assert len(sent) <= 6 * looked, (len(sent), looked)


def test_nothing_is_sent_when_nothing_changed(fake: FakeTrainer) -> None:
    panel, sent = panel_of(fake), list[str]()
    panel.start()
    panel.wait(PATIENCE)
    for widget in every(panel.widget):
        widget.observe(lambda change: sent.append(change.name))
    for _ in range(5):
        panel.refresh()
    assert not sent


def test_a_drawing_is_made_anew_seldom_and_only_for_something_new() -> None:
    import ipywidgets

    widget, drawn = ipywidgets.HTML(), list[int]()

    def draw(now: Snapshot) -> str:
        drawn.append(now.count)
        return str(now.count)

    one = run.Redrawn(lambda now: now.count, (draw, widget))
    for tenth in range(100):
        one.look(Snapshot(state="training", count=tenth), tenth / 10)
    assert 9 <= len(drawn) <= 10  # ten seconds, at most once in each
    for tenth in range(100, 200):
        one.look(Snapshot(state="training", count=99), tenth / 10)
    assert len(drawn) <= 11
    one.look(Snapshot(state="finished", count=100), 20.01)
    assert widget.value == "100"


def test_a_costly_drawing_takes_one_part_in_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 s each, for 300 simulated seconds: once a second would take a fifth. The first one, which loads a library, sets no pace."""
    import ipywidgets

    spent, costs = [0.0], iter([9.0, *[0.2] * 99])
    monkeypatch.setattr("sd3tune.panels.redrawn.time.thread_time", lambda: spent[0])

    def draw(now: Snapshot) -> str:
        spent[0] += next(costs)
        return str(now.count)

    one = run.Redrawn(lambda now: now.count, (draw, ipywidgets.HTML()))
    for tenth in range(3000):
        one.look(Snapshot(state="training", count=tenth), tenth / 10)
    assert spent[0] - 9.0 == pytest.approx(0.01 * 300, rel=0.08)


def test_status_says_state_step_loss_rate_time_money_and_memory() -> None:
    from test_runner import step_record

    gauges = Gauges().take(step_record(41, 1e-3, loss=0.612))
    gauges |= {"seconds_per_update_in_all": 0.2, "peak_memory_bytes": 15_200_000_000, "total_memory_bytes": 24_000_000_000}
    now = Snapshot(state="training", step=41, total_steps=300, learning_rate=1e-3, seconds_per_update=0.1, **gauges)
    said = "training · step 41/300 · loss 0.612 · learning rate 0.001 · 26 s to 52 s left · memory 15.2 GB of 24.0 GB"
    assert showing.status(now) == said
    assert "0.03 to pay until then" in showing.status(now, 2.0)  # 51.8 s at 2 an hour
    assert 'aria-valuenow="41"' in showing.bar(now)


def test_money_that_was_spent_is_said_beside_what_is_to_pay_and_after_the_end() -> None:
    """A machine at 36 an hour costs 0.01 a second."""
    now = Snapshot(
        state="training",
        step=140,
        began_at=100,
        total_steps=300,
        count=40,
        seconds_per_update=1.0,
        seconds_per_update_in_all=2.0,
        seconds=80.0,
    )
    assert "about 0.80 spent, 3.20 to pay until then" in showing.status(now, 36.0)  # 40 updates of this process, 160 to come
    assert "spent" not in showing.status(now)
    assert showing.status(dataclasses.replace(now, state="stopped"), 36.0) == "stopped · step 140/300 · about 0.80 spent"


def test_rates_norms_and_noise_levels_are_said_in_a_sentence_beside_their_charts() -> None:
    from test_runner import step_record

    gauges = Gauges()
    for step, rate in ((1, 5e-4), (2, 1e-3), (3, 2e-4)):
        seen = gauges.take(step_record(step, rate, loss=0.6))
    now = Snapshot(state="training", step=3, total_steps=9, noise_levels=(1, 1, 2, 2, 2, 2, 4, 4, 1, 1), **seen)
    beside = re.sub("<svg.*?</svg>", "", showing.other_curves(now), flags=re.S)
    norm = seen["grad_norms"].latest[1]
    assert f"The learning rate is 0.0002, of 0.0002 to 0.001 so far. The gradient norm before clipping is {norm:.3g}." in beside
    beside = re.sub("<svg.*?</svg>", "", showing.levels(now), flags=re.S)
    assert "Noise levels drawn: 20% below 0.3, near the picture; 50% between; 30% above 0.7, near noise." in beside
    assert showing.levels(Snapshot(noise_levels=(0,) * 10)) == ""


def test_the_report_in_the_notebook_says_seed_and_versions(tmp_path: Path) -> None:
    (tmp_path / "environment.txt").write_text("# Python 3.11.2, Linux\nnumpy==2.0\npeft==0.17.1\ntorch==2.8.0\n")
    said = record.report(Snapshot(state="finished", folder=str(tmp_path), config=presets.playground(seed=1234)))
    assert "<summary>Seed and versions</summary>" in said
    assert "seed 1234\nPython 3.11.2, Linux\npeft==0.17.1\ntorch==2.8.0<" in said
    assert "Seed and versions" not in record.report(Snapshot(state="finished"))


def test_captions_prompts_and_log_are_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">'
    now = Snapshot(state="failed", log=(evil,), error=evil, message=evil, verdict=evil, steering=((1, {evil: evil}),))
    for text in (showing.log(now), showing.changes(now), record.report(now, evil, evil)):
        assert "<img src=x" not in text
        assert "&lt;img src=x" in text


def test_only_core_widgets_that_both_versions_have_and_each_has_a_name(fake: FakeTrainer) -> None:
    found = every(panel_of(fake).widget)
    known = {
        "VBox",
        "HBox",
        "HTML",
        "Image",
        "Button",
        "FloatText",
        "IntText",
        "Text",
        "Dropdown",
        "Checkbox",
        "Textarea",
        "BoundedIntText",
    }
    assert {type(one).__name__ for one in found} <= known
    for one in found:
        if type(one).__name__ not in ("VBox", "HBox", "HTML", "Image"):
            assert one.description or (one.tooltip if "tooltip" in one.traits() else one.description_tooltip)


def test_what_can_be_clicked_lies_over_the_cells_of_a_grid() -> None:
    """Each part's box, in shares of the whole picture, is exactly where that cell's picture was drawn."""
    colours = [[(r * 80, c * 60, 90) for c in range(3)] for r in range(2)]
    rows = tuple((f"row {r}", tuple(Image.new("RGB", (150, 140), one) for one in colours[r])) for r in range(2))
    grid = Grid(rows, ("a", "b", "c"))
    whole = grid.image()
    for r, c in ((0, 0), (0, 2), (1, 1)):
        part = part_of(grid, r, c, "one", 0)
        left, top = round(part.left * whole.width), round(part.top * whole.height)
        box = (left, top, left + round(part.width * whole.width), top + round(part.height * whole.height))
        assert whole.crop(box).getcolors() == [(150 * 140, colours[r][c])]
        around = whole.crop((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)).getcolors()
        assert around is not None
        assert {colour: count for count, colour in around}[colours[r][c]] == 150 * 140


def test_a_click_tells_which_part_and_only_what_changed_is_sent() -> None:
    clicked: list[int] = []
    shown = Clickable(clicked.append)
    parts = [Part("a", 7, 0.0, 0.0, 0.5, 1.0), Part("b", 8, 0.5, 0.0, 0.5, 1.0)]
    shown.show(b"one", parts)
    first, second = shown.buttons
    second.click()
    assert clicked == [8]
    assert (second.layout.left, second.layout.width, second.description) == ("50.000%", "50.000%", "b")
    shown.show(b"two", parts[:1])
    assert (shown.image.value, shown.buttons) == (b"two", (first,))
    shown.show(b"two", parts)
    assert shown.buttons == (first, second), "buttons are made once"
    sent: list[str] = []
    for one in (shown.image, shown.widget, first, first.layout, second):
        one.observe(lambda change: sent.append(change["name"]))
    shown.show(b"two", parts)
    assert sent == []
    shown.show(b"two", [Part("a", 9, 0.0, 0.0, 0.5, 1.0)])
    first.click()
    assert clicked == [8, 7], "a late click means what was seen"
    for number in range(200):
        shown.show(b"two", [Part("a", number)])
    assert len(shown._made) <= KEPT + 1
    assert (first.comm, first.layout.comm) == (None, None), "old buttons are closed"


def test_a_run_that_has_cost_what_it_may_is_saved_and_stopped(live: TrainingPanel) -> None:
    """By the price per hour and the time since its first update; a limit that was typed too low is said, and stops nothing."""
    price, most, runner = live.price, live.spending.most, live.runner

    def asked(step: int, seconds: float) -> list[str]:
        runner._put(step=step, count=step, seconds=seconds)
        live.refresh()
        return [runner._inbox.queue.get_nowait().name for _ in range(runner._inbox.queue.qsize())]

    assert most.disabled
    price.value = 20.0
    assert not most.disabled
    assert asked(100, 360.0) == []  # 2.00
    most.value = 1.0
    assert asked(101, 361.0) == []
    assert "About 2.01 are spent already, more than 1: the run goes on" in live.note.value
    live.say("something else")
    assert asked(102, 362.0) == []
    assert "something else" in live.note.value, "it is said once"
    most.value = 2.5
    assert asked(110, 449.0) == []
    assert asked(111, 450.0) == ["stop"]
    assert "About 2.50 of 2.5 are spent: the run is to be saved and stopped" in live.note.value
    assert asked(111, 450.0) == []
    runner._refuse(Command("stop", {}), "the disk is full")
    assert asked(112, 454.0) == ["stop"], "where it could not be saved, it is asked again after the next update"
    assert "Not done: stop: the disk is full" in live.note.value
    price.value = 0.0
    assert asked(113, 9000.0) == []


def test_a_newer_panel_goes_on_with_price_and_limit(live: TrainingPanel) -> None:
    live.price.value, live.spending.most.value = 2.0, 30.0
    again = TrainingPanel(live.config, None)
    assert again.runner is live.runner
    assert (again.price.value, again.spending.most.value) == (2.0, 30.0)
    live.runner._put(step=5, count=5, seconds=60.0)
    again.refresh()
    with again._busy:  # its own thread waits until the older one has looked
        live.runner._put(step=6, count=6, seconds=54_000.0)
        live.refresh()
        assert live.runner._inbox.queue.empty(), "only the newest panel watches the limit"
    again.refresh()
    assert live.runner._inbox.queue.get_nowait().name == "stop"


def test_what_a_run_has_cost_outlives_a_rewind(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 updates of a second, back to 1,000, and 300 s until the next: 2,302 s in all."""
    from test_runner import step_record

    clock = [1000.0]
    monkeypatch.setattr("sd3tune.snapshot.time.monotonic", lambda: clock[0])
    gauges = Gauges()
    for step in (1, 2000):
        clock[0] = 1000.0 + step
        seen = gauges.take(dataclasses.replace(step_record(step, 1e-4), seconds=1.0))
    assert seen["seconds"] == 2000.0
    gauges = Gauges(gauges.began)
    clock[0] += 301.0
    gauges.take(dataclasses.replace(step_record(1001, 1e-4), seconds=1.0))
    clock[0] += 1.0
    seen = gauges.take(dataclasses.replace(step_record(1002, 1e-4), seconds=1.0))
    assert seen["seconds"] == 2302.0
    assert seen["seconds_per_update_in_all"] == 1.0
