"""A run that goes on in another process: shown, steered and left again, from a second notebook or a terminal."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench
from fresh import KERNEL, Fresh
from test_runner import FakeTrainer, step_record

import sd3tune as st
from sd3tune import panels, snapshot
from sd3tune.cli import main
from sd3tune.curves import EMPTY, Curve
from sd3tune.records import CheckpointRecord, CommandRecord, Record, SegmentRecord
from sd3tune.run_folder import RunFolder
from sd3tune.runner import Runner
from sd3tune.written import Written

PATIENCE = 120
LONG: dict[str, Any] = {"max_train_steps": 100_000, "checkpoint_step_interval": 1000, "validation_prompt": (), "num_eval_images": 2}
LONG |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}


class Elsewhere:
    """A kernel whose main thread is idle while its run goes on."""

    def __init__(self, bench: Workbench, root: Path, **settings: Any) -> None:
        self.config = bench.config(**{**LONG, **settings}, output_dir=str(root / "runs" / "there"))
        self.config.save(root / "run.yaml")
        (root / "kernel.py").write_text(KERNEL)
        self.process = Fresh([str(root / "kernel.py"), str(root / "run.yaml"), str(bench.datasets)], root / "said")
        self.process.until("folder ")
        self.folder = RunFolder(root / "runs" / "there")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.folder.read_history() if row["type"] == kind]


@pytest.fixture
def elsewhere(bench: Workbench, tmp_path: Path) -> Iterator[Callable[..., Elsewhere]]:
    there: list[Elsewhere] = []

    def begin(**settings: Any) -> Elsewhere:
        there.append(Elsewhere(bench, tmp_path, **settings))
        return there[-1]

    yield begin
    for one in there:
        if one.process.poll() is None:
            one.process.signal(signal.SIGKILL)
            one.process.wait()


def there_from(step: int) -> Callable[[snapshot.Snapshot], bool]:
    """Attached, and not before a step."""
    return lambda now: not now.own and now.step >= step


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_notebook_shows_and_steers_it(elsewhere: Callable[..., Elsewhere], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first update on, with the settings of now; what is asked for stands in the run's own history."""
    monkeypatch.setattr("sd3tune.runner.BEAT", 0.1)
    there = elsewhere()
    panel = panels.TrainingPanel(there.config, None)
    assert "still running in process" in panel.note.value
    assert "It is shown and steered from here" in panel.note.value
    now = panel.wait(PATIENCE, until=there_from(5))
    assert (now.own, now.total_steps, now.folder) == (False, 100_000, str(there.folder.path))
    assert now.evals[0] == (0, there.rows("eval")[0]["loss"])
    assert [now.loss.stretches[0].first, now.count >= 5] == [1, True]
    assert 0.0 < now.seconds_per_update_in_all < 10.0, "what it did before it was looked at took no time here"  # type: ignore[operator]
    assert panels.TrainingPanel(there.config, None).runner is panel.runner, "the same cell again"
    panel = panels.TrainingPanel(there.config, None)
    panel.fields["learning_rate"].value = 2e-4
    panel.wait(PATIENCE, until=lambda now: now.learning_rate == 2e-4)
    panel.fields["max_train_steps"].value = "90000"
    assert panel.wait(PATIENCE, until=lambda now: now.total_steps == 90_000).state == "training"
    panel.runner.send("rewind", step=1)
    panel.runner.send("look", work=lambda trainer: trainer.check(there.config))
    panel.wait(PATIENCE, until=lambda now: now.refusals == 2)
    assert "cannot lend its model" in panel.runner.snapshot.refused
    panel.press("pause")
    panel.wait(PATIENCE, until="paused")
    eventually(lambda: [row["name"] for row in there.rows("command")][-1:] == ["pause"])
    step = there.rows("step")[-1]["step"]
    (there.folder.path / "PAUSE").unlink()  # somebody else lets it go on, and changes something
    (there.folder.path / "SET").write_text("learning_rate: 3e-4")
    panel.wait(PATIENCE, until=lambda now: now.state == "training" and now.step > step and now.learning_rate == 3e-4)
    assert panel.fields["learning_rate"].value == 3e-4
    (there.folder.path / "PAUSE").write_text("")
    panel.wait(PATIENCE, until="paused")
    panel.press("go_on")
    panel.wait(PATIENCE, until="training")
    panel.press("save")
    eventually(there.folder.checkpoints)
    panel.press("stop")
    now = panel.wait(PATIENCE)
    there.process.until("ended stopped")
    assert (now.state, now.step) == ("stopped", there.rows("step")[-1]["step"])
    told = [(row["name"], row["value"]) for row in there.rows("command") if row["name"] == "set"]
    assert told == [("set", {"learning_rate": 2e-4}), ("set", {"max_train_steps": 90_000}), ("set", {"learning_rate": 3e-4})]
    assert [settings for _, settings in now.steering] == [value for _, value in told]
    assert [kept.step for kept in st.open_run(there.folder.path).checkpoints][-1] == now.step
    assert not panel.buttons["go_on"].disabled
    assert f"st.replay({str(there.folder.path)!r})" in panel.code()
    assert "changed on the way: step" in panel.changed.value


