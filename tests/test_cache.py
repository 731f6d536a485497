"""The cache: what is encoded, when, under which name, and what happens when the disk or a picture is broken."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import flip, lose, stored
from fakes import Fake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import sd3tune as st3
from sd3tune.cache import Cache, CacheBuilder
from sd3tune.cache.decoding import cut
from sd3tune.cache.keys import latent_key, text_key
from sd3tune.cache.states import Moments
from sd3tune.cache.store import Store
from sd3tune.config import presets
from sd3tune.data.buckets import Bucket, Geometry
from sd3tune.data.planning import Plan
from sd3tune.errors import CacheError, DataError, FileError
from sd3tune.records import CacheRecord


class Unloadable(Fake):
    """Encoders that must not be needed."""

    def load(self) -> Any:
        raise AssertionError("the encoders were loaded though everything is cached")


def add(folder: Path, name: str, shade: int, caption: str | None = None, size: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    pixels = np.random.default_rng(shade).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    path.with_suffix(".txt").write_text(caption or f"caption {shade}")
    return path


@pytest.fixture
def pots(tmp_path: Path) -> Path:
    folder = tmp_path / "pots"
    for n in range(7):
        add(folder, f"{n}.png", n)
    for n in range(7, 10):
        add(folder, f"{n}.png", n, size=(100, 60))
    return folder


def plan_of(folder: Path, **values: Any) -> Plan:
    yaml = folder.parent / "datasets.yaml"
    yaml.write_text(f"- {{id: pots, instance_data_dir: {folder.name}, resolution: 64}}\n")
    return st3.plan(
        st3.discover(yaml),
        presets.playground(cache_dir=str(folder.parent / "cache"), validation_prompt="prompt", text_encoder_batch_size=5, **values),
    )


def build(folder: Path, fake: Fake | None = None) -> tuple[Cache, Fake]:
    fake = fake or Fake()
    return CacheBuilder(plan_of(folder), fake).build(), fake


def fresh(folder: Path, fake: Fake | None = None) -> list[tuple[str, str]]:
    """(kind, name) of the entries that a build writes."""
    return [(r.kind, Path(r.name).name) for r in records_of(CacheBuilder(plan_of(folder), fake or Fake())) if not r.reused]


def records_of(builder: CacheBuilder) -> list[CacheRecord]:
    """The records of entries."""
    return [record for record in builder if record.kind not in ("pictures", "states")]


def entries(folder: Path) -> dict[str, bytes]:
    return stored(folder.parent / "cache")


def drafts(folder: Path) -> list[str]:
    return [p.name for p in (folder.parent / "cache").rglob("*") if p.is_file() and not p.name.endswith(".safetensors")]


# --- what is encoded when --------------------------------------------------------------------------------------------


def test_a_build_encodes_all_and_a_second_one_nothing(pots: Path) -> None:
    """The first build encodes every text and picture once; the second does not even load the encoders."""
    cache, fake = build(pots)
    assert (cache.hits, cache.misses) == (0, 22)
    assert sorted(t for group in fake.texts for t in group) == sorted(["", "prompt", *(f"caption {n}" for n in range(10))])
    assert sorted(fake.pictures) == [3, 3, 4]
    assert [len(g) for g in fake.texts] == [5, 5, 2]
    written = entries(pots)
    again, unused = build(pots, Unloadable())
    assert (again.hits, again.misses, unused.loads) == (22, 0, 0)
    assert entries(pots) == written


def test_records_count_up(pots: Path) -> None:
    """One record per picture, per text and encoder before the last, and per entry, each counted to its total, also when half is reused."""
    records = list(CacheBuilder(plan_of(pots), Fake()))
    assert [(r.step, r.total, r.kind) for r in records[:10]] == [(n, 10, "pictures") for n in range(1, 11)]
    read = [(r.name, r.step, r.total) for r in records[10:34]]
    assert read == [(name, n, 12) for name in ("CLIP-L", "CLIP-G") for n in range(1, 13)]
    assert [(r.step, r.total) for r in records[34:]] == [(n, 22) for n in range(1, 23)]
    lose(pots.parent / "cache", list(entries(pots))[::2])
    records = records_of(CacheBuilder(plan_of(pots), Fake()))
    assert [r.step for r in records] == list(range(1, 23))
    assert sum(not r.reused for r in records) == 11


def test_one_changed_caption_writes_one_text(pots: Path) -> None:
    """A caption's change is one text and no picture; what was there stays as it was."""
    build(pots)
    before = entries(pots)
    (pots / "3.txt").write_text("a new caption")
    fake = Fake()
    assert fresh(pots, fake) == [("texts", "a new caption")]
    assert fake.pictures == []
    assert before.items() <= entries(pots).items()


