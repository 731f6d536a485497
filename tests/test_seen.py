"""What is remembered of files, and how little is read to know which of them are the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import write_datasets
from PIL import Image

import sd3tune as st
from sd3tune.cache import CacheBuilder
from sd3tune.data import images
from sd3tune.data.seen import Seen
from sd3tune.data.sources import Found

OLD = 1_000_000_000


@pytest.fixture(autouse=True)
def _memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (64, 48), when: int = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 1, 2)).save(path)
    path.with_suffix(".txt").write_text("caption")
    os.utime(path, (when, when))
    return path


class Opened:
    """Counts the headers that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        real = images.size

        def counted(path: Path) -> tuple[int, int]:
            self.names.append(path.name)
            return real(path)

        monkeypatch.setattr(images, "size", counted)

    def take(self) -> list[str]:
        """The names since the last call."""
        found, self.names = self.names, []
        return sorted(found)


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the same length and time is not opened again; one with another is; a young one is, because it may still change."""
    for n in range(3):
        picture(tmp_path / "p" / f"{n}.png", n)
    opened = Opened(monkeypatch)
    first = st.discover(tmp_path / "p")
    assert opened.take() == ["0.png", "1.png", "2.png"]
    again = st.discover(tmp_path / "p")
    assert opened.take() == []
    assert again.items == first.items
    picture(tmp_path / "p" / "1.png", 9, (80, 48), OLD + 1)
    assert [i.width for i in st.discover(tmp_path / "p").items] == [64, 80, 64]
    assert opened.take() == ["1.png"]
    data = (tmp_path / "p" / "2.png").read_bytes()
    (tmp_path / "p" / "2.png").write_bytes(data + b" ")
    os.utime(tmp_path / "p" / "2.png", (OLD, OLD))
    st.discover(tmp_path / "p")
    assert opened.take() == ["2.png"]
    Image.new("RGB", (32, 32)).save(tmp_path / "p" / "new.png")
    (tmp_path / "p" / "new.txt").write_text("x")
    for _ in range(2):
        st.discover(tmp_path / "p")
        assert opened.take() == ["new.png"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"0.png": 3}', '{"0.png": [1, 2, 3]}', '{"0.png": [1, 2, "x", 4, "y", null]}'])
def test_a_memory_that_is_damaged_is_no_harm(tmp_path: Path, content: str) -> None:
    """Everything is found out again."""
    picture(tmp_path / "p" / "0.png")
    st.discover(tmp_path / "p")
    (file,) = (tmp_path / "memory" / "sd3tune" / "seen").iterdir()
    file.write_text(content)
    assert [i.width for i in st.discover(tmp_path / "p").items] == [64]


def test_a_memory_that_cannot_be_written_is_no_harm(tmp_path: Path) -> None:
    """Nothing is remembered, and nothing is said."""
    picture(tmp_path / "p" / "0.png")
    (tmp_path / "memory").write_text("in the way")
    assert len(st.discover(tmp_path / "p").items) == 1


def test_digests_are_remembered_by_a_build(tmp_path: Path) -> None:
    """Before it nothing is hashed; after it the next plan knows every digest, and nothing is read to see that all is there."""
    datasets = write_datasets(tmp_path, 3, 1)
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (OLD, OLD))
    config = st.presets.playground(cache_dir=str(tmp_path / "cache"), validation_prompt=())
    plan = st.plan(st.discover(datasets), config)
    assert [p.item.pixels for p in plan.train] == [""] * 3
    builder = CacheBuilder(plan, st.encoders(config))
    assert builder.coverage().unknown == 4
    builder.build()
    again = st.plan(st.discover(datasets), config)
    assert all(p.item.pixels for p in (*again.train, *again.evaluation))
    coverage = CacheBuilder(again, st.encoders(config)).coverage()
    assert coverage.complete
    assert "4 of 4 latents" in str(coverage)
    records = list(CacheBuilder(again, st.encoders(config)))
    assert {r.kind for r in records} == {"latents", "texts"}
    assert all(r.reused for r in records)


def test_files_that_differ_in_the_middle_or_at_the_end_are_not_the_same(tmp_path: Path) -> None:
    """Equal length, equal beginning, other end or middle: two pictures; equal bytes or a hard link: one that counts twice."""
    rng = np.random.default_rng(0)
    base = bytearray(rng.integers(0, 255, 3 * 256 * 256, dtype=np.uint8).tobytes())
    for name, place in (("a", None), ("middle", len(base) // 2), ("end", len(base) - 1), ("equal", None)):
        held = bytearray(base)
        if place is not None:
            held[place] ^= 255
        path = tmp_path / "p" / f"{name}.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.frombytes("RGB", (256, 256), bytes(held)).save(path)
        path.with_suffix(".txt").write_text(name)
    os.link(tmp_path / "p" / "a.bmp", tmp_path / "p" / "link.bmp")
    (tmp_path / "p" / "link.txt").write_text("link")
    said = [note for note in st.discover(tmp_path / "p").notes if "the same picture" in note]
    assert [Path(note.split(" is the")[0]).name for note in said] == ["equal.bmp", "link.bmp"]
    (tmp_path / "held").mkdir()
    for name in ("end", "equal"):
        (tmp_path / "held" / f"x{name}.bmp").write_bytes((tmp_path / "p" / f"{name}.bmp").read_bytes())
        (tmp_path / "held" / f"x{name}.txt").write_text(name)
    (tmp_path / "d.yaml").write_text("- {id: p, instance_data_dir: p}\n- {id: h, instance_data_dir: held, dataset_type: eval}\n")
    out = {p.path.name for p in st.discover(tmp_path / "d.yaml").problems}
    assert out == {"a.bmp", "end.bmp", "equal.bmp", "link.bmp"}


def test_only_what_could_be_the_same_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are read only when length and both ends agree."""
    import sd3tune.data.seen as module

    hashed: list[str] = []
    real = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda path: hashed.append(path.name) or real(path))
    rng = np.random.default_rng(0)
    for n in range(3):
        path = tmp_path / "p" / f"{n}.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text("x")
    st.discover(tmp_path / "p")
    assert hashed == []
    (tmp_path / "p" / "copy.bmp").write_bytes((tmp_path / "p" / "1.bmp").read_bytes())
    (tmp_path / "p" / "copy.txt").write_text("x")
    st.discover(tmp_path / "p")
    assert sorted(hashed) == ["1.bmp", "copy.bmp"]


def test_a_row_is_what_was_put(tmp_path: Path) -> None:
    """Size, digest and the place of a face come back; another length or time forgets them."""
    file = Found(tmp_path / "a", "a", 10, OLD * 10**9, "a")
    seen = Seen("somewhere")
    seen.put(file, (3, 4, "digest", (0.25, 0.5)))
    seen.save(["a"])
    assert Seen("somewhere").get(file) == (3, 4, "digest", (0.25, 0.5))
    assert Seen("somewhere").get(file._replace(size=11)) is None
    assert Seen("somewhere").get(file._replace(time=OLD * 10**9 + 1)) is None
    assert Seen("elsewhere").get(file) is None
