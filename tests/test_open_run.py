"""What a run folder says after its process is gone, and who may write into it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench
from fresh import Fresh

import sd3tune as st
from sd3tune import cli, locking
from sd3tune.locking import STALE, Holder, Lock, holder
from sd3tune.records import StepRecord
from sd3tune.runner import Runner

QUICK: dict[str, Any] = {
    "max_train_steps": 6, "lr_warmup_steps": 0, "eval_loss_disable": True, "validation_disable": True, "checkpoint_step_interval": 2,
}  # fmt: skip

CHILD = """
import sys, sd3tune as st
config = st.RunConfig.load(sys.argv[1])
for record in st.Trainer(config, st.CacheBuilder(st.plan(st.discover(sys.argv[2]), config), st.encoders(config)).build()).run():
    print(record.type, record.step, flush=True)
"""

WANTING = """
import sys, time
from pathlib import Path
from sd3tune.errors import TrainingError
from sd3tune.locking import Lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lock(Path(sys.argv[1])):
        print("mine", flush=True)
        sys.stdin.readline()
except TrainingError as error:
    print(error, flush=True)
"""


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def leave(path: Path, *, age: float = 0.0, **changes: Any) -> Holder:
    """Put somebody else's lock where a run's would be; ``age`` seconds since its last sign of life."""
    found = replace(Holder(**locking._me()), token="another", **changes)
    path.write_text(json.dumps({name: value for name, value in asdict(found).items() if name != "seen"}))
    os.utime(path, (time.time() - age,) * 2)
    return found


# --- the lock --------------------------------------------------------------------------------------------------------


def test_a_lock_is_there_for_as_long_as_a_run_goes_on(bench: Workbench) -> None:
    """It names this process while records come, and is gone after the end, after leaving the loop, and after an error."""
    trainer = bench.trainer(**QUICK)
    assert not trainer.folder.lock.exists()
    for record in trainer.run(1):
        found = holder(trainer.folder.lock)
        assert found is not None
        assert (found.pid, found.alive, found.busy) == (os.getpid(), True, False)
        assert record.step <= 1
    assert not trainer.folder.lock.exists()
    for _ in trainer.run():
        break
    assert not trainer.folder.lock.exists()
    records = trainer.run()
    next(records)
    with pytest.raises(KeyboardInterrupt):
        records.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert not trainer.folder.lock.exists()


def test_a_loop_that_was_left_half_way_takes_nothing_from_the_next(bench: Workbench) -> None:
    """As after Ctrl-C in a notebook's loop, whose traceback keeps the first loop: the second holds the run until its own end."""
    trainer = bench.trainer(**QUICK)
    first = trainer.run(2)
    next(first)
    second = trainer.run(2)
    next(second)
    mine = holder(trainer.folder.lock)
    first.close()  # type: ignore[attr-defined]
    assert holder(trainer.folder.lock) == mine
    list(second)
    assert not trainer.folder.lock.exists()


def test_a_live_process_is_left_alone(tmp_path: Path) -> None:
    """However long it says nothing: the refusal names its number, host and time, and what to do."""
    path = tmp_path / "run.lock"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        leave(path, pid=child.pid, began=locking._began(child.pid), since=0.0, age=3 * STALE)
        before = path.read_bytes()
        with pytest.raises(st.TrainingError) as refused:
            Lock(path).take()
        text = str(refused.value)
        assert f"process {child.pid} on {locking._me()['host']} since {time.strftime('%Y-%m-%d', time.localtime(0))}" in text
        assert "last sign of life 3 min ago" in text
        assert "a file STOP in the folder" in text
        assert path.read_bytes() == before
    finally:
        child.communicate(b"\n")


def test_what_the_dead_leave_is_taken_over(tmp_path: Path, dead: int) -> None:
    """At once where it can be seen that the process is gone, or that its number is another's by now."""
    path = tmp_path / "run.lock"
    for gone in ({"pid": dead}, {"pid": os.getppid(), "began": "1"}):
        leave(path, **gone)
        with Lock(path):
            now = holder(path)
            assert now is not None
            assert now.pid == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_from_another_host_only_silence_tells(tmp_path: Path, dead: int) -> None:
    """Under a minute since its last sign of life, another host's lock stands; after that it is taken. So is half a lock."""
    path = tmp_path / "run.lock"
    leave(path, pid=dead, host="far", machine="far", age=STALE - 5)
    with pytest.raises(st.TrainingError, match=rf"process {dead} on far since"):
        Lock(path).take()
    leave(path, pid=os.getpid(), host="far", machine="far", age=STALE + 5)
    with Lock(path):
        assert holder(path) is not None
    path.write_text('{"token": "ab')
    with pytest.raises(st.TrainingError, match="an unknown host"):
        Lock(path).take()
    os.utime(path, (time.time() - STALE - 5,) * 2)
    with Lock(path):
        pass
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "null", '{"pid": 1}', '"x"', "{", "\x00", json.dumps({"token": 1, "pid": "x"})])
def test_no_content_of_a_lock_is_an_accident(tmp_path: Path, text: str) -> None:
    """It is somebody's who cannot be seen, and never a traceback."""
    path = tmp_path / "run.lock"
    path.write_text(text)
    found = holder(path)
    assert found is not None
    assert found.alive
    assert found.host == "an unknown host"