def test_one_changed_picture_writes_one_latent(pots: Path) -> None:
    """A picture's change is one latent and no text."""
    build(pots)
    add(pots, "3.png", 99, "caption 3")
    fake = Fake()
    assert fresh(pots, fake) == [("latents", "3.png")]
    assert fake.texts == []


def test_a_renamed_file_writes_nothing(pots: Path) -> None:
    """Names, places and times of files are no part of what an entry is."""
    build(pots)
    (pots / "sub").mkdir()
    for ending in (".png", ".txt"):
        (pots / f"3{ending}").rename(pots / "sub" / f"other{ending}")
    os.utime(pots / "4.png", (1, 1))
    assert fresh(pots, Unloadable()) == []


def test_other_encoders_write_everything(pots: Path) -> None:
    """Another fingerprint shares no entry, and the first one's stay."""
    build(pots)
    assert len(fresh(pots, Fake("2"))) == 22
    assert fresh(pots, Unloadable()) == []


def test_a_picture_in_two_datasets_is_encoded_once(pots: Path) -> None:
    """The same bytes at the same geometry are one entry."""
    shutil.copytree(pots, pots.parent / "copy")
    yaml = pots.parent / "two.yaml"
    yaml.write_text("- {id: a, instance_data_dir: pots, resolution: 64, repeats: 3}\n- {id: b, instance_data_dir: copy, resolution: 64}\n")
    plan = st3.plan(st3.discover(yaml), presets.playground(cache_dir=str(pots.parent / "cache"), validation_prompt=()))
    assert len(plan.train) == 50
    fake = Fake()
    cache = CacheBuilder(plan, fake).build()
    assert sum(fake.pictures) == 10
    assert cache.misses == 21


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_fixed(pots: Path, seed: int) -> None:
    """After entries are lost, a build restores them bit for bit, because whole groups are encoded again."""
    build(pots)
    whole = entries(pots)
    lose(pots.parent / "cache", np.random.default_rng(seed).choice(sorted(whole), 6, replace=False))
    build(pots)
    assert entries(pots) == whole


def test_groups_do_not_depend_on_names_or_order(pots: Path) -> None:
    """The same pictures under other names give the same bits in an empty cache."""
    build(pots)
    whole = entries(pots)
    shutil.rmtree(pots.parent / "cache")
    for n in range(10):
        for ending in (".png", ".txt"):
            (pots / f"{n}{ending}").rename(pots / f"z{9 - n}{ending}")
    build(pots)
    assert entries(pots) == whole


def test_interrupted_builds_go_on(pots: Path) -> None:
    """Stopping after any record and beginning again ends as one build does."""
    build(pots)
    whole = entries(pots)
    shutil.rmtree(pots.parent / "cache")
    for stop in (1, 7, 25, 37, 45, 99):
        for number, _ in enumerate(CacheBuilder(plan_of(pots), Fake()), start=1):
            if number >= stop:
                break
    assert entries(pots) == whole


# --- what an entry holds ---------------------------------------------------------------------------------------------


