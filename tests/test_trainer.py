"""The run as a whole: resume is the same run, kills lose nothing, steering is written down."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from fresh import Fresh

import sd3tune as st
from sd3tune.config.optimizers import OPTIMIZERS
from sd3tune.history import follow_segments, read_lines
from sd3tune.run_folder import RunFolder

KEYS = ("step", "loss", "losses", "sigmas", "items", "learning_rate", "grad_norm")


def updates(trainer: st.Trainer, n: int) -> list[dict[str, Any]]:
    """What n updates did, without the times."""
    return [{key: getattr(r, key) for key in KEYS} for r in (trainer.step() for _ in range(n))]


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bitwise equality of adapter, moments and step number."""
    parts = all(
        one[part].keys() == other[part].keys() and all(torch.equal(one[part][k], other[part][k]) for k in one[part])
        for part in ("adapter", "optimizer")
    )
    return parts and one["updates"] == other["updates"]


@pytest.mark.parametrize("ways", [((4, 4), (3, 2, 3)), pytest.param(((15, 15), (10, 10, 10)), marks=pytest.mark.full)])
def test_a_resumed_run_is_the_run_it_resumes(bench: Workbench, ways: tuple[tuple[int, ...], ...]) -> None:
    """8 updates, which is more than an epoch, = 4 + resume + 4 = 3 + resume + 2 + resume + 3, and 30 = 15 + 15 = 10 + 10 + 10: adapter,
    moments, losses and data order, bit for bit.
    """
    whole = bench.trainer(lora_dropout=0.1)
    expected = updates(whole, sum(ways[0]))
    assert sum(ways[0]) > whole.cache.plan.updates_per_epoch
    for parts in ways:
        trainer = bench.trainer(lora_dropout=0.1)
        got: list[dict[str, Any]] = []
        for number, count in enumerate(parts):
            if number:
                trainer.checkpoint()
                trainer = st.Trainer.resume(trainer.folder.path)
            got += updates(trainer, count)
        assert got == expected
        assert same_state(trainer.state_dict(), whole.state_dict())


KILLED = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
import sd3tune as st
config = st.RunConfig.load(sys.argv[2])
cache = st.CacheBuilder(st.plan(st.discover(sys.argv[3]), config), st.encoders(config)).build()
for record in st.Trainer(config, cache).run():
    pass
