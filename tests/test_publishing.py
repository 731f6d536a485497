"""The hub, as a small server: a repository before training, uploads beside it, a card that runs, and every refusal in words."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workbench
from PIL import Image
from ruamel.yaml import YAML

import sd3tune as st
from sd3tune.checkup import _publishing
from sd3tune.cli import main
from sd3tune.errors import CheckpointError, ModelError
from sd3tune.reporting.card import card
from sd3tune.reporting.publishing import publish, write_problem
from sd3tune.run_folder import RunFolder
from sd3tune.validation.shots import shots_of
from sd3tune.validation.snippet import sample_code

TOKEN = "hf_" + "s3cr3t" * 4
QUICK: dict[str, Any] = {"max_train_steps": 2, "lr_warmup_steps": 0, "validation_prompt": ("lock",), "eval_loss_disable": True}

NOTHING: Any = None
"""In place of a cache, where a trainer is refused before it looks at one."""


class Hub:
    """Repositories of me, with what was committed to them; ``refusals`` are the next answers, whatever is asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refusals: list[int] = []
        self.asked: list[str] = []
        self.token: dict[str, Any] = {"role": "write"}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if "whoami" in self.path:
                    return self.answer({"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": hub.token}})
                name = self.path.removeprefix("/api/models/").partition("?")[0]
                self.answer(
                    {"id": name, "siblings": []} if name in hub.repositories else {"error": "no"}, 200 if name in hub.repositories else 404
                )

            def do_POST(self) -> None:
                body = self.content()
                hub.asked.append(self.path)
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
                if hub.refusals and (code := hub.refusals.pop(0)) != 200:
                    self.answer({"error": "no"}, code)
                elif self.path == "/api/repos/create":
                    self.create(json.loads(body))
                elif self.path == "/api/validate-yaml":
                    head = YAML(typ="safe").load(json.loads(body)["content"].split("---")[1])
                    self.answer({"errors": [] if "license" in head else [{"message": "no license"}], "warnings": []})
                elif "/preupload/" in self.path:
                    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                    self.answer({"files": files})
                else:
                    self.commit(body)

            def content(self) -> bytes:
                """The body, in one piece or in chunks."""
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def create(self, given: dict[str, Any]) -> None:
                name = f"{given.get('organization') or 'me'}/{given['name']}"
                there = name in hub.repositories
                hub.repositories.setdefault(name, given.get("private", given.get("visibility") == "private"))
                self.answer({"url": f"{hub.url}/{name}"}, 409 if there else 200)

            def commit(self, body: bytes) -> None:
                rows = [json.loads(line) for line in body.splitlines()]
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for row in rows:
                    if row["key"] == "file":
                        hub.files.setdefault(name, {})[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                self.answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})

            def answer(self, found: dict[str, Any], code: int = 200) -> None:
                body = json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants

    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def finished(grown: Workbench) -> RunFolder:
    """A run of two updates that has come to its end."""
    trainer = grown.trainer(**QUICK, learning_rate=0.02, lora_alpha=32.0)
    for _ in trainer.run():
        pass
    return trainer.folder


def settled(folder: RunFolder, **settings: Any) -> st.RunConfig:
    return st.RunConfig.load(folder.config).replace(push_to_hub=True, **settings)