def test_entries_hold_what_the_encoders_gave(pots: Path) -> None:
    """A latent is that of the cut picture (group of its own), a text that of its characters."""
    cache = CacheBuilder(replace(plan_of(pots), vae_batch_size=1, text_batch_size=1), Fake()).build()
    for placement in cache.plan.train:
        assert torch.equal(cache.latent(placement), Fake().encode_images([cut(placement)]).mean_BCHW[0])
        assert torch.equal(cache.moments(placement)[1], Fake().encode_images([cut(placement)]).deviation_BCHW[0])
    for text in cache.plan.texts:
        (states,) = Fake().encode_texts([text])
        assert torch.equal(cache.text(text).pooled_P, states.pooled_P)


def test_clip_is_padded_and_stands_before_t5(pots: Path) -> None:
    """CLIP's states are padded with zeros to T5's width and come first, as SD3 reads them."""
    cache, _ = build(pots)
    joint = cache.text("caption 1").joint_LD
    value = float(int(hashlib.sha256(b"caption 1").hexdigest()[:4], 16))
    assert joint.shape == (6, 5)
    assert torch.equal(joint[2:], torch.full((4, 5), -value))
    assert torch.all(joint[:2, :3] >= value)
    assert torch.all(joint[:2, :3] < value + 1)
    assert torch.all(joint[:2, 3:] == 0)


def test_the_cut_is_upright_and_centred(tmp_path: Path) -> None:
    """What is encoded is the middle of the picture at the bucket's size."""
    pixels = np.zeros((64, 160, 3), np.uint8)
    pixels[:, 80:] = 255
    (tmp_path / "p").mkdir()
    Image.fromarray(pixels).save(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "a.txt").write_text("x")
    (placement,) = plan_of(tmp_path / "p").train
    picture = np.asarray(cut(placement))
    assert picture.shape == (48, 96, 3)
    assert picture[:, :44].max() == 0
    assert picture[:, 52:].min() == 255


GEOMETRY = Geometry((80, 64), 8, 0, Bucket(64, 64))


def test_keys_depend_on_everything_and_nothing_else() -> None:
    """Pixels, each part of the geometry, the fingerprint, the characters: a change of any is another key."""
    others = [
        latent_key("q", GEOMETRY, "f"), latent_key("p", GEOMETRY, "g"), latent_key("p", GEOMETRY._replace(resized=(81, 64)), "f"),
        latent_key("p", GEOMETRY._replace(resized=(80, 65)), "f"), latent_key("p", GEOMETRY._replace(left=9), "f"),
        latent_key("p", GEOMETRY._replace(top=1), "f"), latent_key("p", GEOMETRY._replace(bucket=Bucket(64, 48)), "f"),
        latent_key("p", GEOMETRY._replace(bucket=Bucket(48, 64)), "f"), text_key("p", "f"), text_key("p ", "f"), text_key("p", "g"),
        text_key("pf", ""), text_key("", "pf"), latent_key("p", GEOMETRY._replace(mirrored=True), "f"),
        latent_key("p", GEOMETRY, "f", "black"),
    ]  # fmt: skip
    assert len({latent_key("p", GEOMETRY, "f"), *others}) == 1 + len(others)
    assert latent_key("p", GEOMETRY, "f") == latent_key("p", GEOMETRY, "f")
    assert text_key("a pot", "f") == "5c487bb13cd20189845a0d2558164999b95bea7d401a34d561e676b6228d6cc0", "a change here empties every cache"


# --- broken pictures, broken entries ---------------------------------------------------------------------------------


def test_a_picture_that_breaks_at_decoding(pots: Path) -> None:
    """It is a row of the cache's plan, everything else is cached and usable; with the picture gone nothing is encoded again."""
    path = add(pots, "broken.jpg", 50, "caption 1", (256, 256))
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    assert "broken.jpg" in {i.path.name for i in plan_of(pots).catalog.items}, "the header can still be read"
    cache, _ = build(pots)
    assert [(p.path, "cannot be decoded, though its header" in p.reason) for p in cache.plan.left_out] == [(path, True)]
    assert {p.item.path.name for p in cache.plan.train} == {f"{n}.png" for n in range(10)}
    read_all(cache)
    assert (cache.hits, cache.misses) == (0, len(entries(pots))) == (0, 22)
    assert [p.path for p in build(pots)[0].plan.left_out] == [path], "a second build says it again"
    path.unlink()
    assert fresh(pots, Unloadable()) == []