"""


RULES = [name for name in OPTIMIZERS if not OPTIMIZERS[name].paged]
"""Update rules that run on a CPU."""


@pytest.mark.parametrize(
    ("delay", "more"),
    [
        (0.0, {"checkpoint_step_interval": 2, "max_train_steps": 6}),
        *(pytest.param(delay, {}, marks=pytest.mark.full) for delay in (0.0, 0.35, 0.9)),
        *(  # six passes an update: a kill nearly always falls between two of them
            pytest.param(0.5, {"optimizer": name, "gradient_accumulation_steps": 6, "use_ema": True}, marks=pytest.mark.full)
            for name in RULES
        ),
    ],
)
def test_kill_nine_loses_nothing_before_the_last_checkpoint(bench: Workbench, tmp_path: Path, delay: float, more: dict[str, Any]) -> None:
    """A run killed with SIGKILL after its first checkpoint resumes there and ends as an undisturbed one, with every update rule."""
    settings: dict[str, Any] = {"checkpoint_step_interval": 4, "max_train_steps": 16, "validation_prompt": (), "eval_loss_disable": True}
    settings |= more
    if more.get("optimizer") in ("prodigy", "schedulefree"):
        settings |= {"learning_rate": 1.0 if more["optimizer"] == "prodigy" else 1e-3, "lr_scheduler": "constant"}
    config = bench.config(**settings)
    bench.cache(config)
    config.save(tmp_path / "run.yaml")
    words = ["-c", KILLED, str(torch.get_num_threads()), str(tmp_path / "run.yaml"), str(bench.datasets)]
    child = Fresh(words, tmp_path / "said.txt")
    folder = RunFolder(Path(config.run.output_dir))
    deadline = time.monotonic() + 120
    while not folder.checkpoints() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    if child.poll() is None:
        child.signal(signal.SIGKILL)
    child.wait()
    trainer = st.Trainer.resume(folder.path)
    assert trainer.steps_done % settings["checkpoint_step_interval"] == 0
    for _ in trainer.run():
        pass
    undisturbed = bench.trainer(**settings)
    for _ in undisturbed.run():
        pass
    assert same_state(trainer.state_dict(), undisturbed.state_dict())
    counted = [row["step"] for row in trainer.folder.read_history() if row["type"] == "step"]
    assert counted == list(range(1, settings["max_train_steps"] + 1))


def test_a_checkpoint_that_was_damaged_is_passed_over(bench: Workbench) -> None:
    """A flipped byte is noticed; the one before is used; with none left the message lists what is wrong."""
    trainer = bench.trainer()
    updates(trainer, 2)
    trainer.checkpoint()
    updates(trainer, 1)
    newest = Path(trainer.checkpoint().path) / "adapter.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert st.Trainer.resume(trainer.folder.path).steps_done == 2
    for checkpoint in trainer.folder.checkpoints():
        (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(st.CheckpointError, match="no checkpoint to resume from; damaged: step-000003"):
        st.Trainer.resume(trainer.folder.path)


def test_resume_refuses_other_pictures(bench: Workbench) -> None:
    """A plan with another batch size is not the run."""
    trainer = bench.trainer()
    trainer.checkpoint()
    other = bench.config(train_batch_size=3)
    with pytest.raises(st.CheckpointError, match="not those of the run"):
        st.Trainer.resume(trainer.folder.path, bench.cache(other))


def test_resume_needs_a_run_folder(tmp_path: Path) -> None:
    """A wrong path is named."""
    with pytest.raises(st.CheckpointError, match="not a run folder"):
        st.Trainer.resume(tmp_path)


def test_a_whole_run_leaves_what_the_contract_names(bench: Workbench) -> None:
    """Records in order, files in place, pictures carry their settings, old checkpoints go."""
    trainer = bench.trainer(
        validation_prompt=("lock", "aubergine"),
        max_train_steps=12,
        checkpoint_step_interval=3,
        checkpoints_total_limit=2,
        validation_steps=6,
        eval_steps_interval=6,
    )
    records = list(trainer.run())
    kinds = [r.type for r in records if r.type not in ("preview", "step")]
    judged = ["eval", "image", "image"]
    assert kinds == ["notice", *judged, "checkpoint", "checkpoint", *judged, "checkpoint", "checkpoint", "checkpoint", *judged]
    assert [r.step for r in records if r.type == "step"] == list(range(1, 13))
    folder = trainer.folder
    for path in (folder.lora, folder.grid, folder.loss_chart, folder.history, folder.config, folder.manifest, folder.log):
        assert path.stat().st_size > 0
    assert [p.name for p in folder.checkpoints()] == ["step-000006", "step-000009", "step-000012"], "the best at step 6 stays"
    assert st.RunConfig.load(folder.config) == trainer.config
    from PIL import Image

    with Image.open(folder.images(12) / "00.png") as picture:
        described = json.loads(picture.info["sd3tune"])
    assert described["prompt"] == "lock"
    assert described["settings"]["validation_num_inference_steps"] == 3
    assert described == json.loads((folder.images(12) / "00.json").read_text())
    assert trainer.grid().rows[0][0] == "base model"
    assert [label for label, _ in trainer.grid().rows] == ["base model", "LoRA, step 12", "reference"]
    assert not list(trainer.run())
    listed = st.runs(folder.path.parent)
    assert any(row.path == folder.path and row.step == 12 and row.finished for row in listed)


def test_adapter_dropout_is_off_when_judging(bench: Workbench) -> None:
    """Two evaluations of one adapter agree to the bit though dropout is half, and so do two drawings."""
    trainer = bench.trainer(lora_dropout=0.5, learning_rate=1e-2, lr_warmup_steps=0)
    for _ in range(3):
        trainer.step()
    assert trainer.evaluate().loss == trainer.evaluate().loss
    first, second = (trainer.validate().rows[0][1][0] for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()


def test_every_resumed_part_of_the_history_has_its_number(bench: Workbench) -> None:
    """Lines before, between and after two resumes are of segments 0, 1 and 2, each segment says where it comes from."""
    trainer = bench.trainer()
    folder = trainer.folder.path
    for _ in range(2):
        trainer.step()
        trainer.checkpoint()
        trainer = st.Trainer.resume(folder, trainer.cache)
    trainer.step()
    lines = read_lines(folder / "history.jsonl")
    assert [(r["step"], r["segment"]) for r in lines if r["type"] == "step"] == [(1, 0), (2, 1), (3, 2)]
    assert [(r["from_step"], r["parent"], r["segment"]) for r in lines if r["type"] == "segment"] == [(1, 0, 1), (2, 1, 2)]


def test_manifest_says_what_was_found(bench: Workbench) -> None:
    """Counts, captions word for word, measured formats, cache hits."""
    manifest = bench.trainer(model_flavour="playground").manifest
    assert (manifest.images_found, manifest.images_used, manifest.images_held_out) == (16, 12, 4)
    assert manifest.first_captions == ("aubergine", "auto rickshaw", "automobile")
    assert dict(manifest.dtypes) == dict.fromkeys(("base", "adapter", "latents", "texts"), "float32")
    assert manifest.trainable_tensors == 192
    modulation = 6 * (1 + 9) + 6 * (1 + 6) + 11 * (1 + 6) + (1 + 2)  # norm1 of dual and other blocks, norm1_context, the last one's
    assert manifest.trainable_parameters == 16 * 160 * (72 * 2 + modulation)
    assert manifest.cache_misses + manifest.cache_hits == 16 + len({"", "lock", "croissant"} | {*_captions(bench)})
    assert '"auto rickshaw"' in str(manifest)
    assert "12 images, batch 2" in manifest.sentence


def _captions(bench: Workbench) -> list[str]:
    return [p.read_text().strip() for p in bench.datasets.parent.rglob("*.txt")]


def test_run_folders_are_never_overwritten(bench: Workbench) -> None:
    """The same output_dir twice gives a second, numbered folder."""
    config = bench.config()
    first, second = (st.Trainer(config, bench.cache(config)).folder.path for _ in range(2))
    assert second == first.with_name(first.name + "-2")


def test_settings_change_while_training_and_are_written_down(bench: Workbench) -> None:
    """Learning rate and SLG take effect at the next update; what cannot change is refused with a reason; resume keeps it."""
    trainer = bench.trainer(lr_scheduler="constant")
    trainer.step()
    assert not trainer.set(learning_rate=5e-4, validation_guidance_skip_layers=(1, 2)).refused
    assert trainer.step().learning_rate == 5e-4
    assert trainer.set(lora_rank=4).refused == "lora_rank cannot change while training"
    assert "beyond this model's blocks, 0 to 2" in trainer.set(validation_guidance_skip_layers=(3,)).refused
    assert "learning_rate: -1" in trainer.set(learning_rate=-1.0).refused
    trainer.checkpoint()
    resumed = st.Trainer.resume(trainer.folder.path)
    assert resumed.step().learning_rate == 5e-4
    assert resumed.config.validation.validation_guidance_skip_layers == (1, 2)
    commands = [row for row in resumed.folder.read_history() if row["type"] == "command"]
    assert commands[0]["value"] == {"learning_rate": 5e-4, "validation_guidance_skip_layers": [1, 2]}


def test_interrupting_an_update_finishes_it_first(bench: Workbench) -> None:
    """Ctrl-C in the middle of an update: the update is whole and in the history, and the next one goes on as if nothing was."""
    trainer, undisturbed = bench.trainer(), bench.trainer()
    velocity = trainer.engine.velocity

    def interrupted(*given: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return velocity(*given)

    trainer.engine.velocity = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    trainer.engine.velocity = velocity
    assert trainer.steps_done == 1
    assert [row["step"] for row in trainer.folder.read_history() if row["type"] == "step"] == [1]
    updates(trainer, 1)
    updates(undisturbed, 2)
    assert same_state(trainer.state_dict(), undisturbed.state_dict())


def test_evaluation_is_always_the_same_number(bench: Workbench) -> None:
    """Fixed noise and levels, no dropout: twice the same, whatever the run's seed; training changes it; B = 0 is the base."""
    trainer = bench.trainer(lora_dropout=0.5, caption_dropout_probability=1.0)
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    assert bench.trainer(seed=7).evaluate().loss == first.loss
    assert first.images == 4
    assert len(first.losses_by_sigma) == len(first.sigmas) == 2
    updates(trainer, 2)
    assert trainer.evaluate().loss != first.loss


