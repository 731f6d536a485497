"""The training panel: a view that asks, tells, and never blocks."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from test_runner import PATIENCE, FakeTrainer, quick_collections  # noqa: F401

from sd3tune.config import presets
from sd3tune.errors import TrainingError
from sd3tune.panels import TrainingPanel, record, run, showing
from sd3tune.snapshot import LEGAL, TERMINAL, Gauges, Snapshot


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
        state="training", step=140, began_at=100, total_steps=300, count=40, seconds_per_update=1.0, seconds_per_update_in_all=2.0
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
