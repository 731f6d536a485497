"""Webhooks against real servers on loopback: slow, down, failing, redirecting; the run never waits, and no loss is silent."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench
from PIL import Image
from test_trackers import curves

import sd3tune as st
from sd3tune.checkup import _webhooks
from sd3tune.config.hooks import Hook, hooks_of
from sd3tune.history import History
from sd3tune.records import (
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    FailureRecord,
    ImageRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    ScoreRecord,
    SegmentRecord,
    StepRecord,
)
from sd3tune.reporting.cleaning import without_places, without_secrets
from sd3tune.reporting.events import Events
from sd3tune.reporting.tail import Patience, Tail, _close
from sd3tune.reporting.webhooks import PATIENCE, Webhook
from sd3tune.run_folder import RunFolder

QUICK = Patience(pauses=(0.05,) * 100, limit=4.0, passing=20)


class Server:
    """Answers each call as ``answer(number of the call)`` says and keeps what it accepted."""

    def __init__(self, answer: Callable[[int], int] = lambda n: 200, delay: float = 0.0, port: int = 0) -> None:
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.count = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.count += 1
                code = answer(outer.count)
                time.sleep(delay)
                if code < 300:
                    outer.calls.append((dict(self.headers.items()), body))
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/hook"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.calls]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [payload for payload in self.payloads if payload["type"] == kind]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*given: Any, **options: Any) -> Server:
        made.append(Server(*given, **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "home" / "runs" / "pots")


def tail(folder: RunFolder, hook: Hook, *, patience: Patience = QUICK, interval: int | None = None, most: int = 500) -> Tail:
    config = st.presets.playground(output_dir=str(folder.path), cache_dir="/home/somebody/cache", max_train_steps=100)
    return Tail(Webhook(hook, Events(config, folder, total=100, updates_per_epoch=10), interval), patience, most=most)


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number, loss=0.5, losses=(0.5,), sigmas=(0.1,), items=("a",), learning_rate=1e-4, grad_norm=1.0, seconds=2.0,
        images_per_second=1.0, peak_memory_bytes=0,
    )  # fmt: skip


def image(folder: RunFolder, number: int) -> ImageRecord:
    path = folder.images(number) / "00.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(path)
    return ImageRecord(step=number, prompt="a pot", path=str(path), seed=1, width=8, height=8, guidance=3.0, skip_layers=())


def preview(number: int) -> PreviewRecord:
    return PreviewRecord(step=1, prompt="a pot", sampler_step=number, sampler_steps=9)


def take(one: Tail, records: list[Record]) -> float:
    """The seconds for which records were in the way of the run."""
    before = time.perf_counter()
    for record in records:
        one.take(record)
    return time.perf_counter() - before


# --- what is said ------------------------------------------------------------------------------------------------------


def test_where_python_starts_no_thread_any_more_nothing_is_waited_for(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 is so at its end; what is lost is told."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    one = tail(folder, Hook("raw", "http://127.0.0.1:9/hook"))
    one.take(step(1))
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < 1.0
    assert one.ended
    assert any("was not delivered (there was no time left)" in said for said in one.news())


def test_a_raw_webhook_is_told_everything_in_order(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """Types, stages and numbers of each record; the picture byte by byte; the token as a header; the run's folder nowhere."""
    server = serve()
    one = tail(folder, Hook("raw", server.url, token="s3cr3t", prefix="[pots]"))
    checkpoint = CheckpointRecord(step=2, path=str(folder.checkpoint_folder / "step-000002"), tensors=3)
    final = CheckpointRecord(step=3, path=str(folder.lora), tensors=3)
    held = EvalRecord(step=2, loss=0.25, images=4, sigmas=(0.5,), losses_by_sigma=(0.25,))
    drawn = image(folder, 2)
    folder.lora.write_bytes(b"")
    length = CommandRecord(step=2, name="set", value={"max_train_steps": 3})
    history = History(folder.history)
    for record in (step(1), length, step(3), final):
        history.append(record)
    start = NoticeRecord(step=0, text=f"12 images of {Path.home()}/pictures/pots into {folder.path}/x")
    for record in (start, step(1), checkpoint, held, preview(1), drawn, length):
        one.take(record)
    for record in (step(3), final):
        one.take(record)
    one.close()
    assert one.news() == []
    said = server.payloads
    assert [p["type"] for p in said] == [
        "lifecycle.stage", "notification", "training.status", "training.checkpoint", "lifecycle.stage", "training.validation",
        "validation.image", "lifecycle.stage", "notification", "training.status", "training.checkpoint", *2 * ["lifecycle.stage"],
    ]  # fmt: skip
    assert said[1]["data"]["config"]["lora_rank"] == st.presets.playground().adapter.lora_rank
    assert not {"output_dir", "cache_dir", "webhook_config"} & set(said[1]["data"]["config"])
    assert said[1]["body"] == "12 images of pictures/pots into x"
    assert said[2]["data"] | {"eta": 198.0, "epoch": 0.1, "loss": 0.5, "lr": 1e-4, "step": 1, "total_steps": 100} == said[2]["data"]
    assert said[9]["data"]["total_steps"] == 3
    assert said[3]["data"] == {"path": "checkpoints/step-000002", "label": "step 2", "is_final": False}
    assert said[10]["data"] == {"path": "lora.safetensors", "label": "final adapter", "is_final": True}
    assert said[5]["data"]["loss"] == 0.25
    assert base64.b64decode(said[6]["images"][0]) == Path(drawn.path).read_bytes()
    assert said[6]["data"]["path"] == "images/step-000002/00.png"
    keys = [p["stage"]["key"] for p in said if "stage" in p]
    assert keys == ["init_prepare_models", "checkpoint_save", "validation", "model_save", "training_complete"]
    assert {p["job_id"] for p in said} == {"pots"}
    assert all(p["title"].startswith("[pots] ") and p["timestamp"].endswith("+00:00") for p in said)
    everything = b"".join(body for _, body in server.calls).decode()
    for hidden in (str(folder.path.parent), str(Path.home()), "somebody", "s3cr3t"):
        assert hidden not in everything, hidden
    assert {headers["X-Api-Key"] for headers, _ in server.calls} == {"s3cr3t"}