def test_validation_does_not_disturb_training(bench: Workbench) -> None:
    """Pictures and evaluations between updates leave every later update as it was."""
    plain, watched = bench.trainer(), bench.trainer()
    expected = updates(plain, 4)
    got = updates(watched, 2)
    watched.validate()
    watched.evaluate()
    got += updates(watched, 2)
    assert got == expected


def test_a_torn_history_is_read_and_continued(bench: Workbench) -> None:
    """The half line of a killed run is left out, and the next record does not stick to it."""
    trainer = bench.trainer()
    updates(trainer, 2)
    trainer.checkpoint()
    with trainer.folder.history.open("a") as file:
        file.write('{"type": "step", "st')
    resumed = st.Trainer.resume(trainer.folder.path)
    updates(resumed, 1)
    assert [row["step"] for row in resumed.folder.read_history() if row["type"] == "step"] == [1, 2, 3]


def test_segments_replace_what_their_parent_did_later() -> None:
    """After resuming from step 2, the first run's step 3 no longer counts."""
    rows = [{"type": "step", "step": n, "segment": 0} for n in (1, 2, 3)]
    rows += [{"type": "segment", "step": 2, "from_step": 2, "segment": 1}, {"type": "step", "step": 3, "segment": 1}]
    assert [(r["step"], r["segment"]) for r in follow_segments(rows) if r["type"] == "step"] == [(1, 0), (2, 0), (3, 1)]


