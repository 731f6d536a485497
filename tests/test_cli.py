"""What a person types, and what comes back: one message, no traceback, the right exit code."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import Workbench
from fresh import Fresh

from sd3tune.cli import main

QUICK = {
    "max_train_steps": "4", "lr_warmup_steps": "0", "validation_prompt": "lock", "validation_num_inference_steps": "2",
    "eval_timesteps": "1", "num_eval_images": "2",
}  # fmt: skip


def arguments(bench: Workbench, out: Path, **settings: str) -> list[str]:
    """``sd3tune train`` on a few pictures."""
    chosen = {**QUICK, "output_dir": str(out), "cache_dir": str(bench.root / "cache"), **settings}
    return ["train", "--data", str(bench.datasets), *(word for k, v in chosen.items() for word in ("--set", f"{k}={v}"))]


def test_train_then_runs(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training ends in 0 and names the adapter; ``runs`` lists it; ``--resume`` of a finished run has nothing to do."""
    assert main(arguments(bench, tmp_path / "runs" / "mine")) == 0
    out = capsys.readouterr().out
    assert f"adapter: {tmp_path / 'runs' / 'mine' / 'lora.safetensors'}" in out
    assert "12 images, batch 4: 4 updates per epoch, 4 updates = each image 1 times" in out
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "mine  step 4" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "runs" / "mine")]) == 0
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model_flavour: playground\noutput_dir: {tmp_path / 'runs' / 'mine'}\n")
    capsys.readouterr()
    place = ["--set", f"output_dir={tmp_path / 'runs' / 'mine'}", "--set", "max_train_steps=5"]
    assert main(["train", "--resume", *place]) == 0
    assert "resumed after update 4 of 5" in capsys.readouterr().out
    assert main(["train", str(settings), "--resume"]) == 0
    assert "resumed after update 5 of 5" in capsys.readouterr().out
    assert main(["train", str(settings), "--resume", str(tmp_path / "runs" / "mine")]) == 1
    assert f"has its own settings; leave {settings} out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: 1 problem\n  - there is no such file"),
        (["plan", "--data", "nowhere"], "nowhere: no such folder"),
        (["plan", "--set", "learning_rat=1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["plan", "--set", "learning_rate"], "'learning_rate' is not NAME=VALUE"),
        (["plan", "--set", "learning_rate=-1", "--set", "lora_rank=0", "--set", "mixed_precision=fp8"], "3 problems"),
        (["train", "--resume", "nowhere"], "not a run folder"),
        (["train", "--resume", "--set", "output_dir=nowhere"], "nowhere; leave --resume out to start one"),
        (["train", "--resume", "nowhere", "--data", "elsewhere"], "a run that goes on has its own data; leave --data out"),
        (["settings", "no-such-word"], "no setting has 'no-such-word'"),
        (["configure", "--set", "lora_rank=0", "--yes"], "lora_rank: 0 is not allowed"),
        (["configure", "--answers", "nowhere.yaml"], "nowhere.yaml: 1 problem\n  - there is no such file"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 1 and the sentence on stderr; never a traceback."""
    old = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert main(words) == 1
    finally:
        os.chdir(old)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_two() -> None:
    """An unknown verb is wrong usage."""
    with pytest.raises(SystemExit) as stopped:
        main(["fly"])
    assert stopped.value.code == 2


def test_settings_explains_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, default, range, unit, meaning."""
    assert main(["settings", "lr_warmup"]) == 0
    assert capsys.readouterr().out.strip() == (
        "optimizer.lr_warmup_steps = 20 [a whole number from 0 to 10,000,000 updates]: Updates over which the rate rises from zero."
    )


def test_ctrl_c_saves_and_says_how_to_go_on(bench: Workbench, tmp_path: Path) -> None:
    """The first interrupt finishes the update, writes a checkpoint and exits with 130; resume takes it from there."""
    words = ["-m", "sd3tune", *arguments(bench, tmp_path / "run", max_train_steps="400", eval_loss_disable="true")]
    child = Fresh(words, tmp_path / "said.txt")
    child.until_file(tmp_path / "run" / "history.jsonl", '"step": 3')
    child.signal(signal.SIGINT)
    code, out = child.wait(), child.output
    assert code == 130, out
    assert f"go on with: sd3tune train --resume {tmp_path / 'run'}" in out
    assert "Traceback" not in out
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))


def test_a_bad_log_level_is_one_message(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SD3TUNE_LOG_LEVEL=LOUD names the legal levels."""
    monkeypatch.setenv("SD3TUNE_LOG_LEVEL", "LOUD")
    assert main(arguments(bench, tmp_path / "run")) == 1
    assert "SD3TUNE_LOG_LEVEL is 'LOUD'; use DEBUG, INFO, WARNING or ERROR" in capsys.readouterr().err