def test_it_goes_on_when_who_looked_at_it_is_gone(elsewhere: Callable[..., Elsewhere], tmp_path: Path) -> None:
    """A script that attached ends, well and at once; then a run that is killed is said to be, and taken up here."""
    there = elsewhere(checkpoint_step_interval=2)
    script = tmp_path / "look.py"
    script.write_text(
        "import sys\nimport sd3tune as st\nfrom sd3tune import panels\n"
        "panel = panels.TrainingPanel(st.RunConfig.load(sys.argv[1]), None)\n"
        "panel.wait(120, until=lambda now: not now.own and now.step > 4)\nprint(panel.runner.snapshot.state)\n"
    )
    looked = subprocess.run([sys.executable, script, tmp_path / "run.yaml"], capture_output=True, text=True, check=False, timeout=300)
    assert (looked.returncode, looked.stdout) == (0, "training\n"), looked.stderr
    step = there.rows("step")[-1]["step"]
    eventually(lambda: there.rows("step")[-1]["step"] > step + 2)
    assert there.rows("command") == []
    panel = panels.TrainingPanel(there.config, None)
    panel.wait(PATIENCE, until=there_from(step))
    panel.press("pause")
    panel.wait(PATIENCE, until="paused")
    there.process.signal(signal.SIGKILL)
    there.process.wait()
    with pytest.raises(st.TrainingError, match="is gone without a word; its newest checkpoint can be gone on with"):
        panel.wait(PATIENCE)
    panel.refresh()
    panel.press("go_on")
    assert not (there.folder.path / "PAUSE").exists()
    killed = there.rows("step")[-1]["step"]
    now = panel.wait(PATIENCE, until=lambda now: now.own and now.step > killed)
    assert now.began_at in (killed, killed - 1, killed - 2)
    panel.press("stop")
    assert panel.wait(PATIENCE).state == "stopped"


