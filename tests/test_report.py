"""The report of a run: one page that holds everything and asks no network."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Workbench
from PIL import Image

import sd3tune as st
from sd3tune import charts
from sd3tune.cli import main
from sd3tune.curves import curve_of
from sd3tune.errors import CheckpointError
from sd3tune.records import NoticeRecord
from sd3tune.reporting import reporters
from sd3tune.reporting.page import MOST, SIDE, page, thinned, write_report
from sd3tune.run_folder import RunFolder


class Reader(HTMLParser):
    """Collects what a page shows and what it would fetch; fails where a tag is not closed."""

    VOID = ("meta", "img", "input", "path", "circle", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.images: list[dict[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self.fetched += [
            given[name] for name in ("src", "href", "action", "data") if name in given and not given[name].startswith(("data:", "#"))
        ]
        assert not [name for name in given if name.startswith("on")], "no scripts"
        assert tag not in ("script", "link", "iframe", "object")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1][-1] += data


def picture(folder: RunFolder, step: int, side: int = 8, prompt: str = "a pot") -> None:
    at = folder.images(step)
    at.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (step % 256, 40, 40)).save(at / "00.png")
    (at / "00.json").write_text(json.dumps({"prompt": prompt}))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder without a run: ten updates, a change of the rate, two evaluations, a notice with markup."""
    made = RunFolder.create(tmp_path / "pots")
    st.presets.playground(learning_rate=3e-4, validation_prompt=("a <b>pot</b>",)).save(made.config)
    rows: list[dict[str, Any]] = [{"type": "step", "step": n, "loss": 1 / n} for n in range(1, 11)]
    rows += [{"type": "eval", "step": 0, "loss": 0.9, "images": 4}, {"type": "eval", "step": 10, "loss": 0.45, "images": 4}]
    rows.append({"type": "command", "step": 4, "name": "set", "value": {"learning_rate": 1e-4}, "refused": ""})
    rows.append({"type": "command", "step": 5, "name": "set", "value": {"lora_rank": 4}, "refused": "lora_rank cannot change"})
    rows.append({"type": "notice", "step": 6, "text": "<script>alert(1)</script> hf_" + "a1" * 17})
    score = {"mean": 0.321, "min": 0.1, "max": 0.5, "std": 0.1, "base": 0.25, "reference": 0.375}
    rows.append({"type": "clip", "step": 10, "kind": "adapter", **score, "scores": [0.1234, 0.5], "names": ["a <b>pot</b>", "cup"]})
    made.history.write_text("".join(json.dumps({**row, "time": time.time(), "segment": 0}) + "\n" for row in rows))
    made.manifest.write_text(json.dumps({"images_found": 16, "advice": ["lower the rate"], "datasets": [{"id": "some", "resolution": 64}]}))
    made.environment.write_text("# Python 3.11, Linux\nnumpy==2\ntorch==2.13\n")
    return made


