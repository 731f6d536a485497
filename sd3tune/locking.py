"""Who writes into a run folder: ``run.lock`` names a process, and is touched for as long as its run goes on.

A lock is left alone while its process is there. On the same machine that can be seen; from elsewhere (another host, another container)
it counts as gone when nothing was heard of it for `STALE` seconds. What a killed process leaves behind is then taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sd3tune.errors import TrainingError
from sd3tune.files import digest, explained, write_text
from sd3tune.shown import duration

NAME = "run.lock"
EVERY, STALE = 2.0, 60.0
"""Seconds between two signs of life, and without one after which a process that cannot be seen counts as gone."""

TRIES, PAUSE = 100, 0.05
"""How often, and after how many seconds again, a lock is asked for that changes hands at this moment."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder."""

    token: str
    pid: int
    thread: int
    host: str
    machine: str
    """This boot of this machine, and which of its processes can be seen."""
    began: str
    """When the process began, by the kernel's own clock: another process may get its number."""
    since: float
    seen: float = 0.0
    """Time of its last sign of life."""

    @property
    def alive(self) -> bool:
        """Whether its process is there, as far as can be known from here."""
        if self.machine != _machine():
            return self.age < STALE
        return _is_there(self.pid) and self.began == _began(self.pid)

    @property
    def here(self) -> bool:
        """Whether it is this very process."""
        return self.machine == _machine() and self.pid == os.getpid()

    @property
    def busy(self) -> bool:
        """Whether it may write: not when it is this very thread, which does something else just now."""
        if not self.alive or not self.here:
            return self.alive
        return self.thread != threading.get_ident() and any(one.ident == self.thread for one in threading.enumerate())

    def __str__(self) -> str:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {begun}"

    @property
    def age(self) -> float:
        """Seconds since its last sign of life."""
        return max(0.0, time.time() - self.seen)


def holder(path: Path) -> Holder | None:
    """Who holds a lock; ``None`` when there is none. What cannot be read is somebody's who cannot be seen."""
    try:
        seen = path.stat().st_mtime
        return _read(path, seen) or Holder("", 0, 0, "an unknown host", "", "", seen, seen)
    except FileNotFoundError:
        return None


def _read(path: Path, seen: float) -> Holder | None:
    """What a lock says; ``None`` for one that is just being written, or is none."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        found = Holder(**row, seen=seen)
    except (ValueError, TypeError):
        return None
    numbers = (found.pid, found.thread, found.since)
    texts = (found.token, found.host, found.machine, found.began)
    return found if all(isinstance(n, (int, float)) for n in numbers) and all(isinstance(t, str) for t in texts) else None


class Lock:
    """One process's hold on a run folder. ``with lock:`` takes it and lets go of it; ``beat`` says that it is still wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token, self._beaten = "", 0.0

    def take(self) -> None:
        """Hold the folder. Raises: TrainingError when another process or thread does; FileError."""
        me = _me()
        text = json.dumps(me, indent=1) + "\n"
        for _ in range(TRIES):
            found = holder(self.path)
            if found is not None and found.busy:
                raise TrainingError(refusal(self.path.parent, found))
            if self._created(self.path, text) if found is None else self._taken_over(found, text):
                self._token, self._beaten = me["token"], time.monotonic()
                return
            time.sleep(PAUSE)
        raise TrainingError(f"{self.path}: changes hands all the time; look which processes want this run, and start one")

    def beat(self) -> None:
        """Give a sign of life, if the last one is `EVERY` seconds old. Raises: TrainingError when another process holds the folder."""
        if time.monotonic() - self._beaten < EVERY:
            return
        self._beaten = time.monotonic()
        found = holder(self.path)
        if found is not None and found.token and found.token != self._token:
            raise TrainingError(f"{self.path.parent}: {found} has taken this run over; nothing more is written here")
        with suppress(OSError):  # a run does not end because a disk was away for a moment
            os.utime(self.path)

    def release(self) -> None:
        """Let go of the folder, unless another process has it by now."""
        found = holder(self.path)
        if found is not None and found.token == self._token:
            self.path.unlink(missing_ok=True)
        self._token = ""

    def require_free(self) -> None:
        """Raises: TrainingError when another process or thread holds the folder."""
        found = holder(self.path)
        if found is not None and found.token != self._token and found.busy:
            raise TrainingError(refusal(self.path.parent, found))

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @staticmethod
    def _created(path: Path, text: str) -> bool:
        """Write a new file; false when there is one already."""
        with explained(path):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        return True

    def _taken_over(self, found: Holder, text: str) -> bool:
        """Put a lock in the place of a dead one. Of several that want to, the one does that has its claim first."""
        claim = self.path.with_name(f"{NAME}.{digest(found.token)[:16]}")
        if not self._created(claim, ""):
            with suppress(OSError):
                if time.time() - claim.stat().st_mtime > STALE:  # whoever made it was killed, too
                    claim.unlink()
            return False
        try:
            now = holder(self.path)
            if now is None or now.token != found.token:
                return False
            write_text(self.path, text)
            return True
        finally:
            claim.unlink(missing_ok=True)


def refusal(folder: Path, found: Holder) -> str:
    """Why a run cannot be gone on with here."""
    if found.here:
        return f"{folder}: this run goes on in another thread of this very process, {found}; use its panel or runner"
    return (
        f"{folder}: {found} is running this run (last sign of life {duration(found.age)} ago); let it end, or stop it there or "
        "by a file STOP in the folder, and try again"
    )


def _me() -> dict[str, Any]:
    pid = os.getpid()
    me = Holder(uuid.uuid4().hex, pid, threading.get_ident(), socket.gethostname(), _machine(), _began(pid), round(time.time(), 3))
    return {name: value for name, value in asdict(me).items() if name != "seen"}


def _machine() -> str:
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_there(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
