"""What is said about an adapter on the way: the loss on held-out pictures, and pictures of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd3tune.cache import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.data.buckets import Placement
from sd3tune.data.timeline import passes
from sd3tune.errors import ModelError, TrainingError
from sd3tune.records import EvalRecord, NoticeRecord, Record
from sd3tune.run_folder import RunFolder
from sd3tune.training.engine import Engine
from sd3tune.training.prior import Prior
from sd3tune.validation.evaluate import Rows, by_image, evaluation_levels, evaluation_loss, losses_of, mean
from sd3tune.validation.grids import Grid
from sd3tune.validation.history_grid import newest_grid, write_grid
from sd3tune.validation.painter import Event, seconds_of_a_forward
from sd3tune.validation.pictures import Kind, Places, of_shots, source_of
from sd3tune.validation.scoring import Scoring
from sd3tune.validation.shots import Shot, by_strength, shots_of
from sd3tune.validation.validator import at_strength, base_rows, check, draw, painting

if TYPE_CHECKING:
    from PIL.Image import Image


class Judge:
    """Looks at the adapter that an engine trains and changes nothing of it."""

    def __init__(self, engine: Engine, transformer: Any, network: Any, cache: Cache, device: torch.device) -> None:
        self._engine, self._transformer, self._network, self._cache, self._device = engine, transformer, network, cache, device
        self._scoring = Scoring(device)
        self._base: dict[tuple[Any, ...], Rows] = {}

    def check(self, config: RunConfig) -> None:
        """Raises: ConfigError for skip-layer guidance on a block that this model does not have, or attention that does not work here."""
        check(config, self._transformer, self._device)

    def evaluation_due(self, config: RunConfig, step: int) -> bool:
        """Whether an interval of updates or of epochs ends with update ``step``: a function of these numbers and the plan alone."""
        e = config.evaluation
        return bool(self._cache.plan.evaluation) and self._ends(step, e.eval_steps_interval, e.eval_epoch_interval)

    def drawing_due(self, config: RunConfig, step: int) -> bool:
        """The same for pictures."""
        v = config.validation
        return bool(config.prompts) and self._ends(step, v.validation_steps, v.validation_epoch_interval)

    def _ends(self, step: int, every: int, share: float | None) -> bool:
        plan = self._cache.plan
        ends = share is not None and passes(plan.phases, (step - 1) * plan.accumulation, step * plan.accumulation, share)
        return ends or bool(every and step % every == 0)

    def evaluate(self, config: RunConfig) -> EvalRecord:
        """The loss on the held-out pictures, with fixed noise and noise levels. Raises: TrainingError when there are none."""
        engine, plan = self._engine, self._cache.plan
        if not plan.evaluation:
            raise TrainingError(
                "there are no held-out pictures; add a data set with dataset_type: eval, or hold out a share of one with eval_share: 0.1"
            )
        levels = evaluation_levels(engine.rules, plan.evaluation, config.evaluation.eval_timesteps)
        with self._evaluating():
            record = evaluation_loss(
                engine.velocity, self._cache, sigmas=levels, device=self._device, step=engine.updates, prior=engine.prior,
                base=self._base_losses(plan.evaluation, levels), pooled=config.evaluation.eval_dataset_pooling,
            )  # fmt: skip
        if not engine.ema:
            return record
        with self._evaluating("ema"):
            rows = losses_of(engine.velocity, self._cache, plan.evaluation, sigmas=levels, device=self._device)
        return replace(record, ema_loss=mean(by_image(rows)))

    def _base_losses(self, placements: Sequence[Placement], sigmas: Sequence[float]) -> Rows | None:
        """The base model's losses, measured once for the same pictures and levels; nothing without a base to ask."""
        prior = self._engine.prior
        if prior is None:
            return None
        key = (*sigmas, *((p.item.id, p.geometry) for p in placements))
        if key not in self._base:
            self._base[key] = losses_of(prior, self._cache, placements, sigmas=sigmas, device=self._device)
        return self._base[key]

    def losses(self, placements: Sequence[Placement], sigmas: Sequence[float]) -> tuple[float, ...]:
        """The loss of pictures with fixed noise, each a mean over noise levels; group after group of one size."""
        with self._evaluating():
            return by_image(losses_of(self._engine.velocity, self._cache, placements, sigmas=sigmas, device=self._device))

    def draw(self, config: RunConfig, folder: RunFolder) -> Iterator[Record]:
        """Draw what is to be drawn: the base model's pictures once, then those of the adapter, its running average, or both.

        One record per sampler step and per picture. The grid is then on disk.
        """
        shots, device, step = shots_of(config), str(self._device), self._engine.updates
        source = source_of(config, self._cache, device, "base", 0)
        wanted: list[Shot] = []
        for found in base_rows(shots, source, folder):
            if isinstance(found, Shot):
                wanted.append(found)
            else:
                yield found
        changed = bool(step) or config.adapter.init_lora is not None
        if wanted or changed:
            with painting(config, self._transformer, self._cache.text, self._device) as painter:
                if wanted:
                    with self._evaluating("base"):
                        yield from draw(painter, wanted, source, Places(folder, 0, "base"))
                for kind in self._kinds(config) if changed else ():
                    source = replace(source, kind=kind, step=step, adapter=folder.keep_adapter(self._weights(kind)))
                    place = Places(folder, step, kind)
                    for strength, alike in by_strength(shots):
                        with self._evaluating(kind, strength):
                            yield from draw(painter, alike, source, place)
        folder.drop_adapters()
        write_grid(config, folder, self._cache.plan, step)
        if config.evaluation.evaluation_type == "clip":
            yield from self._scored(config, folder, shots, self._kinds(config) if changed else ("base",))

    def _scored(self, config: RunConfig, folder: RunFolder, shots: Sequence[Shot], kinds: Sequence[Kind]) -> Iterator[Record]:
        """The scores of the pictures of now; a scorer that cannot be loaded is told, and training goes on."""
        step, base = self._engine.updates, of_shots(folder, 0, "base", [shot.base for shot in shots])
        for kind in kinds:
            rows = base if kind == "base" else of_shots(folder, step, kind, shots)
            try:
                record = self._scoring.of_drawn(config, kind, rows, base, self._cache.plan, step)
            except (ModelError, RuntimeError) as error:
                yield NoticeRecord(step=step, text=f"pictures are not scored: {error}", warning=True)
                return
            if record is not None:
                yield record

    def score(self, config: RunConfig, picture: Image, prompt: str) -> float | None:
        """How well a picture follows its prompt, 0 to 1; nothing unless pictures are scored. Raises: ModelError."""
        return self._scoring.scores(config, [picture], [prompt])[0] if config.evaluation.evaluation_type == "clip" and prompt else None

    def painted(self, config: RunConfig, shots: Sequence[Shot]) -> Iterator[Event]:
        """Draw shots with the adapter as it is, into no folder."""
        with painting(config, self._transformer, self._cache.text, self._device) as painter:
            for strength, alike in by_strength(shots):
                with self._evaluating("adapter", strength):
                    yield from painter.draw(alike)

    def seconds_of_a_forward(self, config: RunConfig, shot: Shot) -> float | None:
        """How long a picture's pass through the model takes now; nothing if it fails."""
        with painting(config, self._transformer, self._cache.text, self._device) as painter, self._evaluating():
            return seconds_of_a_forward(painter, [shot])

    def _kinds(self, config: RunConfig) -> tuple[Kind, ...]:
        """Whose pictures are drawn beside the base model's."""
        if not self._engine.ema or config.validation.ema_validation == "none":
            return ("adapter",)
        return ("ema",) if config.validation.ema_validation == "ema_only" else ("adapter", "ema")

    def _weights(self, kind: Kind) -> Mapping[str, Tensor]:
        return self._engine.ema if kind == "ema" else self._engine.result()

    def grid(self, config: RunConfig, folder: RunFolder) -> Grid:
        """The newest pictures under the base model's, over the real ones."""
        return newest_grid(config, folder, self._cache.plan, self._engine.updates)

    @contextmanager
    def _evaluating(self, kind: Kind = "adapter", strength: float = 1.0) -> Iterator[None]:
        """The model in evaluation mode (no adapter dropout), without the adapter or with a share of its change, for the block."""
        models = [self._transformer, *([self._network] if self._network is not None else [])]
        training = [model.training for model in models]
        for model in models:
            model.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(self._engine.judged(ema=kind == "ema"))
                if kind == "base":
                    stack.enter_context(Prior(self._engine.velocity, self._transformer, self._network).base())
                else:
                    stack.enter_context(at_strength(self._transformer, self._network, strength))
                yield
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)
