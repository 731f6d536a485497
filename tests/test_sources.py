"""Pictures that lie elsewhere than in a folder: addresses, tables, data sets of the hub; and fetching, captioning, faces, HEIC."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fakes import Fake
from PIL import Image, ImageDraw

import sd3tune as st
from sd3tune.cache import CacheBuilder
from sd3tune.cli import main
from sd3tune.data import overlay
from sd3tune.data.download import check_room
from sd3tune.errors import DataError, ModelError


def png(shade: int, size: tuple[int, int] = (64, 64)) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


def built(tmp_path: Path, yaml: str) -> tuple[st.Catalog, st.Cache]:
    """The catalog of a datasets.yaml, and the cache built from it."""
    (tmp_path / "datasets.yaml").write_text(yaml)
    catalog = st.discover(tmp_path / "datasets.yaml")
    plan = st.plan(catalog, st.presets.playground(cache_dir=str(tmp_path / "cache"), validation_prompt=()))
    return catalog, CacheBuilder(plan, Fake()).build()


@pytest.fixture
def bucket() -> Iterator[str]:
    """Three pictures with captions below an address, and litter."""
    memory = fsspec.filesystem("memory")
    for n in range(3):
        memory.pipe(f"/pots/{'sub/' * (n == 2)}{n}.png", png(n, (64 + 32 * n, 64)))
        memory.pipe(f"/pots/{'sub/' * (n == 2)}{n}.txt", f"caption {n}".encode())
    for name in (".hidden.png", "__MACOSX/a.png", "notes.md"):
        memory.pipe(f"/pots/{name}", b"x")
    yield "memory://pots"
    memory.rm("/pots", recursive=True)


def test_an_address_is_read_through(tmp_path: Path, bucket: str) -> None:
    """Names, sizes and captions of files at an fsspec address; nothing is copied; two names are of one picture by content."""
    catalog, cache = built(tmp_path, f"- {{id: pots, instance_data_dir: '{bucket}', resolution: 64}}\n")
    assert [(i.found and i.found.name, i.width, i.caption) for i in catalog.items] == [
        ("0.png", 64, "caption 0"), ("1.png", 96, "caption 1"), ("sub/2.png", 128, "caption 2"),
    ]  # fmt: skip
    assert catalog.problems == (), "litter is passed over"
    assert cache.misses == 7
    for placement in cache.plan.train:
        assert cache.latent(placement).shape[0] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "datasets.yaml"]
    assert st.discover(bucket).items[0].caption == "caption 0"


@pytest.mark.parametrize("address", ["memory://nothing", "nosuch://x/y", "s3://"])
def test_an_address_that_cannot_be_read(tmp_path: Path, address: str) -> None:
    """One DataError with the address."""
    with pytest.raises(DataError, match=r"cannot be read|nothing there|not an address|needs"):
        built(tmp_path, f"- {{id: pots, instance_data_dir: '{address}', resolution: 64}}\n")


def test_type_aws_is_an_s3_address(tmp_path: Path) -> None:
    """SimpleTuner's keys become the address; secrets in the file are refused."""
    from sd3tune.data.entries import read_datasets

    (tmp_path / "d.yaml").write_text("- {id: a, type: aws, aws_bucket_name: b, aws_data_prefix: some/folder/}\n")
    ((entry,), _) = read_datasets(tmp_path / "d.yaml")
    assert (entry.type, entry.instance_data_dir) == ("local", "s3://b/some/folder")


def test_a_table_of_files_and_addresses(tmp_path: Path, bucket: str) -> None:
    """type csv: pictures from the column of addresses, captions from the other; a missing one is a row."""
    (tmp_path / "here.png").write_bytes(png(9))
    (tmp_path / "pictures.csv").write_text(
        f"url,words\n{bucket}/0.png,from far away\nhere.png,from here\n{bucket}/gone.png,never\nhere.txt,not a picture\n"
    )
    (tmp_path / "here.txt").write_text("x")
    yaml = (
        "- {id: t, type: csv, instance_data_dir: ., csv_file: pictures.csv, csv_caption_column: words, caption_strategy: csv, "
        "resolution: 64}\n"
    )
    catalog, cache = built(tmp_path, yaml)
    assert [i.caption for i in catalog.items] == ["from far away", "from here"]
    assert sorted(p.path.name for p in catalog.problems) == ["gone.png", "here.txt"]
    assert cache.misses == 5
    (tmp_path / "pictures.csv").write_text("file,words\na,b\n")
    with pytest.raises(DataError, match=r"no column 'url' \(csv_url_column\); there are \['file', 'words'\]"):
        built(tmp_path, yaml)


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """type huggingface: rows of a parquet layout, with bytes inside, as the datasets library reads them; captions from a column."""
    import datasets

    rows = datasets.Dataset.from_dict(
        {"picture": [{"bytes": png(n), "path": None} for n in range(3)], "words": ["one", "two\nzwei", "three"]},
        features=datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")}),
    )
    (tmp_path / "hub").mkdir()
    rows.to_parquet(str(tmp_path / "hub" / "train.parquet"))
    yaml = (
        f"- {{id: h, type: huggingface, dataset_name: '{tmp_path / 'hub'}', image_column: picture, caption_column: words, "
        "caption_strategy: huggingface, resolution: 64}\n"
    )
    catalog, cache = built(tmp_path, yaml)
    assert [i.captions for i in catalog.items] == [("one",), ("two", "zwei"), ("three",)]
    assert cache.misses == 3 + 5
    for placement in cache.plan.train:
        number = placement.item.path.number  # type: ignore[attr-defined]
        alone = Fake().encode_images([Image.open(io.BytesIO(png(number)))]).mean_BCHW[0]
        assert (cache.latent(placement) - alone).abs().max() < 0.01
    with pytest.raises(DataError, match=r"no column 'image' \(image_column\); there are \['picture', 'words'\]"):
        built(tmp_path, yaml.replace("image_column: picture, ", ""))
    with pytest.raises(DataError, match="cannot be loaded"):
        built(tmp_path, yaml.replace("/hub'", "/nothing'"))


