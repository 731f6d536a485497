"""Nothing is lost: what is saved when, how a run is steered from outside, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from fresh import Fresh
from test_trainer import same_state, updates

import sd3tune as st
from sd3tune import keeping
from sd3tune.errors import CheckpointError, ConfigError
from sd3tune.mirror import Mirror
from sd3tune.records import Record
from sd3tune.run_folder import RunFolder

PLAIN: dict[str, Any] = {"validation_prompt": (), "eval_loss_disable": True, "max_train_steps": 8, "lora_targets": ("to_q",)}
"""Updates alone, of a small adapter."""


def steps_of(folder: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in folder.checkpoints()]


def drive(trainer: st.Trainer, *, until: int = 10**9) -> Iterator[Record]:
    """Records of a run, up to the first of a later step."""
    for record in trainer.run():
        yield record
        if record.step >= until:
            return


# --- when it is saved --------------------------------------------------------------------------------------------------


def test_minutes_count_too(bench: Workbench) -> None:
    """With a millionth of a minute every update is saved; with 0 only every so many of them."""
    often, seldom = (bench.trainer(**PLAIN, checkpoint_minutes=m, checkpoint_step_interval=3) for m in (1e-6, 0.0))
    for trainer in (often, seldom):
        for _ in drive(trainer, until=7):
            pass
    saved = [[r["step"] for r in t.folder.read_history() if r["type"] == "checkpoint"] for t in (often, seldom)]
    assert saved == [[1, 2, 3, 4, 5, 6], [3, 6]]


def test_an_error_in_an_update_saves_what_was_done(bench: Workbench) -> None:
    """Out of memory in update 4: the state after update 3 is on disk, and resumes as if nothing had been."""
    trainer, whole = bench.trainer(**PLAIN), bench.trainer(**PLAIN)
    updates(whole, 5)
    velocity = trainer.engine.velocity

    def fails(*given: torch.Tensor) -> torch.Tensor:
        if trainer.steps_done == 3:
            raise torch.OutOfMemoryError("out of memory")
        return velocity(*given)

    trainer.engine.velocity = fails
    with pytest.raises(torch.OutOfMemoryError):
        for _ in trainer.run():
            pass
    assert steps_of(trainer.folder) == [3]
    resumed = st.Trainer.resume(trainer.folder.path)
    updates(resumed, 2)
    assert same_state(resumed.state_dict(), whole.state_dict())


def test_a_state_in_the_middle_of_an_optimizers_step_is_not_saved(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the optimizer leaves weights half way: that is not a state of the run."""
    trainer = bench.trainer(**PLAIN)
    updates(trainer, 2)
    trainer.checkpoint()
    updates(trainer, 1)
    monkeypatch.setattr(trainer.engine._optimizer, "step", lambda: (_ for _ in ()).throw(RuntimeError("half way")))
    with pytest.raises(RuntimeError, match="half way"):
        for _ in trainer.run():
            pass
    assert steps_of(trainer.folder) == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_and_comes_through(bench: Workbench, number: signal.Signals) -> None:
    """In the middle of update 3: it is finished, saved, and the run resumes bitwise; SIGTERM is as before afterwards."""
    trainer, whole = bench.trainer(**PLAIN), bench.trainer(**PLAIN)
    velocity, before = trainer.engine.velocity, signal.getsignal(signal.SIGTERM)

    def disturbed(*given: torch.Tensor) -> torch.Tensor:
        if trainer.steps_done == 2:
            os.kill(os.getpid(), number)
        return velocity(*given)

    trainer.engine.velocity = disturbed
    with pytest.raises(KeyboardInterrupt):
        for _ in trainer.run():
            pass
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps_of(trainer.folder) == [3]
    resumed = st.Trainer.resume(trainer.folder.path)
    updates(resumed, 2)
    updates(whole, 5)
    assert same_state(resumed.state_dict(), whole.state_dict())


