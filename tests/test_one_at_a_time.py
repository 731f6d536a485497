"""Of the text encoders and the autoencoder one at a time is in memory, and only when something is missing that it makes."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench, lose, stored
from fakes import Fake

import sd3tune as st
from sd3tune.cache import encoding
from sd3tune.cache.states import PartStates
from sd3tune.cache.store import Store
from sd3tune.models import encoders

TEXTS = ["CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded, in order; each load finds everything that was loaded before it gone."""
    order: list[str] = []
    alive: list[weakref.ref[Any]] = []

    def watched(load: Any) -> Any:
        def loading(*given: Any) -> Any:
            assert not [type(ref()).__name__ for ref in alive if ref() is not None]
            made = load(*given)
            order.append(type(made).__name__)
            alive.append(weakref.ref(made))
            return made

        return loading

    for name in ("load_text_encoder", "load_vae"):
        monkeypatch.setattr(encoders, name, watched(getattr(encoders, name)))
    return order


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch(monkeypatch)


@pytest.fixture(scope="module")
def built(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A cache that was built once, and what was loaded for it; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patched:
        order = watch(patched)
        build(bench, folder)
    return folder, order


def build(bench: Workbench, folder: Path, **settings: Any) -> dict[str, bytes]:
    config = bench.config(cache_dir=str(folder), text_encoder_batch_size=5, **settings)
    bench.cache(config)
    return stored(folder)


def test_each_is_loaded_when_the_one_before_is_gone(built: tuple[Path, list[str]]) -> None:
    """The text encoders once each over all texts, then the autoencoder."""
    assert len(stored(built[0])) > 30
    assert built[1] == [*TEXTS, "AutoencoderKL"]


def test_only_what_is_missing_is_loaded(bench: Workbench, tmp_path: Path, built: tuple[Path, list[str]], loads: list[str]) -> None:
    """A lost latent needs no text encoder, a lost text no autoencoder, and nothing is needed when all is there."""
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True)
    whole = stored(tmp_path)
    lose(tmp_path, [name for name in whole if name.startswith("latents")][:1])
    assert build(bench, tmp_path) == whole
    assert loads == ["AutoencoderKL"]
    loads.clear()
    lose(tmp_path, [name for name in whole if name.startswith("texts")][:1])
    assert build(bench, tmp_path) == whole
    assert loads == TEXTS
    loads.clear()
    build(bench, tmp_path)
    assert loads == []


def test_the_bound_changes_the_order_and_no_bit(
    bench: Workbench, tmp_path: Path, built: tuple[Path, list[str]], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for what the CLIPs gave of two groups the encoders come again for each two; the entries are the same."""
    whole = stored(built[0])
    texts = sum(name.startswith("texts") for name in whole)
    with st.encoders(bench.config()).load() as loaded:
        monkeypatch.setattr(encoding, "HELD_BYTES", 11 * loaded.held_bytes)
    assert build(bench, tmp_path / "bounded") == whole
    assert loads == [*TEXTS * -(-texts // 10), "AutoencoderKL"]


def test_without_t5_none_is_loaded(bench: Workbench, tmp_path: Path, loads: list[str]) -> None:
    """Zeros stand in its place."""
    build(bench, tmp_path, use_t5=False)
    assert loads == [*TEXTS[:2], "AutoencoderKL"]


def test_what_is_held_of_a_text_is_known_beforehand(bench: Workbench) -> None:
    """Bytes of both CLIPs' states and pooled vectors, from their configs; each keeps alive no more than itself."""
    with st.encoders(bench.config()).load() as loaded:
        rows = [row for part in loaded.text_parts[:2] for row in loaded.encode_part(part, ["lock", "a red pot"])]
    tensors = [tensor for row in rows for tensor in row if tensor is not None]
    assert 2 * loaded.held_bytes == sum(tensor.nbytes for tensor in tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert 2 * loaded.held_bytes == sum(storages.values())


class Watched(Fake):
    """Notes which encoder read which texts, and how many bytes of what the others gave were alive then."""

    def __init__(self, most: int = 99) -> None:
        super().__init__()
        self.most = most
        self.calls: list[tuple[str, int]] = []
        self.held: list[int] = []
        self._given: list[weakref.ref[torch.Tensor]] = []

    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        if part == "T5" and len(texts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        rows = super().encode_part(part, texts)
        self.calls.append((part, len(texts)))
        if part != "T5":
            self._given += [weakref.ref(tensor) for row in rows for tensor in row if tensor is not None]
        self.held.append(sum(tensor.nbytes for ref in self._given if (tensor := ref()) is not None))
        return rows


def plan_of(bench: Workbench, folder: Path) -> st.Plan:
    return st.plan(st.discover(bench.datasets), bench.config(cache_dir=str(folder), text_encoder_batch_size=5))


def test_what_is_held_stays_below_the_bound(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at each call; and it is let go of as the last encoder goes on."""
    monkeypatch.setattr(encoding, "HELD_BYTES", 12 * Watched.held_bytes)
    fake = Watched()
    st.CacheBuilder(plan_of(bench, tmp_path), fake).build()
    assert 9 * fake.held_bytes < max(fake.held) <= 12 * fake.held_bytes
    after = [held for (part, _), held in zip(fake.calls, fake.held, strict=True) if part == "T5"]
    assert after[0] > after[1]


def test_records_come_with_each_group_of_each_encoder(bench: Workbench, tmp_path: Path) -> None:
    """Nobody waits for a whole sweep."""
    fake, calls = Watched(), 0
    for _ in st.CacheBuilder(plan_of(bench, tmp_path), fake):
        assert len(fake.calls) - calls <= 1
        calls = len(fake.calls)
    assert calls > 9


def test_an_encoder_that_is_too_large_halves_its_own_groups(bench: Workbench, tmp_path: Path) -> None:
    """The others keep theirs; the smaller number is recorded, and the record says why."""
    fake = Watched(most=2)
    records = [r for r in st.CacheBuilder(plan_of(bench, tmp_path), fake) if r.kind == "texts"]
    assert [size for part, size in fake.calls if part == "CLIP-G"] == [5, 5, 5, 4]
    assert max(size for part, size in fake.calls if part == "T5") == 2
    assert records[0].problem == "out of memory: 2 encoded together instead of 3"
    store = Store(tmp_path)
    assert {store.entry("texts", key).group for key, _ in store.entries("texts")} == {1, 2}
