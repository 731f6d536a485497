"""Models of the hub: fetched from a server that answers as the hub does, and every way in which that fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import sd3tune as st
from sd3tune import playground
from sd3tune.errors import ModelError
from sd3tune.models import clip, components, hub, tiny

SHA = "d" * 40
REFUSALS = {
    "gated": (403, "GatedRepo", "Access to model is restricted"), "scope": (403, "", "Please enable access to public gated repositories in "
    "your fine-grained token settings"), "token": (401, "", "Invalid credentials in Authorization header"),
    "nothing": (404, "RepoNotFound", "Repository not found"), "busy": (503, "", "Service Unavailable"),
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Serves the playground as me/sd3 and its scorer as me/clip, with files of other tools beside them, and refuses me/<reason>."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, whole: bool) -> None:
        path = self.path.split("?")[0]
        reason = next((name for name in REFUSALS if f"/me/{name}" in path), None)
        if reason:
            return self.refuse(*REFUSALS[reason])
        model, root = ("clip", playground.SCORER) if "/me/clip" in path else ("sd3", playground.MODEL)
        files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        if path.startswith(f"/api/models/me/{model}"):
            if "other-revision" in path:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id: other-revision")
            rows = [
                {"rfilename": name, "size": p.stat().st_size, "blobId": hashlib.sha1(name.encode()).hexdigest()}
                for name, p in files.items()
            ]
            strange = {"sd3": "sd3_all_in_one.safetensors", "clip": "pytorch_model.bin"}[model]
            rows.append({"rfilename": strange, "size": 10**15, "blobId": "0" * 40})
            tree = [{"type": "file", "path": r["rfilename"], "size": r["size"], "oid": r["blobId"]} for r in rows]
            body = json.dumps(tree if "/tree/" in path else {"id": f"me/{model}", "sha": SHA, "siblings": rows}).encode()
            return self.send(body, whole, {"Content-Type": "application/json"})
        name = path.partition(f"/resolve/{SHA}/")[2]
        if whole:
            self.asked.append(name)
        self.send(files[name].read_bytes(), whole, {"ETag": hashlib.sha1(name.encode()).hexdigest(), "X-Repo-Commit": SHA})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        body = json.dumps({"error": message}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send(self, body: bytes, whole: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    Hub.asked.clear()
    yield address
    http.shutdown()


def test_a_model_is_fetched_once_and_only_its_parts(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's parts and nothing else; a second load asks nobody, also with no server; the values are the playground's."""
    config = st.RunConfig.make(pretrained_model_name_or_path="me/sd3", mixed_precision="no", tokenizer_max_length=16)
    loaded = components.load_transformer(config, torch.device("cpu")).state_dict()
    own = components.load_transformer(st.presets.playground(), torch.device("cpu")).state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    assert "sd3_all_in_one.safetensors" not in Hub.asked
    assert len(Hub.asked) == len(set(Hub.asked)) > 10
    Hub.asked.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert components.model_folder(config).is_dir()
    assert Hub.asked == []


def test_what_is_not_needed_is_not_fetched(server: str) -> None:
    """Without T5 its encoder, the largest part, stays where it is."""
    config = st.RunConfig.make(pretrained_model_name_or_path="me/sd3", use_t5=False, tokenizer_max_length=16)
    components.model_folder(config)
    assert not [name for name in Hub.asked if name.startswith("text_encoder_3")]
    with st.encoders(config).load() as loaded:
        assert not loaded.encode_texts(["lock"])[0].t5_LD.any()


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("me/gated", None, "it is gated, and there is no token; accept its licence on https://huggingface.co/me/gated, then run"),
        ("me/gated", "hf_secretsecret", "its licence is not accepted yet by the account of your token"),
        ("me/scope", "hf_secretsecret", "your token has not the scope for it; on https://huggingface.co/settings/tokens"),
        ("me/token", "hf_secretsecret", "your token is not valid"), ("me/nothing", None, "there is no such model on the hub"),
        ("me/busy", None, "the hub answers 503; try again later"),
    ],
)  # fmt: skip
def test_each_refusal_has_its_own_sentence(server: str, monkeypatch: pytest.MonkeyPatch, name: str, token: str | None, says: str) -> None:
    """What is the matter and what to do; the token is never shown."""
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError) as caught:
        hub.fetched(name)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert "hf_secret" not in str(caught.value)


def test_no_network_no_room_no_revision(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror is named, both figures are said, the page of revisions is linked."""
    with pytest.raises(ModelError, match="it has no such revision"):
        hub.fetched("me/sd3", revision="other-revision")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
        with pytest.raises(ModelError, match=r"me/sd3 needs 0\.0 GB and .* free; make room, or set HF_HOME"):
            hub.fetched("me/sd3")
    assert Hub.asked == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the hub cannot be reached .*HF_ENDPOINT=https://hf-mirror\.com"):
        hub.fetched("me/sd3")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        hub.fetched("me/sd3")


def test_a_small_model_is_fetched_once_with_one_kind_of_weights(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer's safetensors and not the same weights as .bin; a second load asks nobody; the values are the playground's."""
    loaded, own = clip.Scorer.load("me/clip"), clip.Scorer.load(playground.SCORER)
    mine = own._model.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in loaded._model.state_dict().items())
    assert sorted(Hub.asked) == sorted(path.name for path in playground.SCORER.iterdir())
    Hub.asked.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.folder_of("me/clip", weights=clip.WEIGHTS, instead=clip.INSTEAD).is_dir()
    assert Hub.asked == []


def test_a_small_model_that_cannot_be_fetched(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sentences, with what else can be set; of its own room only what is fetched counts."""
    with pytest.raises(ModelError, match=r"me/gated: it is gated, and there is no token"):
        clip.Scorer.load("me/gated")
    with pytest.raises(ModelError, match=r"me/nothing: there is no such model on the hub"):
        tiny.load_tiny("me/nothing", torch.device("cpu"))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
        with pytest.raises(ModelError, match=r"me/clip needs 0\.0 GB and .* free; make room, or set HF_HOME"):
            clip.Scorer.load("me/clip")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cannot be reached .*, or set pretrained_evaluation_model_name_or_path to a CLIP model"):
        clip.Scorer.load("me/clip")
    with pytest.raises(ModelError, match=r"cannot be reached .*, or set validation_preview: false"):
        tiny.load_tiny("me/clip", torch.device("cpu"))


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    """By the transformer's class, before anything is loaded."""
    folder = shutil.copytree(playground.MODEL, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace("SD3Transformer2DModel", "FluxTransformer2DModel"))
    config = st.RunConfig.make(pretrained_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match=r"a model of another family \(FluxTransformer2DModel\); sd3tune trains SD3 and SD3\.5"):
        components.model_folder(config)
    path.write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        components.model_folder(config)


def test_names_and_folders_are_told_apart() -> None:
    """owner/name is a name; everything else is a folder."""
    assert hub.is_name("stabilityai/stable-diffusion-3.5-medium")
    assert not any(map(hub.is_name, ("model", "./a", "/a/b", "a/b/c", "~/m", "a/", "/a", "..", "c:\\x/y")))
    assert set(hub.FLAVOURS) == set(components.SHAPES)
