"""The runner: one thread, one queue, one table of what may be asked when."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sd3tune.config import presets
from sd3tune.errors import CheckpointError, ConfigError, TrainingError
from sd3tune.records import (
    CacheRecord,
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    ImageRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    SegmentRecord,
    StepRecord,
)
from sd3tune.runner import Runner
from sd3tune.snapshot import LEGAL, TERMINAL, Snapshot

COMMANDS = ("start", "pause", "go_on", "stop", "validate", "set", "save", "rewind", "look")
PATIENCE = 10


class FakeTrainer:
    """Does what the runner needs of a trainer, and stops at any of its gates for as long as a test likes."""

    def __init__(self, folder: Path, *, steps: int = 5, seconds: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = presets.playground()
        self.folder = SimpleNamespace(path=folder)
        self.noise_levels = (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)
        self.cache = SimpleNamespace(plan=SimpleNamespace(steps=steps))
        self.steps_done, self.calls, self.threads = 0, list[Any](), set[str]()
        self.seconds, self.fails_at, self.error = seconds, 0, Exception("out of memory")
        self.draws_at, self.cannot_save = 0, False
        self.gates = {name: threading.Event() for name in ("update", "draw", "save")}
        self.reached = {name: threading.Event() for name in self.gates}
        for gate in self.gates.values():
            gate.set()

        self.total_memory_bytes, self.new_prompts, self.beats = 0, list[str](), 0

    def unread(self, settings: Any) -> list[str]:
        self.config.replace(**settings)
        return [text for text in settings.get("validation_prompt", ()) if text == "unread"]

    def encode(self, prompts: Any) -> Iterator[Record]:
        self.new_prompts += prompts
        yield NoticeRecord(step=self.steps_done, text="reading 1 new prompts")

    def beat(self) -> bool:
        self.beats += 1
        return True

    own, held = True, False

    @property
    def done(self) -> bool:
        return self.steps_done >= self.total

    def rewind(self, step: int) -> Record:
        if step % 2:
            raise CheckpointError(f"there is no checkpoint of step {step}")
        self.calls.append(("rewind", step))
        self.steps_done = step
        return SegmentRecord(step=step, from_step=step, parent=0, why="rewind")

    @property
    def total(self) -> int:
        return int(self.cache.plan.steps)

    def pass_gate(self, name: str) -> None:
        self.reached[name].set()
        assert self.gates[name].wait(PATIENCE)

    def run(self) -> Iterator[Record]:
        while self.steps_done < self.cache.plan.steps:
            self.threads.add(threading.current_thread().name)
            self.pass_gate("update")
            if self.fails_at == self.steps_done + 1:
                raise self.error
            self.steps_done += 1
            threading.Event().wait(self.seconds)
            yield step_record(self.steps_done, self.config.optimizer.learning_rate)
            if self.draws_at == self.steps_done:
                yield from self.validation()
        yield EvalRecord(step=self.steps_done, loss=0.5, images=1, sigmas=(0.5,), losses_by_sigma=(0.5,))

    def set(self, **settings: Any) -> CommandRecord:
        self.calls.append(("set", settings))
        try:
            self.config, refused = self.config.replace(**settings), ""
        except ConfigError as error:
            refused = "; ".join(error.problems)
        if max(settings.get("validation_guidance_skip_layers") or (0,)) >= 12:
            refused = "validation_guidance_skip_layers: beyond this model's blocks"
        return CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)

    def note(self, name: str) -> CommandRecord:
        self.calls.append(name)
        return CommandRecord(step=self.steps_done, name=name)

    def validation(self) -> Iterator[Record]:
        for sampler_step in (1, 2):
            yield PreviewRecord(step=self.steps_done, prompt="a <b>pot</b>", sampler_step=sampler_step, sampler_steps=2)
            self.pass_gate("draw")
        yield ImageRecord(step=self.steps_done, prompt="a pot", path="0.png", seed=0, width=8, height=8, guidance=3.0, skip_layers=())

    def grid(self) -> Any:
        return SimpleNamespace(image=lambda: Image.new("RGB", (8, 8), (self.steps_done, 0, 0)))

    def checkpoint(self) -> CheckpointRecord:
        self.pass_gate("save")
        if self.cannot_save:
            raise CheckpointError("the disk is full; make room")
        self.calls.append("checkpoint")
        return CheckpointRecord(step=self.steps_done, path=f"checkpoints/step-{self.steps_done:06d}", tensors=1)

    def parting(self) -> Iterator[Record]:
        self.calls.append("parting")
        yield NoticeRecord(step=self.steps_done, text="step 2 is whole elsewhere")

    def save(self, path: Path) -> int:
        self.calls.append(("save", path.name))
        return 1


def step_record(step: int, rate: float, loss: float | None = None) -> StepRecord:
    return StepRecord(
        step=step, loss=1 / step if loss is None else loss, losses=(), sigmas=(), items=(), learning_rate=rate, grad_norm=1.0, seconds=0.5,
        images_per_second=2.0, peak_memory_bytes=0,
    )  # fmt: skip


@pytest.fixture
def fake(tmp_path: Path) -> FakeTrainer:
    return FakeTrainer(tmp_path / "run")


# --- the table -----------------------------------------------------------------------------------------------------------


def bring_to(state: str, fake: FakeTrainer) -> tuple[Runner, Callable[[], None]]:
    """A runner that stands still in a state, and what lets it go on."""
    ready = threading.Event()

    def make() -> Any:
        assert ready.wait(PATIENCE)
        return fake

    def let_go() -> None:
        for gate in (ready, *fake.gates.values()):
            gate.set()

    runner = Runner(make)
    if state == "idle":
        return runner, let_go
    runner.start()
    if state == "preparing":
        return runner, let_go
    asked = {"paused": "pause", "stopped": "stop", "stopping": "stop"}
    if state in asked:
        runner.send(asked[state])
    fake.draws_at = 1 if state == "validating" else 0
    fake.fails_at = 1 if state == "failed" else 0
    stuck = {"training": "update", "validating": "draw", "stopping": "save"}
    if state in stuck:
        fake.gates[stuck[state]].clear()
    ready.set()
    runner._changed.acquire()
    runner._changed.wait_for(lambda: runner.snapshot.state == state, PATIENCE)
    runner._changed.release()
    if state in stuck:
        assert fake.reached[stuck[state]].wait(PATIENCE)
    return runner, let_go


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", LEGAL)
def test_a_command_is_refused_in_words_exactly_when_the_table_says_so(state: str, command: str, fake: FakeTrainer) -> None:
    runner, let_go = bring_to(state, fake)
    assert runner.snapshot.state == state
    runner.send(
        command, **{"set": {"learning_rate": 0.25}, "rewind": {"step": 0}, "look": {"work": lambda trainer: iter(())}}.get(command, {})
    )
    runner.send("no such command")
    let_go()
    with runner._changed:
        assert runner._changed.wait_for(lambda: any("no such command: " in line for line in runner.snapshot.log), PATIENCE)
    refused = [line for line in runner.snapshot.log if f": {command.replace('_', ' ')}: not possible while" in line]
    assert bool(refused) == (command not in LEGAL[state])
    assert len(refused) <= 1
    runner.send("stop")
    with runner._changed:
        assert runner._changed.wait_for(lambda: not runner.snapshot.live, PATIENCE)


def test_the_table_knows_every_state_and_only_known_commands() -> None:
    assert set(LEGAL) > TERMINAL
    assert set().union(*LEGAL.values()) == set(COMMANDS)
    assert all(not LEGAL[state] for state in TERMINAL)


# --- what commands do ----------------------------------------------------------------------------------------------------


def test_a_run_ends_finished_with_every_update_in_the_snapshot(fake: FakeTrainer) -> None:
    runner = Runner(fake)  # type: ignore[arg-type]
    runner.start()
    end = runner.wait(PATIENCE)
    assert (end.state, end.step, end.total_steps) == ("finished", 5, 5)
    assert [(s.first, s.low, s.high) for s in end.loss.stretches] == [(k, 1 / k, 1 / k) for k in range(1, 6)]
    assert end.evals == ((5, 0.5),)
    assert end.seconds_left == 0


def test_a_snapshot_does_not_change_when_the_run_goes_on(fake: FakeTrainer) -> None:
    fake.cache.plan.steps, fake.seconds = 200, 0.001
    runner = Runner(lambda: fake)  # type: ignore[arg-type,return-value]
    runner.start()
    early = runner.wait(PATIENCE, until=3)
    seen = len(early.loss.stretches)
    runner.wait(PATIENCE, until=50)
    assert len(early.loss.stretches) == seen == early.count < runner.snapshot.count
    runner.send("stop")
    runner.wait(PATIENCE)


def test_nothing_is_trained_while_paused_and_set_and_save_still_work(fake: FakeTrainer) -> None:
    runner, _ = bring_to("paused", fake)
    runner.send("set", learning_rate=0.5)
    runner.send("save")
    runner.send("validate")
    now = runner.wait(PATIENCE, until=lambda now: now.pictures == 1 and now.state == "paused")
    assert (now.step, now.config and now.config.optimizer.learning_rate) == (0, 0.5)
    assert fake.calls == ["pause", ("set", {"learning_rate": 0.5}), "checkpoint", ("save", "lora-step-000000.safetensors"), "validate"]
    runner.send("go_on")
    end = runner.wait(PATIENCE)
    assert (end.state, end.step, end.learning_rate) == ("finished", 5, 0.5)


def test_set_reaches_the_next_update_and_is_listed(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    runner.send("set", learning_rate=0.5, validation_guidance_skip_layers=(7, 8))
    let_go()
    end = runner.wait(PATIENCE)
    assert end.changes == ((1, "learning_rate = 0.5, validation_guidance_skip_layers = (7, 8)"),)
    assert end.learning_rate == 0.5


def test_what_the_trainer_refuses_is_told_and_the_run_goes_on(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    runner.send("set", learning_rate=-1.0)
    let_go()
    end = runner.wait(PATIENCE)
    assert (end.state, end.changes, end.refusals) == ("finished", (), 1)
    assert "learning_rate: -1.0 is not allowed" in end.refused
    assert any(end.refused in line for line in end.log)


def test_stop_finishes_the_update_then_saves_checkpoint_and_adapter(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    runner.send("stop")
    let_go()
    end = runner.wait(PATIENCE)
    assert (end.state, end.step) == ("stopped", 1)
    assert fake.calls == ["checkpoint", ("save", "lora-step-000001.safetensors"), "stop", "parting"]
    assert any(str(fake.folder.path / "lora-step-000001.safetensors") in line for line in end.log)


def test_a_stop_that_cannot_save_loses_nothing(fake: FakeTrainer) -> None:
    runner, _ = bring_to("paused", fake)
    fake.cannot_save = True
    runner.send("stop")
    now = runner.wait(PATIENCE, until=lambda now: now.refusals == 1)
    assert now.refused == "stop: the disk is full; make room"
    fake.cannot_save = False
    runner.send("stop")
    assert runner.wait(PATIENCE).state == "stopped"


def test_pause_while_drawing_takes_effect_when_the_pictures_are_there(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("validating", fake)
    runner.send("pause")
    let_go()
    now = runner.wait(PATIENCE, until="paused")
    assert (now.pictures, now.grid_step) == (1, 1)
    runner.send("stop")
    runner.wait(PATIENCE)


# --- threads and failures ------------------------------------------------------------------------------------------------


def test_only_one_thread_trains_and_it_has_its_name(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    for _ in range(5):
        runner.start()
    assert [t.name for t in threading.enumerate()].count("sd3tune-trainer") == 1
    let_go()
    runner.wait(PATIENCE)
    assert fake.threads == {"sd3tune-trainer"}


def test_attach_finds_the_live_run_of_a_folder_and_no_other(fake: FakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.gates["update"].clear()
    first = Runner.attach(tmp_path / "x", lambda: fake)  # type: ignore[arg-type,return-value]
    unstarted = Runner.attach(tmp_path / "x", lambda: fake)  # type: ignore[arg-type,return-value]
    first.start()
    monkeypatch.chdir(tmp_path)
    assert Runner.attach("x", lambda: fake) is first  # type: ignore[arg-type,return-value]
    assert Runner.attach("y", lambda: fake) is not first  # type: ignore[arg-type,return-value]
    unstarted.start()
    assert unstarted.snapshot.state == "idle"
    assert "another run into the same folder" in unstarted.snapshot.refused
    fake.gates["update"].set()
    first.wait(PATIENCE)
    assert Runner.attach("x", lambda: fake) is not first  # type: ignore[arg-type,return-value]


def test_the_registry_keeps_no_runner_alive(fake: FakeTrainer, tmp_path: Path) -> None:
    runner = Runner.attach(tmp_path / "x", lambda: fake)  # type: ignore[arg-type,return-value]
    runner.start()
    runner.wait(PATIENCE)
    gone = weakref.ref(runner)
    del runner
    wait_for_threads()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RuntimeError("out of memory"), TrainingError, "RuntimeError: out of memory"),
        (TrainingError("the loss is not a number"), TrainingError, "the loss is not a number"),
        (ConfigError(["a: b", "c: d"]), ConfigError, "the configuration: 2 problems\n  - a: b\n  - c: d"),
        (KeyboardInterrupt(), TrainingError, "KeyboardInterrupt: "),
    ],
)
def test_an_exception_in_the_worker_fails_the_run_and_wait_raises_it(error: Exception, kind: type, text: str, fake: FakeTrainer) -> None:
    fake.fails_at, fake.error = 3, error
    runner = Runner(lambda: fake)  # type: ignore[arg-type,return-value]
    runner.start()
    for until in (None, 4, "paused"):
        with pytest.raises(kind) as caught:
            runner.wait(PATIENCE, until=until)
        assert str(caught.value) == text
        assert getattr(caught.value, "problems", None) == getattr(error, "problems", None)
    assert (runner.snapshot.state, runner.snapshot.error, runner.snapshot.step) == ("failed", text, 2)
    assert fake.calls == ["parting"], "what was saved is copied before the end is told"
    assert any("step 2 is whole elsewhere" in line for line in runner.snapshot.log)
    assert "Traceback" in (fake.folder.path / "train.log").read_text()


@pytest.mark.parametrize("end", ["failed", "stopped", "finished"])
def test_when_the_run_ends_nothing_holds_the_trainer(end: str, tmp_path: Path) -> None:
    made: list[weakref.ref[FakeTrainer]] = []

    def make() -> Any:
        fake = FakeTrainer(tmp_path / "run")
        fake.fails_at, fake.error = (2, RuntimeError("x")) if end == "failed" else (0, RuntimeError())
        made.append(weakref.ref(fake))
        return fake

    runner = Runner(make)
    runner.start()
    if end == "stopped":
        runner.send("stop")
    if end == "failed":
        with pytest.raises(TrainingError):
            runner.wait(PATIENCE)
    else:
        runner.wait(PATIENCE)
    assert runner.snapshot.state in TERMINAL
    assert made[0]() is None


def test_a_wait_that_cannot_end_well_ends_in_an_error(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    with pytest.raises(TimeoutError, match=r"training at step 0 of 5"):
        runner.wait(0.01)
    let_go()
    runner.wait(PATIENCE)
    with pytest.raises(TrainingError, match="would never end"):
        runner.wait(PATIENCE, until="paused")
    with pytest.raises(TrainingError, match="would never end"):
        Runner(lambda: fake).wait(PATIENCE)  # type: ignore[arg-type,return-value]


def test_fifty_runs_leave_no_thread_behind(tmp_path: Path) -> None:
    for number in range(50):
        fake = FakeTrainer(tmp_path / "run", steps=10_000)
        runner = Runner.attach(tmp_path / "run", lambda fake=fake: fake)
        runner.start()
        runner.wait(PATIENCE, until=number % 3)
        runner.send("pause")
        runner.send("go_on")
        runner.send("stop")
        end = runner.wait(PATIENCE)
        assert (end.state, end.refusals) == ("stopped", 0)
    wait_for_threads()


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "sd3tune-trainer":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_the_runner_needs_no_torch() -> None:
    code = "import sys, sd3tune.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_log_is_bounded() -> None:
    runner = Runner(lambda: None)  # type: ignore[arg-type,return-value]
    for _ in range(300):
        runner.send("pause")
    assert (len(runner.snapshot.log), runner.snapshot.refusals) == (200, 300)
    assert isinstance(runner.snapshot, Snapshot)


def test_two_hundred_runs_are_started_paused_and_stopped_and_leave_no_thread(tmp_path: Path) -> None:
    for number in range(200):
        runner = Runner.attach(tmp_path / "same", lambda: FakeTrainer(tmp_path / "run", steps=10_000_000))  # type: ignore[arg-type,return-value]
        for name in ("start", "pause", "go_on", "pause", "stop")[: 5 if number % 2 else 4]:
            runner.send(name)
        if not number % 2:
            runner.send("stop")
        assert runner.wait(PATIENCE).state == "stopped"
        assert runner.answered
    alive = [thread for thread in threading.enumerate() if thread.name == "sd3tune-trainer"]
    for thread in alive:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in alive)


def test_what_it_takes_to_make_a_trainer_is_shown_and_can_be_stopped(fake: FakeTrainer) -> None:
    """Encoding is records before there is a trainer: told in the message, and left between two of them."""
    gate, closed = threading.Event(), threading.Event()

    def make() -> Any:
        try:
            for step in range(1, 4):
                yield CacheRecord(step=step, total=3, kind="latents", key="k", name="a.png", reused=False)
                if step == 2:
                    assert gate.wait(PATIENCE)
            return fake
        finally:
            closed.set()

    runner = Runner(make)
    runner.start()
    runner.wait(PATIENCE, until=lambda now: now.message == "encoding, 2 of 3")
    runner.send("stop")
    gate.set()
    assert runner.wait(PATIENCE).state == "stopped"
    assert closed.is_set()
    assert fake.steps_done == 0
    gate.clear()
    again = Runner(make)
    again.send("start")
    again.send("set", learning_rate=0.5)  # kept until there is a trainer
    gate.set()
    end = again.wait(PATIENCE)
    assert (end.state, fake.calls[0]) == ("finished", ("set", {"learning_rate": 0.5}))


def test_prompts_that_nobody_encoded_are_read_first(fake: FakeTrainer) -> None:
    runner, let_go = bring_to("training", fake)
    runner.send("set", validation_prompt=("lock", "unread"))
    let_go()
    end = runner.wait(PATIENCE)
    assert fake.new_prompts == ["unread"]
    assert end.steering == ((1, {"validation_prompt": ("lock", "unread")}),)
    assert any("reading 1 new prompts" in line for line in end.log)
    assert end.began_with is not None
    assert end.began_with.validation.validation_prompt != ("lock", "unread")


def test_running_out_of_memory_is_told_apart(fake: FakeTrainer) -> None:
    import torch

    fake.fails_at, fake.error = 2, torch.OutOfMemoryError("CUDA out of memory")
    runner = Runner(fake)  # type: ignore[arg-type]
    runner.start()
    with pytest.raises(TrainingError, match="OutOfMemoryError"):
        runner.wait(PATIENCE)
    assert runner.snapshot.out_of_memory


def test_an_error_in_a_command_reaches_the_run_which_saves_itself(fake: FakeTrainer) -> None:
    """Whatever it is, and before the runner says that it failed."""
    saved: list[BaseException] = []
    run = fake.run

    def guarded() -> Generator[Record, None, None]:
        try:
            yield from run()
        except RuntimeError as error:
            saved.append(error)
            raise

    def no_thread(trainer: FakeTrainer) -> Iterator[Record]:
        raise RuntimeError("cannot schedule new futures")
        yield

    fake.run = guarded  # type: ignore[method-assign]
    fake.gates["update"].clear()
    runner = Runner(fake)  # type: ignore[arg-type]
    runner.start()
    assert fake.reached["update"].wait(PATIENCE)
    runner.send("look", work=no_thread)
    fake.gates["update"].set()
    with pytest.raises(TrainingError, match="cannot schedule new futures"):
        runner.wait(PATIENCE)
    assert [str(error) for error in saved] == ["cannot schedule new futures"]
    assert runner.snapshot.state == "failed"
