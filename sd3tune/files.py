"""Atomic writing, digests and numbered names. Every write is: temporary file beside it, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from sd3tune.errors import FileError

P = ParamSpec("P")
T = TypeVar("T")

ADVICE = {
    errno.ENOSPC: "the disk is full; free some space, or choose another place with run.output_dir or run.cache_dir",
    errno.EDQUOT: "your disk quota is used up; free some space, or choose another place",
    errno.EACCES: "you may not write there; choose another place with run.output_dir or run.cache_dir",
    errno.EPERM: "you may not write there; choose another place with run.output_dir or run.cache_dir",
    errno.EROFS: "that file system is read-only; choose another place with run.output_dir or run.cache_dir",
    errno.EFBIG: "the file would be larger than this file system or your limits (ulimit -f) allow; choose another place",
    errno.ENAMETOOLONG: "the name is too long for that file system; choose a shorter one",
    errno.EISDIR: "a folder stands where a file is needed; move it away, or choose another place",
    errno.ENOTEMPTY: "there is already something there; move it away, or choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away, or choose another place",
    errno.EEXIST: "a file stands where a folder is needed; move it away, or choose another place",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the disk's refusals at ``path`` into a `FileError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        raise FileError(f"{path}: cannot write: {ADVICE[error.errno]}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises: FileError."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place. Raises: FileError."""
    make_folder(path.parent)
    with explained(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        draft = Path(name)
        try:
            write(draft)
            _sync(draft)
            draft.chmod(0o644)
            draft.replace(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all. Raises: FileError."""

    def write(draft: Path) -> None:
        draft.write_bytes(data)

    write_with(path, write)


def write_text(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` as UTF-8, whole or not at all. Raises: FileError."""
    write_bytes(path, text.encode())


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A draft folder that takes ``path``'s place when the block ends well, and is removed when it does not."""
    make_folder(path.parent)
    with explained(path):
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield draft
            for file in draft.iterdir():
                _sync(file)
            _sync(draft)
            draft.chmod(0o755)
            draft.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def new_numbered_folder(path: Path) -> Path:
    """Create ``path``, or ``path-2``, ``path-3``, ...: the first that does not exist yet. Raises: FileError."""
    make_folder(path.parent)
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with explained(candidate):
            try:
                candidate.mkdir()
            except FileExistsError:
                number += 1
            else:
                return candidate


def free_name(path: Path) -> Path:
    """``name.yaml``, or ``name-2.yaml``, ``-3``, ...: the first that is not there yet."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def digest(*parts: str | bytes | memoryview) -> str:
    """SHA-256 over length-prefixed parts, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def digest_of(data: bytes) -> str:
    """SHA-256 of bytes, as `file_digest` gives it for a file that holds them."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def in_background(pool: ThreadPoolExecutor, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> Future[T]:
    """Work for a thread of a pool; done at once where Python is being taken down and lends no thread any more."""
    try:
        return pool.submit(work, *given, **named)
    except RuntimeError:
        done: Future[T] = Future()
        done.set_result(work(*given, **named))
        return done
