"""The stepwise object and the one loop that the notebook panel, a plain ``for`` and the command line share."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sd3tune import certificate, control, keeping, resuming
from sd3tune.assembly import plan_digest, write_adapter
from sd3tune.building import build, manifest_of, marks_of
from sd3tune.cache import Cache, CacheBuilder
from sd3tune.charts import save_losses
from sd3tune.config.advice import in_short
from sd3tune.config.reading import HOW, frozen, is_live, mapping_of, steered
from sd3tune.config.schema import RunConfig
from sd3tune.control import interrupts_deferred, signals_ignored, terminated_as_interrupt
from sd3tune.data.buckets import Placement
from sd3tune.errors import CacheError, CheckpointError, ConfigError, FileError, ModelError, TrainingError
from sd3tune.files import digest
from sd3tune.history import changed_since
from sd3tune.judging import Judge
from sd3tune.manifest import Manifest
from sd3tune.models import components, encoders, memory
from sd3tune.models.lora_layouts import Layout
from sd3tune.processes import Processes, join
from sd3tune.records import (
    CheckpointRecord,
    CommandRecord,
    EvalRecord,
    FailureRecord,
    NoticeRecord,
    PreviewRecord,
    Record,
    StepRecord,
    WaitRecord,
)
from sd3tune.reporting import Reporters, require
from sd3tune.run_folder import RunFolder, log_level
from sd3tune.saving import Saver
from sd3tune.secrets import without_secrets
from sd3tune.training.guard import GuardError, Refusal
from sd3tune.training.peak import total_memory
from sd3tune.validation.grids import Grid
from sd3tune.validation.painter import Event
from sd3tune.validation.shots import Shot, in_words
from sd3tune.validation.verdict import judged

if TYPE_CHECKING:
    from PIL.Image import Image

R = TypeVar("R", bound=Record)

POLL = 0.2
"""Seconds between two looks at what a waiting run waits for."""

SKIPS_IN_A_ROW = 3
"""After so many refused updates without getting beyond them, it is not the pictures."""


class Order(NamedTuple):
    """What the main process tells the others before an update: settings to change, and whether to stop."""

    settings: tuple[dict[str, Any], ...] = ()
    stop: bool = False


class Trainer:
    """Advance an adapter one update at a time: ``step``, ``run``, ``validate``, ``save``, ``resume``.

    A checkpoint is adapter, optimizer moments, number of updates and live settings; all else is a function of
    (config, cache, seed, k). Of several processes each holds a trainer; what is written, drawn and asked is the main one's.
    Raises: ConfigError, ModelError, CacheError, FileError.
    """

    def __init__(self, config: RunConfig, cache: Cache, *, folder: RunFolder | None = None, processes: Processes | None = None) -> None:
        log_level()
        self.processes = processes or join(config.run.num_processes or 1)
        self.config, self.cache = config, cache
        self._require_the_same()
        notes = self.processes.by_main(lambda: require(config))
        parts = build(config, cache, self.processes, fresh=folder is None)
        self.device, self.transformer, self.network, self.engine = parts.device, parts.transformer, parts.network, parts.engine
        self._judge = Judge(self.engine, self.transformer, self.network, cache, self.device)
        self._judge.check(config)
        self.manifest: Manifest = manifest_of(config, cache, parts)
        self._made_of = marks_of(config, cache)
        self.folder = folder or self.processes.by_main(lambda: RunFolder.create(Path(config.run.output_dir).absolute()))
        self._saver = Saver(self.folder, config, main=self.processes.main)
        self._total, self._refused, self._refused_at, self._rollbacks = cache.plan.steps, 0, 0, 0
        self._orders: list[dict[str, Any]] = []
        self._stopping, self._awaited = False, False
        self.certificate: certificate.Certificate | None = None
        """How the run was resumed, if it was."""
        self._reporters = Reporters.of(config, self.folder, cache.plan, notes) if self.processes.main else Reporters(self.folder)
        if folder is None:
            self._saver.begin(config, self.manifest, parts.said)

    def _require_the_same(self) -> None:
        """Raises: TrainingError when this process has another plan or configuration than the main one."""
        if self.processes.count == 1:
            return
        mark = digest(plan_digest(self.cache.plan), json.dumps(self.config.leaves(), default=str))
        if self.processes.told(mark) != mark:
            raise TrainingError(
                f"process {self.processes.rank} has other pictures or settings than the main one; look at what its cache said of pictures "
                "that cannot be read, and start all processes with the same files"
            )

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
    def noise_levels(self) -> tuple[int, ...]:
        """How many of the noise levels that are drawn lie in each tenth of 0 to 1."""
        return self.manifest.levels

    @property
    def total_memory_bytes(self) -> int:
        """Of the GPU; 0 where there is none."""
        return total_memory(self.device)

    own = True
    """Whether the run ends with this process (`following.Followed` stands for one that does not)."""
    held = False
    """A pause by a file is a `WaitRecord` of this run; of one that is only followed it is a state."""

    @property
    def done(self) -> bool:
        """Whether the run has all its updates."""
        return self.steps_done >= self.total

    def __iter__(self) -> Iterator[Record]:
        return self.run()

    def step(self) -> StepRecord:
        """One optimizer update and nothing else. Raises: TrainingError."""
        with interrupts_deferred() if self.processes.main else nullcontext():
            optimizer = self.config.optimizer
            record = self.engine.update(peak_learning_rate=optimizer.learning_rate, max_grad_norm=optimizer.max_grad_norm)
            self._awaited = True
            self._tell(record)
        return record

    def run(self, n: int | None = None) -> Generator[Record, None, None]:
        """Do up to ``n`` updates (all that are left) and yield every record of what falls due on the way.

        Ctrl-C, SIGTERM, the guard and any error come through after the state was saved. Of several processes the main one decides
        how far it goes, and the others follow.
        """
        last = None if n is None else self.steps_done + n
        with terminated_as_interrupt() if self.processes.main else signals_ignored(), self._saver.holding():
            try:
                yield from self._saver.beating(self._run(last)) if self.processes.main else self._follow()
            except GeneratorExit:
                self._part()
                raise
            except BaseException as error:
                self._reporters.failed(self.steps_done, error)
                try:
                    self.secure()
                except (FileError, CheckpointError, TrainingError) as second:
                    error.add_note(f"the state could not be saved either: {second}")
                finally:
                    self._dismiss()
                self._report(error)
                raise

    def _run(self, last: int | None) -> Iterator[Record]:
        self._awaited = True
        if self.steps_done == 0:
            yield self._tell(NoticeRecord(step=0, text=self.manifest.sentence))
            if self.config.optimizer.guard_policy == "rollback" and not self.folder.checkpoints():
                yield from self._save()
            yield from self._both(draw=self.config.validation.validation_on_startup)
        while self.steps_done < (self.total if last is None else min(last, self.total)):
            if (yield from self._obey()):
                yield from map(self._tell, self._reporters.report(self.steps_done))
                yield from self.parting()
                break
            if (yield from self._advance()):
                yield from self._due(self.steps_done)
            yield from self._news(self._saver.news())
        if self.done and not self._saver.finished(self.steps_done):
            yield from self._finish()
        self._order(stop=True)

    def _follow(self) -> Iterator[Record]:
        """Do in another process what the main one says."""
        while True:
            order = self.processes.told(Order())
            for settings in order.settings:
                self._apply(settings)
            if order.stop:
                return
            yield from self._advance()

    def _order(self, *, stop: bool = False) -> None:
        """Tell the other processes what was asked since the last order."""
        with interrupts_deferred():
            order = Order(tuple(self._orders), stop)
            self._orders.clear()
            self._awaited = False
            self.processes.told(order)

    def _report(self, error: BaseException) -> None:
        """Write down what ended a run, and its report, unless its folder is another process's by now."""
        if self.processes.main and self._saver.mine:
            if not isinstance(error, KeyboardInterrupt):
                words = without_secrets(f"{type(error).__name__}: {error}".partition("\n")[0])
                with suppress(FileError):
                    self._saver.tell(FailureRecord(step=self.steps_done, text=words))
            for said in self._reporters.report(self.steps_done):
                error.add_note(said.text)

    def _dismiss(self) -> None:
        """End the other processes if they wait for an order; in the middle of an update they notice by themselves."""
        if self.processes.main and self._awaited:
            with suppress(TrainingError):
                self._order(stop=True)

    def _part(self) -> None:
        """Whoever ran this broke off: the others must do the same. Raises: TrainingError in a process that does so alone."""
        self._dismiss()
        if not self.processes.main and not self.processes.told(Order()).stop:
            raise TrainingError(f"process {self.processes.rank} left the run while the main one goes on; end them at the same update")

    def _update(self) -> StepRecord:
        """One update of all processes: the order for it and the update itself, with nothing in between."""
        if not self.processes.main:
            return self.step()
        with interrupts_deferred():
            self._order()
            return self.step()

    def _advance(self) -> Generator[Record, None, bool]:
        """One update, or what the guard's policy makes of one that was refused; whether there was one. Raises: GuardError."""
        before = self.steps_done
        try:
            yield self._update()
        except GuardError as error:
            policy = self.config.optimizer.guard_policy
            self._refused, self._refused_at = self._refused + 1, error.refusal.step
            if policy == "rollback" and self._rollbacks < self.config.optimizer.guard_rollbacks:
                yield from self._roll_back(error.refusal)
            elif policy == "skip" and self._refused <= SKIPS_IN_A_ROW:
                yield from self._leave_out(error.refusal, before)
            else:
                if self.steps_done < before:
                    yield from self._branch("guard")
                yield self._refusal(error.refusal, "the run ends")
                raise
            return False
        if self.steps_done >= self._refused_at:
            self._refused = 0
        return True

    def _leave_out(self, refusal: Refusal, before: int) -> Iterator[Record]:
        """Leave out what was refused; save, if the guard went back to where the weights were well."""
        self._awaited = True
        self.engine.skip(refusal.batch)
        if self.steps_done < before:
            yield from self._branch("guard")
        yield self._refusal(refusal, "left out")
        yield self._tell(CommandRecord(step=self.steps_done, name="skip", value=sorted(self.engine.skipped)))
        if self.steps_done < before:
            yield from self._save()

    def _roll_back(self, refusal: Refusal) -> Iterator[Record]:
        """Go back to a checkpoint with half the learning rate, leaving out what was refused; to an older one if that did not help."""
        self._rollbacks += 1
        self.engine.skip(refusal.batch)
        skipped, rate = sorted(self.engine.skipped), self.config.optimizer.learning_rate / 2
        state = self.processes.by_main(lambda: self.folder.read_checkpoint(before=(self._refused - 1) // 2))
        self._awaited = True
        self.engine.load_state_dict({**state, "skipped": skipped})
        self.config = self.config.replace(learning_rate=rate)
        yield from self._branch("rollback", stays=("learning_rate",))
        yield self._refusal(refusal, f"back to step {self.steps_done} with half the learning rate, {rate:.4g}")
        yield self._tell(CommandRecord(step=self.steps_done, name="skip", value=skipped))
        yield from self._save()

    def _refusal(self, refusal: Refusal, end: str) -> Record:
        """The guard's report: what was refused and why, of which pictures, what became of it, and what to think of."""
        items = {f"{p.item.dataset.id}/{p.item.path.name}" for p in self.cache.plan.train if p.item.id in refusal.items}
        pictures = f"; pictures {', '.join(sorted(items))}" if items else ""
        said = f"{refusal}{pictures}; {end}. {in_short(self.config)}".strip()
        return self._tell(NoticeRecord(step=self.steps_done, text=said, warning=True))

    def _branch(self, why: str, *, stays: Collection[str] = ()) -> list[Record]:
        """The guard goes back: the history goes on from the state of now, and says again what stays as it is although it was set later."""
        later = changed_since(self.folder.read_history(), self.steps_done) if self.processes.main else ()
        said: list[Record] = [self._go_on(why)]
        if names := {*stays, *(name for _, name, _ in later)}:
            live = self.config.leaves()
            said.append(self._tell(CommandRecord(step=self.steps_done, name="set", value={name: live[name] for name in sorted(names)})))
        return said

    def _go_on(self, why: str) -> Record:
        """The history goes on from the state and the settings of now."""
        return self._reported(self._saver.branch(why, self.steps_done, live=self._live(), skipped=sorted(self.engine.skipped)))

    def _live(self) -> dict[str, Any]:
        """The settings that a resumed run must not take from the run's first ones."""
        return {name: value for name, value in self.config.leaves().items() if is_live(name) or name in HOW}

    def stop(self) -> None:
        """Save and stop before the next update."""
        self._stopping = True

    def _obey(self) -> Generator[Record, None, bool]:
        """Do what the control files ask; whether to stop."""
        for name in control.asked(self.folder.path):
            if name == "PAUSE":
                yield self.note("pause")
                while (self.folder.path / "PAUSE").exists() and not (self.folder.path / "STOP").exists():
                    time.sleep(POLL)
                    yield WaitRecord(step=self.steps_done, why="paused; remove the file PAUSE to go on")
                yield self.note("go_on")
                return (yield from self._obey())  # what was asked in the meantime
            text = control.take(self.folder.path, name)
            if name == "SET":
                yield self.set_from(text)
                continue
            yield self.note(name.lower())
            if name == "SAMPLE" and self.config.prompts:
                yield from self._drawn()
            elif name == "SAVE":
                self.secure()
            elif name == "STOP":
                self.stop()
                break
        if self._stopping:
            self._stopping = False
            self.secure()
            return True
        return False

    def _due(self, step: int) -> Iterator[Record]:
        """Save first, then judge."""
        config = self.config
        if self.done:
            return
        interval, minutes = config.schedule.checkpoint_step_interval, config.schedule.checkpoint_minutes
        if self._saver.keeper.due(step, interval=interval, minutes=minutes):
            yield from self._save()
        if self._judge.evaluation_due(config, step):
            yield from self._evaluated()
        if self._judge.drawing_due(config, step):
            yield from self._drawn()

    def _evaluated(self) -> Iterator[Record]:
        """Evaluate; keep the state if it is the best so far."""
        record = self.evaluate()
        yield record
        if self.config.schedule.checkpoint_keep_best and record.step and self._saver.best_so_far(record.loss):
            if self._saver.keeper.saved_step != record.step:
                yield from self._save()
            self._saver.mark_best(record.step, record.loss)

    def _save(self) -> Iterator[Record]:
        """A checkpoint; on a disk without room, as soon as there is some."""
        needed = self.engine.bytes()
        told = False
        while self.processes.main and (short := keeping.shortage(self.folder.path, needed, self.config.run.disk_low_threshold)):
            if not told:
                said = f"the run waits: {short}; free some, and it goes on by itself"
                yield self._tell(NoticeRecord(step=self.steps_done, text=said, warning=True))
            told = True
            time.sleep(POLL)
            yield WaitRecord(step=self.steps_done, why=short)
            if (self.folder.path / "STOP").exists():  # saved with what room there is
                break
        yield self.checkpoint()

    def _news(self, said: Sequence[str]) -> Iterator[Record]:
        """What became of copies, and what reporters have to say."""
        for text in (*said, *self._reporters.news()):
            yield self._tell(NoticeRecord(step=self.steps_done, text=text))

    def parting(self) -> Iterator[Record]:
        """For a run that stops here: wait for the last copy, and say what has become of it."""
        while self._saver.copying:
            yield WaitRecord(step=self.steps_done, why="the last checkpoint is being copied")
            time.sleep(POLL)
        yield from self._news(self._saver.news())

    def _both(self, *, draw: bool = True) -> Iterator[Record]:
        """Evaluate and draw."""
        if self.cache.plan.evaluation:
            yield from self._evaluated()
        if self.config.prompts and draw:
            yield from self._drawn()

    def _drawn(self) -> Iterator[Record]:
        """Draw; what cannot be loaded for it ends a run that begins, and costs one that goes on no more than the pictures."""
        try:
            yield from self.validation()
        except ModelError as error:
            if not self.steps_done:
                raise
            yield self._tell(NoticeRecord(step=self.steps_done, text=f"no pictures were drawn: {error}", warning=True))

    def _finish(self) -> Iterator[Record]:
        """Save first, then judge."""
        yield from self._save()
        if self.engine.ema:
            self.save(self.folder.lora.with_name("lora-ema.safetensors"), ema=True)
        tensors = self.save(self.folder.lora)
        yield self._tell(CheckpointRecord(step=self.steps_done, path=str(self.folder.lora), tensors=tensors))
        yield from self._both()
        save_losses(self.folder)
        for record in self._reporters.finish(self.steps_done):
            yield record if isinstance(record, WaitRecord) else self._tell(record)
        yield from self._news(self._saver.finish())

    def _tell(self, record: Record) -> Record:
        self._saver.tell(record)
        return self._reported(record)

    def _reported(self, record: R) -> R:
        """A record that the history has, handed on to the reporters."""
        self._reporters.take(record)
        return record

    # --- what a person may ask between two updates -------------------------------------------------------------------

    def set(self, /, **settings: Any) -> CommandRecord:
        """Change settings that may change while training; the record says so, or why not."""
        try:
            refused = self._objection(settings)
            if not refused:
                self._apply(settings)
                self._orders.append(settings)
        except ConfigError as error:
            refused = "; ".join(error.problems)
        record = CommandRecord(step=self.steps_done, name="set", value=settings, refused=refused)
        self._tell(record)
        return record

    def set_from(self, text: str) -> CommandRecord:
        """The same with settings as YAML; what cannot be read is refused in the record."""
        try:
            return self.set(**mapping_of(text))
        except ConfigError as error:
            record = CommandRecord(step=self.steps_done, name="set", value=text, refused="; ".join(error.problems))
            self._tell(record)
            return record

    def _objection(self, settings: Mapping[str, Any]) -> str:
        """Why settings cannot be changed now; empty when they can."""
        if refused := frozen(settings):
            return refused
        self._changed(settings)
        steps = settings.get("max_train_steps")
        if isinstance(steps, int) and steps < self.steps_done:
            return f"max_train_steps: {steps} updates is less than the {self.steps_done} that are done"
        missing = self.unread(settings)
        if missing:
            return f"{missing[0]!r} was not read by the text encoders yet; trainer.encode([...]) says what that costs, and does it"
        return ""

    def _apply(self, settings: Mapping[str, Any]) -> None:
        """Raises: ConfigError; nothing is changed then."""
        self.config = self._changed(settings)
        if settings.get("max_train_steps") is not None:
            self._total = int(settings["max_train_steps"])
            self.engine.rules = replace(self.engine.rules, total=self._total)

    def _changed(self, settings: Mapping[str, Any]) -> RunConfig:
        """The configuration with other values for some settings. Raises: ConfigError."""
        changed = steered(self.config, settings)
        self._judge.check(changed)
        return changed

    def unread(self, settings: Mapping[str, Any]) -> list[str]:
        """The prompts among some settings that the text encoders have not read yet."""
        missing = []
        for text in {*self._changed(settings).validation_texts} - {*self.config.validation_texts}:
            try:
                self.cache.states(text)
            except CacheError:
                missing.append(text)
        return missing

    def encode(self, prompts: Sequence[str]) -> Iterator[Record]:
        """Let the text encoders read new prompts, on the CPU beside the model; the first record says what that costs."""
        texts = tuple(sorted({*prompts} - {*self.cache.plan.texts}))
        if not texts:
            return
        gb = memory.encoder_bytes(self.config, components.compute_dtype(self.config).itemsize) / 1e9
        cost = f"reading {len(texts)} new prompts loads the text encoders into {gb:.1f} GB of the machine's memory, and frees it afterwards"
        yield self._tell(NoticeRecord(step=self.steps_done, text=cost))
        builder = CacheBuilder(replace(self.cache.plan, train=(), evaluation=(), texts=texts), encoders.encoders(self.config, device="cpu"))
        yield from builder

    def beat(self) -> bool:
        """Say that this run is still held while it waits, which it does for as long as this is true: until there is a file STOP.

        Raises: TrainingError when another process has taken it over.
        """
        self._saver.beat()
        return "STOP" not in control.asked(self.folder.path)

    def note(self, name: str) -> CommandRecord:
        """Write a command that changes nothing here (pause, go on, stop) to the history."""
        record = CommandRecord(step=self.steps_done, name=name)
        self._tell(record)
        return record

    def evaluate(self) -> EvalRecord:
        """The loss on the held-out pictures, with fixed noise and noise levels. Raises: TrainingError when there are none."""
        record = judged(self._judge.evaluate(self.config), self.folder.read_history())
        self._tell(record)
        return record

    def losses(self, placements: Sequence[Placement], sigmas: Sequence[float]) -> tuple[float, ...]:
        """The loss of pictures with fixed noise, each a mean over noise levels; group after group of one size."""
        return self._judge.losses(placements, sigmas)

    def notice(self, text: str) -> Record:
        """Write something that a person should read to the history."""
        return self._tell(NoticeRecord(step=self.steps_done, text=text))

    def validation(self) -> Iterator[Record]:
        """Draw the validation prompts; one record per sampler step and per picture. The grid is then on disk."""
        for record in self._judge.draw(self.config, self.folder):
            if isinstance(record, PreviewRecord):
                self._reporters.take(record)
            yield record if isinstance(record, PreviewRecord) else self._tell(record)

    def painted(self, shots: Sequence[Shot]) -> Iterator[Event]:
        """Draw shots with the adapter as it is, into no folder and no history."""
        return self._judge.painted(self.config, shots)

    def seconds_of_a_forward(self, shot: Shot) -> float | None:
        """How long a picture's pass through the model takes now; nothing if it fails."""
        return self._judge.seconds_of_a_forward(self.config, shot)

    def score(self, picture: Image, prompt: str) -> float | None:
        """How well a picture follows its prompt, 0 to 1; nothing unless ``evaluation_type`` is clip. Raises: ModelError."""
        return self._judge.score(self.config, picture, prompt)

    def check(self, config: RunConfig) -> None:
        """Raises: ConfigError for settings of validation that this model or machine cannot do."""
        self._judge.check(config)

    def validate(self) -> Grid:
        """Draw the validation prompts now and show them under the base model's; what is drawn, and in which steps skip-layer guidance is
        active, is printed first. Raises: TrainingError without prompts."""
        if not self.config.prompts:
            raise TrainingError("there is nothing to draw; set validation_prompt")
        if self.processes.main:
            print(in_words(self.config))  # noqa: T201 (before it takes its time)
        for _ in self.validation():
            pass
        return self.grid()

    def grid(self) -> Grid:
        """The newest pictures under the base model's, over the real ones."""
        return self._judge.grid(self.config, self.folder)

    # --- saving and resuming -----------------------------------------------------------------------------------------

    def save(self, path: str | Path, layout: Layout = "diffusers", *, ema: bool = False) -> int:
        """Write the adapter (or its running average), for diffusers or for ComfyUI, read it back, compare. Returns the number of tensors.

        Raises: CheckpointError when the file is not what it should be; FileError.
        """
        self._require_finite()
        weights = self.engine.ema if ema else self.engine.result()
        if not self.processes.main:
            return len(weights)
        verified = write_adapter(
            Path(path), weights, self.config, self.cache.plan, network=self.network, step=self.steps_done, layout=layout
        )  # fmt: skip
        self._saver.log.info("%s: %s", path, verified)
        return verified.tensors

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors of adapter and optimizer, updates done, live settings."""
        return {
            **self.engine.state_dict(), "live": self._live(), "plan": plan_digest(self.cache.plan), "made_of": self._made_of,
            "steps": self.total, "rollbacks": self._rollbacks, "versions": certificate.versions(self.processes.count),
        }  # fmt: skip

    def checkpoint(self) -> CheckpointRecord:
        """Write a checkpoint into the run folder. Raises: FileError, CheckpointError; older checkpoints are then untouched."""
        self._require_finite()
        if not self.processes.main:
            return CheckpointRecord(step=self.steps_done, path=str(self._checkpoint_path), tensors=0)
        return self._reported(self._saver.checkpoint(self.steps_done, self.state_dict(), self.config.schedule.checkpoints_total_limit))

    @property
    def _checkpoint_path(self) -> Path:
        return self.folder.checkpoint_folder / f"step-{self.steps_done:06d}"

    def secure(self) -> Path:
        """The checkpoint of the state as it is; writes one unless there is one. Raises: FileError, CheckpointError."""
        if self._saver.keeper.saved_step == self.steps_done or not self.engine.whole:
            return self._checkpoint_path
        return Path(self.checkpoint().path)

    def pin(self) -> Path:
        """A checkpoint of now that is never dropped."""
        path = self.secure()
        return self._saver.pin(path) if self.processes.main else path

    def rewind(self, step: int) -> Record:
        """Go back to a checkpoint, with the settings of then; what came after it no longer counts.

        The state as it is stays as a checkpoint. Raises: CheckpointError when there is none of this step; TrainingError with
        several processes.
        """
        if self.processes.count > 1:
            raise TrainingError("of several processes none goes back alone; stop, and resume the checkpoint's folder")
        state = self.folder.read_checkpoint(step)
        self.pin()
        self._reporters.take(NoticeRecord(step=self.steps_done, text=f"back to step {step}"))
        self.config = resuming.as_it_was(RunConfig.load(self.folder.config), state)
        self.folder.point_at(step)
        return self._put_back(state, "rewind")

    def _put_back(self, state: Mapping[str, Any], why: str) -> Record:
        """Be as a checkpoint was, from where the history branches."""
        self.engine.load_state_dict(state)
        self._total, self._rollbacks = int(state.get("steps", self.total)), int(state.get("rollbacks", 0))
        self.engine.rules = replace(self.engine.rules, total=self._total)
        self._saver.go_on_from(int(state["segment"]), self.steps_done)
        return self._go_on(why)

    def _require_finite(self) -> None:
        wrong = self.engine.not_finite()
        if wrong:
            raise CheckpointError(f"{wrong} of the adapter is not finite, so nothing was written; resume from the newest checkpoint")

    @classmethod
    def resume(cls, run_folder: str | Path, cache: Cache | None = None, **changes: Any) -> Trainer:
        """The run of a folder (or of one of its checkpoints), exactly where its newest checkpoint left it; prints a certificate.

        ``changes`` are live settings, such as a learning rate or a length, or those of ``config.reading.HOW``; the history tells them.
        Another number of processes goes on with the same batches. Raises: CheckpointError when there is none, or when pictures or
        captions are no longer the same; ConfigError.
        """
        processes = join()
        with resuming.alone(run_folder, processes):
            found = resuming.read(run_folder, cache, processes)
            how = {name: value for name, value in changes.items() if name in HOW}
            trainer = cls(found.config.replace(**how), found.cache, folder=found.folder, processes=processes)
            trainer._restore(found.state, {name: value for name, value in changes.items() if name not in how}, how)
        if processes.main:
            print(trainer.certificate)  # noqa: T201 (a resumed run says so itself, in a notebook too)
        return trainer

    def _restore(self, state: Mapping[str, Any], changes: Mapping[str, Any], how: Mapping[str, Any]) -> None:
        """Take a checkpoint's state, then a person's changes. Raises: ConfigError."""
        live = json.loads(json.dumps(self._live()))
        lost = [row for row in changed_since(self.folder.read_history(), int(state["updates"])) if live.get(row[1], row[2]) != row[2]]
        stays = self._saver.pin_newest(int(state["updates"]), state["passed_over"]) if self.processes.main else ""
        self._put_back(state, "resume")
        if how:
            self._tell(CommandRecord(step=self.steps_done, name="set", value=dict(how)))
        if changes and (refused := self.set(**changes).refused):
            raise ConfigError([refused], "resume")
        self._orders.clear()  # each process was told of the changes itself
        self.certificate = certificate.certify(
            state, self.cache.plan, steps=self.total, learning_rate=self.engine.rate(self.config.optimizer.learning_rate),
            changes={**how, **changes}, processes=self.processes.count, made_of=self._made_of, lost=lost, stays=stays,
        )  # fmt: skip
        self._tell(NoticeRecord(step=self.steps_done, text=str(self.certificate)))