# --- edited captions -------------------------------------------------------------------------------------------------


def test_edited_captions_go_before_all_others(tmp_path: Path) -> None:
    """They lie beside datasets.yaml, are said, and edits of pictures that are not there are named; the folder is not touched."""
    (tmp_path / "pots").mkdir()
    for n in range(2):
        (tmp_path / "pots" / f"{n}.png").write_bytes(png(n))
        (tmp_path / "pots" / f"{n}.txt").write_text(f"caption {n}")
    yaml = tmp_path / "datasets.yaml"
    yaml.write_text("- {id: pots, instance_data_dir: pots, resolution: 64}\n")
    assert overlay.save(yaml, {"pots": {"1.png": ("corrected",)}}).name == "datasets.captions.json"
    overlay.save(yaml, {"pots": {"gone.png": ("lost",)}})
    catalog = st.discover(yaml)
    assert [i.captions for i in catalog.items] == [("caption 0",), ("corrected",)]
    assert "1 captions are taken from the edits beside datasets.yaml" in str(catalog)
    assert "edited captions of pictures that are not there: pots: gone.png" in str(catalog)
    assert sorted(p.name for p in (tmp_path / "pots").iterdir()) == ["0.png", "0.txt", "1.png", "1.txt"]
    for bad in ("[]", "{", '{"pots": {"1.png": 3}}', '{"pots": 1}'):
        (tmp_path / "datasets.captions.json").write_text(bad)
        with pytest.raises(DataError, match="not a file of edited captions"):
            st.discover(yaml)


# --- fetching --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as fetching a data set asks for."""

    files: ClassVar = {"a.png": png(1), "a.txt": b"caption", "sub/b.png": png(2)}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, whole: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/me/pots"):
            rows = [{"rfilename": n, "size": len(d), "blobId": hashlib.sha1(d).hexdigest()} for n, d in self.files.items()]
            tree = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in self.files.items()]
            body = json.dumps(tree if "/tree/" in path else {"id": "me/pots", "sha": "c" * 40, "siblings": rows}).encode()
            return self.send(body, whole, {"Content-Type": "application/json"})
        name = path.partition(f"/resolve/{'c' * 40}/")[2]
        if name in self.files:
            if whole:
                self.asked.append(name)
            return self.send(self.files[name], whole, {"ETag": hashlib.sha1(self.files[name]).hexdigest(), "X-Repo-Commit": "c" * 40})
        self.send_response(401 if "private" in path else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, whole: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_fetching_a_data_set(tmp_path: Path, hub: str) -> None:
    """Every file comes, whole; a second call fetches nothing; a file that was lost comes again."""
    folder = st.download_dataset("me/pots", tmp_path / "pots", endpoint=hub)
    assert {n: (folder / n).read_bytes() for n in Hub.files} == Hub.files
    assert len(Hub.asked) == 3
    st.download_dataset("me/pots", tmp_path / "pots", endpoint=hub)
    assert len(Hub.asked) == 3
    (folder / "a.png").unlink()
    st.download_dataset("me/pots", tmp_path / "pots", endpoint=hub)
    assert Hub.asked[3:] == ["a.png"]
    assert len(st.discover(folder).items) + len(st.discover(folder).problems) == 2


def test_fetching_what_is_not_there(tmp_path: Path, hub: str) -> None:
    """Each reason has a sentence, and users' folders are left alone."""
    for name, says in (("me/nothing", "there is no such data set on the hub"), ("a b c", "it is written owner/name")):
        with pytest.raises(DataError, match=says):
            st.download_dataset(name, tmp_path / "x", endpoint=hub)
    with pytest.raises(DataError, match=r"cannot be fetched .*try again, it goes on where it stopped"):
        st.download_dataset("me/pots", tmp_path / "x", endpoint="http://127.0.0.1:9")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="there are other files in it; give a new folder with --to"):
        st.download_dataset("me/pots", tmp_path / "mine", endpoint=hub)
    with pytest.raises(DataError, match="a file stands there"):
        st.download_dataset("me/pots", tmp_path / "mine" / "notes.txt", endpoint=hub)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_room_on_the_disk_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is free is refused, with both figures; what is there already counts."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8))
    check_room(tmp_path / "new", 10**8, "me/pots")
    with pytest.raises(DataError, match=r"me/pots needs 0\.2 GB and .* has 0\.1 GB free; make room"):
        check_room(tmp_path / "new", 2 * 10**8, "me/pots")
    (tmp_path / "a").write_bytes(bytes(1000))
    check_room(tmp_path, 10**8 + 1000, "me/pots")


