"""What a webhook is told of each record: type, importance, words, numbers and a picture; paths relative to the run folder."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.config.hooks import LEVELS
from sd3tune.config.schema import RunConfig
from sd3tune.listing import at_its_end
from sd3tune.records import (
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    FailureRecord,
    ImageRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    ScoreRecord,
    SegmentRecord,
    StepRecord,
)
from sd3tune.reporting.cleaning import shareable, without_places
from sd3tune.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Event:
    """One call of a webhook."""

    type: str
    title: str
    severity: str = "info"
    body: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    previews: tuple[bytes, ...] = ()
    """JPEG files."""

    def payload(self, job: str, prefix: str) -> dict[str, Any]:
        """The event as it is sent; the picture as PNG in base64. Raises: OSError when it is gone."""
        title = f"{prefix} {self.title}".strip()
        found: dict[str, Any] = {
            "type": self.type, "title": title, "message": f"{title}: {self.body}" if self.body else title, "severity": self.severity,
            "job_id": job, "timestamp": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
        }  # fmt: skip
        found |= {name: value for name, value in (("body", self.body), ("data", self.data), ("stage", self.stage)) if value}
        pictures = [self.picture.read_bytes()] if self.picture is not None else [as_png(preview) for preview in self.previews]
        if pictures:
            found["images"] = [base64.b64encode(picture).decode() for picture in pictures]
        return found


def as_png(jpeg: bytes) -> bytes:
    """The same picture as a PNG file."""
    with io.BytesIO() as file, Image.open(io.BytesIO(jpeg)) as opened:
        opened.save(file, "PNG")
        return file.getvalue()


def stage(key: str, label: str, status: str, done: tuple[int, int] | None = None, severity: str = "info") -> Event:
    """A part of the run begins, goes on, or ends; ``done`` of so many."""
    found: dict[str, Any] = {"key": key, "label": label, "status": status}
    if done is not None:
        found["progress"] = {"current": done[0], "total": done[1], "percent": round(100 * done[0] / max(1, done[1]), 1)}
    return Event(type="lifecycle.stage", title=f"{label}: {status}", severity=severity, stage=found)


STAGES = {"benchmark_base_model": "Pictures of the base model", "validation": "Validation", "final_validation": "Last validation"}


def _whose(record: ImageRecord) -> tuple[bool, int]:
    return record.kind == "base", record.step


def severity_of(record: Record) -> str:
    """How important what a record has to say is."""
    if isinstance(record, PreviewRecord):
        return "info" if record.previews else "debug"
    if isinstance(record, FailureRecord):
        return "error"
    warns = (
        (isinstance(record, ImageRecord) and record.problem)
        or (isinstance(record, CommandRecord) and record.refused)
        or (isinstance(record, NoticeRecord) and record.warning)
        or (isinstance(record, SegmentRecord) and record.why in ("rollback", "guard"))
    )
    return "warning" if warns else "info"


def heard(level: str, record: Record) -> bool:
    """Whether a webhook of this level is told of a record."""
    return loud(level, severity_of(record))


def loud(level: str, severity: str) -> bool:
    """Whether what is so important is told at a level."""
    return LEVELS.index(severity) >= LEVELS.index(level)


class Events:
    """Turns the records of one run into events. Remembers the run's length and pace, and what is being drawn."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, total: int, updates_per_epoch: float) -> None:
        self._config, self._folder = config, folder
        self._total, self._per_epoch, self._seconds = total, updates_per_epoch, 0.0
        self._written = self._begun = False
        self._drawn: list[ImageRecord] = []

    @property
    def job(self) -> str:
        """The run's name."""
        return self._folder.path.name

    @property
    def done(self) -> bool:
        """Whether the run came to its end, and that was not said yet."""
        return self._written and at_its_end(self._folder, self._folder.read_history())

    def of(self, record: Record) -> Iterator[Event]:
        """What a record has to say."""
        if not isinstance(record, (PreviewRecord, ScoreRecord, NoticeRecord)):
            yield from self._all_drawn(record)
        if isinstance(record, StepRecord):
            yield self._status(record)
        elif isinstance(record, PreviewRecord) and record.previews:
            yield self._preview(record)
        elif isinstance(record, PreviewRecord):
            yield stage("validation", "Validation", "running", (record.sampler_step, record.sampler_steps), "debug")
        elif isinstance(record, ImageRecord):
            yield self._picture(record)
        elif isinstance(record, ScoreRecord):
            title = f"CLIP score {record.mean:.3f} at step {record.step}"
            numbers = {"clip/mean": record.mean, "clip/min": record.min, "clip/max": record.max, "clip/std": record.std}
            yield Event(type="training.validation", title=title, data={"step": record.step, "kind": record.kind, **numbers})
        elif isinstance(record, EvalRecord):
            title = f"Loss on held-out pictures {record.loss:.4f} at step {record.step}"
            data = {"step": record.step, "loss": record.loss, "images": record.images, "losses_by_dataset": record.losses_by_dataset}
            data |= {"relative": record.relative, "ema_loss": record.ema_loss}
            found = {name: value for name, value in data.items() if value not in (None, "", {})}
            yield Event(type="training.validation", title=title, body=record.verdict, data=found)
        elif isinstance(record, CheckpointRecord):
            yield from self._saved(record)
        elif isinstance(record, FailureRecord):
            text = self._clean(record.text)
            yield stage("training_abort", "Training", "failed", (record.step, self._total), "error")
            yield Event(type="error", title=f"The run ended at step {record.step}", severity="error", body=text, data={"step": record.step})
        else:
            yield from self._words(record)

    def complete(self) -> Iterator[Event]:
        """The run has all its updates and its adapter; said once for each end."""
        self._written = False
        yield from self._all_drawn()
        yield stage("training_complete", "Training", "completed", (self._total, self._total))

    def _all_drawn(self, record: Record | None = None) -> Iterator[Event]:
        """Pictures of the base model, or of a step, are all there once something else comes."""
        if self._drawn and not (isinstance(record, ImageRecord) and _whose(record) == _whose(self._drawn[0])):
            first, good = self._drawn[0], sum(not one.problem for one in self._drawn)
            key = "benchmark_base_model" if first.kind == "base" else "final_validation" if first.step >= self._total else "validation"
            yield stage(key, STAGES[key], "completed" if good else "failed", (good, len(self._drawn)))
            self._drawn = []  # it was sent: what failed is asked for again
        if isinstance(record, ImageRecord) and not any(one is record for one in self._drawn):
            self._drawn.append(record)

    def _status(self, record: StepRecord) -> Event:
        self._seconds = 0.9 * self._seconds + 0.1 * record.seconds if self._seconds else record.seconds
        data: dict[str, Any] = {
            "step": record.step, "total_steps": self._total, "loss": record.loss, "lr": record.learning_rate,
            "epoch": round(record.step / self._per_epoch, 4), "eta": round(self._seconds * (self._total - record.step), 1),
            "grad_norm": record.grad_norm, "images_per_second": record.images_per_second,
        }  # fmt: skip
        if record.regularisation_loss is not None:
            data["regularisation_loss"] = record.regularisation_loss
        loss = "" if record.loss is None else f", loss {record.loss:.4f}"
        return Event(type="training.status", title=f"Step {record.step}/{self._total}{loss}", data=data)

    def _preview(self, record: PreviewRecord) -> Event:
        data = {
            "step": record.step, "prompt": record.prompt, "prompts": list(record.prompts), "validation_type": "intermediary",
            "sampler_step": record.sampler_step, "step_label": f"{record.sampler_step}/{record.sampler_steps}",
            "resolution": f"{record.width}x{record.height}", "timestep": record.timestep,
        }  # fmt: skip
        title = f"Preview {data['step_label']} at step {record.step}"
        return Event(type="validation.image", title=title, body=record.prompt, data=data, previews=record.previews)

    def _picture(self, record: ImageRecord) -> Event:
        if record.problem:
            text = f"the picture of {record.prompt!r} could not be drawn: {self._clean(record.problem)}"
            return Event(type="notification", title=f"Step {record.step}", body=text, severity="warning")
        data = {
            "step": record.step, "prompt": record.prompt, "resolution": f"{record.width}x{record.height}", "seed": record.seed,
            "validation_type": {"adapter": "checkpoint"}.get(record.kind, record.kind), "path": self._place(record.path),
        }  # fmt: skip
        title = f"Validation picture at step {record.step}"
        return Event(type="validation.image", title=title, body=record.prompt, data=data, picture=Path(record.path))

    def _saved(self, record: CheckpointRecord) -> Iterator[Event]:
        final = Path(record.path) == self._folder.lora
        place = self._place(record.path)
        label = "final adapter" if final else f"step {record.step}"
        yield Event(type="training.checkpoint", title=f"Saved {place}", data={"path": place, "label": label, "is_final": final})
        if final:
            self._written = True
            yield stage("model_save", "Saving the adapter", "completed")
        else:
            yield stage("checkpoint_save", "Saving a checkpoint", "completed")

    def _words(self, record: Record) -> Iterator[Event]:
        severity = severity_of(record)
        if isinstance(record, NoticeRecord) and record.step == 0 and not self._begun and not record.warning:
            self._begun = True
            yield stage("init_prepare_models", "Preparing", "completed")
            data = {"config": shareable(self._config), "total_steps": self._total}
            yield Event(type="notification", title="Training begins", body=self._clean(record.text), data=data)
        elif isinstance(record, NoticeRecord):
            yield Event(type="notification", title=f"Step {record.step}", severity=severity, body=self._clean(record.text))
        elif isinstance(record, SegmentRecord):
            title = f"The run goes on from step {record.from_step} ({record.why})"
            if record.why == "resume":
                yield stage("init_resume_checkpoint", "Resuming", "completed", (record.from_step, self._total))
            yield Event(type="notification", title=title, severity=severity)
        elif isinstance(record, CommandRecord):
            if record.name == "set" and not record.refused and isinstance(record.value, dict):
                self._total = int(record.value.get("max_train_steps") or self._total)
            value = "" if record.value is None else f" {record.value}"
            refused = f", refused: {record.refused}" if record.refused else ""
            said = self._clean(f"{record.name}{value}{refused}")
            yield Event(type="notification", title=f"Step {record.step}", severity=severity, body=said)

    def _place(self, path: str) -> str:
        place = Path(path)
        return place.relative_to(self._folder.path).as_posix() if place.is_relative_to(self._folder.path) else place.name

    def _clean(self, text: str) -> str:
        return without_places(text, self._folder.path)