def test_signs_of_life_are_given_and_a_lost_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat moves the time of the file; when another has it, the next beat says so and takes nothing away from it."""
    monkeypatch.setattr(locking, "EVERY", 0.0)
    lock = Lock(tmp_path / "run.lock")
    lock.take()
    os.utime(lock.path, (1.0, 1.0))
    lock.beat()
    assert time.time() - lock.path.stat().st_mtime < 10
    leave(lock.path, pid=1, host="far")
    with pytest.raises(st.TrainingError, match=r"process 1 on far since .* has taken this run over"):
        lock.beat()
    lock.release()
    assert lock.path.exists()


def test_beats_cost_nothing_in_between(tmp_path: Path) -> None:
    """Within `EVERY` seconds the disk is not asked again."""
    lock = Lock(tmp_path / "run.lock")
    lock.take()
    os.utime(lock.path, (1.0, 1.0))
    lock.beat()
    assert lock.path.stat().st_mtime == 1.0
    assert locking.EVERY < 10


def test_of_several_that_want_a_dead_run_one_gets_it(tmp_path: Path, dead: int) -> None:
    """Processes that begin at the same moment: one holds the folder, the others are refused with its number."""
    path = tmp_path / "run.lock"
    leave(path, pid=dead)
    command = [sys.executable, "-c", WANTING, str(path)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.stdout.readline().strip() for child in children if child.stdout is not None]
    winner = children[said.index("mine")]
    assert said.count("mine") == 1
    assert sum(f"process {winner.pid} on" in line for line in said) == 2
    for child in children:
        child.communicate("end\n" if child is winner else None)
    assert list(tmp_path.iterdir()) == []


# --- a run whose process was killed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(bench: Workbench) -> tuple[Path, int]:
    """A run folder that was left by ``kill -9`` in the middle of a run, and the number of its process."""
    config = bench.config(**{**QUICK, "max_train_steps": 4000})
    file = bench.root / "killed.yaml"
    config.save(file)
    bench.cache(config)
    child = Fresh(["-c", CHILD, str(file), str(bench.datasets)], bench.root / "killed.txt")
    child.until("step 5\n")
    folder = Path(config.run.output_dir)
    alive = st.open_run(folder)
    assert f"still running in process {child.pid} on " in alive.state
    with pytest.raises(st.TrainingError, match=rf"process {child.pid} on \S+ since \d+-\d+-\d+ .* is running this run"):
        alive.resume()
    child.signal(signal.SIGKILL)
    child.wait()
    return folder, child.pid


def test_a_killed_run_says_so(killed: tuple[Path, int]) -> None:
    """Status, step, newest checkpoint, losses and the way on; opening changes nothing in the folder."""
    folder, pid = killed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = st.open_run(folder)
    assert run.status == "lost"
    newest = run.checkpoints[-1]
    assert run.step >= 5
    assert newest.step in (run.step, run.step - 1)
    assert (
        re_state(run.state)
        == f"ended without saying why, at step {run.step} of 4000 (process {pid} is gone); newest checkpoint: step {newest.step}"
    )
    assert [step for step, _ in run.losses] == list(range(1, run.step + 1))
    assert run.config.schedule.max_train_steps == 4000
    assert f"go on with: sd3tune train --resume {folder}" in str(run)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def re_state(text: str) -> str:
    """A state without host and time."""
    before, _, after = text.partition(" on ")
    return before + " is gone" + after.partition(" is gone")[2]


def test_a_torn_last_line_is_left_out(killed: tuple[Path, int]) -> None:
    """Half a record, half a character, or a line without what its kind needs."""
    folder, _ = killed
    run = st.open_run(folder)
    whole = run.folder.history.read_bytes()
    try:
        for torn in (
            b'{"type": "step", "step": 99',
            b'{"type": "notice", "step": 99, "text": "\xe2\x82',
            b'{"type": "eval", "step": 99}\n',
        ):
            run.folder.history.write_bytes(whole + torn)
            again = st.open_run(folder)
            assert (again.step, again.losses) == (run.step, run.losses)
            assert len(again.records) == len(run.records)
            assert again.evals == run.evals
    finally:
        run.folder.history.write_bytes(whole)


def test_a_killed_run_is_resumed_and_finished(killed: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    """`resume` gives the trainer of the newest checkpoint; afterwards the run is finished, and shows itself."""
    folder, _ = killed
    newest = st.open_run(folder).checkpoints[-1].step
    trainer = st.open_run(folder).resume(max_train_steps=newest + 2)
    assert trainer.steps_done == newest
    records = list(trainer.run())
    assert [r.step for r in records if isinstance(r, StepRecord)] == [newest + 1, newest + 2]
    run = st.open_run(folder)
    assert (run.status, run.total, run.state) == ("finished", newest + 2, f"finished after {newest + 2} updates")
    assert [c.value for c in run.commands] == [{"max_train_steps": newest + 2}]
    capsys.readouterr()
    assert cli.main(["runs", str(folder)]) == 0
    assert f"finished after {newest + 2} updates" in capsys.readouterr().out


# --- other ends ------------------------------------------------------------------------------------------------------


def test_prepared_stopped_and_finished(bench: Workbench) -> None:
    """Each has its sentence, and a chart when there is something to draw."""
    trainer = bench.trainer(**{**QUICK, "validation_disable": False, "validation_prompt": "lock", "validation_num_inference_steps": 1})
    run = st.open_run(trainer.folder.path)
    assert (run.status, run.state, run.step, run.grid) == ("not begun", "prepared, and not begun", 0, None)
    for _ in trainer.run(3):
        if trainer.steps_done == 1:
            assert st.open_run(trainer.folder.path).status == "running"
    run = run.refresh()
    assert (run.status, run.state) == ("stopped", "stopped at step 3 of 6; newest checkpoint: step 2")
    for _ in trainer.run():
        pass
    run = run.refresh()
    assert (run.status, run.state) == ("finished", "finished after 6 updates")
    assert run.grid == trainer.folder.grid
    html = run._repr_html_()
    assert f"loss {run.losses[-1][1]:.3g} at step 6" in html
    assert "data:image/png;base64," in html
    with pytest.raises(st.CheckpointError, match="not a run folder"):
        st.open_run(bench.root)


def test_a_runner_holds_its_run_while_it_is_paused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another trainer in the same kernel is refused, the view says paused, and the sign of life goes on."""
    monkeypatch.setattr("sd3tune.runner.BEAT", 0.05)
    monkeypatch.setattr(locking, "EVERY", 0.0)
    trainer = bench.trainer(**{**QUICK, "max_train_steps": 4000})
    folder = trainer.folder
    runner = Runner(trainer)
    runner.start()
    runner.wait(120, until=2)
    runner.send("pause")
    runner.wait(120, until="paused")
    run = st.open_run(folder.path)
    assert run.status == "running"
    assert ", paused" in run.state
    with pytest.raises(st.TrainingError, match="in another thread of this very process"):
        run.resume()
    os.utime(folder.lock, (1.0, 1.0))
    deadline = time.monotonic() + 20
    while folder.lock.stat().st_mtime == 1.0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.time() - folder.lock.stat().st_mtime < 30
    runner.send("stop")
    runner.wait(120)
    assert st.open_run(folder.path).status == "stopped"
    assert not [one for one in threading.enumerate() if one.name == "sd3tune-trainer"] or not folder.lock.exists()


