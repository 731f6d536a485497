"""Runs that lie in a folder when a panel is made: another process's, a killed one's, a finished one's."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_runner import PATIENCE, FakeTrainer, step_record

from sd3tune import locking
from sd3tune.config import presets
from sd3tune.config.schema import RunConfig
from sd3tune.errors import TrainingError
from sd3tune.history import History
from sd3tune.panels import TrainingPanel, taking
from sd3tune.records import CheckpointRecord, EvalRecord
from sd3tune.run_folder import RunFolder


def leave(path: Path, steps: int, *, checkpoint: bool = True, finished: bool = False) -> RunFolder:
    """A run folder as a process leaves it behind."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    presets.playground(output_dir=str(path)).save(folder.config)
    history = History(folder.history)
    for step in range(1, steps + 1):
        history.append(step_record(step, 1e-3))
    history.append(EvalRecord(step=steps, loss=0.25, images=1, sigmas=(0.5,), losses_by_sigma=(0.25,)))
    if finished:
        folder.lora.write_bytes(b"weights")
        history.append(CheckpointRecord(step=steps, path=str(folder.lora), tensors=1))
    history.close()
    if checkpoint:
        state = folder.checkpoint_folder / f"step-{steps:06d}" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
    return folder


def hold(folder: RunFolder, pid: int) -> None:
    me = locking._me() | {"pid": pid, "thread": 1, "began": locking._began(pid), "token": "another"}
    folder.lock.write_text(json.dumps(me))


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is there."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


def panel_at(path: Path, made: list[RunConfig] | None = None) -> TrainingPanel:
    def make(config: RunConfig, cache: object) -> FakeTrainer:
        if made is not None:
            made.append(config)
        return FakeTrainer(path.with_name("fake"))

    return TrainingPanel(presets.playground(output_dir=str(path)), None, make=make)  # type: ignore[arg-type]


def test_a_run_of_another_living_process_is_shown_until_that_ends(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    folder = leave(tmp_path / "run", 6)
    hold(folder, other.pid)
    panel = panel_at(folder.path)
    said = panel.note.value.replace("&#x27;", "'")
    assert f"{folder.path}: still running in process {other.pid} on " in said
    assert "It is shown and steered from here, and does not end with this notebook." in said
    assert panel.buttons["start"].disabled
    other.kill()
    other.wait()
    with pytest.raises(TrainingError, match=f"process {other.pid} .* is gone without a word"):
        panel.wait(PATIENCE)


def test_a_killed_kernels_run_is_shown_and_can_be_gone_on_with(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    folder = leave(tmp_path / "run", 6)
    hold(folder, other.pid)
    other.kill()
    other.wait()
    panel = panel_at(folder.path)
    assert "ended without saying why, at step 6" in panel.note.value
    assert "Go on takes it up" in panel.note.value
    now = panel.runner.snapshot
    assert (now.state, now.step, now.folder, now.count, now.evals) == ("stopped", 6, str(folder.path), 6, ((6, 0.25),))
    assert now.loss.latest == (6, 1 / 6)
    assert (now.rates.latest, now.grad_norms.latest) == ((6, 1e-3), (6, 1.0))
    assert "The learning rate is 0.001" in panel.others.value
    assert "<svg" in panel.chart.value
    assert panel.checkpoint.value == 6
    assert [name for name, one in panel.buttons.items() if not one.disabled] == ["start", "go_on"]


def test_start_beside_a_run_that_was_left_is_a_run_of_its_own(tmp_path: Path) -> None:
    made = list[RunConfig]()
    folder = leave(tmp_path / "run", 6)
    panel = panel_at(folder.path, made)
    before = folder.history.read_bytes()
    panel.press("start")
    assert panel.wait(PATIENCE).step == 5
    assert len(made) == 1
    assert folder.history.read_bytes() == before


def test_only_the_newest_run_of_the_name_counts_and_only_one_that_can_go_on_is_taken_up(tmp_path: Path) -> None:
    old = leave(tmp_path / "run", 6)
    os.utime(old.config, (1, 1))
    leave(tmp_path / "run-of-another-name", 6)
    found = taking.newest_run(tmp_path / "run")
    assert found is not None
    assert found.path == old.path
    leave(tmp_path / "run-2", 4, finished=True)
    panel = panel_at(tmp_path / "run")
    assert (panel.runner.snapshot.state, panel.note.value) == ("idle", "")
    time.sleep(0.02)
    leave(tmp_path / "run-3", 2, checkpoint=False)
    panel = panel_at(tmp_path / "run")
    assert panel.runner.snapshot.state == "idle"
    assert "there is no checkpoint" in panel.note.value
    assert taking.newest_run(tmp_path / "elsewhere") is None
