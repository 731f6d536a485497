"""The evaluation loss: held-out pictures, fixed noise, fixed noise levels, captions always on; and what it is compared with.

Shapes: B images, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from sd3tune.cache.reading import Cache
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.planning import Plan
from sd3tune.records import EvalRecord
from sd3tune.training import flow
from sd3tune.training.batches import Batch, load, noise
from sd3tune.training.rules import Rules
from sd3tune.training.sigmas import common_factor, ladder

EVAL_SEED = 0
"""Apart from the run's seed, so that runs with different seeds are judged alike."""


def evaluation_levels(rules: Rules, placements: Sequence[Placement], count: int) -> tuple[float, ...]:
    """The fixed noise levels of every evaluation: those of training in equal parts; a shift by size is that of the mean size."""
    factor = common_factor(rules.shift, [(p.bucket.height // 8, p.bucket.width // 8) for p in placements])
    return ladder(count, scale=rules.sigmoid_scale, factor=factor, spread=rules.spread)


DRIFT_LEVELS = 4
"""Most of the noise levels at which the base model is asked, too."""


@dataclass(frozen=True)
class Seen:
    """What was measured of some pictures of one size: tensors of one number per picture, one tensor per noise level."""

    losses_B: tuple[Tensor, ...]
    drifts_B: tuple[Tensor, ...]
    """Mean squared distance from the base model's prediction, at some of the levels."""
    errors_B: tuple[Tensor, ...]
    """The base model's own loss there."""


def look(
    velocity: flow.Velocity, cache: Cache, placements: Sequence[Placement], *, sigmas: Sequence[float], device: torch.device,
    batch: int = 8, prior: flow.Velocity | None = None,
) -> Iterator[Seen]:  # fmt: skip
    """The loss of each picture at each noise level, with noise that depends on the pictures' place alone.

    One forward pass for each picture and level; with a ``prior`` one of the base model, too, at up to `DRIFT_LEVELS` of the levels.
    """
    compared = () if prior is None else spread(len(sigmas), DRIFT_LEVELS)
    for number, rows in enumerate(_groups(placements, batch)):
        held = _Held(load(cache, [(p, p.item.caption) for p in rows]), number, device)
        losses_B, drifts_B, errors_B = [], [], []
        for i, sigma in enumerate(sigmas):
            with torch.no_grad():
                model = held.ask(velocity, sigma)
                losses_B.append(held.cost(model))
                if prior is not None and i in compared:
                    base = held.ask(prior, sigma)
                    drifts_B.append(held.cost(model, base))
                    errors_B.append(held.cost(base))
        yield Seen(tuple(losses_B), tuple(drifts_B), tuple(errors_B))


class _Answer:
    """A velocity that was asked already, at the points in question."""

    def __init__(self, sigma_B: Tensor, answer_BCHW: Tensor) -> None:
        self.sigma_B, self._answer_BCHW = sigma_B, answer_BCHW

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        return self._answer_BCHW


class _Held:
    """A batch with its fixed noise."""

    def __init__(self, batch: Batch, number: int, device: torch.device) -> None:
        self.noise_BCHW = noise(batch.latent_BCHW.shape, seed=EVAL_SEED, k=number).to(device)
        self.latent_BCHW = batch.latent_BCHW.float().to(device)
        self.joint_BLD, self.pooled_BP = batch.joint_BLD.to(device), batch.pooled_BP.to(device)
        self.mask_BHW = None if batch.mask_BHW is None else batch.mask_BHW.to(device)

    def ask(self, velocity: flow.Velocity, sigma: float) -> _Answer:
        sigma_B = torch.full((len(self.latent_BCHW),), sigma, device=self.latent_BCHW.device)
        noisy_BCHW = flow.mix(self.latent_BCHW, self.noise_BCHW, sigma_B)
        return _Answer(sigma_B, velocity(noisy_BCHW, sigma_B, self.joint_BLD, self.pooled_BP))

    def cost(self, answer: _Answer, to: _Answer | None = None) -> Tensor:
        """The loss of an answer, or its distance from another one: one number per picture."""
        return flow.loss(
            answer, self.latent_BCHW, self.joint_BLD, self.pooled_BP, sigma_B=answer.sigma_B, noise_BCHW=self.noise_BCHW,
            mask_BHW=self.mask_BHW, prior=to,
        )  # fmt: skip


def by_image(parts: Sequence[tuple[Tensor, ...]]) -> tuple[float, ...]:
    """The mean of each picture over the levels, group after group."""
    return tuple(chain.from_iterable(torch.stack(part).mean(0).tolist() for part in parts))


def evaluation_loss(
    velocity: flow.Velocity, cache: Cache, *, sigmas: Sequence[float], device: torch.device, step: int, batch: int = 8,
    prior: flow.Velocity | None = None,
) -> EvalRecord:  # fmt: skip
    """Mean loss over the plan's held-out pictures, where their masks count, and over ``sigmas``.

    With a ``prior`` also that of as many training pictures, and the distance from the base model on the held-out ones: between
    two and three times the cost of the loss alone, which is one forward pass for each picture and level. The caller puts the
    model into evaluation mode.
    """
    seen = list(look(velocity, cache, cache.plan.evaluation, sigmas=sigmas, device=device, batch=batch, prior=prior))
    count = sum(len(group.losses_B[0]) for group in seen)
    sums = [0.0] * len(sigmas)
    for group in seen:
        for i, loss_B in enumerate(group.losses_B):
            sums[i] += float(loss_B.sum())
    by_sigma = tuple(s / count for s in sums)
    trained: list[Seen] = []
    learned = 0
    drifts: tuple[float, ...] = ()
    if prior is not None:
        learned = len(training_pictures(cache.plan))
        shown = training_pictures(cache.plan, count)
        trained = list(look(velocity, cache, shown, sigmas=sigmas, device=device, batch=batch))
        errors = by_image([group.errors_B for group in seen])
        drifts = tuple(drift * count / sum(errors) for drift in by_image([group.drifts_B for group in seen]))
    return EvalRecord(
        step=step, loss=sum(by_sigma) / len(by_sigma), images=count, sigmas=tuple(sigmas), losses_by_sigma=by_sigma,
        losses_by_image=by_image([group.losses_B for group in seen]), train_losses_by_image=by_image([g.losses_B for g in trained]),
        train_images=learned, drifts_by_image=drifts,
    )  # fmt: skip


def training_pictures(made: Plan, count: int | None = None) -> list[Placement]:
    """Up to ``count`` of the pictures to learn from (all), each once, spread evenly over the plan: always the same ones."""
    once: dict[str, Placement] = {}
    for placement in made.train:
        if not placement.item.dataset.is_regularisation_data:
            once.setdefault(placement.item.id, placement)
    rows = list(once.values())
    return [rows[i] for i in spread(len(rows), len(rows) if count is None else count)]


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` places out of ``length``: the middle of each equal part."""
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _groups(placements: Sequence[Placement], size: int) -> Iterator[list[Placement]]:
    """Chunks of one bucket, in a fixed order."""
    by_bucket: dict[Bucket, list[Placement]] = {}
    for placement in placements:
        by_bucket.setdefault(placement.bucket, []).append(placement)
    for bucket in sorted(by_bucket):
        rows = by_bucket[bucket]
        yield from (rows[i : i + size] for i in range(0, len(rows), size))
