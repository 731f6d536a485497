"""Every record that the long-running parts yield. Frozen, printable, and one line of ``history.jsonl`` each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records; ``type`` names the kind in the history."""

    type: ClassVar[str] = "record"
    step: int

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data, ``type`` first."""
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class CacheRecord(Record):
    """One entry of the cache is in place; ``reused`` when it already was. ``step`` counts entries.

    ``problem`` says why there is no entry, or that a damaged one was encoded again. On the way there are records of another kind:
    ``pictures`` that were hashed, and ``states`` of a text that one of its encoders (``name``) gave; ``step`` counts those.
    """

    type: ClassVar[str] = "cache"
    total: int
    kind: str
    key: str
    name: str
    reused: bool
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One optimizer update: what it saw and what it measured before it changed anything."""

    type: ClassVar[str] = "step"
    loss: float | None
    """Mean over the pictures to learn from; nothing when all of this update were regularisation pictures."""
    losses: tuple[float, ...]
    sigmas: tuple[float, ...]
    items: tuple[str, ...]
    learning_rate: float
    grad_norm: float
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    regularisation_loss: float | None = None
    """Mean over regularisation pictures: how far the model is from the base there. ``losses`` holds those of both kinds."""
    extra_forwards: int = 0
    """Pictures that went through the model besides the ones that learn, so that others could be rolled."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record):
    """Loss on held-out pictures with fixed noise and fixed noise levels."""

    type: ClassVar[str] = "eval"
    loss: float
    images: int
    sigmas: tuple[float, ...]
    losses_by_sigma: tuple[float, ...]
    losses_by_image: tuple[float, ...] = ()
    train_losses_by_image: tuple[float, ...] = ()
    """The same of some training pictures, always of the same ones."""
    train_images: int = 0
    """Of how many those are."""
    drifts_by_image: tuple[float, ...] = ()
    """Squared distance from the base model's predictions on the held-out pictures, as shares of the base's mean loss there."""
    items: tuple[str, ...] = ()
    """Which pictures the held-out ones are, and (``train_items``) which the training ones."""
    train_items: tuple[str, ...] = ()
    base_loss: float | None = None
    """The base model's loss on the same pictures with the same noise."""
    relative: float | None = None
    """The loss as a share of the base model's."""
    ema_loss: float | None = None
    """The loss of the running average of the weights, when one is kept."""
    losses_by_band: tuple[float | None, ...] = ()
    """Mean loss in equal parts of the noise levels 0 to 1; nothing where no level lies."""
    base_losses_by_band: tuple[float | None, ...] = ()
    losses_by_dataset: dict[str, float] = field(default_factory=dict)
    """Mean loss of each data set's held-out pictures; empty when they are pooled."""
    verdict: str = ""
    """What the evaluations so far say, in a sentence that begins with the word for it; empty when this is the first."""


@dataclass(frozen=True, kw_only=True)
class ProbeRecord(Record):
    """What a learning rate has learned after some updates that do not count; not written to the history. ``step`` is the trainer's."""

    type: ClassVar[str] = "probe"
    learning_rate: float
    updates: int
    """Updates at this rate; 0 for the state that all rates begin with."""
    losses_by_image: tuple[float, ...]
    """Of the pictures that all rates are judged by; empty when the rate ran away."""
    refused: str = ""
    """Why the guard ended this rate."""
    last: bool = False
    """Whether this rate is done."""


