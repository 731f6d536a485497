"""What this machine can do: tried, remembered, said before anything is downloaded, and refused where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Workbench

import sd3tune as st
from sd3tune.cli import main
from sd3tune.models import capabilities, hub
from sd3tune.models.capabilities import FORMATS, NEAREST, PRECISIONS, needed, probe, problems


def test_what_works_is_really_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each format in a process of its own; the answer is remembered, also over a memory that is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert probe(["int8-quanto", "bf16"]) == {"int8-quanto": "", "bf16": ""}
    monkeypatch.setattr(capabilities, "TRY", "raise SystemExit(3)")
    assert probe(["int8-quanto"]) == {"int8-quanto": ""}, "not tried again"
    assert probe(["fp8-quanto"]) == {"fp8-quanto": "it ends the process (3)"}
    monkeypatch.setattr(capabilities, "TRY", "raise RuntimeError('no such kernel')")
    assert probe(["nf4-bnb"]) == {"nf4-bnb": "RuntimeError: no such kernel"}
    next((tmp_path / "sd3tune" / "capabilities").iterdir()).write_text("[")
    assert probe(["int8-quanto"]) == {"int8-quanto": "RuntimeError: no such kernel"}


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the line that installs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe(["int4-quanto"])["int4-quanto"] == "it needs g++ and ninja to build its extension; apt install g++ ninja-build"


def test_the_nearest_setting_that_works_is_named() -> None:
    """From a made-up table: what is asked, why not, what instead; nothing for what is not asked."""
    config = st.presets.playground(base_model_precision="int2-quanto", text_encoder_3_precision="fp8-quanto", mixed_precision="bf16")
    assert needed(config) == ["bf16", "fp8-quanto", "int2-quanto"]
    assert problems(config, {}) == []
    table = {"int2-quanto": "no compiler", "nf4-bnb": "no kernel", "bf16": "too old", "int4-quanto": "no compiler"}
    said = problems(config, table)
    assert said == [
        "mixed_precision: bf16 does not work on this machine (too old); the nearest that does: fp16",
        "base_model_precision: int2-quanto does not work on this machine (no compiler); the nearest that does: int8-quanto",
    ]
    for name in (*FORMATS, *PRECISIONS):
        chain = [name]
        while chain[-1] in NEAREST:
            chain.append(NEAREST[chain[-1]])
            assert len(chain) < 9
        assert chain[-1] in ("no", "no_change")


def test_a_trainer_refuses_what_this_machine_cannot_do(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded; the same configuration may still be written on this machine for another one."""
    config = bench.config(base_model_precision="fp8-quanto")
    cache = bench.cache(config)
    monkeypatch.setattr(capabilities, "probe", lambda names: dict.fromkeys(names, "no kernel"))
    with pytest.raises(st.ConfigError, match=r"this machine: 1 problem\n  - base_model_precision: fp8-quanto does not work"):
        st.Trainer(config, cache)


def test_fp8_on_apple_is_refused_when_the_configuration_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU of Apple's has it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(st.ConfigError, match="fp8-quanto never works on Apple's GPUs; use int8-quanto"):
        st.presets.playground(base_model_precision="fp8-quanto")


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that is asked has a line; what stands in the way is bad and the exit code is 1; a token is never shown."""
    monkeypatch.setattr(capabilities, "probe", lambda names=(*FORMATS, *PRECISIONS): dict.fromkeys(names, "") | {"fp8-quanto": "no kernel"})
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for what in ("Python", "torch", "GPU", "memory", "models", "cache", "runs", *FORMATS, *PRECISIONS):
        assert f" {what} " in said
    assert "fp8-quanto does not: no kernel" in said
    (tmp_path / "run.yaml").write_text("model_flavour: sd35-medium\nbase_model_precision: fp8-quanto\n")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["doctor", str(tmp_path / "run.yaml")]) == 1
    said = capsys.readouterr().out
    assert "bad   settings   base_model_precision: fp8-quanto does not work on this machine (no kernel)" in said
    assert f"bad   model      {hub.FLAVOURS['sd35-medium']}: " in said
    assert "ok    token      there is one" in said
    assert "hf_secret" not in said
    assert "playground, which comes with the package" in str(st.doctor(st.presets.playground()))
