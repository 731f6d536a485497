"""The stepwise object and the one loop that the notebook panel, a plain ``for`` and the command line share."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3tune.assembly import begin, check_sizes, checkpointing, plan_digest, rebuild_cache, rules_of, spec_of
from sd3tune.cache import Cache
from sd3tune.config.advice import advice
from sd3tune.config.reading import is_live
from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError, ConfigError, TrainingError
from sd3tune.files import write_text
from sd3tune.manifest import Manifest, describe
from sd3tune.models import adapters, capabilities, components, lycoris_adapters
from sd3tune.models.lora_files import save_lora
from sd3tune.models.lora_layouts import Layout
from sd3tune.models.modelspec import modelspec
from sd3tune.models.tokens import truncated
from sd3tune.records import CheckpointRecord, CommandRecord, EvalRecord, NoticeRecord, PreviewRecord, Record, SegmentRecord, StepRecord
from sd3tune.run_folder import History, RunFolder, log_level, open_log
from sd3tune.training.batches import Batches
from sd3tune.training.engine import Engine, TransformerVelocity
from sd3tune.training.optim import require as require_optimizer
from sd3tune.training.prior import Prior
from sd3tune.validation.evaluate import evaluation_levels, evaluation_loss
from sd3tune.validation.grids import Grid
from sd3tune.validation.validator import Validator, grid_of


class Trainer:
    """Advance an adapter one update at a time: ``step``, ``run``, ``validate``, ``save``, ``resume``.

    A checkpoint is adapter, optimizer moments, number of updates and live settings; all else is a function of
    (config, cache, seed, k). Raises: ConfigError, ModelError, CacheError, FileError.
    """

    def __init__(self, config: RunConfig, cache: Cache, *, folder: RunFolder | None = None) -> None:
        log_level()
        self.config, self.cache = config, cache
        self.device = components.pick_device()
        capabilities.require(config)
        require_optimizer(config.optimizer.optimizer, self.device)
        self.transformer = components.load_transformer(config, self.device)
        if checkpointing(config, self.device):
            self.transformer.enable_gradient_checkpointing()
        self._check_layers(config)
        check_sizes(cache.plan, self.transformer.config)
        self.network: Any = None
        if config.adapter.lora_type == "lycoris":
            lycoris = lycoris_adapters.read_config(config.adapter.lycoris_config)
            self.network, weights = lycoris_adapters.add_lycoris(self.transformer, lycoris, seed=config.schedule.seed)
        else:
            weights = adapters.add_lora(self.transformer, spec_of(config), seed=config.schedule.seed)
        begun = begin(config, weights) if folder is None else ""
        batches = Batches(
            cache, seed=config.schedule.seed, caption_dropout=config.data.caption_dropout_probability, latent_draw=config.data.latent_draw,
            masked_probability=config.objective.masked_loss_probability,
        )  # fmt: skip
        velocity = TransformerVelocity(self.transformer, components.compute_dtype(config))
        self.engine = Engine(
            velocity, weights, batches, rules_of(config, cache.plan), prior=Prior(velocity, self.transformer, self.network)
        )  # fmt: skip
        self._validator = Validator(self.transformer, cache, self.device)
        cut_off = tuple(truncated(config, sorted({c for p in cache.plan.train for c in p.item.captions})))
        self.manifest: Manifest = describe(
            cache,
            self.transformer,
            weights,
            self.engine.rules,
            truncated=cut_off,
            seconds_per_update=self.engine.seconds_per_update(),
            advice=tuple(map(str, advice(config))),
        )
        self.folder = folder or RunFolder.create(Path(config.run.output_dir).absolute())
        self._log = open_log(self.folder)
        self._history = History(self.folder)
        if folder is None:
            config.save(self.folder.config)
            write_text(self.folder.manifest, json.dumps(self.manifest.as_dict(), indent=1) + "\n")
            self._log.info("run folder %s\n%s%s", self.folder.path, begun + "\n" * bool(begun), self.manifest)

    # --- the loop ----------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Updates done so far."""
        return self.engine.updates

    @property
    def done(self) -> bool:
        """Whether the run has all its updates."""
        return self.steps_done >= self.cache.plan.steps

    def __iter__(self) -> Iterator[Record]:
        return self.run()

    def step(self) -> StepRecord:
        """One optimizer update and nothing else. Raises: TrainingError."""
        with interrupts_deferred():
            optimizer = self.config.optimizer
            record = self.engine.update(peak_learning_rate=optimizer.learning_rate, max_grad_norm=optimizer.max_grad_norm)
            self._tell(record)
        return record

    def run(self, n: int | None = None) -> Iterator[Record]:
        """Do up to ``n`` updates (all that are left) and yield every record of what falls due on the way."""
        last = self.cache.plan.steps if n is None else min(self.cache.plan.steps, self.steps_done + n)
        if self.steps_done == 0:
            yield self._tell(NoticeRecord(step=0, text=self.manifest.sentence))
            yield from self._judge(0)
        while self.steps_done < last:
            yield self.step()
            yield from self._due(self.steps_done)
        if self.done and not self.folder.lora.exists():
            yield from self._finish()

    def _due(self, step: int) -> Iterator[Record]:
        config = self.config
        if self.done:
            return
        if step % config.schedule.checkpoint_step_interval == 0:
            yield self.checkpoint()
        every = config.evaluation.eval_steps_interval
        if every and step % every == 0 and self.cache.plan.evaluation:
            yield self.evaluate()
        every = config.validation.validation_steps
        if every and step % every == 0 and config.prompts:
            yield from self.validation()

    def _judge(self, step: int) -> Iterator[Record]:
        if self.cache.plan.evaluation:
            yield self.evaluate()
        if self.config.prompts:
            yield from self.validation()

    def _finish(self) -> Iterator[Record]:
        """Save first, then judge."""
        yield self.checkpoint()
        if self.engine.ema:
            self.save(self.folder.lora.with_name("lora-ema.safetensors"), ema=True)
        tensors = self.save(self.folder.lora)
        yield self._tell(CheckpointRecord(step=self.steps_done, path=str(self.folder.lora), tensors=tensors))
        yield from self._judge(self.steps_done)
        self.folder.save_loss_chart()

    def _tell(self, record: Record) -> Record:
        """Write a record to the history; those that are rare also to the log, in words."""
        self._history.append(record)
        if not isinstance(record, StepRecord):
            self._log.info("%s", record)
        return record

    # --- what a person may ask between two updates -------------------------------------------------------------------

    def set(self, **settings: Any) -> CommandRecord:
        """Change settings that may change while training; the record says so, or why not."""
        frozen = [name for name in settings if not is_live(name)]
        refused = ""
        if frozen:
            refused = f"{', '.join(frozen)} cannot change while training"
        else:
            try:
                changed = self.config.replace(**settings)
                self._check_layers(changed)
                self.config = changed
            except ConfigError as error:
                refused = "; ".join(error.problems)
        record = CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)
        self._tell(record)
        return record

    def note(self, name: str) -> CommandRecord:
        """Write a command that changes nothing here (pause, go on, stop) to the history."""
        record = CommandRecord(step=self.steps_done, name=name)
        self._tell(record)
        return record

    def evaluate(self) -> EvalRecord:
        """The loss on the held-out pictures, with fixed noise and noise levels. Raises: TrainingError when there are none."""
        if not self.cache.plan.evaluation:
            raise TrainingError("there are no held-out pictures; add a data set with dataset_type: eval")
        levels = evaluation_levels(self.engine.rules, self.cache.plan.evaluation, self.config.evaluation.eval_timesteps)
        with self._evaluating():
            record = evaluation_loss(self.engine.velocity, self.cache, sigmas=levels, device=self.device, step=self.steps_done)
        self._tell(record)
        return record

    def validation(self) -> Iterator[Record]:
        """Draw the validation prompts; one record per sampler step and per picture. The grid is then on disk."""
        with self._evaluating(self.config.validation.validation_lycoris_strength):
            for record in self._validator.draw(self.config, self.folder, self.steps_done):
                yield record if isinstance(record, PreviewRecord) else self._tell(record)
        self.grid().save(self.folder.grid)

    def validate(self) -> Grid:
        """Draw the validation prompts now and show them above the base model's. Raises: TrainingError without prompts."""
        if not self.config.prompts:
            raise TrainingError("there is nothing to draw; set validation_prompt")
        for _ in self.validation():
            pass
        return self.grid()

    def grid(self) -> Grid:
        """The newest pictures under the base model's, over the real ones."""
        drawn = sorted(int(p.name.removeprefix("step-")) for p in self.folder.images(0).parent.glob("step-*"))
        drawn = [step for step in drawn if step <= self.steps_done]
        return grid_of(self.config, self.folder, self.cache, sorted({*drawn[:1], *drawn[-1:]}))

    # --- saving and resuming -----------------------------------------------------------------------------------------

    def save(self, path: str | Path, layout: Layout = "diffusers", *, ema: bool = False) -> int:
        """Write the adapter (or its running average), for diffusers or for ComfyUI, read it back, compare. Returns the number of tensors.

        Raises: CheckpointError when the file is not what it should be; FileError.
        """
        weights = self.engine.ema if ema else self.engine.result()
        notes = {"sd3tune.step": str(self.steps_done), **modelspec(self.config, self.cache.plan, Path(path).stem)}
        if self.network is not None:
            lycoris = lycoris_adapters.read_config(self.config.adapter.lycoris_config)
            verified = lycoris_adapters.save_lycoris(Path(path), self.network, weights, notes, lycoris)
        else:
            skeleton = components.skeleton(self.config)
            verified = save_lora(Path(path), weights, spec_of(self.config), skeleton=skeleton, notes=notes, layout=layout)
        self._log.info("%s: %s", path, verified)
        return verified.tensors

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors of adapter and optimizer, updates done, live settings."""
        live = {name: value for name, value in self.config.leaves().items() if is_live(name)}
        return {**self.engine.state_dict(), "live": live, "plan": plan_digest(self.cache.plan)}

    def checkpoint(self) -> CheckpointRecord:
        """Write a checkpoint into the run folder. Raises: FileError; older checkpoints are then untouched."""
        state = self.state_dict()
        tensors = {name: state.pop(name) for name in ("adapter", "optimizer")}
        path, count = self.folder.write_checkpoint(
            self.steps_done, tensors, {**state, "segment": self._history.segment}, self.config.schedule.checkpoints_total_limit
        )
        record = CheckpointRecord(step=self.steps_done, path=str(path), tensors=count)
        self._tell(record)
        self._history.sync()
        return record

    @classmethod
    def resume(cls, run_folder: str | Path, cache: Cache | None = None) -> Trainer:
        """The run of a folder, exactly where its newest checkpoint left it.

        Raises: CheckpointError when there is none, or when pictures or captions are no longer the same.
        """
        folder = RunFolder(Path(run_folder).absolute())
        if not folder.config.exists():
            raise CheckpointError(f"{folder.path}: not a run folder (there is no config.yaml)")
        state = folder.read_checkpoint()
        config = RunConfig.load(folder.config)
        cache = cache or rebuild_cache(folder, config)
        if state["plan"] != plan_digest(cache.plan):
            raise CheckpointError(
                f"{folder.path}: the pictures, captions or batch settings are not those of the run; put them back to resume it, "
                "or start a new run"
            )
        live = {k: tuple(v) if isinstance(v, list) else v for k, v in state["live"].items()}
        trainer = cls(config.replace(**live), cache, folder=folder)
        trainer.engine.load_state_dict(state)
        segments = [line.get("segment", 0) for line in folder.read_history()]
        trainer._history.segment = max(segments, default=0) + 1
        trainer._tell(SegmentRecord(step=trainer.steps_done, from_step=trainer.steps_done, parent=int(state["segment"]), why="resume"))
        return trainer

    def _check_layers(self, config: RunConfig) -> None:
        depth = self.transformer.config.num_layers
        wrong = [n for n in config.validation.validation_guidance_skip_layers or () if n >= depth]
        if wrong:
            raise ConfigError([f"validation_guidance_skip_layers: {wrong} is beyond this model's blocks, 0 to {depth - 1}"])

    @contextmanager
    def _evaluating(self, strength: float = 1.0) -> Iterator[None]:
        """The model in evaluation mode (no adapter dropout), with a share of a LyCORIS adapter's change, for the duration of the block."""
        models = [self.transformer, *([self.network] if self.network is not None else [])]
        layers = [] if self.network is None or strength == 1 else self.network.loras
        before = [layer.multiplier for layer in layers]
        for model in models:
            model.eval()
        for layer in layers:
            layer.multiplier = strength * layer.multiplier
        try:
            with self.engine.judged():
                yield
        finally:
            for model in models:
                model.train()
            for layer, multiplier in zip(layers, before, strict=True):
                layer.multiplier = multiplier


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C (or a notebook's stop button) take effect at the end of the block instead of in its middle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