def test_sigterm_between_two_updates_too(bench: Workbench) -> None:
    """While somebody looks at a record, SIGTERM becomes an interrupt there; the command line then saves."""
    trainer = bench.trainer(**PLAIN)
    with pytest.raises(KeyboardInterrupt):
        for record in trainer.run():
            if record.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
    assert trainer.secure().name == "step-000002"
    assert steps_of(trainer.folder) == [2]


@pytest.mark.full
def test_the_command_line_obeys_sigterm(bench: Workbench, tmp_path: Path) -> None:
    """SIGTERM to ``sd3tune train``: exit code 130, a checkpoint, and how to go on."""
    config = bench.config(**{**PLAIN, "max_train_steps": 400}, output_dir=str(tmp_path / "run"))
    config.save(tmp_path / "run.yaml")
    child = Fresh(["-m", "sd3tune", "train", str(tmp_path / "run.yaml"), "--data", str(bench.datasets)], tmp_path / "said.txt")
    child.until_file(tmp_path / "run" / "history.jsonl", '"step": 3')
    child.signal(signal.SIGTERM)
    code, out = child.wait(), child.output
    assert code == 130, out
    assert f"go on with: sd3tune train --resume {tmp_path / 'run'}" in out
    assert steps_of(RunFolder(tmp_path / "run"))


# --- what stays --------------------------------------------------------------------------------------------------------


def test_the_best_and_the_pinned_stay(bench: Workbench) -> None:
    """Of ten checkpoints two are kept, and with them the best one and the one that was pinned."""
    trainer = bench.trainer(**PLAIN, checkpoints_total_limit=2)
    for _ in range(5):
        trainer.step()
        trainer.checkpoint()
        if trainer.steps_done == 1:
            trainer.pin()
        if trainer.steps_done == 2:
            keeping.mark_best(trainer.folder.checkpoint_folder, 2, 0.5)
    assert steps_of(trainer.folder) == [1, 2, 4, 5]


def test_the_best_state_is_saved_when_it_is_seen(bench: Workbench) -> None:
    """Evaluations between checkpoints: the lowest loss is that of best.json, and its state is on disk."""
    trainer = bench.trainer(validation_prompt=(), max_train_steps=7, eval_steps_interval=2, checkpoint_step_interval=100)
    evals = {r.step: r.loss for r in trainer.run() if r.type == "eval"}
    best = keeping.best_of(trainer.folder.checkpoint_folder)
    assert best is not None
    assert best == min(((s, v) for s, v in evals.items() if s), key=lambda row: row[1])
    assert best[0] in steps_of(trainer.folder)


