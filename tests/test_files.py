"""Writing whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from sd3tune.errors import FileError
from sd3tune.files import digest, file_digest, make_folder, new_numbered_folder, write_bytes, write_folder, write_text, write_with


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def test_a_write_replaces_the_content(tmp_path: Path) -> None:
    """Folders are made on the way, the file holds the bytes, and nothing else is left beside it."""
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "öne")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_a_failed_write_leaves_the_old_content(tmp_path: Path, error: BaseException) -> None:
    """Whatever is raised while writing, the old file stays, no draft is left, and the error is the one raised."""
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def half(draft: Path) -> None:
        draft.write_text("ha")
        raise error

    with pytest.raises(type(error)) as caught:
        write_with(path, half)
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EACCES, "may not write"), (errno.EROFS, "read-only"),
        (errno.EFBIG, "larger than"),
    ],
)  # fmt: skip
def test_refusals_of_the_disk_are_explained(tmp_path: Path, number: int, says: str) -> None:
    """A disk that refuses gives a FileError with the path and what to do; the old file stays."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(FileError, match=says) as caught:
        write_with(path, lambda draft: refuse(number))
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_every_step_of_a_write_may_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The disk may refuse at the temporary file, at fsync or at the rename: the same error, the old content."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    where = {"mkstemp": "tempfile.mkstemp", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}[step]
    with monkeypatch.context() as patched:
        patched.setattr(where, lambda *a, **k: refuse(errno.EROFS))
        with pytest.raises(FileError, match=r"read-only; choose another place"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is: write, fsync of the draft, rename, fsync of the folder."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        events.append("sync " + ("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"))
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        events.append(f"rename {self.read_text() if self.is_file() else 'folder'}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_text(tmp_path / "file.txt", "new")
    assert events == ["sync file", "rename new", "sync folder"]
    events.clear()
    with write_folder(tmp_path / "made") as draft:
        (draft / "a").write_text("x")
    assert events == ["sync file", "sync folder", "rename folder", "sync folder"]


def test_something_in_the_way_is_explained(tmp_path: Path) -> None:
    """A file where a folder should be, a folder where a file should be, and names that are too long are FileErrors."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(FileError, match="a file stands where a folder is needed"):
        make_folder(tmp_path / "file")
    with pytest.raises(FileError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "below.txt", "x")
    with pytest.raises(FileError, match="a folder stands where a file is needed"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(FileError, match="name is too long"):
        write_text(tmp_path / ("n" * 250), "x")
    with pytest.raises(FileError, match="already something there"), write_folder(tmp_path / "folder") as draft:
        (draft / "a").write_text("x")
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == ["full"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """The draft takes its place at the end of the block; after an error nothing is there."""
    with write_folder(tmp_path / "in" / "made") as draft:
        (draft / "a.txt").write_text("x")
        assert not (tmp_path / "in" / "made").exists()
    assert names(tmp_path / "in") == ["made"]
    assert names(tmp_path / "in" / "made") == ["a.txt"]

    def half() -> None:
        with write_folder(tmp_path / "in" / "other") as draft:
            (draft / "a.txt").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert names(tmp_path / "in") == ["made"]


def test_numbered_folders(tmp_path: Path) -> None:
    """A run never gets another's folder: -2, -3, ... and also past a file of that name."""
    wanted = tmp_path / "runs" / "pots.v1"
    assert [new_numbered_folder(wanted).name for _ in range(3)] == ["pots.v1", "pots.v1-2", "pots.v1-3"]
    (tmp_path / "runs" / "pots.v1-4").write_text("x")
    assert new_numbered_folder(wanted).name == "pots.v1-5"


def test_digests() -> None:
    """A digest keeps its parts apart; a file's digest is plain SHA-256 of its bytes."""
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a") == digest(b"a") != digest("a", "")
    assert len(digest()) == 64


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    """The reference value of SHA-256 for ``abc``."""
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


WRITER = """
import sys, time
from pathlib import Path
from sd3tune.files import write_with
def write(draft):
    with draft.open("wb") as f:
        print("writing", flush=True)
        while True:
            f.write(b"new" * 10000); f.flush(); time.sleep(0.001)
write_with(Path(sys.argv[1]), write)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL in the middle of a write leaves the old content, five times over."""
    path = tmp_path / "file.txt"
    write_text(path, "old")
    moment = random.Random(5)
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout
            assert child.stdout.readline() == b"writing\n"
            time.sleep(moment.uniform(0, 0.03))
            child.kill()
        assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
