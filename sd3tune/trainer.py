"""The stepwise object and the one loop that the notebook panel, a plain ``for`` and the command line share."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3tune import certificate, control, keeping
from sd3tune.assembly import begin, check_sizes, checkpointing, plan_digest, rebuild_cache, rules_of, spec_of
from sd3tune.cache import Cache, CacheBuilder
from sd3tune.config.advice import advice
from sd3tune.config.reading import is_live
from sd3tune.config.schema import RunConfig
from sd3tune.control import interrupts_deferred, terminated_as_interrupt
from sd3tune.data.buckets import Placement
from sd3tune.errors import CacheError, CheckpointError, ConfigError, FileError, TrainingError
from sd3tune.files import write_text
from sd3tune.history import History
from sd3tune.manifest import Manifest, describe
from sd3tune.mirror import Mirror
from sd3tune.models import adapters, capabilities, components, encoders, lycoris_adapters, memory
from sd3tune.models.lora_files import save_lora
from sd3tune.models.lora_layouts import Layout
from sd3tune.models.modelspec import modelspec
from sd3tune.models.tokens import truncated
from sd3tune.records import (
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    SegmentRecord,
    StepRecord,
    WaitRecord,
)
from sd3tune.run_folder import PINNED, RunFolder, log_level, open_log, step_of
from sd3tune.training.batches import Batches
from sd3tune.training.engine import Engine
from sd3tune.training.guard import GuardError
from sd3tune.training.optim import require as require_optimizer
from sd3tune.training.prior import Prior
from sd3tune.training.velocity import TransformerVelocity
from sd3tune.validation.evaluate import by_image, evaluation_levels, evaluation_loss, look
from sd3tune.validation.grids import Grid
from sd3tune.validation.validator import Validator, grid_of
from sd3tune.validation.verdict import judged

POLL = 0.2
"""Seconds between two looks at what a waiting run waits for."""

SKIPS_IN_A_ROW = 3
"""After so many refused updates without one that is applied, it is not the pictures."""


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
        self._history = History(self.folder.history)
        self._keeper = keeping.Keeper()
        self._total, self._refused, self._rollbacks = cache.plan.steps, 0, 0
        self.certificate: certificate.Certificate | None = None
        """How the run was resumed, if it was."""
        self._mirror = Mirror(self.folder.path, config.run.mirror_to) if config.run.mirror_to else None
        if folder is None:
            write_text(self.folder.environment, certificate.installed())
            config.save(self.folder.config)
            write_text(self.folder.manifest, json.dumps(self.manifest.as_dict(), indent=1) + "\n")
            self._log.info("run folder %s\n%s%s", self.folder.path, begun + "\n" * bool(begun), self.manifest)

    # --- the loop ----------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Updates done so far."""
        return self.engine.updates

    @property
    def total(self) -> int:
        """Updates of the whole run, as it is set now."""
        return self._total

    @property
    def done(self) -> bool:
        """Whether the run has all its updates."""
        return self.steps_done >= self.total

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
        """Do up to ``n`` updates (all that are left) and yield every record of what falls due on the way.

        Ctrl-C, SIGTERM, the guard and any error come through after the state was saved.
        """
        last = None if n is None else self.steps_done + n
        with terminated_as_interrupt():
            try:
                yield from self._run(last)
            except GeneratorExit:
                raise
            except BaseException as error:
                try:
                    self.secure()
                except (FileError, CheckpointError) as second:
                    error.add_note(f"the state could not be saved either: {second}")
                raise

    def _run(self, last: int | None) -> Iterator[Record]:
        if self.steps_done == 0:
            yield self._tell(NoticeRecord(step=0, text=self.manifest.sentence))
            if self.config.optimizer.guard_policy == "rollback" and not self.folder.checkpoints():
                yield from self._save()
            yield from self._judge(0)
        while self.steps_done < (self.total if last is None else min(last, self.total)):
            if (yield from self._obey()):
                return
            if (yield from self._advance()):
                yield from self._due(self.steps_done)
            yield from self._news()
        if self.done and not self.folder.lora.exists():
            yield from self._finish()

    def _advance(self) -> Generator[Record, None, bool]:
        """One update, or what the guard's policy makes of one that was refused; whether there was one. Raises: GuardError."""
        before = self.steps_done
        try:
            yield self.step()
        except GuardError as error:
            policy = self.config.optimizer.guard_policy
            self._refused += 1
            if policy == "rollback" and self._rollbacks < self.config.optimizer.guard_rollbacks:
                yield from self._roll_back(error)
            elif policy == "skip" and self._refused <= SKIPS_IN_A_ROW:
                self.engine.skip(error.refusal.batch)
                if self.steps_done < before:
                    yield self._branch("guard", self.steps_done)
                yield self._tell(NoticeRecord(step=self.steps_done, text=f"{error.refusal}; left out"))
                yield self._tell(CommandRecord(step=self.steps_done, name="skip", value=sorted(self.engine.skipped)))
            else:
                if self.steps_done < before:
                    self._branch("guard", self.steps_done)
                raise
            return False
        self._refused = 0
        return True

    def _roll_back(self, error: GuardError) -> Iterator[Record]:
        """Go back to a checkpoint with half the learning rate, leaving out what was refused; to an older one if that did not help."""
        self._rollbacks += 1
        self.engine.skip(error.refusal.batch)
        skipped, rate = sorted(self.engine.skipped), self.config.optimizer.learning_rate / 2
        state = self.folder.read_checkpoint(before=(self._refused - 1) // 2)
        self.engine.load_state_dict({**state, "skipped": skipped})
        self.config = self.config.replace(learning_rate=rate)
        self.folder.point_at(self.steps_done)
        yield self._branch("rollback", self.steps_done)
        text = f"{error.refusal}; back to step {self.steps_done} with half the learning rate, {rate:.4g}"
        yield self._tell(NoticeRecord(step=self.steps_done, text=text))
        yield self._tell(CommandRecord(step=self.steps_done, name="set", value={"learning_rate": rate}))
        yield self._tell(CommandRecord(step=self.steps_done, name="skip", value=skipped))

    def _branch(self, why: str, step: int) -> Record:
        """From here on the history goes on from ``step``."""
        parent = self._history.segment
        self._history.segment = 1 + max((line.get("segment", 0) for line in self.folder.read_history()), default=0)
        return self._tell(SegmentRecord(step=step, from_step=step, parent=parent, why=why))

    def _obey(self) -> Generator[Record, None, bool]:
        """Do what the control files ask; whether to stop."""
        for name in control.asked(self.folder.path):
            if name == "PAUSE":
                yield self.note("pause")
                while (self.folder.path / "PAUSE").exists() and not (self.folder.path / "STOP").exists():
                    time.sleep(POLL)
                    yield WaitRecord(step=self.steps_done, why="paused; remove the file PAUSE to go on")
                yield self.note("go_on")
                continue
            control.take(self.folder.path, name)
            yield self.note(name.lower())
            if name == "SAMPLE" and self.config.prompts:
                yield from self.validation()
            elif name != "SAMPLE":
                self.secure()
            if name == "STOP":
                return True
        return False

    def _due(self, step: int) -> Iterator[Record]:
        """Save first, then judge."""
        config = self.config
        if self.done:
            return
        if self._keeper.due(step, interval=config.schedule.checkpoint_step_interval, minutes=config.schedule.checkpoint_minutes):
            yield from self._save()
        every = config.evaluation.eval_steps_interval
        if every and step % every == 0 and self.cache.plan.evaluation:
            yield from self._evaluated()
        every = config.validation.validation_steps
        if every and step % every == 0 and config.prompts:
            yield from self.validation()

    def _evaluated(self) -> Iterator[Record]:
        """Evaluate; keep the state if it is the best so far."""
        record = self.evaluate()
        yield record
        best = keeping.best_of(self.folder.checkpoint_folder)
        if self.config.schedule.checkpoint_keep_best and record.step and (best is None or record.loss < best[1]):
            if self._keeper.saved_step != record.step:
                yield from self._save()
            keeping.mark_best(self.folder.checkpoint_folder, record.step, record.loss)

    def _save(self) -> Iterator[Record]:
        """A checkpoint; on a disk without room, as soon as there is some."""
        needed = self.engine.bytes()
        told = False
        while short := keeping.shortage(self.folder.path, needed, self.config.run.disk_low_threshold):
            if not told:
                yield self._tell(NoticeRecord(step=self.steps_done, text=f"the run waits: {short}; free some, and it goes on by itself"))
            told = True
            time.sleep(POLL)
            yield WaitRecord(step=self.steps_done, why=short)
        yield self.checkpoint()

    def _news(self, *, wait: bool = False) -> Iterator[Record]:
        """What the mirror has to say."""
        for text in self._mirror.news(wait=wait) if self._mirror else ():
            yield self._tell(NoticeRecord(step=self.steps_done, text=text))

    def _judge(self, step: int) -> Iterator[Record]:
        if self.cache.plan.evaluation:
            yield from self._evaluated()
        if self.config.prompts:
            yield from self.validation()

    def _finish(self) -> Iterator[Record]:
        """Save first, then judge."""
        yield from self._save()
        if self.engine.ema:
            self.save(self.folder.lora.with_name("lora-ema.safetensors"), ema=True)
        tensors = self.save(self.folder.lora)
        yield self._tell(CheckpointRecord(step=self.steps_done, path=str(self.folder.lora), tensors=tensors))
        yield from self._judge(self.steps_done)
        self.folder.save_loss_chart()
        if self._mirror:
            self._mirror.copy("the run", [p for p in sorted(self.folder.path.iterdir()) if p.is_file()])
            yield from self._news(wait=True)
            self._mirror.close()

    def _tell(self, record: Record) -> Record:
        """Write a record to the history; those that are rare also to the log, in words."""
        self._history.append(record)
        if not isinstance(record, StepRecord):
            self._log.info("%s", record)
        return record

    # --- what a person may ask between two updates -------------------------------------------------------------------

    def set(self, **settings: Any) -> CommandRecord:
        """Change settings that may change while training; the record says so, or why not."""
        refused = self._objection(settings)
        if not refused:
            try:
                self._apply(settings)
            except ConfigError as error:
                refused = "; ".join(error.problems)
        record = CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)
        self._tell(record)
        return record

    def _objection(self, settings: Mapping[str, Any]) -> str:
        """Why settings cannot be changed now; empty when they can."""
        frozen = [name for name in settings if not is_live(name)]
        if frozen:
            return f"{', '.join(frozen)} cannot change while training"
        steps = settings.get("max_train_steps")
        if isinstance(steps, int) and steps < self.steps_done:
            return f"max_train_steps: {steps} updates is less than the {self.steps_done} that are done"
        missing = self.unread(settings)
        if missing:
            return f"{missing[0]!r} was not read by the text encoders yet; trainer.encode([...]) says what that costs, and does it"
        return ""

    def _apply(self, settings: Mapping[str, Any]) -> None:
        """Raises: ConfigError; nothing is changed then."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        if values.get("max_train_steps") is not None:
            values["num_train_epochs"] = None
        changed = self.config.replace(**values)
        self._check_layers(changed)
        self.config = changed
        if settings.get("max_train_steps") is not None:
            self._total = int(settings["max_train_steps"])
            self.engine.rules = replace(self.engine.rules, total=self._total)

    def unread(self, settings: Mapping[str, Any]) -> list[str]:
        """The prompts among some settings that the text encoders have not read yet."""
        given = settings.get("validation_prompt", ())
        texts = [*([given] if isinstance(given, str) else given), settings.get("validation_negative_prompt", "")]
        missing = []
        for text in texts:
            try:
                self.cache.states(text)
            except CacheError:
                missing.append(text)
        return missing

    def encode(self, prompts: Sequence[str]) -> Iterator[Record]:
        """Let the text encoders read new prompts, on the CPU beside the model; the first record says what that costs."""
        texts = tuple(sorted({*prompts} - {*self.cache.plan.texts}))
        gb = memory.encoder_bytes(self.config, components.compute_dtype(self.config).itemsize) / 1e9
        cost = f"reading {len(texts)} new prompts loads the text encoders into {gb:.1f} GB of the machine's memory, and frees it afterwards"
        yield self._tell(NoticeRecord(step=self.steps_done, text=cost))
        builder = CacheBuilder(replace(self.cache.plan, train=(), evaluation=(), texts=texts), encoders.encoders(self.config, device="cpu"))
        yield from builder

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
            record = evaluation_loss(
                self.engine.velocity, self.cache, sigmas=levels, device=self.device, step=self.steps_done, prior=self.engine.prior
            )  # fmt: skip
        record = judged(record, self.folder.read_history())
        self._tell(record)
        return record

    def losses(self, placements: Sequence[Placement], sigmas: Sequence[float]) -> tuple[float, ...]:
        """The loss of pictures with fixed noise, each a mean over noise levels; group after group of one size."""
        with self._evaluating():
            seen = look(self.engine.velocity, self.cache, placements, sigmas=sigmas, device=self.device)
            return by_image([group.losses_B for group in seen])

    def notice(self, text: str) -> Record:
        """Write something that a person should read to the history."""
        return self._tell(NoticeRecord(step=self.steps_done, text=text))

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
        self._require_finite()
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
        return {
            **self.engine.state_dict(), "live": live, "plan": plan_digest(self.cache.plan), "steps": self.total,
            "rollbacks": self._rollbacks, "versions": certificate.versions(),
        }  # fmt: skip

    def checkpoint(self) -> CheckpointRecord:
        """Write a checkpoint into the run folder. Raises: FileError, CheckpointError; older checkpoints are then untouched."""
        self._require_finite()
        state = self.state_dict()
        tensors = {name: state.pop(name) for name in ("adapter", "optimizer")}
        path, count = self.folder.write_checkpoint(
            self.steps_done, tensors, {**state, "segment": self._history.segment}, self.config.schedule.checkpoints_total_limit
        )
        record = CheckpointRecord(step=self.steps_done, path=str(path), tensors=count)
        self._tell(record)
        self._history.sync()
        self._keeper.saved(self.steps_done)
        if self._mirror:
            facts = [self.folder.config, self.folder.manifest, self.folder.environment, self.folder.history]
            written = [*sorted(path.glob("*.safetensors")), path / "state.json", self.folder.checkpoint_folder / "latest.json"]
            self._mirror.copy(f"step {self.steps_done}", [*facts, *written], keep=[p.name for p in self.folder.checkpoints()])
        return record

    def secure(self) -> Path:
        """The checkpoint of the state as it is; writes one unless there is one. Raises: FileError, CheckpointError."""
        path = self.folder.checkpoint_folder / f"step-{self.steps_done:06d}"
        if self._keeper.saved_step == self.steps_done or not self.engine.whole:
            return path
        return Path(self.checkpoint().path)

    def pin(self) -> Path:
        """A checkpoint of now that is never dropped."""
        path = self.secure()
        write_text(path / PINNED, "kept by hand\n")
        return path

    def _require_finite(self) -> None:
        wrong = self.engine.not_finite()
        if wrong:
            raise CheckpointError(f"{wrong} of the adapter is not finite, so nothing was written; resume from the newest checkpoint")

    @classmethod
    def resume(cls, run_folder: str | Path, cache: Cache | None = None, **changes: Any) -> Trainer:
        """The run of a folder (or of one of its checkpoints), exactly where its newest checkpoint left it; prints a certificate.

        ``changes`` are live settings, such as a learning rate or a length, and are written to the history.
        Raises: CheckpointError when there is none, or when pictures or captions are no longer the same; ConfigError.
        """
        path = Path(run_folder).absolute()
        step = step_of(path) if path.parent.name == "checkpoints" else None
        folder = RunFolder(path if step is None else path.parent.parent)
        if not folder.config.exists():
            raise CheckpointError(f"{folder.path}: not a run folder (there is no config.yaml)")
        state = folder.read_checkpoint(step)
        config = RunConfig.load(folder.config)
        cache = cache or rebuild_cache(folder, config)
        if state["plan"] != plan_digest(cache.plan):
            raise CheckpointError(
                f"{folder.path}: the pictures, captions or batch settings are not those of the run; put them back to resume it, "
                "or start a new run"
            )
        live = {k: tuple(v) if isinstance(v, list) else v for k, v in state["live"].items()}
        if live.get("max_train_steps") is not None:
            live["num_train_epochs"] = None
        trainer = cls(config.replace(**live), cache, folder=folder)
        trainer._restore(state, changes)
        print(trainer.certificate)  # noqa: T201 (a resumed run says so itself, in a notebook too)
        return trainer

    def _restore(self, state: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        """Take a checkpoint's state, then a person's changes. Raises: ConfigError."""
        self.engine.load_state_dict(state)
        self._total, self._rollbacks = int(state.get("steps", self.total)), int(state.get("rollbacks", 0))
        self.engine.rules = replace(self.engine.rules, total=self._total)
        self._history.segment = int(state["segment"])
        self._keeper.saved(self.steps_done)
        self._branch("resume", self.steps_done)
        if changes and (refused := self.set(**changes).refused):
            raise ConfigError([refused], "resume")
        self.certificate = certificate.certify(
            state, self.cache.plan, steps=self.total, learning_rate=self.engine.rate(self.config.optimizer.learning_rate), changes=changes
        )
        self._tell(NoticeRecord(step=self.steps_done, text=str(self.certificate)))

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