# --- captions by a model, faces, HEIC --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP with random weights, saved as people's are."""
    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={**small, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
                     "pad_token_id": 0},
        vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=16,
    )  # fmt: skip
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[words.index("p")] = 9
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_captions_by_a_model(tmp_path: Path, captioner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file beside the folder with a line for each picture, which datasets.yaml can name; corrections are never overwritten."""
    folder = tmp_path / "pots"
    folder.mkdir()
    for n in range(2):
        (folder / f"{n}.png").write_bytes(png(n))
    (folder / "broken.png").write_bytes(b"x")
    assert main(["data", "caption", str(folder), "--model", str(captioner)]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "pots.captions.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0.png", "1.png"]
    assert "left out: broken.png" in said
    assert "caption_strategy: jsonl" in said
    (tmp_path / "datasets.yaml").write_text(
        f"- {{id: pots, instance_data_dir: pots, resolution: 64, caption_strategy: jsonl, parquet: {{path: {out}}}}}\n"
    )
    assert [i.caption for i in st.discover(tmp_path / "datasets.yaml").items] == [row["caption"] for row in rows]
    assert main(["data", "caption", str(folder), "--model", str(captioner)]) == 1
    assert "is already there, perhaps with corrections" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["0.png", "1.png", "broken.png"]
    from sd3tune.models.captioning import captions_of

    with pytest.raises(ModelError, match="cannot be loaded as an image-to-text model"):
        list(captions_of(folder, str(tmp_path)))
    assert main(["data", "caption"]) == 1
    assert "caption needs a folder and --model" in capsys.readouterr().err


def face(x: int, y: int, size: tuple[int, int]) -> Image.Image:
    """A drawn face of 160 x 200 px around (x, y)."""
    picture = Image.effect_noise(size, 12).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x - 80, y - 105, x + 80, y + 105), fill=(215, 180, 160))
    draw.ellipse((x - 82, y - 120, x + 82, y - 55), fill=(60, 40, 30))
    for eye in (x - 34, x + 34):
        draw.rectangle((eye - 24, y - 42, eye + 24, y - 34), fill=(70, 45, 40))
        draw.ellipse((eye - 20, y - 30, eye + 20, y - 10), fill=(120, 90, 85))
        draw.ellipse((eye - 9, y - 28, eye + 9, y - 12), fill=(20, 15, 15))
    draw.polygon([(x, y - 20), (x - 16, y + 28), (x + 16, y + 28)], fill=(190, 150, 130))
    draw.ellipse((x - 34, y + 44, x + 34, y + 64), fill=(120, 50, 50))
    return picture


def test_crops_around_faces(tmp_path: Path) -> None:
    """The cut holds the face wherever it is, never leaves the picture, and is the middle where there is none; it is remembered."""
    pytest.importorskip("cv2")
    (tmp_path / "p").mkdir()
    places = {"left": (110, 240), "right": (1090, 240), "middle": (600, 240)}
    for name, (x, y) in places.items():
        face(x, y, (1200, 480)).save(tmp_path / "p" / f"{name}.png")
    Image.new("RGB", (1200, 480), "gray").save(tmp_path / "p" / "none.png")
    (tmp_path / "d.yaml").write_text(
        "- {id: f, instance_data_dir: p, resolution: 256, caption_strategy: filename, crop: true, crop_style: face}\n"
    )
    made = st.plan(st.discover(tmp_path / "d.yaml"), st.presets.playground())
    for placement in made.train:
        (width, height), left, top, bucket, _ = placement.geometry
        assert 0 <= left <= width - bucket.width
        assert 0 <= top <= height - bucket.height
        wanted = places.get(placement.item.path.stem, (600, 240))[0] * width / 1200
        assert left <= wanted <= left + bucket.width
        if placement.item.path.stem == "none":
            assert placement.item.focus == (0.5, 0.5)
    assert {p.item.path.stem: p.geometry.left > 0 for p in made.train} == {"left": False, "right": True, "middle": True, "none": True}


def test_heic(tmp_path: Path) -> None:
    """HEIC is read when its plugin is there."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    (tmp_path / "p").mkdir()
    Image.new("RGB", (128, 64), (200, 30, 30)).save(tmp_path / "p" / "a_pot.heic")
    (tmp_path / "d.yaml").write_text("- {id: f, instance_data_dir: p, resolution: 64, caption_strategy: filename}\n")
    (item,) = st.discover(tmp_path / "d.yaml").items
    assert (item.width, item.height, item.caption) == (128, 64, "a pot")