def test_previews_failures_and_scores_are_told(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """A preview's pictures are PNGs with their step; a picture that failed is a warning in words; a score is numbers."""
    server, jpeg = serve(), io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(jpeg, "JPEG")
    one = tail(folder, Hook("raw", server.url))
    shown = replace(preview(5), previews=(jpeg.getvalue(),) * 2, prompts=("a pot", "a cup"), count=2, width=16, height=8, timestep=750.0)
    failed = replace(image(folder, 3), path="", problem=f"no room in {folder.path}/x")
    score = ScoreRecord(step=3, kind="adapter", mean=0.3, min=0.2, max=0.4, std=0.1, scores=(0.2, 0.4), names=("a", "b"))
    for record in (preview(4), shown, failed, score):
        one.take(record)
    one.close()
    assert one.news() == []
    said = server.payloads
    assert [p["type"] for p in said] == ["validation.image", "notification", "training.validation"], "a step without pictures is debug"
    assert said[0]["data"]["step_label"] == "5/9"
    assert (said[0]["data"]["resolution"], said[0]["data"]["timestep"]) == ("16x8", 750.0)
    assert said[0]["data"]["prompts"] == ["a pot", "a cup"]
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for data in said[0]["images"]]
    assert [(picture.format, picture.size) for picture in found] == 2 * [("PNG", (8, 8))]
    assert said[1]["severity"] == "warning"
    assert "no room in x" in said[1]["body"]
    assert said[2]["data"]["clip/mean"] == 0.3