def test_a_trainer_that_was_left_behind_writes_no_more(bench: Workbench) -> None:
    """After a resume elsewhere the first trainer is refused, with the way to go on, and the history has no line of it."""
    first = bench.trainer(**QUICK)
    list(first.run(2))
    second = st.Trainer.resume(first.folder.path)
    list(second.run(1))
    before = first.folder.history.read_bytes()
    with pytest.raises(st.TrainingError, match=r"was resumed elsewhere and went on from there; .*Trainer.resume"):
        next(first.run())
    assert first.folder.history.read_bytes() == before
    assert not first.folder.lock.exists()


def test_a_run_that_was_taken_over_saves_nothing(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the other process, and no checkpoint is written over the other's."""
    monkeypatch.setattr(locking, "EVERY", 0.0)
    trainer = bench.trainer(**{**QUICK, "checkpoint_step_interval": 1000})
    records = trainer.run()
    while not isinstance(next(records), StepRecord):
        pass
    leave(trainer.folder.lock, host="far", machine="far")
    with pytest.raises(st.TrainingError, match=r"on far since .* has taken this run over") as ended:
        next(records)
    assert "the state could not be saved either" in "".join(ended.value.__notes__)
    assert trainer.folder.checkpoints() == []
    assert trainer.folder.lock.exists()