# --- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_uploads_its_adapter_its_card_and_its_checkpoints(bench: Workbench, hub: Hub) -> None:
    """A private repository before the model is loaded; every file as it is on disk; the card in the hub's form; no token anywhere."""
    config = bench.config(
        **QUICK,
        push_to_hub=True,
        push_checkpoints_to_hub=True,
        hub_model_id="me/pots",
        checkpoint_step_interval=1,
        checkpoints_total_limit=9,
    )
    trainer = st.Trainer(config, bench.cache(config))
    assert hub.repositories == {"me/pots": True}
    for _ in trainer.run():
        pass
    got, folder = hub.files["me/pots"], trainer.folder
    wanted = {"README.md": folder.card, "lora.safetensors": folder.lora, "grid.png": folder.grid}
    wanted |= {"images/00.png": folder.images(2) / "00.png"}
    wanted |= {
        f"checkpoints/{at.name}/{p.name}": p for at in folder.checkpoints() for p in at.iterdir() if p.is_file()
    }  # every one, for none was passed
    assert set(wanted) - set(got) == set()
    assert all(got[name] == path.read_bytes() for name, path in wanted.items())
    said = [row["text"] for row in folder.read_history() if row["type"] == "notice"]
    assert said[-1] == f"hub: the adapter is at {hub.url}/me/pots"
    for path in folder.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_uploads_that_fail_are_tried_again(finished: RunFolder, hub: Hub) -> None:
    """Two answers of 500 in different places: the third try is whole."""
    hub.refusals = [500, 200, 500]
    said = publish(finished, settled(finished, hub_model_id="me/again"), pauses=(0.01, 0.01, 0.01))
    assert said == f"the adapter is at {hub.url}/me/again"
    assert hub.files["me/again"]["lora.safetensors"] == finished.lora.read_bytes()


def test_a_hub_that_stays_away_costs_a_notice(finished: RunFolder, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all tries: where everything is, and the command for later."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the hub cannot be reached now .*; adapter and card are in .*, and later: sd3tune push .*run"):
        publish(finished, settled(finished), pauses=(0.01,))


