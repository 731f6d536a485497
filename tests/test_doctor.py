"""What this machine can do: tried, remembered, said before anything is downloaded, and refused where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Workbench

import sd3tune as st
from sd3tune import checkup, rocm
from sd3tune.cli import main
from sd3tune.models import capabilities, hub
from sd3tune.models.capabilities import FORMATS, NEAREST, PRECISIONS, needed, probe, problems
from sd3tune.secrets import without_secrets


def test_what_works_is_really_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In another process; the answer is remembered, also over a memory that is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert probe(["int8-quanto", "bf16"]) == {"int8-quanto": "", "bf16": ""}
    monkeypatch.setattr(capabilities, "TRY", "raise SystemExit(3)")
    assert probe(["int8-quanto"]) == {"int8-quanto": ""}, "not tried again"
    assert probe(["fp8-quanto"]) == {"fp8-quanto": "it ends the process (3)"}
    monkeypatch.setattr(capabilities, "TRY", "raise RuntimeError('no such kernel')")
    assert probe(["nf4-bnb"]) == {"nf4-bnb": "RuntimeError: no such kernel"}
    next((tmp_path / "sd3tune" / "capabilities").iterdir()).write_text("[")
    assert probe(["int8-quanto"]) == {"int8-quanto": "RuntimeError: no such kernel"}


def test_one_that_fails_or_ends_the_process_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process tries several; after a failure those that are left get another one, and so do those after a crash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fate = """
import os, sys
with open(os.environ["STARTS"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
for name in sys.argv[1:]:
    if name == "fp16":
        raise RuntimeError("no such kernel")
    if name == "int8-quanto":
        os.abort()
    print("a library talks", name, flush=True)
    print(name, flush=True)
"""
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setattr(capabilities, "TRY", fate)
    names = ["bf16", "fp16", "fp8-quanto", "int8-quanto", "nf4-bnb"]
    found = {"bf16": "", "fp16": "RuntimeError: no such kernel", "fp8-quanto": "", "int8-quanto": "it ends the process (-6)", "nf4-bnb": ""}
    assert probe(names) == found
    assert (tmp_path / "starts").read_text().splitlines() == [" ".join(names[k:]) for k in (0, 2, 4)]
    assert probe(reversed(names)) == found
    assert len((tmp_path / "starts").read_text().splitlines()) == 3, "what is known is not tried again"


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
    for what in (
        "Python",
        "torch",
        "diffusers",
        "peft",
        "ipykernel",
        "ipywidgets",
        "front end",
        "GPU",
        "memory",
        "models",
        "cache",
        "runs",
        *FORMATS,
        *PRECISIONS,
    ):
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


@pytest.mark.parametrize(
    ("kernel", "environment", "modules", "state", "says"),
    [
        (False, {"JPY_SESSION_NAME": "/home/a.ipynb"}, {"google.colab"}, "ok", "none: this Python is no notebook's"),
        (True, {"JPY_SESSION_NAME": "/content/a.ipynb"}, {"google.colab"}, "note", "Colab, which shows no changes in the background"),
        (True, {"JPY_SESSION_NAME": "/home/me/pots.ipynb", "VSCODE_PID": "7"}, set(), "ok", "a Jupyter server's, on pots.ipynb"),
        (True, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, set(), "ok", "Kaggle"),
        (True, {"VSCODE_PID": "7"}, set(), "ok", "VS Code; run panel.watch() if"),
        (True, {}, set(), "ok", "a notebook's, of which the kernel cannot tell more"),
    ],
)  # fmt: skip
def test_the_front_end_is_told_by_what_it_leaves(
    kernel: bool, environment: dict[str, str], modules: set[str], state: str, says: str
) -> None:
    found = checkup.front_end(kernel, environment, modules)
    assert (found.state, found.what) == (state, "front end")
    assert found.text.startswith(says)


# --- made-up machines ------------------------------------------------------------------------------------------------


def tools(folder: Path, **said: str) -> str:
    """A PATH on which only these programs are, each of which prints something."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in said.items():
        (folder / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_versions_of_tools_and_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of what is there the version, of what is missing what it costs and the line that installs it."""
    found = {"g++": "g++ (Ubuntu 13.3.0-6ubuntu2) 13.3.0", "nvcc": "(c) 2005-2024, compilation tools, release 12.4, V12.4.131",
             "nvidia-smi": "550.54.15"}  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", **found))
    assert [str(f).split(maxsplit=2)[2] for f in checkup._tools()] == [
        "g++ 13.3.0", "no ninja: int4-quanto and int2-quanto cannot be built; apt install ninja-build", "nvcc 12.4",
    ]  # fmt: skip
    assert checkup._driver() == "550.54.15"
    assert "ok    driver     NVIDIA 550.54.15" in map(str, checkup._machine())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkup._driver() == ""
    said = "\n".join(f.text for f in checkup._tools())
    assert "no g++: int4-quanto and int2-quanto cannot be built; apt install g++\n" in said
    assert "no nvcc: int4-quanto and int2-quanto on the GPU cannot be built; apt install nvidia-cuda-toolkit" in said
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not any("nvcc" in f.text for f in checkup._tools())


def test_rocm_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The guide's commands for amdsmi, in order, and whether the defaults came in time; nothing of it elsewhere."""
    assert not any(f.what == "ROCm" for f in checkup._tools())
    monkeypatch.setattr(torch.version, "hip", "6.2")
    for name in rocm.defaults():
        monkeypatch.delenv(name, raising=False)
    lines = [f.text for f in checkup._tools() if f.what == "ROCm"]
    assert lines[0].endswith(
        "apt install amd-smi-lib; pushd /opt/rocm/share/amd_smi; python3 -m pip install --upgrade pip; python3 -m pip install .; popd"
    )
    assert lines[1].startswith("torch was imported before sd3tune could set PYTORCH_TUNABLEOP_ENABLED, PYTORCH_TUNABLEOP_FILENAME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    for name, value in rocm.defaults().items():
        monkeypatch.setenv(name, value)
    assert [f.text for f in checkup._tools() if f.what == "ROCm"][1:] == [
        "PYTORCH_TUNABLEOP_ENABLED=1; PYTORCH_TUNABLEOP_FILENAME=/c/sd3tune/tunableop%d.csv"
    ]


@pytest.mark.parametrize(
    ("hip", "before", "expected"),
    [("'6.2.41133'", "", "1"), ("None", "", "None"), ("'6.2.41133'", "import torch; ", "None"), ("'6.2.41133'", "own", "0")],
)
def test_rocm_defaults_come_before_torch(tmp_path: Path, hip: str, before: str, expected: str) -> None:
    """With the first public name, on ROCm alone, not when torch is there already, and never over the user's own value."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = {hip}\n")
    own = {"PYTORCH_TUNABLEOP_ENABLED": "0"} if before == "own" else {}
    code = f"{before.replace('own', '')}import os, sd3tune; sd3tune.ConfigError; print(os.environ.get('PYTORCH_TUNABLEOP_ENABLED'))"
    root = str(Path(st.__file__).parent.parent)
    environment = {"PATH": "/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{root}", **own}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_no_token_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of the environment, nor one that an error carries, nor a password or token in an address."""
    monkeypatch.setenv("HF_TOKEN", "plainsecret")
    said = without_secrets("GET https://me:hf_abcdefgh@hub/x?token=qqq&a=1 with plainsecret, Bearer hf_zzzzzzzzzz")
    assert said == "GET https://***@hub/x?token=***&a=1 with ***, Bearer ***"
    import huggingface_hub.constants  # noqa: F401  (it reads the address now)

    monkeypatch.setenv("HF_ENDPOINT", "http://me:sesame@127.0.0.1:9")
    rows = "\n".join(map(str, checkup._hub(st.RunConfig.make(model_flavour="sd35-medium"))))
    assert "http://***@127.0.0.1:9 was set too late" in rows
    assert "sesame" not in rows

    busy = OSError("503 for https://me:sesame@hub/x?token=plainsecret")
    busy.response = SimpleNamespace(status_code=503)  # type: ignore[attr-defined]
    assert hub.explained(busy, "a/b") == "the hub answers 503; try again later (503 for https://***@hub/x?token=***)"


def test_a_mirror_that_is_set_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub read it when it was imported; nothing is said when it was in time or not set."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub.late_endpoint() == ""
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    said = hub.late_endpoint()
    assert said.startswith(f"HF_ENDPOINT=https://hf-mirror.com was set too late for models of captions and masks, which still come from "
                           f"{constants.ENDPOINT}")  # fmt: skip
    assert said.endswith("export HF_ENDPOINT=https://hf-mirror.com")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hf-mirror.com")
    assert hub.late_endpoint() == ""
