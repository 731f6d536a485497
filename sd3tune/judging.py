"""What is said about an adapter on the way: the loss on held-out pictures, and pictures of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sd3tune.cache import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.data.buckets import Placement
from sd3tune.data.timeline import passes
from sd3tune.errors import ConfigError, TrainingError
from sd3tune.records import EvalRecord, Record
from sd3tune.run_folder import RunFolder
from sd3tune.training.engine import Engine
from sd3tune.validation.evaluate import Rows, by_image, evaluation_levels, evaluation_loss, losses_of, mean
from sd3tune.validation.grids import Grid
from sd3tune.validation.validator import Validator, newest_grid


class Judge:
    """Looks at the adapter that an engine trains and changes nothing of it."""

    def __init__(self, engine: Engine, transformer: Any, network: Any, cache: Cache, device: torch.device) -> None:
        self._engine, self._transformer, self._network, self._cache, self._device = engine, transformer, network, cache, device
        self._validator = Validator(transformer, cache, device)
        self._base: dict[tuple[Any, ...], Rows] = {}

    def check_layers(self, config: RunConfig) -> None:
        """Raises: ConfigError when skip-layer guidance names a block that this model does not have."""
        depth = self._transformer.config.num_layers
        wrong = [n for n in config.validation.validation_guidance_skip_layers or () if n >= depth]
        if wrong:
            raise ConfigError([f"validation_guidance_skip_layers: {wrong} is beyond this model's blocks, 0 to {depth - 1}"])

    def evaluation_due(self, config: RunConfig, step: int) -> bool:
        """Whether an interval of updates or of epochs ends with update ``step``: a function of these numbers and the plan alone."""
        plan, every, share = self._cache.plan, config.evaluation.eval_steps_interval, config.evaluation.eval_epoch_interval
        if not plan.evaluation:
            return False
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
        with self._evaluating(ema=True):
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
        """Draw the validation prompts; one record per sampler step and per picture. The grid is then on disk."""
        with self._evaluating(config.validation.validation_lycoris_strength):
            yield from self._validator.draw(config, folder, self._engine.updates)
        self.grid(config, folder).save(folder.grid)

    def grid(self, config: RunConfig, folder: RunFolder) -> Grid:
        """The newest pictures under the base model's, over the real ones."""
        return newest_grid(config, folder, self._cache, self._engine.updates)

    @contextmanager
    def _evaluating(self, strength: float = 1.0, *, ema: bool = False) -> Iterator[None]:
        """The model in evaluation mode (no adapter dropout), with a share of a LyCORIS adapter's change, for the duration of the block;
        with ``ema`` it has the running average of the weights."""
        models = [self._transformer, *([self._network] if self._network is not None else [])]
        layers = [] if self._network is None or strength == 1 else self._network.loras
        before = [layer.multiplier for layer in layers]
        for model in models:
            model.eval()
        for layer in layers:
            layer.multiplier = strength * layer.multiplier
        try:
            with self._engine.judged(ema=ema):
                yield
        finally:
            for model in models:
                model.train()
            for layer, multiplier in zip(layers, before, strict=True):
                layer.multiplier = multiplier
