"""The wizard as a frozen state: answers so far, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3tune.config.advice import advice
from sd3tune.config.schema import RunConfig
from sd3tune.configuring import outcome, script
from sd3tune.configuring.machine import Machine
from sd3tune.configuring.pictures import Pictures, look
from sd3tune.configuring.questions import Question
from sd3tune.configuring.writing import Files, files_of
from sd3tune.data.datasets import Dataset
from sd3tune.data.wording import number
from sd3tune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Wizard:
    """See the package. ``answers`` are in the order in which they were given."""

    machine: Machine
    answers: Mapping[str, Any] = field(default_factory=dict)
    pictures: Pictures | None = None
    """What the folder of the first answer holds."""

    @cached_property
    def question(self) -> Question | None:
        """What to ask now; ``None`` when there is an answer to everything."""
        return script.next_question(self)

    def answer(self, value: Any = None) -> Wizard:
        """The wizard with an answer to its question; nothing is the default. Raises: ConfigError, with why it cannot be that."""
        question = self.question
        if question is None:
            raise ConfigError(["every question is answered; files() is next"], "configure")
        given = question.read(value)
        made = replace(self, answers={**self.answers, question.name: given})
        if question.name == "instance_data_dir":
            try:
                made = replace(made, pictures=look(given))
            except DataError as error:
                raise ConfigError([str(error)], "configure") from None
        made.config, made.dataset  # noqa: B018 (what contradicts the answers before is refused here)
        return made

    def back(self) -> Wizard:
        """The wizard before its last answer; itself at the beginning."""
        kept = dict(list(self.answers.items())[:-1])
        return replace(self, answers=kept, pictures=self.pictures if kept else None)

    @property
    def found(self) -> Pictures:
        """What the folder holds. Raises: ConfigError before the first answer."""
        if self.pictures is None:
            raise ConfigError(["name the folder of the pictures first"], "configure")
        return self.pictures

    @cached_property
    def config(self) -> RunConfig:
        """The configuration as far as the answers go. Raises: ConfigError."""
        return outcome.config_of(self.answers)

    @cached_property
    def dataset(self) -> Dataset:
        """The entry of datasets.yaml as far as the answers go. Raises: ConfigError."""
        return outcome.dataset_from(self.answers, self.pictures)

    @property
    def last(self) -> str:
        """The question that was answered last; empty at the beginning."""
        return [*self.answers][-1] if self.answers else ""

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the last answer means: what was found, what stands in the way, what should be thought of."""
        last = self.last
        if last == "instance_data_dir":
            return tuple(str(self.found).splitlines())
        if last == "model" and self.answers["model"] != outcome.OTHER:
            return (str(self.machine), *self.machine.access(self.config))
        if last == "pretrained_model_name_or_path":
            return self.machine.access(self.config)
        said = [text for text in self._memory() if text not in self.back()._memory()] if last in MEMORY else []
        if last in ("base_model_precision", "text_encoder_3_precision", "optimizer"):
            said += outcome.hindrances(self.config, self.machine)
        if last == "report_to":
            said += self.machine.trackers(self.config)
        if last in ("repeats", "max_train_steps", "num_train_epochs"):
            said.append(self.sentence)
        return (*said, *self._advice())

    def _memory(self) -> tuple[str, ...]:
        if "preset" not in self.answers:
            return ()
        need = outcome.need_of(self.config, int(self.answers.get("resolution", 0)) or max(w for w, _ in self.config.validation_sizes))
        return () if need is None else (f"memory {outcome.verdict(need, self.machine, self.answers.get('gpu_gb', 0.0))}",)

    def _advice(self) -> list[str]:
        before = set(map(str, advice(self.back().config))) if self.answers else set()
        return [str(one) for one in advice(self.config) if str(one) not in before]

    @property
    def sentence(self) -> str:
        """Updates, epochs, and how often each picture is seen."""
        per_epoch = outcome.updates_per_epoch(self.answers, self.found)
        epochs = self.config.schedule.num_train_epochs
        updates = math.ceil(epochs * per_epoch) if epochs else self.config.max_train_steps or 0
        seen = updates / per_epoch * (1 + self.answers.get("repeats", 0))
        return (
            f"{outcome.learned_from(self.answers, self.found)} pictures to learn from: {number(per_epoch)} updates an epoch; "
            f"{updates:,} updates show each picture about {number(round(seen, 1))} times"
        )

    @property
    def summary(self) -> tuple[tuple[str, str], ...]:
        """Each question's name with its answer, as a person would type it."""
        return tuple((name, Question(name, "", "", "text", value).shown_default) for name, value in self.answers.items())

    @cached_property
    def cautions(self) -> tuple[str, ...]:
        """What should be looked at before anything runs; nothing of it forbids writing the files."""
        place = Path(self.config.run.output_dir)
        return (
            *outcome.cautions(self.answers, self.found, self.machine), *outcome.disk(self.answers, self.found, self.machine, place),
        )  # fmt: skip

    def files(self, folder: str | Path = ".") -> Files:
        """The two files, under names that are free in a folder. Raises: ConfigError while a question is open."""
        if self.question is not None:
            raise ConfigError([f"{self.question.name} is not answered yet"], "configure")
        return files_of(
            self.config, self.dataset, self.answers.get("preset", outcome.NO_PRESET), str(self.found).splitlines()[0], Path(folder)
        )


MEMORY = ("preset", "base_model_precision", "text_encoder_3_precision", "lora_rank", "resolution", "train_batch_size", "optimizer")
"""Answers that decide what is needed in memory."""
