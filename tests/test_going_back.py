"""A run that goes back (resume, rewind, guard) is what its history, its newest checkpoint and its replay say it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Workbench
from fresh import KERNEL, Fresh
from test_keeping import PLAIN, drive, steps_of
from test_trainer import same_state, updates
from test_webhooks import Server

import sd3tune as st
from sd3tune import keeping
from sd3tune.control import TerminatedError
from sd3tune.errors import CheckpointError
from sd3tune.history import changed_since, follow_segments
from sd3tune.run_folder import PINNED, latest_step
from sd3tune.runner import Runner

SAME = "the adapter is the same, bit for bit"


def replayed(trainer: st.Trainer) -> str:
    return list(st.replay(trainer.folder.path))[-1].text  # type: ignore[attr-defined, no-any-return]


def run_away(trainer: st.Trainer, at: int) -> None:
    """One batch, once, whose prediction is far off: a loss that runs away, which is not the pictures' fault alone."""
    velocity, left = trainer.engine.velocity, [True]

    def off(*given: torch.Tensor) -> torch.Tensor:
        if trainer.steps_done == at and left and left.pop():
            return velocity(*given) * 1e3
        return velocity(*given)

    trainer.engine.velocity = off


# --- commands ----------------------------------------------------------------------------------------------------------


