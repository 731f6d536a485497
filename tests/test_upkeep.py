"""Looking after a cache: counted, verified, pruned only when told, explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Workbench

import sd3tune as st
from sd3tune.cache import upkeep
from sd3tune.cache.store import KINDS, Store
from sd3tune.cli import main
from sd3tune.errors import CacheError


@pytest.fixture
def folder(bench: Workbench, tmp_path: Path) -> Path:
    """A built cache of 16 pictures, and a datasets.yaml beside it."""
    config = bench.config(cache_dir=str(tmp_path / "cache"))
    bench.cache(config)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "cache").rglob("*") if p.is_file()}


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
    """Entries and bytes of each kind are those on disk; drafts do not count."""
    (folder / "cache" / "latents" / "00").mkdir(exist_ok=True)
    (folder / "cache" / "latents" / "00" / ".x.safetensors.1.tmp").write_bytes(b"1")
    found = upkeep.stats(folder / "cache")
    whole = {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}
    assert found.entries == {kind: sum(f"/{kind}/" in name for name in whole) for kind in KINDS}
    assert sum(found.size.values()) == sum(map(len, whole.values()))
    assert found.entries["latents"] == 16
    assert "latents        16 entries" in str(found)


def test_verify_names_what_is_damaged_and_changes_nothing(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fifth entry with one bit flipped: exactly these are named; a build mends them; then all is well."""
    whole = files(folder)
    bad = sorted(whole)[::5]
    for name in bad:
        data = bytearray(whole[name])
        data[len(data) * 2 // 3] ^= 4
        (folder / name).write_bytes(data)
    before = files(folder)
    assert {str(path.relative_to(folder)) for path, said in upkeep.verify(folder / "cache") if said} == set(bad)
    assert main(arguments(bench, folder, "verify")) == 1
    assert f"{len(whole)} entries, {len(bad)} damaged" in capsys.readouterr().out
    assert files(folder) == before
    assert main(arguments(bench, folder, "build")) == 0
    assert f"{len(whole) - len(bad)} entries reused, {len(bad)} encoded" in capsys.readouterr().out
    assert files(folder) == whole
    assert main(arguments(bench, folder, "verify")) == 0


def test_prune_shows_first_and_deletes_only_when_told(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another setting needs is unused here; without --yes nothing goes, with it exactly what was shown."""
    needed = set(files(folder))
    bench.cache(bench.config(cache_dir=str(folder / "cache"), validation_prompt=("something else",)))
    (folder / "cache" / "notes.txt").write_text("mine")
    (folder / "cache" / "latents" / "mine.safetensors").write_text("mine")
    before = files(folder)
    extra = set(before) - needed - {"cache/notes.txt", "cache/latents/mine.safetensors"}
    assert len(extra) == 1
    assert main(arguments(bench, folder, "prune")) == 0
    said = capsys.readouterr().out
    assert "1 entries, " in said
    assert "nothing was deleted; the same command with --yes deletes them" in said
    assert files(folder) == before
    assert main(arguments(bench, folder, "prune", "--yes")) == 0
    assert "deleted: " in capsys.readouterr().out
    assert set(files(folder)) == set(before) - extra


def test_only_entries_can_be_removed(folder: Path) -> None:
    """A path that is not an entry stops everything before the first deletion."""
    entry = next(path for _, path in Store(folder / "cache").files("texts"))
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"mine\.txt: not an entry of the cache .*nothing was deleted"):
        upkeep.remove(folder / "cache", [entry, folder / "mine.txt"])
    assert entry.exists()
    assert (folder / "mine.txt").exists()


def test_explain(bench: Workbench, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture's cut and caption with their keys, there or not; a picture that is not in the plan is said to be so."""
    picture = next((bench.datasets.parent / "train").glob("*.png"))
    assert main(["cache", "explain", str(picture), *arguments(bench, folder, "explain")[2:]]) == 0
    said = capsys.readouterr().out
    assert said.count("it will be reused") == 2
    assert f"caption {picture.with_suffix('.txt').read_text().strip()!r}" in said
    keys = {path.stem for kind in KINDS for _, path in Store(folder / "cache").files(kind)}
    assert sum(key in said for key in keys) == 2
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
