"""Looking after a cache: counted, verified, pruned only when told, explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Workbench, flip, stored

import sd3tune as st
from sd3tune.cache import upkeep
from sd3tune.cache.store import KINDS
from sd3tune.cli import main
from sd3tune.errors import CacheError


@pytest.fixture(scope="module")
def built(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built cache of 16 pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    bench.cache(bench.config(cache_dir=str(folder)))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A folder with a copy of it."""
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return stored(folder / "cache")


def arguments(bench: Workbench, folder: Path, what: str, *more: str) -> list[str]:
    return [
        "cache",
        what,
        "--data",
        str(bench.datasets),
        "--set",
        f"cache_dir={folder / 'cache'}",
        "--set",
        "validation_prompt=[lock, croissant]",
        *more,
    ]


def test_stats_count_everything(folder: Path) -> None:
    """Entries, files and bytes of each kind are those on disk; drafts do not count."""
    (folder / "cache" / "latents" / ".x.safetensors.1.tmp").write_bytes(b"1")
    found = upkeep.stats(folder / "cache")
    shards = list((folder / "cache").glob("*/*.safetensors"))
    assert found.entries == {kind: sum(name.startswith(kind) for name in files(folder)) for kind in KINDS} | {"models": 0}
    assert sum(found.size.values()) == sum(path.stat().st_size for path in shards)
    assert sum(found.files.values()) == len(shards)
    assert found.entries["latents"] == 16
    assert "latents        16 entries in" in str(found)


def test_verify_names_what_is_damaged_and_changes_nothing(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit flipped in every tenth entry: exactly these are named; a build mends them bitwise; then all is well."""
    whole = files(folder)
    bad = sorted(whole)[::10]
    for number, name in enumerate(bad):
        flip(folder / "cache", name, number / len(bad), number % 8)
    before = {path: path.read_bytes() for path in (folder / "cache").rglob("*.safetensors")}
    assert {key for key, said in upkeep.verify(folder / "cache") if said} == {name.split("/")[1] for name in bad}
    assert main(arguments(bench, folder, "verify")) == 1
    assert f"{len(whole)} entries, {len(bad)} damaged" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert main(arguments(bench, folder, "build")) == 0
    said = capsys.readouterr()
    assert f"{len(whole) - len(bad)} entries reused, {len(bad)} encoded" in said.out
    assert files(folder) == whole
    assert main(arguments(bench, folder, "verify")) == 0


def test_an_unreadable_file_is_named(folder: Path) -> None:
    """A file whose header is gone is named by verify."""
    path = next((folder / "cache" / "texts").glob("*.safetensors"))
    path.write_bytes(b"12345678" + b"x" * 50)
    assert {key for key, said in upkeep.verify(folder / "cache") if said} == {path.name}


def test_prune_shows_first_and_deletes_only_when_told(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another setting needs is unused here; without --yes nothing goes, with it exactly what was shown."""
    needed = files(folder)
    bench.cache(bench.config(cache_dir=str(folder / "cache"), validation_prompt=("something else",)))
    (folder / "cache" / "notes.txt").write_text("mine")
    (folder / "cache" / "latents" / "mine.txt").write_text("mine")
    before = files(folder)
    extra = set(before) - set(needed)
    assert len(extra) == 1
    assert main(arguments(bench, folder, "prune")) == 0
    said = capsys.readouterr().out
    assert "1 entries, " in said
    assert "nothing was deleted; the same command with --yes deletes them" in said
    assert files(folder) == before
    assert main(arguments(bench, folder, "prune", "--yes")) == 0
    assert "deleted: " in capsys.readouterr().out
    assert files(folder) == needed
    assert (folder / "cache" / "notes.txt").exists()
    assert (folder / "cache" / "latents" / "mine.txt").exists()


def test_removing_leaves_the_others_bit_for_bit(folder: Path) -> None:
    """Entries of the same file stay, also when that file's header holds a damaged copy of them."""
    whole = files(folder)
    names = sorted(whole)
    flip(folder / "cache", names[0], 0.5, 3)
    gone = {kind: {name.split("/")[1] for name in names[1::2] if name.startswith(kind)} for kind in KINDS}
    assert upkeep.remove(folder / "cache", gone) > 0
    assert files(folder) == {name: whole[name] for name in names[2::2]}


def test_only_entries_can_be_removed(folder: Path) -> None:
    """A key that is not an entry stops everything before the first deletion."""
    whole = files(folder)
    with pytest.raises(CacheError, match=r"mine: not an entry of the cache .*nothing was deleted"):
        upkeep.remove(folder / "cache", {"texts": {max(whole).split("/")[1], "mine"}})
    assert files(folder) == whole


def test_explain(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture's cut and caption with their keys, there or not; a picture that is not in the plan is said to be so."""
    picture = next((bench.datasets.parent / "train").glob("*.png"))
    assert main(["cache", "explain", str(picture), *arguments(bench, folder, "explain")[2:]]) == 0
    said = capsys.readouterr().out
    assert said.count("it will be reused") == 2
    assert f"caption {picture.with_suffix('.txt').read_text().strip()!r}" in said
    assert sum(name.split("/")[1] in said for name in files(folder)) == 2
    config = bench.config(cache_dir=str(folder / "cache"), tokenizer_max_length=12)
    builder = st.CacheBuilder(st.plan(st.discover(bench.datasets), config), st.encoders(config))
    told = upkeep.explain(builder, picture)
    assert told.count("it will be reused") == told.count("not there: it will be encoded") == 1
    with pytest.raises(CacheError, match=r"other\.png: not in the plan"):
        upkeep.explain(builder, folder / "other.png")


def test_no_cache_folder(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 1."""
    assert main(arguments(bench, tmp_path, "stats")) == 1
    assert "there is no cache folder; name one with --cache" in capsys.readouterr().err