@dataclass(frozen=True, kw_only=True)
class PreviewRecord(Record):
    """One step of the sampler is done, for all pictures that are drawn together; not written to the history."""

    type: ClassVar[str] = "preview"
    prompt: str
    """Of the first of them."""
    sampler_step: int
    sampler_steps: int
    count: int = 1
    """Pictures drawn together."""
    prompts: tuple[str, ...] = ()
    previews: tuple[bytes, ...] = ()
    """What they look like so far, as JPEG files; empty unless ``validation_preview`` asks for it at this step."""
    width: int = 0
    height: int = 0
    timestep: float | None = None
    """The noise level of the sampler's step, times 1000."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord(Record):
    """One validation picture is on disk, or ``problem`` says why it could not be drawn."""

    type: ClassVar[str] = "image"
    prompt: str
    path: str
    seed: int
    width: int
    height: int
    guidance: float
    skip_layers: tuple[int, ...]
    name: str = ""
    """Of the prompt, in its library."""
    kind: str = "adapter"
    """``base`` for the model without the adapter (``step`` is 0 then), ``adapter``, or ``ema`` for its running average."""
    problem: str = ""


READING = (
    "CLIP score tells how well pictures follow their prompts, not how good they look. With openai's large models a mean of 0.30 to 0.39 "
    "is the plateau and 0.18 to 0.22 is poor; a single good picture may score 0.14. A mean over few prompts is noise: compare it with its "
    "standard error, on the same prompts and seeds."
)
"""How to read a CLIP score."""


@dataclass(frozen=True, kw_only=True)
class ScoreRecord(Record):
    """How well the pictures of a step follow their prompts: CLIP's cosine, 0 to 1. It says nothing of how good they look."""

    type: ClassVar[str] = "clip"
    kind: str
    """Whose pictures: ``base``, ``adapter`` or ``ema``."""
    mean: float
    min: float
    max: float
    std: float
    scores: tuple[float, ...]
    names: tuple[str, ...]
    base: float | None = None
    """Mean of the base model's pictures of the same prompts."""
    reference: float | None = None
    """Mean of real pictures with their captions: those of data sets to evaluate on."""
    truncated: int = 0
    """Prompts of which the scorer sees only the beginning."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """A checkpoint (or the final adapter) is on disk and has been read back."""

    type: ClassVar[str] = "checkpoint"
    path: str
    tensors: int


@dataclass(frozen=True, kw_only=True)
class CommandRecord(Record):
    """A command of a person was applied between two updates, or refused with a reason."""

    type: ClassVar[str] = "command"
    name: str
    value: Any = None
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class NoticeRecord(Record):
    """Something a person should read."""

    type: ClassVar[str] = "notice"
    text: str
    warning: bool = False
    """Whether something went wrong, or did not go as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class WaitRecord(Record):
    """The run waits and can go on; not written to the history."""

    type: ClassVar[str] = "wait"
    why: str


@dataclass(frozen=True, kw_only=True)
class SegmentRecord(Record):
    """The run goes on from ``from_step`` of segment ``parent``; later lines of that parent no longer count."""

    type: ClassVar[str] = "segment"
    from_step: int
    parent: int
    why: str
    live: Mapping[str, Any] = field(default_factory=dict)
    """The settings that may change while training, as they are from here on."""
    skipped: tuple[int, ...] = ()
    """The updates' batches that are left out from here on."""


@dataclass(frozen=True, kw_only=True)
class FailureRecord(Record):
    """The run ended before it was done, by an error."""

    type: ClassVar[str] = "failure"
    text: str


KINDS: dict[str, type[Record]] = {
    kind.type: kind
    for kind in (
        CacheRecord, StepRecord, EvalRecord, PreviewRecord, ImageRecord, ScoreRecord, CheckpointRecord,
        CommandRecord, NoticeRecord, WaitRecord,
        SegmentRecord, FailureRecord,
    )
}  # fmt: skip
"""Every kind by its ``type``."""


def of_row(row: Mapping[str, Any]) -> Record | None:
    """The record that a line of a history holds; nothing for one of another version, whose kind or fields are others."""
    kind = KINDS.get(row.get("type", ""))
    if kind is None:
        return None
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    missing = dataclasses.MISSING
    if any(field.name not in row and field.default is missing and field.default_factory is missing for field in fields):
        return None
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name in names}
    return kind(**values)


def records_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """The records of a history's lines; those of other versions are left out."""
    return (record for row in rows if (record := of_row(row)) is not None)
