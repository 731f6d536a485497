"""Several processes are one: the same batches, losses and adapter, and one of them writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import several
import torch
from conftest import Workbench, write_miniature
from fresh import Fresh

import sd3tune as st
from sd3tune import panels, playground
from sd3tune.control import TerminatedError, interrupts_deferred
from sd3tune.launching import _own
from sd3tune.processes import Processes, join
from sd3tune.run_folder import RunFolder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures with masks (so that the last batch of two is short), four of regularisation, two held out."""
    from PIL import Image

    root = tmp_path_factory.mktemp("several")
    names = sorted(p.stem for p in (playground.PICTURES / "train").glob("*.png"))
    for part, chosen in (("train", names[:7]), ("class", names[10:14]), ("held", names[20:22])):
        (root / part).mkdir()
        for name in chosen:
            for end in (".png", ".txt"):
                shutil.copy(playground.PICTURES / "train" / f"{name}{end}", root / part)
    (root / "masks").mkdir()
    for number, name in enumerate(names[:7]):
        with Image.open(root / "train" / f"{name}.png") as picture:
            width, height = picture.size
        mask = Image.new("L", (width, height), 60)
        mask.paste(255, (16 * number % 64, 16, width - 20, height - 16))
        mask.save(root / "masks" / f"{name}.png")
    write_miniature(root / "miniature")
    square = "resolution: 64, crop: true, crop_aspect: square"
    (root / "datasets.yaml").write_text(
        f"- {{id: some, instance_data_dir: train, {square}, conditioning_data: masks}}\n"
        "- {id: masks, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: masks}\n"
        f"- {{id: class, instance_data_dir: class, {square}, is_regularisation_data: true}}\n"
        f"- {{id: held, instance_data_dir: held, {square}, dataset_type: eval}}\n"
    )
    return root


def settings(data: Path, **more: Any) -> dict[str, Any]:
    quick: dict[str, Any] = {
        "model_flavour": None, "pretrained_model_name_or_path": str(data / "miniature"), "lora_rank": 4, "max_train_steps": 20,
        "lr_warmup_steps": 3, "lr_scheduler": "constant_with_warmup", "learning_rate": 4e-4, "gradient_accumulation_steps": 2,
        "validation_prompt": (), "eval_timesteps": 2, "num_eval_images": 2, "checkpoint_step_interval": 1000,
        "cache_dir": str(data / "cache"), "output_dir": str(data / "runs" / "run"),
    }  # fmt: skip
    return {**quick, **more}


def write_job(folder: Path, data: Path, config: st.RunConfig, **more: Any) -> Path:
    folder.mkdir()
    leaves = {k: v for k, v in config.leaves().items() if v is not None}
    job = folder / "job.json"
    job.write_text(json.dumps({"settings": leaves, "data": str(data / "datasets.yaml"), **more}))
    return job


ALL: dict[str, Any] = {
    "guard_policy": "skip", "caption_dropout_mode": "per_encoder", "caption_dropout_probability": 0.3, "input_perturbation": 0.05,
    "latent_draw": "sample", "masked_loss_probability": 0.7, "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 0.5,
}  # fmt: skip
"""Everything that is drawn for an image."""