def test_a_broken_picture_that_lies_there_twice(pots: Path) -> None:
    """Both files are rows: no batch asks for the entry that neither of them has."""
    path = add(pots, "broken.jpg", 50, "caption 1", (256, 256))
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    (pots / "again.jpg").write_bytes(path.read_bytes())
    (pots / "again.txt").write_text("caption 2")
    cache, _ = build(pots)
    assert sorted(p.path.name for p in cache.plan.left_out) == ["again.jpg", "broken.jpg"]
    read_all(cache)


def test_no_picture_can_be_decoded(pots: Path) -> None:
    """The build ends with what can be done, and the cache is refused with names and reasons."""
    for path in pots.glob("*.png"):
        path.unlink()
    for n in range(3):
        path = add(pots, f"{n}.jpg", n, size=(200, 200))
        path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"no picture is left to train on:\n .*\.jpg: cannot be decoded"):
        build(pots)


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_flipped_bit_is_named_and_encoded_again(pots: Path, kind: str) -> None:
    """A bit flipped anywhere in an entry's values: the next build names that entry alone, and ends bitwise as before."""
    build(pots)
    whole = entries(pots)
    names = sorted(name for name in whole if name.startswith(kind))
    for number, name in enumerate(names):
        flip(pots.parent / "cache", name, number / len(names), number % 8)
        said = [r for r in records_of(CacheBuilder(plan_of(pots), Fake())) if not r.reused]
        assert [r.key for r in said] == [name.split("/")[1]], (number, said)
        assert said[0].problem.startswith("encoded again: ")
        assert said[0].key in said[0].problem
        assert entries(pots) == whole
    cache, _ = build(pots)
    assert cache.plan.left_out == ()


def one_file(folder: Path, kind: str) -> Path:
    return next((folder.parent / "cache" / kind).glob("*.safetensors"))


def read_all(cache: Cache) -> None:
    for placement in cache.plan.train:
        cache.latent(placement)
    for text in cache.plan.texts:
        cache.text(text)


def test_values_cannot_be_taken_for_others(pots: Path) -> None:
    """What the header says of an entry is under its checksum: key, shape, group and facts."""
    cache, _ = build(pots)
    path = one_file(pots, "latents")
    data = path.read_bytes()
    key, other = sorted(name.split("/")[1] for name in entries(pots) if name.startswith("latents"))[:2]
    swapped = data.replace(key.encode(), b"x" * 64).replace(other.encode(), key.encode()).replace(b"x" * 64, other.encode())
    for changed in (swapped, data.replace(b"[3, 3, ", b"[3, 9, ") if b"[3, 3, " in data else data.replace(b"[3,8,8]", b"[8,3,8]")):
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(CacheError, match="damaged"):
            read_all(cache)
    facts = data.replace(b"sharpness", b"sharpless")
    path.write_bytes(facts)
    with pytest.raises(CacheError, match="damaged"):
        read_all(cache)
    path.write_bytes(data)
    read_all(cache)


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_missing_entry_is_explained(pots: Path, kind: str) -> None:
    """An entry that is not there is named with its folder, and what to do."""
    cache, _ = build(pots)
    one_file(pots, kind).unlink()
    with pytest.raises(CacheError, match=r"is not encoded yet; iterate the CacheBuilder to its end") as caught:
        read_all(cache)
    assert str(pots.parent / "cache" / kind) in str(caught.value)


