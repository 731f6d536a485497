"""Why a run failed, without the memory that the error holds."""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.cache.memory import is_out_of_memory
from sd3tune.errors import Sd3TuneError, TrainingError


@dataclass(frozen=True)
class Failure:
    """An error that ended a run, as far as a person needs it."""

    kind: type[Sd3TuneError]
    text: str
    out_of_memory: bool
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException, folder: str) -> Failure:
        """The failure in words; the traceback goes to the run's log, and what its frames hold is let go."""
        ours = isinstance(error, Sd3TuneError)
        if folder:
            with suppress(OSError), (Path(folder) / "train.log").open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)))
        traceback.clear_frames(error.__traceback__)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        details = dict(vars(error)) if ours else {}
        return cls(type(error) if isinstance(error, Sd3TuneError) else TrainingError, text, is_out_of_memory(error), details)

    def error(self) -> Sd3TuneError:
        """The error again, to raise where somebody waits: TrainingError for one that is not ours."""
        made = self.kind.__new__(self.kind, self.text)
        made.__dict__.update(self.details)
        return made
