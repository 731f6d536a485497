"""The cache: what is encoded, when, under which name, and what happens when the disk or a picture is broken."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save_file

import sd3tune as st3
from sd3tune.cache import Cache, CacheBuilder
from sd3tune.cache.builder import TextStates, cut
from sd3tune.cache.keys import latent_key, text_key
from sd3tune.config import presets
from sd3tune.data.buckets import Bucket, Geometry
from sd3tune.data.planning import Plan
from sd3tune.errors import CacheError, DataError, FileError


class Fake:
    """Encoders that are functions of pixels, characters and of everything encoded together, and that count what they do."""

    def __init__(self, mark: str = "1") -> None:
        self.latent_fingerprint, self.text_fingerprint = f"vae {mark}", f"text {mark}"
        self.loads = 0
        self.pictures: list[int] = []
        self.texts: list[tuple[str, ...]] = []

    @contextmanager
    def load(self) -> Iterator[Fake]:
        self.loads += 1
        yield self

    def encode_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        self.pictures.append(len(pictures))
        pixels = torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)) for p in pictures])
        z = pixels[:, ::8, ::8].permute(0, 3, 1, 2).contiguous() / 255
        return z + z.mean() * 1e-3

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        self.texts.append(tuple(texts))
        group = float(sum(map(len, texts))) * 1e-3
        values = [float(int(hashlib.sha256(t.encode()).hexdigest()[:4], 16)) for t in texts]
        return [TextStates(torch.full((2, 3), v + group), torch.full((4, 5), -v), torch.full((6,), v)) for v in values]


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
    return [(r.kind, Path(r.name).name) for r in CacheBuilder(plan_of(folder), fake or Fake()) if not r.reused]


def entries(folder: Path) -> dict[str, bytes]:
    root = folder.parent / "cache"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


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
    """One record per entry, counted to the total, also when half of it is reused."""
    records = list(CacheBuilder(plan_of(pots), Fake()))
    assert [r.step for r in records] == list(range(1, 23))
    assert {r.total for r in records} == {22}
    for name in list(entries(pots))[::2]:
        (pots.parent / "cache" / name).unlink()
    records = list(CacheBuilder(plan_of(pots), Fake()))
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
    for name in np.random.default_rng(seed).choice(sorted(whole), 6, replace=False):
        (pots.parent / "cache" / name).unlink()
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
    for stop in (1, 7, 15, 99):
        for record in CacheBuilder(plan_of(pots), Fake()):
            if record.step >= stop:
                break
    assert entries(pots) == whole


# --- what an entry holds ---------------------------------------------------------------------------------------------


def test_entries_hold_what_the_encoders_gave(pots: Path) -> None:
    """A latent is that of the cut picture (group of its own), a text that of its characters."""
    cache = CacheBuilder(replace(plan_of(pots), vae_batch_size=1, text_batch_size=1), Fake()).build()
    for placement in cache.plan.train:
        assert torch.equal(cache.latent(placement), Fake().encode_images([cut(placement)])[0])
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
    assert text_key("a pot", "f") == "f768fe87cd88214827abcbfd0922669fbae460cd48d37e11f60937d83231f389", "a change here empties every cache"


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
    """A bit flipped anywhere in an entry: the next build names that entry alone, and ends bitwise as before."""
    build(pots)
    whole = entries(pots)
    names = sorted(name for name in whole if name.startswith(kind))
    for number, name in enumerate(names):
        data = bytearray(whole[name])
        data[len(data) * (2 * number + 1) // (2 * len(names))] ^= 1 << number % 8
        (pots.parent / "cache" / name).write_bytes(data)
        said = [r for r in CacheBuilder(plan_of(pots), Fake()) if not r.reused]
        assert [Path(r.key).name for r in said] == [Path(name).stem], (number, said)
        assert said[0].problem.startswith("encoded again: ")
        assert name.split("/")[-1] in said[0].problem
        assert entries(pots) == whole
    cache, _ = build(pots)
    assert cache.plan.left_out == ()


def one_entry(folder: Path, kind: str) -> Path:
    return next((folder.parent / "cache" / kind).rglob("*.safetensors"))


def read_all(cache: Cache) -> None:
    for placement in cache.plan.train:
        cache.latent(placement)
    for text in cache.plan.texts:
        cache.text(text)


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_missing_entry_is_explained(pots: Path, kind: str) -> None:
    """An entry that is not there names its path and what to do."""
    cache, _ = build(pots)
    path = one_entry(pots, kind)
    path.unlink()
    with pytest.raises(CacheError, match=r"not encoded yet; iterate the CacheBuilder to its end") as caught:
        read_all(cache)
    assert str(path) in str(caught.value)


def test_entries_of_others_are_refused(pots: Path) -> None:
    """A file that was copied over another, or written by something else, is not taken for the entry."""
    cache, _ = build(pots)
    path = one_entry(pots, "latents")
    other = next(p for p in path.parent.parent.rglob("*.safetensors") if p != path)
    shutil.copy(other, path)
    with pytest.raises(CacheError, match="another entry; build the cache again, which encodes this entry anew"):
        read_all(cache)
    save_file({"latent_CHW": torch.zeros(3, 8, 8)}, path)
    with pytest.raises(CacheError, match="another entry"):
        read_all(cache)
    save_file({"latent_WHC": torch.zeros(3, 8, 8)}, path, {"entry": f"{path.stem} of 1"})
    with pytest.raises(CacheError, match="damaged"):
        read_all(cache)
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheError):
        read_all(cache)


@given(st.binary(max_size=300) | st.tuples(st.integers(0, 600), st.binary(max_size=20)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_entries(pots: Path, damage: bytes | tuple[int, bytes]) -> None:
    """Garbage, truncation and overwritten bytes give tensors (values carry no checksum) or a CacheError with path and advice."""
    cache, _ = build(pots)
    path = one_entry(pots, "latents")
    data = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else data[: damage[0]] + damage[1] + data[damage[0] + len(damage[1]) + 1 :])
    message = ""
    try:
        read_all(cache)
    except CacheError as error:
        message = str(error)
    if message:
        assert str(path) in message
        assert "build the cache again" in message
    else:
        assert "latent_CHW" in load(path.read_bytes())
    path.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -100])
def test_truncated_entries(pots: Path, length: int) -> None:
    """An entry that was cut short is damaged; deleted and built again it is as before."""
    cache, _ = build(pots)
    path = one_entry(pots, "texts")
    data = path.read_bytes()
    path.write_bytes(data[:length])
    with pytest.raises(CacheError, match=r"damaged .*; build the cache again, which encodes this entry anew"):
        read_all(cache)
    path.unlink()
    read_all(build(pots)[0])
    assert path.read_bytes() == data


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
    """A full disk in the middle of an entry says so, leaves no draft, and keeps what is complete."""
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
            build(pots)
    assert len(entries(pots)) == 3
    assert not [name for name in entries(pots) if name.endswith(".tmp")]
    build(pots)
    read_all(build(pots, Unloadable())[0])


def test_drafts_are_never_entries(pots: Path) -> None:
    """What a killed build left lying about is neither counted nor read."""
    cache, _ = build(pots)
    path = one_entry(pots, "latents")
    draft = path.with_name(f".{path.name}.abc.tmp")
    path.rename(draft)
    with pytest.raises(CacheError, match="not encoded yet"):
        read_all(cache)
    assert len(fresh(pots)) == 1
    read_all(cache)