def test_writing_the_same_step_again_never_leaves_none(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two renames, the old one is still read under its other name."""
    trainer = bench.trainer(**PLAIN)
    updates(trainer, 1)
    trainer.checkpoint()
    real = Path.replace

    def dies(path: Path, target: Path) -> Path:
        if target.name == "step-000001":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            trainer.checkpoint()
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000001.old"]
    resumed = st.Trainer.resume(trainer.folder.path)
    assert same_state(resumed.state_dict(), trainer.state_dict())
    resumed.checkpoint()
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000001"]


def test_no_file_with_a_nan(bench: Workbench, tmp_path: Path) -> None:
    """A weight that is no number is named, and neither checkpoint nor adapter is written."""
    trainer = bench.trainer(**PLAIN)
    updates(trainer, 1)
    name, weight = next(iter(trainer.engine.weights.items()))
    with torch.no_grad():
        weight.view(-1)[0] = float("nan")
    for write in (trainer.checkpoint, lambda: trainer.save(tmp_path / "x.safetensors")):
        with pytest.raises(CheckpointError, match=f"{name} of the adapter is not finite, so nothing was written"):
            write()
    assert not trainer.folder.checkpoints()
    assert not (tmp_path / "x.safetensors").exists()


# --- room on the disk --------------------------------------------------------------------------------------------------


def test_a_low_disk_waits_and_goes_on(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little room the run says so once, waits without an update, and saves when there is room."""
    trainer = bench.trainer(**PLAIN, checkpoint_step_interval=2)
    answers = iter([1e6, 1e6, 1e6])
    usage = shutil.disk_usage(bench.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(next(answers, 1e12))))
    kinds = [r.type for r in drive(trainer, until=3)]
    assert kinds == ["notice", "step", "step", "notice", "wait", "wait", "wait", "checkpoint", "step"]
    said = [r["text"] for r in trainer.folder.read_history() if r["type"] == "notice"][1]
    assert said.startswith("the run waits: 1.0 MB are free where ")
    assert "wanted for the next checkpoint" in said
    assert not [r for r in trainer.folder.read_history() if r["type"] == "wait"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(bench: Workbench, tmp_path: Path) -> None:
    """On a tmpfs of 60 MB: the run waits there when others fill it, and ends as an undisturbed one when they leave."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        settings = {**PLAIN, "checkpoint_step_interval": 2, "disk_low_threshold": 0.0, "checkpoints_total_limit": 1}
        trainer, whole = bench.trainer(**settings, output_dir=str(mount / "run")), bench.trainer(**settings)
        waited = 0
        for record in trainer.run():
            if record.type == "step" and record.step == 3:
                free = shutil.disk_usage(mount).free
                (mount / "ballast").write_bytes(b"0" * (free - 200_000))
            waited += record.type == "wait"
            assert waited < 50
            if waited == 2:
                (mount / "ballast").unlink(missing_ok=True)
        for _ in whole.run():
            pass
        assert waited >= 2
        assert same_state(trainer.state_dict(), whole.state_dict())
        assert trainer.folder.lora.exists()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


# --- files that steer --------------------------------------------------------------------------------------------------


def test_stop_save_and_sample(bench: Workbench) -> None:
    """Each file is obeyed before the next update, taken away, and written to the history."""
    trainer = bench.trainer(max_train_steps=8, eval_loss_disable=True, validation_prompt="lock", validation_steps=0)
    for record in trainer.run():
        if record.type == "step" and record.step in (2, 3, 4):
            (trainer.folder.path / {2: "SAVE", 3: "SAMPLE", 4: "STOP"}[record.step]).touch()
    assert trainer.steps_done == 4
    assert steps_of(trainer.folder) == [2, 4]
    assert trainer.folder.images(3).exists()
    assert not [name for name in ("STOP", "SAVE", "SAMPLE") if (trainer.folder.path / name).exists()]
    commands = [(r["step"], r["name"]) for r in trainer.folder.read_history() if r["type"] == "command"]
    assert commands == [(2, "save"), (3, "sample"), (4, "stop")]
    assert not trainer.folder.lora.exists()


def test_pause_lasts_as_long_as_its_file(bench: Workbench) -> None:
    """No update while PAUSE is there; STOP ends a paused run, too."""
    trainer = bench.trainer(**PLAIN)
    pause = trainer.folder.path / "PAUSE"
    kinds: list[str] = []
    for record in trainer.run():
        kinds.append(record.type)
        if record.type == "step" and record.step == 1:
            pause.touch()
        if kinds[-2:] == ["wait", "wait"]:
            pause.unlink()
        if record.step == 2:
            break
    assert kinds == ["notice", "step", "command", "wait", "wait", "command", "step"]
    pause.touch()
    (trainer.folder.path / "STOP").touch()
    assert [r.type for r in trainer.run()][-1] == "command"
    assert trainer.steps_done == 2


# --- a second copy -----------------------------------------------------------------------------------------------------


def test_the_mirror_is_a_run_that_resumes(bench: Workbench, tmp_path: Path) -> None:
    """What lies at the other place is whole, follows the rotation, says so, and goes on as the run would have."""
    trainer = bench.trainer(**PLAIN, checkpoint_step_interval=2, checkpoints_total_limit=2, mirror_to=str(tmp_path / "away"))
    for _ in drive(trainer, until=7):
        pass
    said = trainer._saver.news(wait=True)
    said += [r["text"] for r in trainer.folder.read_history() if r["type"] == "notice"]
    assert [step for step in (2, 4, 6) if any(text.startswith(f"step {step} is whole at ") for text in said)] == [2, 4, 6]
    copy = tmp_path / "away" / trainer.folder.path.name
    assert steps_of(RunFolder(copy)) == [4, 6]
    shutil.rmtree(trainer.folder.path)
    resumed, whole = st.Trainer.resume(copy), bench.trainer(**PLAIN)
    updates(resumed, 2)
    updates(whole, 8)
    assert same_state(resumed.state_dict(), whole.state_dict())


def test_the_mirror_reaches_fsspec_addresses_and_survives_their_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory:// stands for any bucket; two runs of one name get two places; a refusal is news and not an end."""
    import fsspec

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "a.txt").write_text("one")
    mirror = Mirror(run, "memory://bucket/runs")
    mirror.copy("step 1", [run / "a.txt"])
    assert "step 1 is whole at " in mirror.news(wait=True)[0]
    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/bucket/runs/run/a.txt") == b"one"
    assert Mirror(run, "memory://bucket/runs").address == mirror.address
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    assert Mirror(other, "memory://bucket/runs").address.endswith("/run-2")
    monkeypatch.setattr(type(memory), "pipe_file", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
    mirror.copy("step 2", [run / "a.txt"])
    assert mirror.news(wait=True)[0].startswith("step 2 could not be copied to ")
    mirror.close()


@pytest.mark.parametrize(("address", "said"), [("nonsense://x", "cannot be reached"), ("/proc/nothing/x", "cannot be reached")])
def test_a_mirror_that_cannot_be_reached_is_one_message(tmp_path: Path, address: str, said: str) -> None:
    """Said when the run begins, not after the first hour."""
    with pytest.raises(ConfigError, match=said):
        Mirror(tmp_path, address)


# --- going on ----------------------------------------------------------------------------------------------------------


def test_the_certificate(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """Step, epoch and place, what was put back, the rate, what was passed over, and what differs."""
    trainer = bench.trainer(**PLAIN, use_ema=True)
    updates(trainer, 7)
    trainer.checkpoint()
    state = trainer.folder.checkpoints()[-1] / "state.json"
    facts = json.loads(state.read_text())
    facts["versions"]["torch"] = "1.0"
    state.write_text(json.dumps(facts))
    updates(trainer, 1)
    newest = Path(trainer.checkpoint().path)
    (newest / "optimizer.safetensors").unlink()
    resumed = st.Trainer.resume(trainer.folder.path)
    said = capsys.readouterr().out
    assert said.strip() == str(resumed.certificate)
    count = len(resumed.engine.weights)
    for line in (
        f"resumed after update 7 of 8, from {state.parent}",
        "epoch 2, batch 2 of 6; the order of the data is identical",
        f"put back: {count} adapter tensors, {3 * count} of the optimizer, {count} averages",
        "learning rate of the next update",
        "passed over: step-000008: ",
        f"differs: torch was 1.0 and is {torch.__version__.split('+')[0]}",
    ):
        assert line in said


def test_rate_and_length_change_on_resume_when_asked_and_stay_changed(bench: Workbench) -> None:
    """Both are in the history and in the next checkpoint; nothing else may change."""
    trainer = bench.trainer(**PLAIN, lr_scheduler="constant")
    updates(trainer, 2)
    trainer.checkpoint()
    longer = st.Trainer.resume(trainer.folder.path, learning_rate=5e-4, max_train_steps=12)
    assert longer.total == 12
    assert longer.step().learning_rate == 5e-4
    longer.checkpoint()
    again = st.Trainer.resume(trainer.folder.path)
    assert again.total == 12
    assert again.step().learning_rate == 5e-4
    rows = [r["value"] for r in again.folder.read_history() if r["type"] == "command"]
    assert rows == [{"learning_rate": 5e-4, "max_train_steps": 12}]
    with pytest.raises(ConfigError, match="lora_rank cannot change while training"):
        st.Trainer.resume(trainer.folder.path, lora_rank=4)
    with pytest.raises(ConfigError, match="max_train_steps: 1 updates is less than the 4 that are done"):
        again.checkpoint()
        st.Trainer.resume(trainer.folder.path, max_train_steps=1)


def test_a_checkpoint_can_be_chosen(bench: Workbench) -> None:
    """The path of an older checkpoint resumes there, and what came later no longer counts."""
    trainer = bench.trainer(**PLAIN)
    for _ in range(4):
        trainer.step()
        trainer.checkpoint()
    resumed = st.Trainer.resume(trainer.folder.checkpoint_folder / "step-000002")
    assert resumed.steps_done == 2
    updates(resumed, 1)
    resumed.checkpoint()
    assert st.Trainer.resume(trainer.folder.path).steps_done == 3
    counted = [r["step"] for r in resumed.folder.read_history() if r["type"] == "step"]
    assert counted == [1, 2, 3]


def test_new_prompts_in_mid_run(bench: Workbench) -> None:
    """A prompt that was not read is refused with the way to do it; then it is drawn, by the base model, too."""
    trainer = bench.trainer(validation_prompt="lock", max_train_steps=6, eval_loss_disable=True)
    for _ in drive(trainer, until=1):
        pass
    assert (
        "'a pot of stew' was not read by the text encoders yet; trainer.encode([...])"
        in trainer.set(validation_prompt="a pot of stew").refused
    )
    records = list(trainer.encode(["a pot of stew"]))
    assert records[0].type == "notice"
    assert "reading 1 new prompts loads the text encoders into" in getattr(records[0], "text", "")
    assert not trainer.set(validation_prompt=("a pot of stew", "lock")).refused
    rows = trainer.validate().rows
    assert [label for label, _ in rows][:2] == ["base model", "LoRA, step 1"]
    assert [picture is None for picture in rows[0][1]] == [False, False]
    assert [picture is None for picture in rows[1][1]] == [False, False]


# --- the guard's policies ----------------------------------------------------------------------------------------------


def poison(trainer: st.Trainer, number: int) -> None:
    """Make the latents of an update's batch no number."""
    read = trainer.engine.batches.__class__.part

    class Poisoned(trainer.engine.batches.__class__):  # type: ignore[name-defined, misc]
        def part(self, k: int, places: range) -> Any:
            batch = read(self, k, places)
            if k == number:
                batch.latent_BCHW[0] = float("nan")
            return batch

    trainer.engine.batches.__class__ = Poisoned


def test_stop_saves_what_was_good(bench: Workbench) -> None:
    """The message names the picture; the checkpoint is the state before it."""
    trainer, whole = bench.trainer(**PLAIN), bench.trainer(**PLAIN)
    poison(trainer, 3)
    with pytest.raises(st.TrainingError, match=r"step 4: the gradient is nan .* The update was not applied"):
        for _ in trainer.run():
            pass
    updates(whole, 3)
    assert same_state(st.Trainer.resume(trainer.folder.path).state_dict(), whole.state_dict())


def test_skip_leaves_the_batch_out_for_good_and_replays(bench: Workbench) -> None:
    """Eight updates without batch 3; the history says so; resume and replay leave it out as well, bit for bit."""
    trainer = bench.trainer(**PLAIN, guard_policy="skip")
    poison(trainer, 3)
    records = list(trainer.run())
    assert [r.step for r in records if r.type == "step"] == list(range(1, 9))
    assert trainer.state_dict()["skipped"] == [3]
    assert [r["value"] for r in trainer.folder.read_history() if r["type"] == "command"] == [[3]]
    resumed = st.Trainer.resume(trainer.folder.path)
    assert resumed.engine.next_batch == 9
    assert list(st.replay(trainer.folder.path))[-1].text == "replayed 8 updates: the adapter is the same, bit for bit"  # type: ignore[attr-defined]


def test_a_mad_rate_is_caught_and_rolled_back_until_it_learns(grown: Workbench) -> None:
    """A learning rate of 1: caught within 3 updates each time, halved until the run ends finite and better than the base."""
    trainer = grown.trainer(
        validation_prompt=(), max_train_steps=40, guard_policy="rollback", guard_rollbacks=12, learning_rate=1.0, lr_scheduler="cosine",
        num_eval_images=4, lr_warmup_steps=0,
    )  # fmt: skip
    start = trainer.state_dict()
    seen: list[Record] = []
    for record in trainer.run():
        seen.append(record)
        if record.type == "segment":
            assert same_state({**trainer.state_dict(), "updates": 0}, start) or trainer.steps_done
    first = next(i for i, r in enumerate(seen) if r.type == "segment")
    assert sum(r.type == "step" for r in seen[:first]) <= 3
    losses = {r.step: r.loss for r in seen if r.type == "eval"}  # type: ignore[attr-defined]
    rates = [r.value["learning_rate"] for r in seen if r.type == "command" and r.name == "set"]  # type: ignore[attr-defined]
    assert rates
    assert losses[40] < losses[0]
    counted = [r["step"] for r in trainer.folder.read_history() if r["type"] == "step"]
    assert counted == list(range(1, 41))
    assert st.Trainer.resume(trainer.folder.path).steps_done == 40


def test_rollback_ends_when_it_was_tried_often_enough(bench: Workbench) -> None:
    """guard_rollbacks is the number of times; then the run stops with the guard's message."""
    trainer = bench.trainer(**PLAIN, guard_policy="rollback", guard_rollbacks=2)
    velocity = trainer.engine.velocity
    trainer.engine.velocity = lambda *given: velocity(*given) * float("nan")
    with pytest.raises(st.TrainingError, match="step 1: the gradient is nan"):
        for _ in trainer.run():
            pass
    rates = [r["value"]["learning_rate"] for r in trainer.folder.read_history() if r["type"] == "command" and r["name"] == "set"]
    assert len(rates) == 2
    assert rates[1] == rates[0] / 2


def test_replay_obeys_every_command(bench: Workbench) -> None:
    """Rate, limit and length changed on the way, a resume in between: the same adapter, bit for bit; and another run is not."""
    trainer = bench.trainer(**PLAIN, lr_scheduler="cosine")
    updates(trainer, 2)
    trainer.set(learning_rate=3e-3, max_grad_norm=0.05)
    updates(trainer, 2)
    trainer.checkpoint()
    trainer = st.Trainer.resume(trainer.folder.path, max_train_steps=9)
    updates(trainer, 2)
    path = Path(trainer.checkpoint().path)
    assert list(st.replay(trainer.folder.path))[-1].text == "replayed 6 updates: the adapter is the same, bit for bit"  # type: ignore[attr-defined]
    rows = [line for line in trainer.folder.history.read_text().splitlines() if '"max_grad_norm"' not in line]
    trainer.folder.history.write_text("\n".join(rows) + "\n")
    assert "the adapter differs by up to" in list(st.replay(trainer.folder.path))[-1].text  # type: ignore[attr-defined]
    assert path.exists()


def test_nothing_is_left_running(bench: Workbench, tmp_path: Path) -> None:
    """A finished run with a mirror leaves no thread behind."""
    bench.cache(bench.config())
    before = {*threading.enumerate()}
    trainer = bench.trainer(**{**PLAIN, "max_train_steps": 5}, mirror_to=str(tmp_path / "away"))
    for _ in trainer.run():
        pass
    assert not [thread for thread in {*threading.enumerate()} - before if "mirror" in thread.name]
    assert (tmp_path / "away" / trainer.folder.path.name / "lora.safetensors").exists()
