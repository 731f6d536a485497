"""Curves and pictures in a tracker: the usual names, from another thread, and no trouble for the run."""

from __future__ import annotations

import importlib.util
import io
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workbench
from test_trainer import same_state, updates

import sd3tune as st
from sd3tune.checkup import _tracker
from sd3tune.records import ImageRecord, ScoreRecord, SegmentRecord, StepRecord
from sd3tune.reporting import require, trackers
from sd3tune.run_folder import RunFolder

QUICK: dict[str, Any] = {
    "max_train_steps": 2, "lr_warmup_steps": 1, "validation_steps": 1, "validation_prompt": ("lock",), "eval_steps_interval": 1,
    "num_eval_images": 1, "checkpoint_minutes": 0.0,
}  # fmt: skip

PLAIN: dict[str, Any] = {
    "losses": (), "sigmas": (), "items": (), "learning_rate": 0.1, "grad_norm": 2.0, "seconds": 1.0, "images_per_second": 3.0,
    "peak_memory_bytes": 0,
}  # fmt: skip


def curves(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def pretend(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    """Only these trackers can be found."""
    real = importlib.util.find_spec

    def find(name: str, *given: Any) -> Any:
        return (object() if name in installed else None) if name in trackers.KINDS else real(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_tensorboard_shows_what_the_history_has(bench: Workbench) -> None:
    """Every number of every update under the usual names, evaluations, pictures pixel by pixel; no Accelerator was made."""
    from accelerate.state import AcceleratorState
    from PIL import Image

    trainer = bench.trainer(**QUICK, report_to="tensorboard")
    for _ in trainer.run():
        pass
    shown, rows = curves(trainer.folder.path), trainer.folder.read_history()
    steps = [row for row in rows if row["type"] == "step"]
    for name, key in (("train_loss", "loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm")):
        assert [(e.step, e.value) for e in shown.Scalars(name)] == [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in steps]
    evals = [(row["step"], row["loss"]) for row in rows if row["type"] == "eval"]
    assert [(e.step, e.value) for e in shown.Scalars("loss/val")] == [(s, pytest.approx(v, rel=1e-6)) for s, v in evals]
    assert [s for s, _ in evals] == [0, 1, 2]
    base, name = sorted(shown.Tags()["images"], reverse=True)
    assert (name.partition("/tag")[0], base.partition("/tag")[0]) == ("validation/lock 64x64", "validation/lock 64x64 (base)")
    assert [[e.step for e in shown.Images(tag)] for tag in (base, name)] == [[0], [1, 2]]
    drawn = np.asarray(Image.open(io.BytesIO(shown.Images(name)[-1].encoded_image_string)).convert("RGB"))
    kept = np.asarray(Image.open(trainer.folder.images(2) / "00.png").convert("RGB"))
    assert np.array_equal(drawn, kept)
    assert AcceleratorState._shared_state == {}, "precision is ours"
    assert not [row for row in rows if row["type"] == "notice" and row["step"]]


def test_a_resumed_run_hides_what_it_replaces(bench: Workbench) -> None:
    """After going back to step 2, the curve has each step once, with the values of the history that counts."""
    trainer = bench.trainer(report_to="tensorboard", max_train_steps=5, validation_prompt=(), eval_loss_disable=True)
    updates(trainer, 2)
    trainer.checkpoint()
    updates(trainer, 2)
    list(trainer._reporters.finish(4))
    resumed = st.Trainer.resume(trainer.folder.path, trainer.cache)
    for _ in resumed.run():
        pass
    rows = [(r["step"], r["loss"]) for r in resumed.folder.read_history() if r["type"] == "step"]
    shown = [(e.step, e.value) for e in curves(resumed.folder.path).Scalars("train_loss")]
    assert shown == [(s, pytest.approx(v, rel=1e-6)) for s, v in rows]
    assert [s for s, _ in rows] == [1, 2, 3, 4, 5]


class Broken:
    """A tracker's library that fails, as when its server is away."""

    def init(self, **_: Any) -> Any:
        raise ConnectionError("no route to https://me:hf_secretsecret@api.example/x")


def test_a_tracker_that_fails_is_one_notice_and_the_run_is_the_same(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, no_login: None
) -> None:
    """Three failures and it is left alone; the run has the bits of one without; no address or token in the notice."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", Broken())
    pretend(monkeypatch, "wandb")
    quick: dict[str, Any] = {"max_train_steps": 4, "lr_warmup_steps": 1, "validation_prompt": (), "eval_loss_disable": True}
    trainer, plain = bench.trainer(report_to="wandb", **quick), bench.trainer(**quick)
    for _ in trainer.run():
        pass
    updates(plain, 4)
    assert same_state(trainer.state_dict(), plain.state_dict())
    said = [row["text"] for row in trainer.folder.read_history() if row["type"] == "notice"]
    assert any("wandb: it failed 3 times in a row; nothing more is sent there" in text for text in said)
    assert any("ConnectionError: no route to https://api.example" in text for text in said)
    assert not [text for text in said if "hf_secret" in text]


def test_weights_and_biases_is_told_once_and_in_order(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, no_login: None, tmp_path: Path
) -> None:
    """Project, name and an identity that a resumed run keeps and another run has not; numbers by step; settings without paths."""
    calls: list[dict[str, Any]] = []
    logged: list[tuple[int, set[str]]] = []
    captions: list[str] = []

    class Run:
        def __init__(self, step: int) -> None:
            self.step = step

        def log(self, values: dict[str, Any], step: int) -> None:
            assert step >= self.step, "it would drop this and say so in its own log only"
            self.step = step
            logged.append((step, set(values)))
            captions.extend(picture for shown in values.values() if isinstance(shown, list) for picture in shown)

        def finish(self) -> None:
            logged.append((-1, set()))

    def init(**given: Any) -> Run:
        calls.append(given)
        return Run(max((step for step, _ in logged), default=0) if given["id"] == calls[0]["id"] else 0)

    library = types.SimpleNamespace(init=init, Image=lambda pixels, caption: caption)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    pretend(monkeypatch, "wandb")
    options = dict(
        report_to="wandb",
        tracker_project_name="pots",
        tracker_run_name="first",
        max_train_steps=3,
        lr_warmup_steps=1,
        eval_loss_disable=True,
    )
    trainer = bench.trainer(**options, validation_prompt=("lock",))
    updates(trainer, 1)
    trainer.checkpoint()
    updates(trainer, 1)
    list(trainer._reporters.finish(2))
    for _ in st.Trainer.resume(trainer.folder.path, trainer.cache).run():
        pass
    other = RunFolder.create(tmp_path / "other")
    trackers.Tracker("wandb", trainer.config, other).send(StepRecord(step=1, loss=0.5, **PLAIN))
    assert [(c["project"], c["name"]) for c in calls] == [("pots", "first")] * 3
    assert calls[0]["id"] == calls[1]["id"] != calls[2]["id"]
    steps = [step for step, names in logged if "train_loss" in names]
    assert steps == [1, 2, 2, 3, 1]
    shown = [(step, *names) for step, names in logged if any(name.startswith("validation/") for name in names)]
    assert shown == [(3, "validation/lock 64x64 (base)"), (3, "validation/lock 64x64")], "the base model's is drawn late, and not lost"
    assert captions == ["step 0: lock", "step 3: lock"]
    assert not {"output_dir", "cache_dir", "mirror_to", "webhook_config"} & set(calls[0]["config"])
    assert str(bench.root) not in str(calls[0]["config"])
    assert "k" * 40 not in str(calls)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_every_picture_of_a_step_is_shown(bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """The same prompt under two names, prompts that differ late, two seeds, base, adapter and average: each under a name of its own."""
    from PIL import Image

    shown: list[str] = []
    run = types.SimpleNamespace(step=0, log=lambda values, step: shown.extend(values), finish=lambda: None)
    library = types.SimpleNamespace(init=lambda **_: run, Image=lambda pixels, caption: caption)
    monkeypatch.setitem(sys.modules, "wandb", library)
    folder, path = RunFolder.create(tmp_path / "run"), tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    tracker = trackers.Tracker(kind, bench.config(), folder)
    plain = ImageRecord(step=0, prompt="lock", name="lock", path=str(path), seed=42, width=8, height=8, guidance=3.0, skip_layers=())
    long = ["x" * 60 + ending for ending in "ab"]
    wanted = [
        plain, replace(plain, kind="base"), replace(plain, kind="ema"), replace(plain, seed=43), replace(plain, width=16),
        replace(plain, name="one"), replace(plain, name="two"), replace(plain, prompt="pot"),
        *(replace(plain, prompt=text, name=text) for text in long), replace(plain, prompt="", name="no prompt"),
    ]  # fmt: skip
    for record in wanted:
        tracker.send(record)
    tracker.finish()
    if kind == "tensorboard":
        shown = curves(folder.path).Tags()["images"]
    assert len(set(shown)) == len(wanted)


def test_a_late_base_picture_hides_nothing(bench: Workbench, tmp_path: Path) -> None:
    """Resumed at step 2: what comes after it is replaced, and a picture of step 0 that comes first leaves the rest as it is."""
    from PIL import Image

    folder, path = RunFolder.create(tmp_path / "run"), tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    for resumed in (False, True):
        tracker = trackers.Tracker("tensorboard", bench.config(), folder)
        if resumed:
            tracker.send(SegmentRecord(step=2, from_step=2, parent=0, why="resume"))
            tracker.send(ImageRecord(
                step=0, prompt="lock", path=str(path), seed=42, width=8, height=8, guidance=3.0, skip_layers=(), kind="base"
            ))  # fmt: skip
        for step in (3, 4) if resumed else (1, 2, 3):
            tracker.send(StepRecord(step=step, loss=step + 0.5 * resumed, **PLAIN))
        tracker.finish()
    assert [(e.step, e.value) for e in curves(folder.path).Scalars("train_loss")] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    (name,) = curves(folder.path).Tags()["images"]
    assert [e.step for e in curves(folder.path).Images(name)] == [0]


def test_scores_have_the_usual_names() -> None:
    """``clip/mean`` and its like; those of the running average apart."""
    score = ScoreRecord(step=3, kind="adapter", mean=0.3, min=0.2, max=0.4, std=0.1, scores=(0.2, 0.4), names=("a", "b"))
    assert trackers.numbers_of(score) == {"clip/mean": 0.3, "clip/min": 0.2, "clip/max": 0.4, "clip/std": 0.1}
    assert set(trackers.numbers_of(replace(score, kind="ema"))) == {"clip/mean_ema", "clip/min_ema", "clip/max_ema", "clip/std_ema"}


def test_numbers_that_are_not_there_are_left_out() -> None:
    """An update of regularisation pictures alone has no train_loss, and another no regularisation_loss."""
    assert trackers.numbers_of(StepRecord(step=1, loss=None, regularisation_loss=0.5, **PLAIN)) == {
        "regularisation_loss": 0.5, "learning_rate": 0.1, "grad_norm": 2.0, "images_per_second": 3.0,
    }  # fmt: skip
    assert "regularisation_loss" not in trackers.numbers_of(StepRecord(step=1, loss=0.5, **PLAIN))


def test_what_is_missing_is_said_before_a_model_is_loaded(bench: Workbench, monkeypatch: pytest.MonkeyPatch, no_login: None) -> None:
    """A package, a login: one message with the line that helps, and no run folder."""
    config = bench.config(report_to="tensorboard")
    cache = bench.cache(config)
    pretend(monkeypatch)
    with pytest.raises(
        st.ConfigError, match=r"report_to: tensorboard is not installed; pip install tensorboard \(or 'sd3tune\[trackers\]'\)"
    ):
        st.Trainer(config, cache)
    assert not Path(config.run.output_dir).exists()
    with pytest.raises(st.ConfigError, match=r"report_to: all finds no tracker; pip install 'sd3tune\[trackers\]'"):
        trackers.kinds_of(bench.config(report_to="all"))
    pretend(monkeypatch, "wandb", "tensorboard")
    with pytest.raises(st.ConfigError, match=r"there is no login for api\.wandb\.ai; run: wandb login"):
        trackers.kinds_of(bench.config(report_to="wandb"))
    everything = bench.config(report_to="all")
    assert trackers.kinds_of(everything) == ("tensorboard",), "without asking for a login"
    (said,) = require(everything)
    assert said.startswith("report_to: all leaves wandb out: there is no login for api.wandb.ai")
    assert [f.state for f in _tracker(everything)] == ["ok", "note"]


@pytest.mark.parametrize(
    ("variables", "netrc", "well"),
    [
        ({}, "", False), ({"WANDB_API_KEY": "s3cr3t"}, "", True), ({"WANDB_MODE": "offline"}, "", True),
        ({"WANDB_MODE": "online"}, "", False), ({}, "machine api.wandb.ai login user password s3cr3t", True),
        ({}, "machine other.example login user password s3cr3t", False), ({}, "nonsense", False),
        ({"WANDB_BASE_URL": "https://own.example"}, "machine own.example login user password s3cr3t", True),
        ({"WANDB_BASE_URL": "https://own.example"}, "machine api.wandb.ai login user password s3cr3t", False),
    ],
)  # fmt: skip
def test_the_doctor_looks_for_a_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_login: None, variables: dict[str, str], netrc: str, well: bool
) -> None:
    """Variables and the netrc file of the server that is used; a key is never shown."""
    pretend(monkeypatch, "wandb")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc + "\n")
        (tmp_path / "netrc").chmod(0o600)
    (found,) = _tracker(st.presets.playground(report_to="wandb"))
    assert (found.state == "ok") is well
    assert "s3cr3t" not in str(found)
    assert not list(_tracker(st.presets.playground()))
