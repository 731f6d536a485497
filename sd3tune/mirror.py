"""A second copy of a run somewhere else, made in the background: a folder, a mounted drive, or an address that fsspec knows."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sd3tune.errors import ConfigError, FileError
from sd3tune.files import digest_of, in_background, write_bytes, write_text
from sd3tune.shown import duration, size_in_words


class Mirror:
    """Copies files of one run, in one thread and in order; ``news`` says what has arrived."""

    def __init__(self, run: Path, to: str) -> None:
        """Raises: ConfigError when the address needs a package that is missing, or cannot be reached."""
        self._run, self._fs, self._root = run, *_reached(to)
        self.address = self._own_place(to)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sd3tune-mirror")
        self._jobs: list[Future[str]] = []

    def _own_place(self, to: str) -> str:
        """A folder below ``to`` that no other run uses: the one of before when the run goes on, else a new one."""
        known = self._run / "mirror.json"
        if known.exists():
            row = json.loads(known.read_text())
            if row["to"] == to:
                return str(row["address"])
        number = 1
        while self._fs.exists(address := f"{self._root}/{self._run.name}" + (f"-{number}" if number > 1 else "")):
            number += 1
        write_text(known, json.dumps({"to": to, "address": address}) + "\n")
        return address

    def copy(self, what: str, paths: Sequence[Path], keep: Sequence[str] = ()) -> None:
        """Copy files in the order given, read them back, then remove checkpoints that are not in ``keep`` any more."""
        self._jobs.append(in_background(self._pool, self._copied, what, list(paths), list(keep)))

    def news(self, *, wait: bool = False) -> list[str]:
        """What has become of the copies since the last call; with ``wait``, of all of them."""
        ready = [job for job in self._jobs if wait or job.done()]
        self._jobs = [job for job in self._jobs if job not in ready]
        return [job.result() for job in ready]

    @property
    def busy(self) -> bool:
        """Whether a copy is not finished."""
        return any(not job.done() for job in self._jobs)

    def close(self) -> None:
        """End the thread when it has done its work."""
        self._pool.shutdown()

    def _copied(self, what: str, paths: list[Path], keep: list[str]) -> str:
        started, count = time.monotonic(), 0
        try:
            for path in paths:
                data = path.read_bytes()
                self._put(f"{self.address}/{path.relative_to(self._run).as_posix()}", data)
                count += len(data)
            self._forget(keep)
        # Whatever a remote place answers is news, and never the end of the training.
        except Exception as error:  # noqa: BLE001
            return f"{what} could not be copied to {self.address} ({type(error).__name__}: {error}); the next one will be tried again"
        took = duration(time.monotonic() - started)
        return f"{what} is whole at {self.address} ({size_in_words(count)} in {took}): up to there, this machine may go away"

    def _put(self, address: str, data: bytes) -> None:
        if "local" in _protocols(self._fs):
            write_bytes(Path(address), data)
        else:
            self._fs.makedirs(address.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(address, data)
        if digest_of(self._fs.cat_file(address)) != digest_of(data):
            raise FileError(f"{address}: does not read back as written")

    def _forget(self, keep: list[str]) -> None:
        """Remove checkpoints that the run itself has dropped."""
        folder = f"{self.address}/checkpoints"
        for found in self._fs.ls(folder, detail=False) if keep and self._fs.exists(folder) else []:
            name = found.rstrip("/").rsplit("/", 1)[-1]
            if name.startswith("step-") and name not in keep:
                self._fs.rm(found, recursive=True)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _reached(to: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(str(Path(to).absolute()) if "://" not in to else to)
        fs.makedirs(root, exist_ok=True)
    except ImportError as error:
        raise ConfigError([f"mirror_to: {to} needs a package that is not installed ({error}); pip install 'sd3tune[remote]'"]) from None
    except (ValueError, OSError) as error:
        raise ConfigError([f"mirror_to: {to} cannot be reached ({error}); name a folder, or an address such as s3://bucket/runs"]) from None
    return fs, root.rstrip("/")