def test_a_command_that_the_checkpoint_has_not_seen_is_not_replayed(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that was set after the checkpoint, at its very step: resumed without it, told so, and replayed without it."""
    trainer = bench.trainer(**PLAIN)
    updates(trainer, 2)
    trainer.checkpoint()
    trainer.set(learning_rate=3e-3)
    rate = trainer.folder.read_checkpoint()["live"]["learning_rate"]
    resumed = st.Trainer.resume(trainer.folder.path)
    assert "changed after the checkpoint, and no longer so: learning_rate = 0.003, at step 2" in capsys.readouterr().out
    assert resumed.config.optimizer.learning_rate == rate
    assert changed_since(resumed.folder.read_history(), 0) == ()
    updates(resumed, 2)
    resumed.checkpoint()
    assert SAME in replayed(resumed)


def test_a_command_that_the_checkpoint_has_seen_stays(bench: Workbench) -> None:
    """Set, saved, resumed: it stays in force and in the history, and is replayed."""
    trainer = bench.trainer(**PLAIN)
    updates(trainer, 2)
    trainer.set(learning_rate=3e-3)
    trainer.checkpoint()
    resumed = st.Trainer.resume(trainer.folder.path)
    assert resumed.config.optimizer.learning_rate == 3e-3
    updates(resumed, 2)
    resumed.checkpoint()
    assert changed_since(resumed.folder.read_history(), 0) == ((2, "learning_rate", 3e-3),)
    assert SAME in replayed(resumed)


@pytest.mark.parametrize("policy", ["rollback", "skip"])
def test_what_a_person_set_stays_in_force_when_the_guard_goes_back_and_is_replayed(bench: Workbench, policy: str) -> None:
    """A limit set at step 13, a runaway at 14, back to 10 or before: the limit is in force from there on, and the replay is bitwise."""
    trainer = bench.trainer(**{**PLAIN, "max_train_steps": 18}, guard_policy=policy, checkpoint_step_interval=6)
    run_away(trainer, 14)
    for record in trainer.run():
        if record.type == "step" and record.step == 13 and trainer.config.optimizer.max_grad_norm == 1.0:
            trainer.set(max_grad_norm=1e-3)
    assert trainer.config.optimizer.max_grad_norm == 1e-3
    back = next(r for r in trainer.folder.read_history() if r["type"] == "segment")
    assert back["from_step"] < 13
    told = [(at, name) for at, name, _ in changed_since(trainer.folder.read_history(), 0)]
    assert (back["from_step"], "max_grad_norm") in told
    assert SAME in replayed(trainer)


def test_a_history_of_before_segments_said_what_they_begin_with_is_read_as_it_was() -> None:
    """Without the settings of the segment, commands at its step stay."""
    command = {"type": "command", "name": "set", "value": {"learning_rate": 1.0}, "refused": "", "step": 2}
    segment = {"type": "segment", "from_step": 2, "parent": 0, "why": "resume", "step": 2, "segment": 1}
    assert follow_segments([command, segment]) == [command, segment]
    assert follow_segments([command, {**segment, "live": {"learning_rate": 1.0}, "skipped": []}])[0] == command
    assert follow_segments([command, {**segment, "live": {"learning_rate": 2.0}, "skipped": []}])[0]["type"] == "segment"


# --- the guard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["rollback", "skip"])
def test_where_the_guard_went_back_to_is_saved_at_once(bench: Workbench, policy: str) -> None:
    """A kill right after it: the resumed run stands where the guard put it, leaves out the same batch, and knows its rate."""
    trainer = bench.trainer(**{**PLAIN, "max_train_steps": 30}, guard_policy=policy, checkpoint_step_interval=13)
    run_away(trainer, 14)
    for record in trainer.run():
        if record.type == "checkpoint" and trainer.engine.skipped:
            break
    state = trainer.state_dict()
    at = trainer.steps_done
    assert at == latest_step(trainer.folder.checkpoint_folder) == {"skip": 10, "rollback": 13}[policy]
    resumed = st.Trainer.resume(trainer.folder.path)
    assert resumed.state_dict()["skipped"] == [14]
    assert same_state(resumed.state_dict(), state)
    assert resumed.config.optimizer.learning_rate == trainer.config.optimizer.learning_rate


def test_after_the_guard_went_back_the_next_checkpoint_is_written_again(bench: Workbench) -> None:
    """Step 13 was saved before the runaway; when it is reached again, the state that leaves the batch out is on disk."""
    trainer = bench.trainer(**{**PLAIN, "max_train_steps": 15}, guard_policy="skip", checkpoint_step_interval=13)
    run_away(trainer, 14)
    saved = [trainer.folder.read_checkpoint(13)["skipped"] for r in trainer.run() if r.type == "checkpoint" and r.step == 13]
    assert saved == [[], [14]]


def test_a_checkpoint_that_runs_away_again_is_left_for_an_older_one(bench: Workbench) -> None:
    """Each try applies one update and fails at the next: the third goes back further than the first two."""
    trainer = bench.trainer(**{**PLAIN, "max_train_steps": 40}, guard_policy="rollback", guard_rollbacks=3, checkpoint_step_interval=6)
    velocity = trainer.engine.velocity
    trainer.engine.velocity = lambda *given: velocity(*given) * (1e3 if trainer.steps_done >= 14 else 1)
    with pytest.raises(st.TrainingError, match="step 15"):
        for _ in trainer.run():
            pass
    lines = [json.loads(line) for line in trainer.folder.history.read_text().splitlines()]
    assert [row["from_step"] for row in lines if row["type"] == "segment" and row["why"] == "rollback"] == [12, 12, 6]


def test_a_run_that_the_guard_stops_says_why_in_its_history(bench: Workbench) -> None:
    """Images, noise levels and block stand in the history, with what to think of for such a model."""
    trainer = bench.trainer(**PLAIN, optimizer="lion", learning_rate=1e-4)
    velocity = trainer.engine.velocity
    trainer.engine.velocity = lambda *given: velocity(*given) * float("nan")
    with pytest.raises(st.TrainingError):
        for _ in trainer.run():
            pass
    (said,) = [r["text"] for r in trainer.folder.read_history() if r["type"] == "notice" and "gradient" in r["text"]]
    assert said.startswith("step 1: the gradient is nan")
    assert "; pictures some/" in said
    assert ".png" in said
    assert "noise levels 0." in said
    assert "; the run ends. Advice: Lion wants about a tenth of AdamW's rate" in said


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_best_is_one_of_the_run_as_it_goes_on(bench: Workbench) -> None:
    """Best at 6, gone on from 4: the best is that of those before, and what 6 becomes then is judged anew."""
    trainer = bench.trainer(**PLAIN, checkpoint_step_interval=2)
    for _ in drive(trainer, until=7):
        pass
    folder = trainer.folder.checkpoint_folder
    with trainer.folder.history.open("a") as file:
        for step, loss in ((2, 0.8), (4, 0.7), (6, 0.5)):
            file.write(json.dumps({"type": "eval", "step": step, "loss": loss, "segment": 0}) + "\n")
    keeping.mark_best(folder, 6, 0.5)
    st.Trainer.resume(folder / "step-000004")
    assert keeping.best_of(folder) == (4, 0.7)
    keeping.forget_best(folder, 1, [])
    assert keeping.best_of(folder) is None


def test_an_older_checkpoint_that_is_resumed_leaves_the_newest_for_good(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """Gone on from step 2 of 6: step 6 is pinned and told; a damaged newest one is not, for nobody chose to leave it."""
    trainer = bench.trainer(**PLAIN, checkpoint_step_interval=2, checkpoints_total_limit=3)
    for _ in drive(trainer, until=7):
        pass
    resumed = st.Trainer.resume(trainer.folder.checkpoint_folder / "step-000002", learning_rate=1e-3)
    newest = trainer.folder.checkpoint_folder / "step-000006"
    assert f"left behind, and kept for good: {newest}" in capsys.readouterr().out
    updates(resumed, 1)
    resumed.checkpoint()
    assert steps_of(trainer.folder) == [2, 3, 6]
    (trainer.folder.checkpoint_folder / "step-000003" / "adapter.safetensors").write_bytes(b"")
    again = st.Trainer.resume(trainer.folder.path)
    assert again.steps_done == 2
    assert not (trainer.folder.checkpoint_folder / "step-000003" / PINNED).exists()
    updates(resumed, 3)
    resumed.checkpoint()
    assert newest.with_suffix(".old").exists()
    assert trainer.folder.read_checkpoint(6)["segment"] == 1, "the one that counts, and not the one left behind"


def test_another_base_model_is_told_by_the_certificate(bench: Workbench, tmp_path: Path) -> None:
    """The same layout with one other value: resumed, and said; a copy with other times is the same model."""
    model = tmp_path / "model"
    shutil.copytree(bench.root / "miniature", model, symlinks=True)
    trainer = bench.trainer(**PLAIN, pretrained_model_name_or_path=str(model), model_flavour=None)
    updates(trainer, 1)
    trainer.checkpoint()
    weights = next((model / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data)
    assert "nothing differs: software, models and data" in str(st.Trainer.resume(trainer.folder.path).certificate)
    for place in range(len(data) // 2, len(data) // 2 + 200_000, 4):
        data[place] ^= 1
    weights.write_bytes(data)
    assert "differs: the weights of the base model are not those of then" in str(st.Trainer.resume(trainer.folder.path).certificate)


def test_a_finished_run_that_is_made_longer_finishes_again(bench: Workbench) -> None:
    """Eight updates to the end, then twelve: the final adapter is that of step 12, and the history says so."""
    trainer = bench.trainer(**PLAIN)
    list(trainer.run())
    before = trainer.folder.lora.read_bytes()
    longer = st.Trainer.resume(trainer.folder.path, max_train_steps=12)
    seen = list(longer.run())
    assert [r.step for r in seen if r.type == "checkpoint" and r.path == str(longer.folder.lora)] == [12]  # type: ignore[attr-defined]
    assert longer.folder.lora.read_bytes() != before
    assert list(st.Trainer.resume(trainer.folder.path).run()) == []


# --- how it ends -------------------------------------------------------------------------------------------------------


def test_a_low_disk_does_not_keep_a_run_that_shall_stop(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """STOP while it waits for room: saved with what room there is, and stopped."""
    trainer = bench.trainer(**PLAIN, checkpoint_step_interval=2)
    usage = shutil.disk_usage(bench.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    kinds = []
    for record in trainer.run():
        kinds.append(record.type)
        assert kinds.count("wait") < 20
        if kinds.count("wait") == 2:
            (trainer.folder.path / "STOP").write_text("")
    assert kinds[-1] != "wait"
    assert steps_of(trainer.folder) == [2]


def test_a_stopped_run_says_when_the_machine_may_go_away(bench: Workbench, tmp_path: Path) -> None:
    """After STOP the last record says that the last checkpoint is whole at the other place."""
    trainer = bench.trainer(**PLAIN, mirror_to=str(tmp_path / "away"))
    for record in trainer.run():
        if record.type == "step" and record.step == 3:
            trainer.stop()
    last = trainer.folder.read_history()[-1]
    assert last["text"].startswith("step 3 is whole at ")
    assert last["text"].endswith("this machine may go away")


def test_sigterm_saves_the_run_of_a_panel(bench: Workbench, tmp_path: Path) -> None:
    """The main thread is idle, as a kernel's is; the worker's run is saved, and the process ends by the signal."""
    config = tmp_path / "run.yaml"
    bench.config(**{**PLAIN, "max_train_steps": 100_000}).save(config)
    script = tmp_path / "panel.py"
    script.write_text(KERNEL)
    process = Fresh([str(script), str(config), str(bench.datasets)], tmp_path / "said")
    process.until("folder ")
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.output
    folder = Path(process.output.split("folder ", 1)[1].splitlines()[0])
    opened = st.open_run(folder)
    steps = [row["step"] for row in opened.history if row["type"] == "step"]
    assert [kept.step for kept in opened.checkpoints] == [steps[-1]]
    with pytest.raises(CheckpointError):
        st.Trainer.resume(tmp_path)


def test_a_script_that_is_through_saves_the_run_of_a_panel(bench: Workbench, tmp_path: Path) -> None:
    """So does a kernel that is restarted. What draws the run's last chart is waited for, too: cut off, it would abort the process. Who is
    told of the run hears of its last checkpoint.
    """
    server, hook = Server(delay=0.5), {"webhook_type": "raw", "callback_url": "$MY_HOOK"}
    config = tmp_path / "run.yaml"
    bench.config(**{**PLAIN, "max_train_steps": 100_000, "mirror_to": str(tmp_path / "away"), "webhook_config": hook}).save(config)
    script = tmp_path / "panel.py"
    script.write_text(
        KERNEL.partition("while ")[0].replace(
            "run.start()\n",
            "run.start()\nfrom sd3tune import live\n"
            "live.thread(run, 'late', lambda: run.wait() and time.sleep(0.5) or print('drawn when', run.snapshot.state))\n",
        )
    )
    environment = {**os.environ, "MY_HOOK": server.url}
    ended = subprocess.run([sys.executable, script, config, bench.datasets], env=environment, capture_output=True, text=True, check=False)
    server.close()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "drawn when stopped" in ended.stdout
    opened = st.open_run(Path(ended.stdout.split("folder ", 1)[1].splitlines()[0]))
    steps = [row["step"] for row in opened.history if row["type"] == "step"]
    assert [kept.step for kept in opened.checkpoints] == [steps[-1]]
    assert opened.commands[-1].name == "stop"
    assert server.of("training.checkpoint")[-1]["data"]["path"].endswith(f"step-{steps[-1]:06d}")
    assert any(row.get("text", "").startswith(f"step {steps[-1]} is whole at {tmp_path / 'away'}") for row in opened.history)
    assert (opened.path / f"lora-step-{steps[-1]:06d}.safetensors").is_file()


def test_sigterm_in_an_update_comes_through_also_where_a_panel_has_run(bench: Workbench) -> None:
    """The panel's handler stays when its run has ended; an update of this thread is finished all the same, and told."""
    runner = Runner(lambda: bench.trainer(**{**PLAIN, "max_train_steps": 1}, lr_warmup_steps=0))
    runner.start()
    runner.wait()
    assert callable(signal.getsignal(signal.SIGTERM))
    trainer = bench.trainer(**PLAIN)
    velocity = trainer.engine.velocity

    def disturbed(*given: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return velocity(*given)

    trainer.engine.velocity = disturbed
    with pytest.raises(TerminatedError):
        trainer.step()
    assert trainer.steps_done == 1
