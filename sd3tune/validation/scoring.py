"""CLIP scores of what was drawn, beside those of the base model's pictures and of the real held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from sd3tune import playground
from sd3tune.config.schema import RunConfig
from sd3tune.config.sections import Evaluation
from sd3tune.data.images import read_rgb
from sd3tune.data.planning import Plan
from sd3tune.errors import DataError, ModelError
from sd3tune.models.clip import Scorer, summary
from sd3tune.records import ScoreRecord
from sd3tune.validation.pictures import Found, opened


class Scoring:
    """The one scorer of a run, loaded when it is first asked; it waits on the CPU and moves to the device where there is room."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scorers: dict[str, Scorer] = {}
        self._known: dict[tuple[str, Path, str], float] = {}
        """Model, picture's file and text -> score, of pictures that do not change."""

    def of_drawn(
        self, config: RunConfig, kind: str, drawn: Sequence[Found], base: Sequence[Found], plan: Plan | None, step: int
    ) -> ScoreRecord | None:
        """The scores of drawn pictures, without the one of no prompt; nothing when there are none. Raises: ModelError."""
        rows = [found for found in drawn if found.shot.prompt]
        if not rows:
            return None
        texts = [found.shot.prompt for found in rows]
        scores = self.scores(config, [opened(found.path) for found in rows], texts)
        found = summary(scores)
        return ScoreRecord(
            step=step, kind=kind, mean=found.mean, min=found.min, max=found.max, std=found.std, scores=scores,
            names=tuple(found.shot.name for found in rows), base=self._mean(config, base),
            reference=None if plan is None else self._reference(config, plan), truncated=len(self._scorer(config).truncated(texts)),
        )  # fmt: skip

    def scores(self, config: RunConfig, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[float, ...]:
        """The score of each picture with its prompt, 0 to 1. Raises: ModelError."""
        scorer = self._scorer(config)
        if not pictures:
            return ()
        if self._device.type == "cpu":
            return scorer.scores(pictures, prompts)
        try:
            with scorer.on(self._device):
                return scorer.scores(pictures, prompts)
        except (ModelError, torch.OutOfMemoryError):  # no room there: slower on the CPU, and the same
            pass
        return scorer.scores(pictures, prompts)

    def _scorer(self, config: RunConfig) -> Scorer:
        name = scorer_name(config)
        if name not in self._scorers:
            self._scorers[name] = Scorer.load(name)
        return self._scorers[name]

    def _mean(self, config: RunConfig, base: Sequence[Found]) -> float | None:
        return self._kept(config, [(found.path, found.shot.prompt) for found in base if found.shot.prompt])

    def _reference(self, config: RunConfig, plan: Plan) -> float | None:
        """Of the held-out pictures with their captions; of those of data sets to evaluate on also when their loss is left out."""
        held, e = [p.item for p in plan.evaluation], config.evaluation
        if not held:
            only, found = e.eval_dataset_id, [item for item in plan.catalog.items if item.dataset.dataset_type == "eval"]
            names = [name for name in dict.fromkeys(item.dataset.id for item in found) if only in (None, name)]
            held = [item for name in names for item in [one for one in found if one.dataset.id == name][: e.num_eval_images]]
        return self._kept(config, [(item.path, item.caption) for item in held if item.caption])

    def _kept(self, config: RunConfig, rows: Sequence[tuple[Path, str]]) -> float | None:
        """The mean of pictures that do not change; what was not scored yet is, all at once. One that cannot be read does not count."""
        name, new = scorer_name(config), dict[tuple[str, Path, str], Image.Image]()
        for path, text in dict.fromkeys(rows):
            if (name, path, text) not in self._known:
                with suppress(DataError, OSError):
                    new[name, path, text] = read_rgb(path)
        self._known |= zip(new, self.scores(config, list(new.values()), [text for *_, text in new]), strict=True)
        found = [self._known[name, path, text] for path, text in rows if (name, path, text) in self._known]
        return sum(found) / len(found) if found else None


def scorer_name(config: RunConfig) -> str:
    """Folder or name of the scorer; the playground has its own."""
    name = config.evaluation.pretrained_evaluation_model_name_or_path
    default = name == Evaluation().pretrained_evaluation_model_name_or_path
    return str(playground.SCORER) if default and config.model.model_flavour == "playground" else name
