"""The training panel: a view that asks, tells, and never blocks."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_runner import PATIENCE, FakeTrainer, quick_collections  # noqa: F401

from sd3tune import charts
from sd3tune.config import presets
from sd3tune.errors import TrainingError
from sd3tune.panels import TrainingPanel, fields
from sd3tune.panels import training as panel_module
from sd3tune.snapshot import LEGAL, TERMINAL, Snapshot


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


# --- form ----------------------------------------------------------------------------------------------------------------


def test_the_form_is_the_config(fake: FakeTrainer) -> None:
    panel = panel_of(fake)
    assert panel.apply()
    assert panel.config == presets.playground(output_dir=str(fake.folder.path))
    panel.fields["learning_rate"].value = 5e-4
    panel.fields["validation_guidance_skip_layers"].value = " 7,8 , 9"
    assert panel.config.optimizer.learning_rate == 5e-4
    assert panel.config.validation.validation_guidance_skip_layers == (7, 8, 9)
    panel.fields["validation_guidance_skip_layers"].value = ""
    assert panel.config.validation.validation_guidance_skip_layers is None


@pytest.mark.parametrize(
    ("name", "typed", "says"),
    [
        ("validation_guidance_skip_layers", "7, x", "is not a list of block numbers"),
        ("validation_guidance_skip_layers", "7, 7", "different block numbers"),
        ("learning_rate", 0.0, "learning_rate: 0.0 is not allowed"),
        ("learning_rate", 7.0, "learning_rate: 7.0 is not allowed"),
        ("validation_guidance", 99.0, "validation_guidance: 99.0 is not allowed"),
    ],
)
def test_a_bad_value_gives_a_sentence_and_is_neither_applied_nor_clipped(name: str, typed: Any, says: str, fake: FakeTrainer) -> None:
    panel = panel_of(fake)
    before = panel.config
    panel.fields[name].value = typed
    assert says in panel.note.value
    assert panel.fields[name].value == typed
    assert panel.config == before
    panel.start()
    assert panel.runner.snapshot.state == "idle"
    panel.fields[name].value = fields.shown(before.leaves()[name])
    assert panel.note.value == ""


def test_every_field_says_what_the_setting_means(fake: FakeTrainer) -> None:
    for name, field in panel_of(fake).fields.items():
        assert field.description == fields.LABELS[name]
        assert fields.declared(name).description in (field.tooltip if "tooltip" in field.traits() else field.description_tooltip)
    assert fields.hint("learning_rate").endswith("(above 0 to 1)")


# --- run -----------------------------------------------------------------------------------------------------------------


def test_buttons_follow_the_table(live: TrainingPanel) -> None:
    for state in LEGAL:
        live.runner._put(state=state)
        live.refresh()
        enabled = {name for name, button in live.buttons.items() if not button.disabled}
        assert enabled == ({"start"} if state in TERMINAL else set(LEGAL[state]) - {"set"})
    live.runner._put(state="training")


def test_handlers_only_enqueue(live: TrainingPanel, fake: FakeTrainer) -> None:
    for name in ("pause", "go_on", "save", "validate"):
        live.buttons[name].click()
    live.fields["learning_rate"].value = 0.5
    assert fake.calls == []
    assert live.runner._queue.qsize() == 5


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


def test_the_pump_sends_little_however_fast_the_run_is(fake: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    fake.cache.plan.steps = 3000
    panel = panel_of(fake)
    for widget in (
        panel.status,
        panel.note,
        panel.chart,
        panel.caption,
        panel.picture,
        panel.log,
        *panel.buttons.values(),
        *panel.fields.values(),
    ):
        widget.observe(lambda change: sent.append(change.name))
    looks: list[int] = []
    refresh = panel.refresh
    monkeypatch.setattr(panel, "refresh", lambda: (looks.append(1), refresh()))
    panel.start()
    panel.wait(60)
    assert panel.runner.snapshot.count == 3000
    assert len(sent) <= 20 + 4 * len(looks)
    still = len(sent)
    for _ in range(5):
        refresh()
    assert len(sent) == still


def test_status_says_state_step_loss_rate_and_time() -> None:
    now = Snapshot(
        state="training", step=41, total_steps=300, learning_rate=1e-3, seconds_per_update=0.1, points=[(41, 0.612)], count=1
    )  # fmt: skip
    assert panel_module.sentence(now) == "training · step 41/300 · loss 0.612 · lr 0.001 · 26 s left"


def test_captions_prompts_and_log_are_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">'
    now = Snapshot(state="failed", log=(evil,), error=evil, message=evil)
    for text in (panel_module.log_text(now), panel_module.report(now)):
        assert "<img src=x" not in text
        assert "&lt;img src=x" in text


def test_the_report_needs_no_kernel_and_holds_curve_and_pictures() -> None:
    html = panel_module.report(Snapshot(state="finished", points=[(1, 0.5)], count=1, grid=b"png", grid_step=1))
    assert "data:image/png;base64,cG5n" in html
    assert "<svg" in html


@pytest.mark.parametrize("count", [0, 1, 2, 300, 301, 5000])
@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), float("inf")])
def test_the_curve_is_valid_xml_without_nan_and_bounded(count: int, value: float) -> None:
    losses = [(k + 1, value if k % 3 == 0 else k * 0.1) for k in range(count)]
    svg = charts.line(losses, [(0, value)], total=count, marks=[1], name="a < b & c")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("viewBox")
    drawn = " ".join(p.get("d", "") for p in root.iter())
    assert not re.search("nan|inf", drawn)
    assert max((p.get("d", "").count("L") for p in root.iter()), default=0) <= charts.MOST
    assert "currentColor" in svg


def test_the_curve_can_be_read_aloud() -> None:
    root = ElementTree.fromstring(charts.line([(1, 0.9), (2, 0.61234)], [(2, 0.7)]))
    assert root.get("aria-label") == "loss 0.612 at step 2; 0.7 on held-out pictures"


def test_bars_are_as_high_as_their_shares() -> None:
    """Ten bars whose heights are to each other as what was drawn; the shares are said in words, and stand over the bars."""
    counts = (100, 200, 0, 50, 50, 100, 100, 100, 100, 200)
    root = ElementTree.fromstring(charts.levels(counts))
    heights = [float(p.get("height", "")) for p in root.iter() if p.tag.endswith("rect")]
    assert heights == pytest.approx([44 * count / 200 for count in counts], abs=0.06)
    assert root.get("aria-label", "").endswith("10, 20, 0, 5, 5, 10, 10, 10, 10, 20")
    assert "10,20,0,5,5,10,10,10,10,20" in ",".join(p.text or "" for p in root.iter() if p.tag.endswith("text"))


def test_the_envelope_keeps_every_peak() -> None:
    points = [(k, 100.0 if k == 777 else 0.0) for k in range(2000)]
    kept = charts.envelope(points)
    assert (777, 100.0) in kept
    assert len(kept) <= charts.MOST
    assert kept == sorted(kept)


def test_only_core_widgets_that_both_versions_have(fake: FakeTrainer) -> None:
    found, todo = set[str](), [panel_of(fake).widget]
    while todo:
        widget = todo.pop()
        found.add(type(widget).__name__)
        todo += getattr(widget, "children", ())
    assert found <= {"VBox", "HBox", "HTML", "Image", "Button", "FloatText", "Text", "Dropdown"}
