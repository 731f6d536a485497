"""One update: the only owner of what training changes, namely adapter weights, optimizer moments and updates done.

Shapes: B images, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.control import interrupts_deferred
from sd3tune.errors import CheckpointError, TrainingError
from sd3tune.processes import Processes
from sd3tune.records import StepRecord
from sd3tune.training import flow
from sd3tune.training.batches import Batches, fold
from sd3tune.training.guard import RECENT, Guard, GuardError, Refusal, block_sizes, due, suspects, worst_block
from sd3tune.training.objective import ALONE, Part, forward, mean_loss, share_of_nothing
from sd3tune.training.optim import averaged, clip, new_optimizer, optimizer_state, restore_optimizer
from sd3tune.training.peak import peak_memory
from sd3tune.training.rules import CALM, HIGHEST_SCALE, Rules, ema_decay
from sd3tune.training.schedules import learning_rate
from sd3tune.training.sharing import measured, summed, with_measured


class Engine:
    """Advance an adapter one update at a time."""

    def __init__(
        self, velocity: flow.Velocity, weights: Mapping[str, nn.Parameter], batches: Batches, rules: Rules,
        prior: flow.Velocity | None = None, walker: flow.Velocity | None = None, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.processes = processes
        self.velocity, self.weights, self.batches, self.rules, self.prior = velocity, dict(weights), batches, rules, prior
        self._walker = walker
        self.updates = 0
        self._scale, self._calm = (HIGHEST_SCALE if rules.scaled else 1.0), 0
        self._optimizer = new_optimizer(rules.rule, self.weights, seed=rules.seed)
        self.ema: dict[str, Tensor] = {}
        if rules.ema_decay is not None:
            self.ema = {n: w.detach().to(rules.ema_device or w.device, torch.float32, copy=True) for n, w in self.weights.items()}
        self._aside: dict[str, Tensor] = {}
        self._device = next(iter(self.weights.values())).device
        self.guard, self.skipped = Guard(), set[int]()
        self._next, self._moving = 0, False
        self._healthy: dict[str, Any] = {}

    def update(self, *, peak_learning_rate: float, max_grad_norm: float | None = None) -> StepRecord:
        """Do one update. Everything is measured and checked before the optimizer changes anything.

        Raises: GuardError when loss, gradient or adapter are not finite or run away. The weights are then those before this
        update or, if they run away themselves, those of the last look that found them well.
        """
        started, rules = time.perf_counter(), self.rules
        most = rules.max_grad_norm if max_grad_norm is None else max_grad_norm
        self._put_back()
        number = self.next_batch
        if self.guard.began is None and not self.updates:
            self.guard.began = self._beginning()
        self._look(number)
        indices = range(number * rules.accumulation, (number + 1) * rules.accumulation)
        images = sum(len(self.batches.ids(k)) for k in indices)
        parts, grad_norm = self._gradient(indices, images, most)
        while not math.isfinite(grad_norm) and self._scale > 1:  # an overflow of fp16: the same batches again, multiplied by less
            self._scale, self._calm = self._scale / 2, 0
            parts, grad_norm = self._gradient(indices, images, most)
        losses = tuple(torch.cat([part.loss_B for part in parts]).tolist())
        items = tuple(i for part in parts for i in part.ids)
        levels = tuple(torch.cat([p.sigma_B for p in parts]).tolist())
        step, (loss, nothing) = self.updates + 1, share_of_nothing(parts)
        why, runaway = self.guard.objection(loss, grad_norm, nothing=nothing)
        if why:
            names, at = suspects(items, levels, losses)
            self._refuse(Refusal(step, number, why, names, at, worst_block(self.weights), runaway))
        rate = self.rate(peak_learning_rate)
        self._optimizer.param_groups[0]["lr"] = rate
        self._moving = True
        self._optimizer.step()
        self.updates, self._next = step, number + 1
        self.guard.accept(loss, grad_norm, nothing=nothing)
        self._follow(step)
        self._moving = False
        if step == 10:
            self._assert_moved()
        seconds = time.perf_counter() - started
        return StepRecord(
            step=step, loss=mean_loss(parts, regularisation=False), regularisation_loss=mean_loss(parts, regularisation=True),
            losses=losses, sigmas=levels, items=items, learning_rate=rate, grad_norm=grad_norm, seconds=seconds,
            images_per_second=len(items) / seconds, peak_memory_bytes=peak_memory(self._device),
            extra_forwards=sum(part.extra_forwards for part in parts),
        )  # fmt: skip

    def rate(self, peak: float) -> float:
        """The learning rate of the next update."""
        rules = self.rules
        return learning_rate(
            self.updates, peak=peak, schedule=rules.schedule, warmup=rules.warmup, total=rules.total, cycles=rules.cycles,
            power=rules.power, end=rules.end,
        )  # fmt: skip

    def bytes(self) -> int:
        """Size of a checkpoint's tensors, about: those of an optimizer that has not begun count as two moments."""
        adapter = sum(weight.nbytes for weight in self.weights.values())
        moments = sum(value.nbytes for value in optimizer_state(self._optimizer, self.weights)[0].values())
        return adapter + max(moments, 2 * adapter) + sum(mean.nbytes for mean in self.ema.values())

    def not_finite(self) -> str:
        """The first weight, or average of one, that is not finite; empty when all are."""
        for name, value in (*self.weights.items(), *self.ema.items()):
            if not torch.isfinite(value).all():
                return name
        return ""

    @property
    def whole(self) -> bool:
        """Whether the state is one between two updates, and not one that an error left half way through an optimizer's step."""
        return not self._moving

    @property
    def next_batch(self) -> int:
        """Which update's worth of batches comes next: those that were skipped never come again."""
        number = self._next
        while number in self.skipped:
            number += 1
        return number

    def skip(self, number: int) -> None:
        """Leave out an update's worth of batches, now and after every rollback."""
        self.skipped.add(number)

    def _look(self, number: int) -> None:
        """Look at the adapter itself, every few updates; remember it while it is well. Raises: GuardError."""
        if not due(self.updates):
            return
        found = block_sizes(self.weights)
        block, why = self.guard.grown(found)
        if why:
            self._refuse(Refusal(self.updates + 1, number, why, (), (), block, True))
        self.guard.blocks = found
        self._healthy = self.state_dict()

    def _refuse(self, refusal: Refusal) -> None:
        """Change nothing; or, when the weights themselves run away, go back to where they were well. Raises: GuardError."""
        self._optimizer.zero_grad(set_to_none=True)
        if refusal.runaway:
            self.load_state_dict({**self._healthy, "skipped": sorted(self.skipped)})
        raise GuardError(refusal)

    def _gradient(self, indices: range, images: int, most: float) -> tuple[list[Part], float]:
        """The gradient of the mean loss over some batches, summed over the processes and clipped; its norm before that."""
        self._optimizer.zero_grad(set_to_none=True)
        own = (self.processes.rank,) if self.processes.rank else ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(self.rules.seed, indices[0], 3, *own))  # adapter dropout draws from torch's own generator
            parts = summed([self._backward(k, images) for k in indices], self.weights, self.processes)
        if self._scale != 1:
            for weight in self.weights.values():
                if weight.grad is not None:
                    weight.grad.div_(self._scale)
        return parts, clip(self.weights, most, self.rules.clip_method)

    def _follow(self, step: int) -> None:
        """What comes after the optimizer: the average of the weights, and a larger scale after a calm stretch."""
        rules = self.rules
        if rules.ema_decay is not None and step % rules.ema_interval == 0:
            for name, mean in self.ema.items():
                mean.lerp_(self.weights[name].detach().to(mean), 1 - ema_decay(step // rules.ema_interval, rules.ema_decay))
        if rules.scaled:
            self._calm += 1
            if self._calm % CALM == 0:
                self._scale = min(2 * self._scale, HIGHEST_SCALE)

    def seconds_per_update(self) -> float:
        """Time of one update's forward and backward passes without rollouts, the second of two tries; changes nothing."""
        for _ in range(2):
            started = time.perf_counter()
            with torch.random.fork_rng(devices=[]):
                self._backward(0, 1, rolled=False)
            self._optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
        return seconds * self.rules.accumulation

    def _backward(self, k: int, images: int, *, rolled: bool = True) -> Part:
        """Add batch ``k``'s share of the gradient of the mean loss over the update's ``images`` images."""
        loss, part = self._forward(k, rolled=rolled)
        if loss.requires_grad:  # not where this process has no image of the batch
            (loss / images * self._scale).backward()  # type: ignore[no-untyped-call]
        return part

    @torch.no_grad()
    def _beginning(self) -> float:
        """The loss of some batches before anything is learned, as a share of what predicting nothing costs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(self.rules.seed, 0, 9))
            parts = [self._forward(k, rolled=False)[1] for k in range(RECENT)]
        loss, nothing = share_of_nothing(with_measured(parts, self.processes.sum(measured(parts))))
        return loss / nothing

    def _forward(self, k: int, *, rolled: bool = True) -> tuple[Tensor, Part]:
        rules = self.rules if rolled else replace(self.rules, rollout=None)
        return forward(
            k, self.batches, rules, velocity=self.velocity, prior=self.prior, device=self._device, walker=self._walker,
            processes=self.processes,
        )  # fmt: skip

    @contextmanager
    def judged(self, *, ema: bool = False, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The weights that are to be judged (their running average, or others), for the duration of the block or until the next update.

        Then they are those that train, bit by bit.
        """
        better = weights or (self.ema if ema else averaged(self._optimizer, self.weights))
        swapped = bool(better) and not self._aside
        if swapped:
            self._aside = {name: weight.detach().clone() for name, weight in self.weights.items()}
            self._take(better)
        try:
            yield
        finally:
            if swapped:
                self._put_back()

    def _put_back(self) -> None:
        self._take(self._aside)
        self._aside = {}

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Updates that do not count: at the end of the block, however it ends, everything is as it was, bit for bit."""
        now, rules, healthy = self.state_dict(), self.rules, self._healthy
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            try:
                yield
            finally:
                with interrupts_deferred():
                    self.load_state_dict(now)
                    self.rules, self._healthy = rules, healthy
                    self._optimizer.zero_grad(set_to_none=True)

    def result(self) -> dict[str, Tensor]:
        """The adapter to save for use, in fp32: the weights, or the average that schedule-free training judges."""
        with self.judged():
            return {name: weight.detach().clone().float().cpu() for name, weight in self.weights.items()}

    def _assert_moved(self) -> None:
        """Ten updates must have moved every B away from zero."""
        still = [name for name, weight in self.weights.items() if ".lora_B." in name and not weight.detach().any()]
        if still and len(still) == sum(".lora_B." in name for name in self.weights):
            raise TrainingError(
                "after 10 updates the adapter has not moved at all: no gradient reaches it; this is a defect, please report it"
            )

    def state_dict(self) -> dict[str, Any]:
        """Adapter, optimizer moments and updates done: all that an update reads and that is not a function of (config, cache, k)."""
        adapter = {name: self._aside.get(name, weight.detach()).clone().cpu() for name, weight in self.weights.items()}
        tensors, numbers = optimizer_state(self._optimizer, self.weights)
        moments = {key: value.cpu() for key, value in tensors.items()}
        mean = {f"ema.{name}": value.clone().cpu() for name, value in self.ema.items()}
        return {
            "adapter": adapter, "optimizer": {**moments, **mean}, "optimizer_numbers": numbers, "updates": self.updates,
            "loss_scale": [self._scale, self._calm], "next": self._next, "skipped": sorted(self.skipped), "guard": self.guard.state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`. Raises: CheckpointError when the state is of another adapter; nothing is changed then."""
        adapter: Mapping[str, Tensor] = state["adapter"]
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        differing = {name for name, _ in {(n, t.shape) for n, t in adapter.items()} ^ set(shapes.items())}
        if differing:
            raise CheckpointError(f"the checkpoint is of another adapter: {len(differing)} weights differ, e.g. {min(differing)}")
        self._aside = {}
        self._take(adapter)
        moments = {key: value for key, value in state["optimizer"].items() if not key.startswith("ema.")}
        restore_optimizer(self._optimizer, self.weights, moments, state.get("optimizer_numbers", {}))
        for name, mean in self.ema.items():
            mean.copy_(state["optimizer"].get(f"ema.{name}", self.weights[name].detach()))
        if self.rules.scaled:
            self._scale, self._calm = state.get("loss_scale", [self._scale, 0])
        self.updates = int(state["updates"])
        self._next, self._moving = int(state.get("next", self.updates)), False
        self.skipped, self.guard = set(state.get("skipped", ())), Guard(**copy.deepcopy(dict(state.get("guard", {}))))
        self._healthy = {**state}