def told(data: Path, name: str, count: int, updates: int, *, launched: bool = False) -> list[dict[str, Any]]:
    """Train with so many processes, which torchrun may start; what each of them wrote down."""
    config = st.presets.playground(**settings(data, num_processes=count, train_batch_size=2 // count, max_train_steps=updates, **ALL))
    job = write_job(data / f"{name}-{updates}", data, config, poison=14, slower_from=5)
    if count == 1:
        several.main(job)
    elif launched:
        done = subprocess.run(
            [*TORCHRUN, several.__file__, str(job)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        shared = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
        ranks = [(rank, {**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}) for rank in range(count)]
        started = [Fresh([several.__file__, str(job)], job.with_name(f"said-{rank}.txt"), env) for rank, env in ranks]
        for process in started:
            assert process.wait() == 0, process.output
    return [json.loads(job.with_name(f"told-{rank}-of-{count}.json").read_text()) for rank in range(count)]


def adapter(folder: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = RunFolder(Path(folder)).read_checkpoint()["adapter"]
    return state


def flat(rows: list[Any]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in (row if isinstance(row, list) else [row])])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("updates", "launched"), [(9, False), pytest.param(20, True, marks=pytest.mark.full)])
def test_two_processes_are_one(data: Path, updates: int, launched: bool) -> None:
    """2 x 1 against 1 x 2 over 9 and 20 updates of 2 batches: the same losses and adapter, to 1e-5.

    With masks, regularisation, rollouts, short batches, a rate that a person lowers after update 5, and a poisoned picture that the guard
    skips.
    """
    first, second = told(data, "two", 2, updates, launched=launched)
    (alone,) = told(data, "one", 1, updates)
    assert (first["count"], second["count"], alone["count"]) == (2, 2, 1)
    assert first["images"] + second["images"] == alone["images"]
    assert min(first["images"], second["images"]) > 0.4 * alone["images"], "both did their share"
    assert first["images"] != second["images"], "a short batch had nothing for the second"
    assert first["losses"] == second["losses"]
    assert first["digest"] == second["digest"], "both hold the same adapter, bit for bit"
    assert first["items"] == alone["items"], "the same pictures in the same order"
    assert first["rates"] == second["rates"] == alone["rates"]
    assert first["rates"][5] == first["rates"][4] / 4, "what a person asks of the main process reaches both at the same update"
    assert first["extra"] == second["extra"] == alone["extra"]
    assert sum(first["extra"]) > 0, "some pictures were rolled out"
    assert first["skipped"] == second["skipped"] == alone["skipped"] == [7], "the guard's verdict, too"
    for name in ("losses", "norms"):
        assert torch.allclose(flat(first[name]), flat(alone[name]), rtol=1e-5, atol=1e-6), name
    ours, theirs = adapter(first["folder"]), adapter(alone["folder"])
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert first["folder"] == second["folder"], "there is one run folder"
    steps = [row for row in RunFolder(Path(first["folder"])).read_history() if row["type"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, updates + 1)), "one process wrote the history"


@contextmanager
def running(data: Path, name: str, **more: Any) -> Iterator[tuple[subprocess.Popen[str], RunFolder]]:
    """A long run of two processes by the command line, after its third update; and its folder."""
    given = settings(data, output_dir=str(data / "runs" / name), max_train_steps=5000, **more)
    run = data / f"{name}.yaml"
    st.presets.playground(**given).save(run)
    command = [*TORCHRUN, "-m", "sd3tune", "train", str(run), "--data", str(data / "datasets.yaml"), "--set", "num_processes=2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = RunFolder(data / "runs" / name)
    try:
        patience = time.monotonic() + 240
        while not folder.history.exists() or folder.history.read_text().count('"type": "step"') < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < patience
            time.sleep(0.1)
        yield process, folder
    finally:
        process.kill()


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process of one rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.full
def test_a_killed_process_ends_the_others_with_a_message(data: Path) -> None:
    """SIGKILL of the second process: within 30 s all is over, the reason is said, and the state is saved and resumes."""
    with running(data, "killed") as (process, folder):
        os.kill(worker(process, 1), signal.SIGKILL)
        started = time.monotonic()
        said, _ = process.communicate(timeout=60)
        assert time.monotonic() - started < 30
    assert process.returncode != 0
    assert re.search(r"another process is gone|interrupted after step \d+; saved", said), said  # whichever the main process saw first
    assert re.search(r"Root Cause.*rank +: 1 .*\(SIGKILL\)", said, re.DOTALL), said
    steps = [row["step"] for row in folder.read_history() if row["type"] == "step"]
    assert folder.read_checkpoint()["updates"] == steps[-1], "the main process saved its last update"


@pytest.mark.full
def test_sigterm_saves_and_another_number_of_processes_goes_on(data: Path) -> None:
    """SIGTERM of the launcher: saved after a whole update. One process resumes it with batches of the same pictures."""
    with running(data, "ended") as (process, folder):
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=90)
    assert re.search(r"interrupted after step \d+; saved", said), said
    step = folder.read_checkpoint()["updates"]
    assert [row["step"] for row in folder.read_history() if row["type"] == "step"][-1] == step
    assert goes_on_alone(folder) == step + 1


def goes_on_alone(folder: RunFolder) -> int:
    """The next update of a run of two processes, by one: with batches of the same pictures."""
    trainer = st.Trainer.resume(folder.path)
    assert (trainer.processes.count, trainer.config.run.num_processes, trainer.config.data.train_batch_size) == (1, 1, 8)
    assert "processes was 2 and is 1" in str(trainer.certificate)
    step = trainer.steps_done
    assert trainer.step().step == step + 1
    return step + 1


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_panel_follows_and_steers_other_processes(data: Path, count: int) -> None:
    """Started, watched, changed, paused and stopped like a run in the kernel; all of it stands in the run's own history, and one
    process goes on with it.
    """
    config = st.presets.playground(**settings(data, output_dir=str(data / "runs" / f"launched{count}"), max_train_steps=5000))
    cache = st.CacheBuilder(st.plan(st.discover(data / "datasets.yaml"), config), st.encoders(config)).build()
    panel = panels.TrainingPanel(config, cache, make=panels.in_processes(data / "datasets.yaml", count))
    panel.start()
    panel.wait(240, until=4)
    panel.runner.send("set", learning_rate=2e-4)
    panel.wait(60, until=lambda now: now.learning_rate == 2e-4)
    panel.press("pause")
    panel.wait(60, until="paused")
    folder, patience = RunFolder(data / "runs" / f"launched{count}"), time.monotonic() + 60
    while '"pause"' not in folder.history.read_text() and time.monotonic() < patience:
        time.sleep(0.1)
    panel.press("go_on")
    panel.wait(60, until=lambda now: now.state == "training" and now.step > 6)
    panel.press("stop")
    assert panel.wait(90).state == "stopped"
    history = folder.read_history()
    commands = [(row["name"], row["refused"]) for row in history if row["type"] == "command"]
    assert [row for row in commands if row[0] != "save"] == [("set", ""), ("pause", ""), ("go_on", ""), ("stop", "")]
    assert folder.read_checkpoint()["updates"] == [row["step"] for row in history if row["type"] == "step"][-1]
    assert st.RunConfig.load(folder.config).run.num_processes == count
    if count == 2:
        goes_on_alone(folder)


def test_settings_by_a_file_are_taken_or_refused_in_words(bench: Workbench) -> None:
    """SET holds YAML; what is no setting, not live or not YAML changes nothing and is said."""
    trainer = bench.trainer(max_train_steps=8, validation_prompt=(), eval_loss_disable=True)
    asked = ["learning_rate: 2e-4", "lora_rank: 3", "learning_rates: 1", "a: [", "just words", "validation_prompt:", "self: 1", ""]
    for record in trainer.run():
        if isinstance(record, st.StepRecord) and asked:
            (trainer.folder.path / "SET").write_text(asked.pop(0))
    rows = [row for row in trainer.folder.read_history() if row["type"] == "command"]
    assert [bool(row["refused"]) for row in rows] == [False, *[True] * 6]
    words = ["", "lora_rank cannot change", "learning_rates", "not valid YAML", "NAME: VALUE", "validation_prompt", "self"]
    for row, said in zip(rows, words, strict=True):
        assert said in row["refused"]
    assert trainer.config.optimizer.learning_rate == 2e-4


def test_a_launch_that_fails_says_why(data: Path) -> None:
    """The last words of what was started are in the error."""
    run = data / "wrong.yaml"
    st.presets.playground(**settings(data)).save(run)
    launched = st.launch(run, data / "nowhere.yaml")
    with pytest.raises(st.TrainingError, match=r"exit code 1.*\n.*nowhere\.yaml"):
        list(launched)


def test_a_launchers_report_is_not_the_runs_last_words() -> None:
    """What torchrun says of itself before and after is left out."""
    said = [
        "W1126 16:00:00.000 1 torch/distributed/run.py:774] Setting OMP_NUM_THREADS", "ConfigError: run.yaml: 1 problem",
        "  - learning_rates: no such setting", "E1126 16:00:01.000 1 torch/distributed/elastic/multiprocessing/api.py:984] failed",
        'File "<frozen runpy>", line 198', '  File "/x/torch/distributed/run.py", line 1', "torch.distributed.elastic.ChildFailedError:",
    ]  # fmt: skip
    assert _own(said) == ["ConfigError: run.yaml: 1 problem", "  - learning_rates: no such setting"]


@pytest.mark.parametrize(("outer", "fails"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_signal_is_never_lost(outer: bool, fails: bool) -> None:
    """It takes effect at the end of the outermost block, also when that ends with an error."""
    done = []
    with pytest.raises(TerminatedError), interrupts_deferred() if outer else nullcontext():
        with suppress(ValueError), interrupts_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inside")
            if fails:
                raise ValueError
        assert outer
        done.append("outside")
    assert done == ["inside", "outside"][: 1 + outer]


class Told(Processes):
    """A main process that writes down what it tells another one."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "orders", [])

    def told(self, value: Any) -> Any:
        self.orders.append(value)  # type: ignore[attr-defined]
        return value


def test_what_is_asked_last_is_told_with_the_stop(bench: Workbench) -> None:
    """A setting after the last update of ``run(n)`` reaches the others; broken loops and errors tell them to stop, once."""
    trainer = bench.trainer(max_train_steps=20, validation_prompt=(), eval_loss_disable=True)
    told = trainer.processes = Told()
    for record in trainer.run(2):
        if record.step == 2 and record.type == "step":
            trainer.set(learning_rate=5e-5)
    orders = told.orders  # type: ignore[attr-defined]
    assert [(bool(order.settings), order.stop) for order in orders] == [(False, False), (False, False), (True, True)]
    assert orders[-1].settings == ({"learning_rate": 5e-5},)
    orders.clear()
    for record in trainer.run():
        if record.step == 3:
            break
    assert [order.stop for order in orders] == [False, True]
    orders.clear()
    with pytest.raises(KeyboardInterrupt):
        for record in trainer.run():
            if record.step == 4:
                raise KeyboardInterrupt
    assert [order.stop for order in orders][:1] == [False]


@pytest.mark.parametrize(
    ("environment", "wanted", "said"),
    [
        ({}, 2, "num_processes is 2, and 1 started; start them with: torchrun --nproc_per_node 2"),
        ({"WORLD_SIZE": "4"}, 2, "num_processes is 2, and 4 started"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "DeepSpeed is not used"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "FSDP is not used"),
    ],
)
def test_what_was_not_started_as_asked_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: int | None, said: str
) -> None:
    """Fewer or more processes than num_processes, and launchers that split states."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(st.ConfigError, match=re.escape(said)):
        join(wanted)


def test_one_process_is_alone(bench: Workbench) -> None:
    """Without a launcher nothing is connected, and a run file for two is refused with the command that starts two."""
    assert join() == Processes()
    config = bench.config(num_processes=2)
    with pytest.raises(st.ConfigError, match="torchrun --nproc_per_node 2"):
        st.Trainer(config, bench.cache(config))


def test_places_share_out_every_image_once() -> None:
    """For any number of images and processes: each image once, shares that differ by at most one."""
    for count in range(1, 6):
        for images in range(9):
            shares = [Processes(rank, count).places(images) for rank in range(count)]
            assert sorted(place for share in shares for place in share) == list(range(images))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