def test_offline_the_card_lies_beside_the_adapter_and_is_pushed_later(
    bench: Workbench, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """HF_HUB_OFFLINE is told at the start and the run ends well; ``sd3tune push`` then uploads it under another name."""
    import huggingface_hub.constants

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        trainer = bench.trainer(**{**QUICK, "validation_prompt": ()}, push_to_hub=True)
        for _ in trainer.run():
            pass
    said = [row["text"] for row in trainer.folder.read_history() if row["type"] == "notice"]
    assert any(text.startswith("push_to_hub: HF_HUB_OFFLINE is set;") for text in said)
    assert f"later: sd3tune push {trainer.folder.path}" in said[-1]
    assert not hub.files
    assert main(["push", str(trainer.folder.path), "--set", "hub_model_id=later", "--set", "model_card_private=false"]) == 0
    assert capsys.readouterr().out.strip() == f"the adapter is at {hub.url}/me/later"
    assert hub.repositories == {"me/later": False}
    assert hub.files["me/later"]["README.md"] == trainer.folder.card.read_bytes()


def test_each_end_is_uploaded_and_nothing_else(bench: Workbench, hub: Hub) -> None:
    """Rewound and run again, the adapter goes up again; made longer and stopped, the old one does not, by itself or by hand."""
    trainer = bench.trainer(**{**QUICK, "validation_prompt": ()}, checkpoint_step_interval=1, push_to_hub=True, hub_model_id="me/pots")
    list(trainer.run())
    first = hub.files.pop("me/pots")
    trainer.rewind(1)
    trainer.set(learning_rate=0.01)
    list(trainer.run())
    second = hub.files.pop("me/pots")
    assert second["lora.safetensors"] == trainer.folder.lora.read_bytes() != first["lora.safetensors"]
    longer = st.Trainer.resume(trainer.folder.path, trainer.cache, max_train_steps=4)
    list(longer.run(1))
    for one in longer._reporters._tails:
        one.close()
        assert one.news() == []
    with pytest.raises(CheckpointError, match=r"the run went on after lora\.safetensors was written.*sd3tune train --resume"):
        publish(longer.folder, settled(longer.folder))
    assert hub.files == {}


def test_what_is_not_finished_is_not_pushed(bench: Workbench, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message each: no adapter yet, and no run at all."""
    folder = RunFolder.create(tmp_path / "run")
    bench.config().save(folder.config)
    with pytest.raises(CheckpointError, match=r"there is no lora\.safetensors yet"):
        publish(folder, settled(folder))
    assert main(["push", str(tmp_path)]) == 1
    assert "not a run folder" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (401, r"your token is not valid \(any more\); run: hf auth login"), (403, "your token may not write there; make one of type write"),
        (400, "check hub_model_id"),
    ],
)  # fmt: skip
def test_a_refusal_is_said_before_a_model_is_loaded(bench: Workbench, hub: Hub, code: int, says: str) -> None:
    """With the status and the way out; there is no run folder then, and no token in the message."""
    config = bench.config(**QUICK, push_to_hub=True)
    hub.refusals = [code] * 5
    with pytest.raises(st.ConfigError, match=says) as caught:
        st.Trainer(config, NOTHING)
    assert TOKEN not in str(caught.value)
    assert not Path(config.run.output_dir).exists()


def test_a_token_that_may_only_read_is_said_though_the_repository_is_there(bench: Workbench, hub: Hub) -> None:
    """The hub's client takes a repository that can be read for one that was made; the upload would fail at the very end."""
    hub.repositories["me/pots"], hub.refusals, hub.token = True, [403], {"role": "read"}
    with pytest.raises(st.ConfigError, match="push_to_hub: your token may only read; make one of type write"):
        st.Trainer(bench.config(push_to_hub=True, hub_model_id="me/pots"), NOTHING)


def test_no_token_is_said_first(bench: Workbench, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the hub then."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(st.ConfigError, match="push_to_hub: there is no token; run: hf auth login, with a token of type write"):
        st.Trainer(bench.config(push_to_hub=True), NOTHING)
    assert hub.asked == []


# --- the card ----------------------------------------------------------------------------------------------------------


def test_the_cards_code_draws_the_runs_picture(finished: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Word for word, with the run folder as repository: the stock pipeline gives the last validation's picture; the base gives another."""
    monkeypatch.chdir(tmp_path)
    config = st.RunConfig.load(finished.config)
    code = sample_code(config, shots_of(config)[0], str(finished.path))
    exec(compile(code, "README.md", "exec"), {})
    drawn, kept = (
        np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (tmp_path / "picture.png", finished.images(2) / "00.png")
    )
    base = np.asarray(Image.open(finished.images(0) / "00.png").convert("RGB"), dtype=int)
    assert np.abs(drawn - kept).max() <= 1
    assert np.abs(drawn - base).max() > 20


def test_the_card_says_what_it_is(finished: RunFolder) -> None:
    """The hub's fields are YAML with the gallery; alpha, length, settings and licence in words; every link is there; no path of ours."""
    text = finished.card.read_text()
    _, head, body = text.split("---\n", 2)
    fields = YAML(typ="safe").load(head)
    assert fields["license"] == "apache-2.0"
    assert fields["library_name"] == "diffusers"
    assert fields["widget"] == [{"text": "lock", "output": {"url": "images/00.png"}, "parameters": {"negative_prompt": ""}}]
    assert "Trained with rank 16 and alpha 32" in body
    assert "`max_sequence_length=16`" in body
    assert "2 updates of 2 x 1 images" in body
    assert "12 images to learn from, 4 held out" in body
    config = st.RunConfig.load(finished.config)
    assert f"```python\n{sample_code(config, shots_of(config)[0], finished.path.name)}```" in body
    assert str(finished.path.parent.parent) not in text
    assert "learning_rate: 0.02" in body


def test_the_card_is_of_the_run_as_it_ended(bench: Workbench, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """After a rewind, with other settings from then on: they are in the card, its code and its gallery; what was left behind is not."""
    pots = {"one": "lock", "two": {"prompt": "croissant", "negative": "lock"}}
    trainer = bench.trainer(
        max_train_steps=3, lr_warmup_steps=0, checkpoint_step_interval=1, eval_loss_disable=True, validation_prompt=(),
        user_prompt_library=pots, validation_on_startup=False, push_to_hub=True, hub_model_id="me/pots",
    )  # fmt: skip
    list(trainer.run())
    trainer.rewind(1)
    changed = {"max_train_steps": 2, "validation_guidance": 2.25, "validation_negative_prompt": "croissant", "learning_rate": 0.0125}
    assert not trainer.set(**changed).refused
    list(trainer.run())
    folder, got = trainer.folder, hub.files["me/pots"]
    text = got["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    widget = YAML(typ="safe").load(head)["widget"]
    assert [(one["text"], one["parameters"]["negative_prompt"]) for one in widget] == [("lock", "croissant"), ("croissant", "lock")]
    assert "pictures above: step 2" in body
    assert [got[f"images/0{n}.png"] for n in (0, 1)] == [(folder.images(2) / f"0{n}.png").read_bytes() for n in (0, 1)]
    assert "Drawn with guidance 2.25," in body
    assert "learning rate 0.0125" in body
    assert "* from step 1 on: max_train_steps 2, validation_guidance 2.25" in body
    assert sample_code(trainer.config, shots_of(trainer.config)[0], "me/pots") in body
    assert "\nlearning_rate: 0.0125\n" in body
    folder.card.unlink()
    assert main(["push", str(folder.path)]) == 0
    capsys.readouterr()
    assert folder.card.read_text() == text


def test_cards_of_other_bases(finished: RunFolder) -> None:
    """Stability's models carry their licence and name; skip-layer guidance, no T5, LyCORIS and a note are in it; a local path is not."""
    config = st.RunConfig.make(
        model_flavour="sd35-medium", use_t5=False, validation_guidance_skip_layers=(7, 8), validation_prompt='a "pot"',
        model_card_note="Mine.",
        lora_type="lycoris", init_lora="/home/me/a.safetensors", hub_model_id="me/pots",
    )  # fmt: skip
    text = card(finished, config, "me/pots")
    fields = YAML(typ="safe").load(text.split("---\n", 2)[1])
    base = "stabilityai/stable-diffusion-3.5-medium"
    assert (fields["license"], fields["license_name"], fields["base_model"]) == ("other", "stabilityai-ai-community", base)
    assert fields["license_link"] == f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    for part in (
        f"from_pretrained('{base}', torch_dtype=torch.bfloat16, text_encoder_3=None, tokenizer_3=None)", "skip_guidance_layers=[7, 8]",
        'hf_hub_download(\'me/pots\', "lora.safetensors")', "network.merge_to()", "prompt='a \"pot\"'",
    ):  # fmt: skip
        assert part in code, part
    assert "Mine." in text
    assert "/home/me" not in text
    local = card(finished, st.RunConfig.make(pretrained_model_name_or_path="/home/me/sd3"), "pots")
    assert "/home/me" not in local
    assert "base_model" not in YAML(typ="safe").load(local.split("---\n", 2)[1])


# --- the doctor --------------------------------------------------------------------------------------------------------


def fine(*scopes: tuple[str, list[str]]) -> dict[str, Any]:
    return {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": n}, "permissions": p} for n, p in scopes]}}


@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        ({"role": "write"}, "pots", ""), ({"role": "write"}, "team/pots", ""), ({"role": "read"}, "pots", "your token may only read"),
        ({"role": "write"}, "other/pots", "other is neither you (me) nor an organisation of yours"),
        (fine(("me", ["repo.content.read", "repo.write"])), "pots", ""), (fine(("me", ["repo.content.read"])), "pots", "of me; add that"),
        (fine(("me/pots", ["repo.write"])), "me/pots", ""), (fine(("me/jars", ["repo.write"])), "me/pots", "may not write"),
        (fine(("me", ["repo.write"])), "team/pots", "may not write to repositories of team"), (fine(), "pots", "may not write"),
    ],
)  # fmt: skip
def test_the_doctor_knows_what_a_token_may(hub: Hub, token: dict[str, Any], name: str, says: str) -> None:
    """From the hub's answer: write, read, fine-grained for an account, an organisation or one repository."""
    hub.token = token
    answer = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": token}}
    assert says in write_problem(answer, name)
    assert bool(write_problem(answer, name)) is bool(says)
    (found,) = _publishing(st.presets.playground(push_to_hub=True, hub_model_id=name))
    assert (found.state, says in found.text) == ("bad" if says else "ok", True)
    assert TOKEN not in str(found)


def test_the_doctor_without_a_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away is a note, no token is bad, and without push_to_hub nothing is asked."""
    config = st.presets.playground(push_to_hub=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert [f.state for f in _publishing(config)] == ["note"]
    monkeypatch.delenv("HF_TOKEN")
    assert [(f.state, "there is no token" in f.text) for f in _publishing(config)] == [("bad", True)]
    assert not list(_publishing(st.presets.playground()))