def test_a_full_disk_is_one_message_and_leaves_no_half(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while saving: FileError with advice, the earlier checkpoint still reads, no draft is left."""
    trainer = bench.trainer()
    updates(trainer, 1)
    trainer.checkpoint()
    updates(trainer, 1)
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(st.FileError, match=r"the disk is full; free some space"):
            trainer.checkpoint()
        with pytest.raises(st.FileError, match=r"the disk is full"):
            trainer.save(trainer.folder.lora)
    assert not trainer.folder.lora.exists()
    assert not [p for p in trainer.folder.path.rglob("*") if p.name.endswith(".tmp")]
    assert trainer.folder.read_checkpoint()["updates"] == 1


def test_an_output_folder_that_is_a_file_is_one_message(bench: Workbench, tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "taken").write_text("")
    config = bench.config(output_dir=str(tmp_path / "taken" / "run"))
    with pytest.raises(st.FileError, match="a file stands where a folder is needed"):
        st.Trainer(config, bench.cache(config))


def test_history_lines_carry_time_and_segment(bench: Workbench) -> None:
    """Every line says when, and of which segment it is."""
    trainer = bench.trainer()
    updates(trainer, 1)
    (row,) = read_lines(trainer.folder.history)
    assert row["segment"] == 0
    assert abs(row["time"] - time.time()) < 60


def test_quantised_base_trains_and_saves(bench: Workbench) -> None:
    """int8-quanto: most base weights are qint8, the adapter is fp32, updates change it, the file verifies."""
    trainer = bench.trainer(base_model_precision="int8-quanto")
    formats = dict(trainer.manifest.dtypes)
    assert formats["base"].startswith("qint8")
    assert formats["adapter"] == "float32"
    updates(trainer, 3)
    assert trainer.save(trainer.folder.lora) == len(trainer.engine.weights) == 44


def test_bf16_trains_with_an_fp32_adapter(bench: Workbench) -> None:
    """mixed_precision: bf16 keeps the adapter and the moments in fp32."""
    trainer = bench.trainer(mixed_precision="bf16")
    updates(trainer, 2)
    assert dict(trainer.manifest.dtypes)["base"] == "bfloat16"
    assert {t.dtype for t in trainer.state_dict()["adapter"].values()} == {torch.float32}
    assert {t.dtype for t in trainer.state_dict()["optimizer"].values()} == {torch.float32}


def test_sizes_beyond_the_models_positions_stop_before_training(bench: Workbench, tmp_path: Path) -> None:
    """A picture of an extreme shape is told from the model's own limit, and no run folder is made."""
    from PIL import Image

    Image.new("RGB", (4000, 40), (9, 9, 9)).save(tmp_path / "long.png")
    (tmp_path / "long.txt").write_text("a line")
    (tmp_path / "d.yaml").write_text("[{id: a, instance_data_dir: ., resolution: 64, maximum_aspect_ratio: 100}]")
    config = bench.config(cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"))
    cache = st.CacheBuilder(st.plan(st.discover(tmp_path / "d.yaml"), config), st.encoders(config)).build()
    with pytest.raises(st.DataError, match=r"640x16 px: this model knows sides of at most 256 px; lower resolution"):
        st.Trainer(config, cache)
    assert not (tmp_path / "run").exists()