@pytest.mark.parametrize(
    ("level", "interval", "types"),
    [
        ("debug", None, [*2 * ["training.status"], "lifecycle.stage", "validation.image", *2 * ["lifecycle.stage"], "error"]),
        ("info", 2, ["training.status", "validation.image", *2 * ["lifecycle.stage"], "error"]),
        ("warning", None, ["lifecycle.stage", "error"]),
        ("error", None, ["lifecycle.stage", "error"]),
        ("critical", None, []),
    ],
)
def test_level_and_interval(folder: RunFolder, serve: Callable[..., Server], level: str, interval: int | None, types: list[str]) -> None:
    """What is below the level is left out, and the loss but every so many updates."""
    server = serve()
    one = tail(folder, Hook("raw", server.url, level=level), interval=interval)
    take(one, [step(1), step(2), preview(1), image(folder, 2), FailureRecord(step=2, text="ValueError: no")])
    one.close()
    assert [p["type"] for p in server.payloads] == types
    assert one.news() == []


def test_what_went_wrong_is_a_warning(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """A picture that failed, a refused change, a notice that says so, a rollback: at the level warning these and nothing else."""
    server = serve()
    one = tail(folder, Hook("raw", server.url, level="warning"))
    failed = replace(image(folder, 3), path="", problem="no room")
    refused = CommandRecord(step=4, name="set", value={"lora_rank": 4}, refused="lora_rank cannot change")
    waits = NoticeRecord(step=4, text="the run waits", warning=True)
    back = SegmentRecord(step=2, from_step=2, parent=0, why="rollback")
    plain = [NoticeRecord(step=0, text="a run"), step(1), image(folder, 2), replace(refused, refused=""), replace(back, why="resume")]
    take(one, [*plain, failed, refused, waits, back])
    one.close()
    assert [p["severity"] for p in server.payloads] == 4 * ["warning"]
    assert [p.get("body", p["title"]) for p in server.payloads] == [
        "the picture of 'a pot' could not be drawn: no room", "set {'lora_rank': 4}, refused: lora_rank cannot change", "the run waits",
        "The run goes on from step 2 (rollback)",
    ]  # fmt: skip


def test_stages_have_an_end(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """Resuming; the base model's pictures, then a step's, one of which failed; a checkpoint; the last pictures: each stage once."""
    server = serve()
    one = tail(folder, Hook("raw", server.url))
    base, failed = replace(image(folder, 0), kind="base"), replace(image(folder, 2), path="", problem="no room")
    final = CheckpointRecord(step=100, path=str(folder.lora), tensors=3)
    folder.lora.write_bytes(b"")
    history = History(folder.history)
    for record in (step(100), final):
        history.append(record)
    take(one, [SegmentRecord(step=1, from_step=1, parent=0, why="resume"), base, replace(base, seed=2), image(folder, 2), failed, step(3)])
    take(one, [CheckpointRecord(step=3, path=str(folder.checkpoint_folder / "step-000003"), tensors=3), final, image(folder, 100)])
    one.close()
    found = [(p["stage"]["key"], p["stage"]["status"], p["stage"].get("progress", {}).get("current")) for p in server.of("lifecycle.stage")]
    assert found == [
        ("init_resume_checkpoint", "completed", 1), ("benchmark_base_model", "completed", 2), ("validation", "completed", 1),
        ("checkpoint_save", "completed", None), ("model_save", "completed", None), ("final_validation", "completed", 1),
        ("training_complete", "completed", 100),
    ]  # fmt: skip


def test_discord_gets_messages_and_pictures(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """A message for what a person reads, the picture as a file, no losses unless they are asked for."""
    server = serve()
    one = tail(folder, Hook("discord", server.url, prefix="pots"))
    drawn = image(folder, 2)
    take(one, [step(1), preview(1), NoticeRecord(step=1, text="x" * 3000), drawn])
    one.close()
    (_, words), (headers, picture) = server.calls
    assert json.loads(words) == {"content": ("pots Step 1: " + "x" * 3000)[:2000]}
    assert headers["Content-Type"].startswith("multipart/form-data; boundary=")
    assert Path(drawn.path).read_bytes() in picture
    assert b'{"content": "pots Validation picture at step 2: a pot"}' in picture
    every = tail(folder, Hook("discord", server.url), interval=5)
    take(every, [step(n) for n in range(1, 11)])
    every.close()
    assert [json.loads(body)["content"] for _, body in server.calls[2:]] == ["Step 5/100, loss 0.5000", "Step 10/100, loss 0.5000"]


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_slow_server_is_never_waited_for(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """0.1 s a call and 300 records at once: none holds the run up, every picture arrives, the losses between are passed."""
    server = serve(delay=0.1)
    one = tail(folder, Hook("raw", server.url))
    records: list[Record] = [r for n in range(1, 101) for r in (step(n), preview(1), *([image(folder, n)] if n % 20 == 0 else []))]
    assert take(one, records) < 3.0, "to wait for the calls would take 20 s"
    one.close()
    assert [p["data"]["step"] for p in server.of("validation.image")] == [20, 40, 60, 80, 100]
    shown = [p["data"]["step"] for p in server.of("training.status")]
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert len(shown) < 60
    assert one.news() == []


@pytest.mark.full
def test_a_server_that_answers_after_ten_seconds_gets_every_picture_once(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """No call is given up and made again; the run is never held up."""
    server = serve(delay=10.0)
    one = tail(folder, Hook("raw", server.url), patience=PATIENCE._replace(limit=60.0))
    assert take(one, [image(folder, 1), image(folder, 2)]) < 0.5
    one.close()
    assert [p["data"]["step"] for p in server.of("validation.image")] == [1, 2]
    assert server.count == 3, "two pictures, and that the first step's are drawn"
    assert one.news() == []


def test_a_server_that_fails_gets_every_picture_in_the_end(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """Two of three calls answer 500 or 429: pictures and notices arrive, each once, in order."""
    server = serve(lambda n: 200 if n % 3 == 0 else 500 if n % 3 == 1 else 429)  # stages between them, too
    one = tail(folder, Hook("raw", server.url))
    take(one, [image(folder, 1), NoticeRecord(step=1, text="hello"), image(folder, 2), image(folder, 3)])
    one.close()
    assert [p["data"].get("step") for p in server.of("validation.image")] == [1, 2, 3]
    assert [p["body"] for p in server.of("notification")] == ["hello"]
    assert [(p["stage"]["key"], p["stage"]["progress"]["total"]) for p in server.of("lifecycle.stage")] == 2 * [("validation", 1)]
    assert one.news() == []


def test_a_server_that_comes_back_gets_what_it_missed(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """Down while 3 pictures are drawn, then there: all arrive, with nothing to tell."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    one = tail(folder, Hook("raw", f"http://127.0.0.1:{port}/hook"), patience=Patience((0.2,) * 100, limit=10.0, passing=20))
    assert take(one, [image(folder, 1), image(folder, 2), image(folder, 3)]) < 0.5
    time.sleep(0.5)
    server = serve(port=port)
    one.close()
    assert [p["data"]["step"] for p in server.of("validation.image")] == [1, 2, 3]
    assert one.news() == []


def test_the_loss_of_each_picture_is_told(folder: RunFolder) -> None:
    """A server that is away: each picture has its sentence, of all else the first and the number; no address beyond the host."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api/webhooks/123/s3cr3t"
        one = tail(folder, Hook("raw", url), patience=Patience(pauses=(0.02, 0.02), limit=3.0, passing=20))
        take(one, [*(image(folder, n) for n in (1, 2, 3)), step(4), step(5), NoticeRecord(step=5, text="x")])
        before = time.monotonic()
        one.close()
    assert time.monotonic() - before < 4
    said = one.news()
    lost = [text for text in said if "the picture" in text]
    assert [f"images/step-00000{n}/00.png" in text or f"step-00000{n}/00.png" in text for n, text in zip((1, 2, 3), lost, strict=True)]
    assert all("it cannot be reached" in text and text.endswith("; it is in the run folder") for text in lost)
    assert said[-1] == "webhook raw (127.0.0.1): 3 records were not delivered in all; the history has them"
    assert "s3cr3t" not in str(said)


def test_a_server_that_hangs_does_not_keep_the_end(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """A call that never comes back: after the limit the run is over, and what was on its way is told as lost."""
    server = serve(delay=30.0)
    one = tail(folder, Hook("raw", server.url), patience=Patience(limit=0.3, passing=20))
    take(one, [image(folder, 1), image(folder, 2)])
    one.stop()
    before = time.monotonic()
    while not one.ended:
        time.sleep(0.02)
    assert time.monotonic() - before < 3
    assert [("step-000001" in text, "no time left" in text) for text in one.news()] == [(True, True), (False, True)]


@pytest.mark.parametrize(("code", "why"), [(404, "it answers 404"), (302, "it answers 302")])
def test_what_will_not_change_is_not_tried_again(folder: RunFolder, serve: Callable[..., Server], code: int, why: str) -> None:
    """A wrong address, or a redirect that would carry the token elsewhere: one call, one sentence."""
    server = serve(lambda n: code)
    one = tail(folder, Hook("raw", server.url, token="s3cr3t"))
    one.take(image(folder, 1))
    one.close()
    assert server.count == 1
    assert [why in text for text in one.news()] == [True]


def test_a_full_queue_drops_previews_first_and_never_the_last_picture(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """With room for 4: previews go, then losses, then old pictures; the newest picture and the notices arrive."""
    gate = threading.Event()
    server = serve(lambda n: 200 if gate.wait(10) else 500)
    one = tail(folder, Hook("raw", server.url, level="debug"), patience=Patience(pauses=(0.05,) * 9, limit=8.0), most=4)
    one.take(NoticeRecord(step=1, text="on its way"))
    while server.count == 0:
        time.sleep(0.01)
    take(one, [preview(1), step(2), preview(2), image(folder, 3), image(folder, 4), image(folder, 5), image(folder, 6)])
    take(one, [NoticeRecord(step=n, text=str(n)) for n in (7, 8, 9, 10, 11)])
    gate.set()
    one.close()
    assert [p["data"]["step"] for p in server.of("validation.image")] == [6]
    assert [p["body"] for p in server.of("notification")] == ["on its way", "9", "10", "11"]
    assert not server.of("training.status")
    lost = [text for text in one.news() if "the picture" in text]
    assert [any(f"step-00000{n}" in text for text in lost) for n in (3, 4, 5, 6)] == [True, True, True, False]
    assert all("too many were waiting" in text for text in lost)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_certificates_are_checked(folder: RunFolder, serve: Callable[..., Server], tmp_path: Path) -> None:
    """A server that signed itself is refused with the way out, and called when the setting says so."""
    key = tmp_path / "key.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(tmp_path / "cert.pem"),
        "-days",
        "2",
    ]
    subprocess.run([*made, "-subj", "/CN=localhost"], check=True, capture_output=True)
    server = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    url = f"https://localhost:{server.http.server_port}/hook"
    strict, lax = tail(folder, Hook("raw", url)), tail(folder, Hook("raw", url, verify=False))
    strict.take(image(folder, 1))
    strict.close()
    assert server.calls == []
    assert ["its certificate is not valid; ssl_no_verify: true goes without" in text for text in strict.news()] == [True]
    lax.take(image(folder, 2))
    lax.close()
    assert [p["data"]["step"] for p in server.of("validation.image")] == [2]


# --- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_tells_its_webhooks(bench: Workbench, serve: Callable[..., Server], tmp_path: Path) -> None:
    """Two at once, one of them down: the run ends well, the pictures of the other are the run's, the losses are notices."""
    server = serve()
    raw = {"webhook_type": "raw", "callback_url": server.url, "auth_token": "s3cr3t"}
    down = {"webhook_type": "discord", "webhook_url": "http://127.0.0.1:9/api/webhooks/s3cr3t"}
    (tmp_path / "hooks.json").write_text(json.dumps([raw, down]))
    trainer = bench.trainer(
        max_train_steps=2,
        lr_warmup_steps=0,
        validation_prompt=("lock",),
        webhook_config=str(tmp_path / "hooks.json"),
        eval_loss_disable=True,
    )
    for one in trainer._reporters._tails:
        one._patience = one._patience._replace(pauses=(0.01,), limit=5.0)
    for _ in trainer.run():
        pass
    drawn = [Path(row["path"]).read_bytes() for row in trainer.folder.read_history() if row["type"] == "image"]
    assert [base64.b64decode(p["images"][0]) for p in server.of("validation.image")] == drawn
    assert [p["data"]["step"] for p in server.of("training.status")] == [1, 2]
    assert server.payloads[-1]["stage"]["key"] == "training_complete"
    said = [row["text"] for row in trainer.folder.read_history() if row["type"] == "notice"]
    assert len([text for text in said if text.startswith("webhook discord (127.0.0.1): the picture")]) == len(drawn) == 2
    for file in (trainer.folder.config, trainer.folder.history, trainer.folder.log, trainer.folder.card):
        assert "s3cr3t" not in file.read_text()
    assert str(bench.root) not in str(server.payloads)


def test_a_run_that_goes_on_after_its_end_is_told(bench: Workbench, serve: Callable[..., Server]) -> None:
    """Rewound and run again: each update and each end arrive. Made longer and left half-way: no end is told when the process ends."""
    server = serve()
    trainer = bench.trainer(
        max_train_steps=2, lr_warmup_steps=0, checkpoint_step_interval=1, validation_prompt=(), eval_loss_disable=True,
        webhook_config={"callback_url": server.url}, report_to="tensorboard",
    )  # fmt: skip
    list(trainer.run())
    trainer.rewind(1)
    list(trainer.run())
    tails = trainer._reporters._tails
    assert all(one.ended for one in tails)
    trainer.set(max_train_steps=4)
    list(trainer.run(1))
    for one in tails:
        _close(weakref.ref(one))
        assert one.news() == []
    assert [p["data"]["step"] for p in server.of("training.status")] == [1, 2, 2, 3]
    keys = [p["stage"]["key"] for p in server.payloads if "stage" in p]
    assert [key for key in keys if key in ("model_save", "training_complete")] == 2 * ["model_save", "training_complete"]
    rows = [(r["step"], r["loss"]) for r in trainer.folder.read_history() if r["type"] == "step"]
    shown = [(e.step, e.value) for e in curves(trainer.folder.path).Scalars("train_loss")]
    assert shown == [(s, pytest.approx(v, rel=1e-6)) for s, v in rows]
    assert [s for s, _ in rows] == [1, 2, 3]


def test_what_is_told_after_an_end_is_of_the_next(folder: RunFolder, serve: Callable[..., Server]) -> None:
    """A server that hangs over the first end: what it had is told as lost, once; what came afterwards arrives, in order."""
    gate = threading.Event()
    server = serve(lambda n: 404 if n == 1 and gate.wait(20) else 200)
    one = tail(folder, Hook("raw", server.url), patience=Patience(limit=0.2, passing=20))
    one.take(image(folder, 1))
    one.stop()
    while not one.ended:
        time.sleep(0.02)
    assert [("step-000001" in text, "no time left" in text) for text in one.news()] == [(True, True)]
    one.take(image(folder, 2))
    one.go_on()
    take(one, [image(folder, 3), NoticeRecord(step=4, text="hello")])
    assert not one.ended
    gate.set()
    deadline = time.monotonic() + 10
    while "hello" not in str(server.calls) and time.monotonic() < deadline:
        time.sleep(0.02)
    one.close()
    assert [p["body"] for p in server.payloads if "body" in p] == ["a pot", "hello"]
    assert [p["data"]["step"] for p in server.of("validation.image")] == [3]
    assert one.news() == []


def test_an_error_is_told(bench: Workbench, serve: Callable[..., Server]) -> None:
    """What ends the run goes out before it goes up."""
    server = serve()
    trainer = bench.trainer(validation_prompt=(), eval_loss_disable=True, webhook_config={"callback_url": server.url})

    def fails(*_: Any) -> Any:
        raise RuntimeError(f"no room in {trainer.folder.path}/x")

    trainer.engine.velocity = fails
    with pytest.raises(RuntimeError, match="no room"):
        for _ in trainer.run():
            pass
    trainer._reporters._tails[0].close()
    assert [p["body"] for p in server.of("error")] == ["RuntimeError: no room in x"]
    assert [p["stage"]["status"] for p in server.of("lifecycle.stage") if p["stage"]["key"] == "training_abort"] == ["failed"]


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"webhook_type": "slack"}, "webhook_type 'slack' is not known; use raw or discord"),
        ({"webhook_type": "raw"}, "a raw webhook needs callback_url"),
        ({"callback_url": "ftp://x/y"}, "an address that begins with http:// or https://"),
        ({"callback_url": "https://x/y", "log_level": "loud"}, "log_level 'loud' is not known; use debug, info"),
        ({"callback_url": "https://x/y", "url": 1}, "url is not known; a webhook has auth_token"),
        ({"callback_url": "https://x/y", "ssl_no_verify": "yes"}, "ssl_no_verify is true or false"),
        ({"callback_url": "https://x/y", "auth_token": "s3cr3t"}, r"auth_token is a secret.*write \$NAME"),
        ({"webhook_type": "discord", "webhook_url": "https://x/s3cr3t"}, "webhook_url is a secret"),
        ({"callback_url": "https://me:s3cr3t@x/y"}, "callback_url holds a password or a query"),
        ('{"callback_url": ', "webhook_config is not valid JSON"),
    ],
)
def test_a_bad_webhook_is_said_with_the_settings(given: Any, says: str) -> None:
    """When the configuration is made, without showing a secret."""
    with pytest.raises(st.ConfigError, match=says) as caught:
        st.presets.playground(webhook_config=given)
    assert "s3cr3t" not in str(caught.value)


def test_where_a_webhook_may_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mapping, a list, JSON as text, or a file; secrets from the environment or the file; what is missing there is said at the start."""
    row = {"webhook_type": "discord", "webhook_url": "$POTS_HOOK", "log_level": "error"}
    monkeypatch.setenv("POTS_HOOK", "https://discord.example/api/webhooks/1/s3cr3t")
    wanted = (Hook("discord", "https://discord.example/api/webhooks/1/s3cr3t", level="error"),)
    (tmp_path / "hook.json").write_text(json.dumps({**row, "webhook_url": wanted[0].url}))
    for given in (row, [row], json.dumps(row), json.dumps([row]), str(tmp_path / "hook.json")):
        config = st.presets.playground(webhook_config=given)
        assert hooks_of(config.reporting.webhook_config) == wanted
        config.save(tmp_path / "run.yaml")
        assert "s3cr3t" not in (tmp_path / "run.yaml").read_text()
        assert hooks_of(st.RunConfig.load(tmp_path / "run.yaml").reporting.webhook_config) == wanted
    assert "s3cr3t" not in repr(wanted)
    config = st.presets.playground(webhook_config=row)
    assert [str(found).split() for found in _webhooks(config)] == [["ok", "webhook", "discord", "(discord.example)"]]
    monkeypatch.delenv("POTS_HOOK")
    assert [found.state for found in _webhooks(config)] == ["bad"]
    with pytest.raises(st.ConfigError, match=r"webhook_url is \$POTS_HOOK, and the environment has no such variable; set it"):
        hooks_of(row)
    with pytest.raises(st.ConfigError, match=r"no\.json cannot be read \(FileNotFoundError\)"):
        hooks_of("no.json")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/data/me/run/images/a.png is there", "images/a.png is there"), ("see /etc/passwd, or ~/x/y.txt", "see passwd, or y.txt"),
        ("C:\\Users\\me\\a.png", "a.png"), ("3/4 of and/or 5 it/s", "3/4 of and/or 5 it/s"),
        ("https://me:pw@host.example/a/b?token=1 fails", "https://host.example fails"), (f"token hf_{'a1' * 17} here", "token *** here"),
        ("from huggingface_hub import hf_hub_download", "from huggingface_hub import hf_hub_download"),
    ],
)  # fmt: skip
def test_paths_and_tokens_are_taken_out_of_sentences(text: str, left: str) -> None:
    """What remains is what the sentence is about."""
    assert without_places(text, Path("/data/me/run")) == left
    assert without_secrets(left) == left