def test_files_of_others_are_no_shards(pots: Path) -> None:
    """A file that something else wrote is said to be unreadable, and the entries are encoded again."""
    cache, _ = build(pots)
    whole = entries(pots)
    path = one_file(pots, "latents")
    for tensors, metadata in (({"latent_CHW": torch.zeros(3, 8, 8)}, None), ({"a.b": torch.zeros(2)}, {"entries": "{}"})):
        save_file(tensors, path, metadata)
        with pytest.raises(CacheError, match="not encoded yet"):
            read_all(cache)
        assert "not a readable shard" in Store(pots.parent / "cache").unreadable[path]
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheError):
        read_all(cache)
    path.rmdir()
    read_all(build(pots)[0])
    assert entries(pots) == whole


@given(st.binary(max_size=300) | st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=20)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(pots: Path, damage: bytes | tuple[float, bytes]) -> None:
    """Garbage, truncation and overwritten bytes never give other values: every entry reads as it was written, or is a CacheError."""
    cache, _ = build(pots)
    before = {p.item.path: cache.latent(p).clone() for p in cache.plan.train}
    path = one_file(pots, "latents")
    data = path.read_bytes()
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        start = int(damage[0] * len(data))
        path.write_bytes(data[:start] + damage[1] + data[start + len(damage[1]) :])
    for placement in cache.plan.train:
        said = ""
        try:
            assert torch.equal(cache.latent(placement), before[placement.item.path])
        except CacheError as error:
            said = str(error)
        assert not said or (str(path.parent) in said and ("build the cache again" in said or "iterate the CacheBuilder" in said))
    path.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -100])
def test_truncated_files(pots: Path, length: int) -> None:
    """A file that was cut short loses its entries alone; built again all is as before."""
    build(pots)
    whole = entries(pots)
    path = one_file(pots, "texts")
    path.write_bytes(path.read_bytes()[:length])
    cache, fake = build(pots)
    assert fake.pictures == []
    read_all(cache)
    assert entries(pots) == whole


