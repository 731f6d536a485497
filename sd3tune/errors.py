"""What a person can fix. ``except Sd3TuneError`` catches all of it; anything else is our bug and keeps its traceback.

Sd3TuneError
├── ConfigError       a setting is unknown, out of range, or contradicts another
├── DataError         a folder, picture or caption
├── CacheError        what is encoded is missing or unreadable
├── ModelError        the base model cannot be loaded as asked
├── FileError         the disk: read-only, full, in the way
├── CheckpointError   a saved state or adapter does not fit
└── TrainingError     the run cannot go on as it is
"""

from __future__ import annotations


class Sd3TuneError(Exception):
    """Base of every error whose message says where, what, and what to do."""


class ConfigError(Sd3TuneError):
    """One or more settings are wrong; ``problems`` holds one sentence for each."""

    def __init__(self, problems: list[str], where: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{where}: {count}", *(f"  - {p}" for p in problems)]))


class DataError(Sd3TuneError):
    """The pictures or captions cannot be used."""


class CacheError(Sd3TuneError):
    """An encoded tensor is missing or cannot be read."""


class ModelError(Sd3TuneError):
    """The base model cannot be loaded as asked."""


class FileError(Sd3TuneError):
    """A file or folder cannot be written."""


class CheckpointError(Sd3TuneError):
    """A checkpoint or adapter file does not fit, or does not read back as written."""


class TrainingError(Sd3TuneError):
    """Training cannot go on."""