def test_a_run_that_ends_there_has_ended_here(
    bench: Workbench, elsewhere: Callable[..., Elsewhere], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished is not stopped, whoever asked for it; a terminal sees the same, and says what a finished run is."""
    monkeypatch.setattr("sd3tune.runner.BEAT", 0.1)
    there = elsewhere(max_train_steps=200)
    (there.folder.path / "PAUSE").write_text("")
    panel = panels.TrainingPanel(there.config, None)
    panel.wait(PATIENCE, until="paused")
    so_far = Written.so_far

    def and_then(written: Written) -> list[dict[str, Any]]:
        rows = so_far(written)
        (there.folder.path / "SET").write_text("learning_rate: 3e-4")
        (there.folder.path / "PAUSE").unlink()
        return rows

    run = ["attach", str(there.folder.path)]
    monkeypatch.setattr(Written, "so_far", and_then)
    assert main(run) == 0
    said, bar = capsys.readouterr()
    assert "200/200" in bar, "of all updates, not of those that were seen"
    assert "still running in process" in said
    assert "files in its folder steer it: STOP, PAUSE, SET, SAVE, SAMPLE" in said
    assert ": set learning_rate = 0.0003\n" in said
    assert "step 200: loss on 2 held-out images" in said
    assert said.rstrip().endswith("finished after 200 updates")
    assert panel.wait(PATIENCE).state == "finished"
    assert main(run) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["finished after 200 updates"]
    assert main(["attach", str(bench.root)]) == 1
    assert "not a run folder" in capsys.readouterr().err


def test_a_run_of_this_very_process_is_named_and_not_attached_to(bench: Workbench) -> None:
    """Its loop stands still in another cell, and holds the folder."""
    trainer = bench.trainer(**LONG)
    records = trainer.run()
    next(records)
    panel = panels.TrainingPanel(trainer.config, None)
    assert "Start begins another run beside it" in panel.note.value
    assert panel.runner.snapshot.state == "idle"
    records.close()


def test_a_run_that_is_paused_here_can_be_stopped_from_elsewhere(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3tune.runner.BEAT", 0.1)
    trainer = bench.trainer(**LONG)
    runner = Runner(trainer)
    runner.start()
    runner.wait(PATIENCE, until=2)
    runner.send("pause")
    runner.wait(PATIENCE, until="paused")
    (trainer.folder.path / "STOP").write_text("")
    assert runner.wait(PATIENCE).state == "stopped"
    assert trainer.folder.checkpoints()


def test_a_run_that_goes_back_goes_back_on_its_second_screen(tmp_path: Path) -> None:
    """Updates of which a later one takes the place are no longer shown, and the length is that of the checkpoint."""
    folder = RunFolder(tmp_path)

    def write(*records: Record) -> None:
        with folder.history.open("a") as file:
            file.writelines(json.dumps({**record.as_dict(), "segment": 0}) + "\n" for record in records)

    write(*(step_record(step, 1e-4) for step in (1, 2, 3, 4)), CommandRecord(step=4, name="set", value={"max_train_steps": 50}))
    written = Written(folder, updates=100)
    assert (len(written.so_far()), written.steps_done, written.total) == (5, 4, 50)
    write(SegmentRecord(step=2, from_step=2, parent=0, why="rewind", live={"max_train_steps": 100}))
    (back,) = written.run()
    assert (written.steps_done, written.total) == (2, 100)
    seen = snapshot.Snapshot(state="training", step=4, evals=((0, 1.0), (2, 0.9), (4, 0.8)), loss=Curve(latest=(4, 0.5)))
    changes, _ = snapshot.after(seen, back)
    now = dataclasses.replace(seen, **changes)
    assert (now.step, now.evals, now.loss, now.went_back) == (2, ((0, 1.0), (2, 0.9)), EMPTY, 1)
    read = dataclasses.replace(seen, state="preparing")
    changes, _ = snapshot.after(read, back)
    assert dataclasses.replace(read, **changes) == dataclasses.replace(read, went_back=1), "the history lacks those lines already"


def test_a_run_that_fails_has_failed_here(bench: Workbench) -> None:
    """Its history says by what, without tokens, as long as nobody has gone on with it; an interrupt is none."""
    trainer = bench.trainer(**{**LONG, "max_train_steps": 4})
    list(trainer.run(2))
    velocity = trainer.engine.velocity

    def fails(error: BaseException) -> None:
        def failing(*_: Any) -> Any:
            raise error

        trainer.engine.velocity = failing
        with pytest.raises(type(error)):
            list(trainer.run())
        trainer.engine.velocity = velocity

    fails(KeyboardInterrupt())
    assert st.open_run(trainer.folder.path).state.startswith("stopped at step 2 of 4; newest")
    fails(RuntimeError("hf_abcdefghi is no good\nhere and there"))
    assert st.open_run(trainer.folder.path).state.startswith("stopped at step 2 of 4 by RuntimeError: *** is no good; newest")
    with pytest.raises(st.TrainingError, match=r"ended by RuntimeError: \*\*\* is no good$"):
        list(Written(trainer.folder).run())
    list(trainer.run())
    assert st.open_run(trainer.folder.path).state == "finished after 4 updates"
    assert [record.type for record in Written(trainer.folder).run()][-1] != "failure"


def test_a_file_that_stops_a_run_of_this_kernel_stops_it_and_does_not_finish_it(bench: Workbench) -> None:
    trainer = bench.trainer(**LONG)
    runner = Runner(trainer)
    runner.start()
    runner.wait(PATIENCE, until=2)
    runner.send("set", max_train_steps=50_000)
    assert runner.wait(PATIENCE, until=lambda now: now.total_steps == 50_000).live
    (trainer.folder.path / "STOP").write_text("")
    assert runner.wait(PATIENCE).state == "stopped"


def test_what_was_written_before_is_in_the_curves_and_not_in_the_pace_or_the_log(tmp_path: Path) -> None:
    fake = FakeTrainer(tmp_path, steps=1003, seconds=0.05)

    def make() -> Generator[Record, None, FakeTrainer]:
        for step in range(1, 1001):
            yield step_record(step, 1e-4)
        yield CheckpointRecord(step=1000, path="long ago", tensors=1)
        fake.steps_done = 1000
        return fake

    runner = Runner(make)
    runner.start()
    now = runner.wait(PATIENCE)
    assert (now.count, now.loss.stretches[0].first, now.began_at) == (1003, 1, 1000)
    assert now.seconds_per_update_in_all > 0.04  # type: ignore[operator]
    assert not [line for line in now.log if "long ago" in line]


def test_time_counts_from_where_a_run_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sd3tune.snapshot.time.monotonic", lambda: clock[0])
    gauges = snapshot.Gauges()

    def take(step: int) -> dict[str, Any]:
        return gauges.take(dataclasses.replace(step_record(step, 1e-4), seconds=2.0))

    for step in (1, 2, 3):
        take(step)
    gauges.begin()
    clock[0] = 100.0
    take(4)
    clock[0] = 104.0
    seen = take(6)
    assert (seen["count"], len(seen["loss"].stretches)) == (5, 5)
    assert (seen["seconds_per_update_in_all"], seen["seconds"]) == (2.0, 6.0)