def test_a_finished_run_has_its_report(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """Written at the end, and the same again by the command; the pictures of every step are in it, pixel by pixel almost."""
    trainer = bench.trainer(max_train_steps=2, lr_warmup_steps=0, validation_steps=1, validation_prompt=("lock",), num_eval_images=1)
    for _ in trainer.run():
        pass
    path = trainer.folder.path / "report.html"
    text = path.read_text()
    assert main(["report", str(trainer.folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text() == text
    read = Reader(text)
    assert read.fetched == []
    drawn = [image for image in read.images if image["alt"] == "lock"]
    assert len(drawn) == 3
    for image, step in zip(drawn, (0, 1, 2), strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        kept = Image.open(trainer.folder.images(step) / "00.png").convert("RGB")
        far = [abs(a - b) for a, b in zip(shown.convert("L").getdata(), kept.convert("L").getdata(), strict=True)]
        assert sum(far) / len(far) < 4
    assert "finished after 2 updates" in text
    evals = [row["loss"] for row in trainer.folder.read_history() if row["type"] == "eval"]
    assert f"on held-out pictures {evals[-1]:.4f}, at the beginning {evals[0]:.4f}" in text
    assert ["images_found", "16"] in read.rows
    assert not [row for row in trainer.folder.read_history() if row["type"] == "notice" and row["step"]]


@pytest.mark.parametrize("how", ["STOP", "Ctrl-C", "an error"])
def test_a_run_that_ends_early_has_its_report_too(bench: Workbench, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """With what it had learned by then; when the page fails, that is said, and the run ends as it would have."""
    trainer = bench.trainer(max_train_steps=9, validation_prompt=(), eval_loss_disable=True)
    list(trainer.run(1))
    assert not trainer.folder.report.exists(), "it only pauses"

    def leave() -> None:
        records = trainer.run()
        if how == "STOP":
            (trainer.folder.path / "STOP").touch()
            list(records)
            return
        next(records)
        error = KeyboardInterrupt() if how == "Ctrl-C" else RuntimeError("no room")
        with pytest.raises(type(error)) as caught:
            records.throw(error)  # type: ignore[attr-defined]
        assert ("the report could not be written (no ink)" in getattr(caught.value, "__notes__", [])) is broken

    broken = False
    leave()
    read = Reader(text := trainer.folder.report.read_text())
    assert f"not finished after {trainer.steps_done} updates" in text
    assert (["step 1", "stop "] in read.rows) is (how == "STOP")
    broken = True

    def fails(folder: RunFolder) -> Path:
        raise CheckpointError("no ink")

    monkeypatch.setattr(reporters, "write_report", fails)
    leave()
    said = [row["text"] for row in trainer.folder.read_history() if row["type"] == "notice"]
    assert ("the report could not be written (no ink)" in said) is (how == "STOP")


def test_everything_is_there_and_nothing_is_fetched(folder: RunFolder) -> None:
    """Settings that were set stand out, events in order, manifest, versions; text is text; no token; no address of any kind."""
    picture(folder, 0, prompt="a <b>pot</b>")
    text = page(folder)
    read = Reader(text)
    assert read.fetched == []
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "<script" not in text
    assert "mean 0.321; the base model's pictures 0.250; real held-out pictures with their captions 0.375." in text
    assert "not how good they look" in text, "how to read it stands beside it"
    assert ["a <b>pot</b>", "0.123"] in read.rows
    assert "<b>" not in text
    assert ["step 6", "<script>alert(1)</script> ***"] in read.rows
    assert ["step 4", 'set {"learning_rate": 0.0001}'] in read.rows
    assert ["step 5", 'set {"lora_rank": 4}, refused: lora_rank cannot change'] in read.rows
    assert '<tr class="set"><td>learning_rate</td><td>0.0003</td></tr>' in text
    assert "<tr><td>lora_dropout</td><td>0.0</td></tr>" in text
    leaves = {row[0] for row in read.rows}
    assert set(st.presets.playground().leaves()) <= leaves, "every setting"
    assert ["datasets", "id: some, resolution: 64"] in read.rows
    assert "Python 3.11, Linux, torch==2.13" in text
    assert [image["alt"] for image in read.images] == ["a <b>pot</b>"]
    assert "not finished after 10 updates; loss 0.1000; on held-out pictures 0.4500, at the beginning 0.9000" in text
    assert "Content-Security-Policy" in text


def test_the_curves_are_those_of_the_history_that_counts(folder: RunFolder) -> None:
    """What a rollback replaced is not drawn; a change of a setting is marked, a refused one is not."""
    marked = charts.line(curve_of((n, 1 / n) for n in range(1, 11)), [(0, 0.9), (10, 0.45)], marks=[4])
    assert marked in page(folder)
    assert charts.held_out([(0, 0.9), (10, 0.45)]) in page(folder)
    with folder.history.open("a") as file:
        file.write(json.dumps({"type": "segment", "step": 3, "from_step": 3, "parent": 0, "segment": 1, "why": "rollback"}) + "\n")
        file.write(json.dumps({"type": "step", "step": 4, "loss": 0.3, "segment": 1}) + "\n")
    text = page(folder)
    assert charts.line(curve_of([(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.3)]), [(0, 0.9)]) in text
    assert "the run goes on from step 3 (rollback)" in text


def test_many_and_large_pictures_stay_a_page(folder: RunFolder) -> None:
    """Of many steps some are shown, always the first and the last; large pictures become small; one row of steps, the last one open."""
    for step in range(0, 400, 10):
        picture(folder, step, side=1024 if step == 390 else 8)
    read = Reader(text := page(folder))
    labels = [int(step) for step in re.findall(r'<label for="s\d+">(\d+)</label>', text)]
    assert len(labels) == MOST
    assert (labels[0], labels[-1]) == (0, 390)
    assert labels == sorted(set(labels))
    assert max(int(image["width"]) for image in read.images) == SIDE
    assert text.count(" checked>") == 1
    assert ".sheet{display:none;" in text
    assert [int(n) for n in re.findall(r"#s(\d+):checked~\.f\1\{display:flex\}", text)] == list(range(MOST))
    assert text.count("display:flex") == MOST, "and no other rule shows them"
    assert re.search(r"checked><label[^>]*>390<", text)
    assert thinned([Path(str(n)) for n in range(3)], 5) == [Path("0"), Path("1"), Path("2")]


def row(kind: str, step: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "step": step, **more}


UPDATES = [row("step", n) for n in (1, 2, 3, 4)]
SAVED, FINAL = row("checkpoint", 4, path="/x/step-000004"), row("checkpoint", 4, path="/x/lora.safetensors")
LONGER = row("command", 4, name="set", value={"max_train_steps": 6}, refused="")
TAKEN_UP = row("segment", 4, from_step=4, parent=0, why="resume", live={"max_train_steps": 4}, skipped=[])


@pytest.mark.parametrize(
    ("lines", "ended"),
    [
        (UPDATES, False), ([*UPDATES, SAVED, FINAL], True), ([*UPDATES[:3], {**FINAL, "step": 3}], False),
        ([*UPDATES, SAVED, FINAL, LONGER], False), ([*UPDATES, SAVED, FINAL, {**LONGER, "refused": "no"}], True),
        ([*UPDATES, SAVED, FINAL, LONGER, TAKEN_UP], True), ([*UPDATES, SAVED, FINAL, TAKEN_UP, LONGER], False),
        ([*UPDATES, SAVED, FINAL, LONGER, row("step", 5)], False),
        ([*UPDATES, SAVED, FINAL, {**TAKEN_UP, "from_step": 2, "why": "rewind"}, *UPDATES[2:]], False),
        ([*UPDATES, SAVED, FINAL, LONGER, row("step", 5), row("step", 6), {**FINAL, "step": 6}], True),
    ],
)  # fmt: skip
def test_a_run_is_finished_where_its_adapter_was_written_with_nothing_left(
    tmp_path: Path, lines: list[dict[str, Any]], ended: bool
) -> None:
    """Of four updates: made longer, taken up before that was saved, rewound, gone on. Page, list and opened run agree."""
    made = RunFolder.create(tmp_path / "pots")
    st.presets.playground().save(made.config)
    made.manifest.write_text(json.dumps({"updates": 4}))
    made.lora.write_bytes(b"")
    made.history.write_text("".join(json.dumps({"loss": 1.0, **line}) + "\n" for line in lines))
    assert ("; finished after" in page(made)) is ended
    (listed,) = st.runs(tmp_path)
    assert listed.finished is ended
    assert (st.open_run(made.path).status == "finished") is ended


def test_an_empty_run_has_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings alone are enough; what is no run is one message."""
    made = RunFolder.create(tmp_path / "pots")
    st.presets.playground().save(made.config)
    assert "not finished after 0 updates" in write_report(made).read_text()
    assert "no loss yet" in made.report.read_text()
    assert main(["report", str(tmp_path)]) == 1
    assert "not a run folder (there is no config.yaml)" in capsys.readouterr().err


def test_a_report_that_fails_costs_a_notice(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the page, or a full disk: the run has ended well by then, and its card is there."""

    def fails(folder: RunFolder) -> Path:
        raise CheckpointError("no ink")

    monkeypatch.setattr(reporters, "write_report", fails)
    said = list(reporters.Reporters(folder).finish(10))
    assert said == [NoticeRecord(step=10, text="the report could not be written (no ink)", warning=True)]
    assert folder.card.exists()