# --- disks that refuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "says"), [(errno.EACCES, "may not write"), (errno.EROFS, "read-only"), (errno.ENOSPC, "the disk is full")]
)
def test_a_disk_that_refuses(pots: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    """A cache that cannot be written is a FileError with the path and a way out; what was cached stays, no drafts are left."""
    build(pots)
    before = entries(pots)
    add(pots, "new.png", 77)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(FileError, match=says) as caught:
            build(pots)
    assert str(pots.parent / "cache") in str(caught.value)
    assert entries(pots) == before
    assert drafts(pots) == []
    assert len(fresh(pots)) == 2


def test_a_file_where_the_cache_should_be(pots: Path) -> None:
    """A file in the way is explained."""
    (pots.parent / "cache").write_text("x")
    with pytest.raises(FileError, match="a file stands where a folder is needed"):
        build(pots)


def test_a_limit_of_the_system_while_writing(pots: Path) -> None:
    """When the system really stops a write halfway, it is a FileError, no draft is left, and a later build completes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    plan = plan_of(pots)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
        with pytest.raises(FileError, match="cannot write"):
            CacheBuilder(plan, Fake()).build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert entries(pots) == {}
    assert build(pots)[0].misses == 22


def test_a_full_disk_while_writing(pots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a file says so, leaves no draft, and keeps what is complete."""
    count = 0
    write = Path.write_bytes

    def filling(self: Path, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == 4:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", filling)
        with pytest.raises(FileError, match="the disk is full; free some space"):
            CacheBuilder(plan_of(pots, write_batch_size=2), Fake()).build()
    assert len(entries(pots)) >= 6
    assert drafts(pots) == []
    build(pots)
    read_all(build(pots, Unloadable())[0])


def test_drafts_are_never_entries(pots: Path) -> None:
    """What a killed build left lying about is neither counted nor read."""
    cache, _ = build(pots)
    path = one_file(pots, "latents")
    path.rename(path.with_name(f".{path.name}.abc.tmp"))
    with pytest.raises(CacheError, match="not encoded yet"):
        read_all(cache)
    assert len(fresh(pots)) == 10
    read_all(cache)


# --- memory, processes -----------------------------------------------------------------------------------------------


class Narrow(Fake):
    """Encoders whose memory holds so many pictures, or none at all unless in tiles."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def encode_images(self, pictures: Sequence[Image.Image], *, tiled: bool = False) -> Moments:
        if len(pictures) > self.most and not tiled:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode_images(pictures)


def test_out_of_memory_halves_the_batch_and_says_so(pots: Path) -> None:
    """Every entry comes to be, in smaller groups that are recorded, and each record of a smaller group that follows the event says it."""
    fake = Narrow(1)
    records = records_of(CacheBuilder(plan_of(pots), fake))
    assert fake.pictures == [1] * 10
    assert len(records) == 22
    assert any("out of memory: 2 encoded together instead of 4" in r.problem for r in records) is False
    assert "out of memory: 1 encoded together instead of 2" in next(r.problem for r in records if r.kind == "latents")
    store = Store(pots.parent / "cache")
    assert {store.entry("latents", key).group for key, _ in store.entries("latents")} == {1}
    read_all(build(pots, Unloadable())[0])


def test_out_of_memory_with_one_picture_encodes_in_tiles(pots: Path) -> None:
    """It is said, and the build ends; when tiles do not help either, the error says what to do."""
    records = records_of(CacheBuilder(plan_of(pots), Narrow(0)))
    assert "encoded in tiles" in next(r.problem for r in records if r.kind == "latents")
    read_all(build(pots, Unloadable())[0])

    class Hopeless(Fake):
        def encode_images(self, pictures: Sequence[Image.Image], *, tiled: bool = False) -> Moments:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(CacheError, match="out of memory with one picture or text at a time; lower resolution"):
        build(pots, Hopeless("2"))


def test_other_errors_are_not_taken_for_full_memory(pots: Path) -> None:
    """A defect keeps its own error."""

    class Wrong(Fake):
        def encode_images(self, pictures: Sequence[Image.Image], *, tiled: bool = False) -> Moments:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        build(pots, Wrong())


def test_parts_of_a_build_make_the_whole(pots: Path) -> None:
    """Two parts encode every group once between them; what comes out is what one build gives, bit for bit."""
    build(pots)
    whole = entries(pots)
    shutil.rmtree(pots.parent / "cache")
    fakes = [Fake(), Fake()]
    parts = [records_of(CacheBuilder(plan_of(pots), fake, part=(rank, 2))) for rank, fake in enumerate(fakes)]
    assert sum(map(len, parts)) == 22
    assert all(parts)
    assert sum(len(f.pictures) for f in fakes) == 3
    assert sum(len(f.texts) for f in fakes) == 3
    assert entries(pots) == whole
    assert build(pots, Unloadable())[0].hits == 22


def test_what_another_process_encodes_meanwhile_is_not_encoded_again(pots: Path) -> None:
    """A builder looks again before each group; entries of the other one count as reused."""
    mine = iter(CacheBuilder(plan_of(pots), fake := Fake()))
    records = [next(mine) for _ in range(11)]
    build(pots)
    records += list(mine)
    assert [r.step for r in records if r.kind not in ("pictures", "states")] == list(range(1, 23))
    assert sum(r.reused for r in records) >= 10
    assert len(fake.pictures) < 3
    assert fake.texts == [], "what the last text encoder gives was there before it was asked"


def test_a_picture_that_changes_after_the_plan(pots: Path) -> None:
    """Its bytes are not those that were planned with: it is a row that says so, and nothing is stored under the old key."""
    plan = plan_of(pots)
    builder = CacheBuilder(plan, Fake())
    records = [next(iterator) for iterator in [iter(builder)] for _ in range(10)]
    assert {r.kind for r in records} == {"pictures"}
    iterator = iter(builder)
    records = [next(iterator) for _ in range(10)]
    add(pots, "3.png", 55, "caption 3")
    (pots / "4.png").unlink()
    cache = builder.cache([*records, *iterator])
    said = {p.path.name: p.reason for p in cache.plan.left_out}
    assert "was changed since it was looked at; discover and plan again" in said["3.png"]
    assert set(said) == {"3.png", "4.png"}
    read_all(cache)
