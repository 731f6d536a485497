"""The evaluation loss: held-out pictures, fixed noise, fixed noise levels, captions always on; and what it is compared with.

The noise of a picture at a level is a function of the picture's bytes and the level: of no seed, batch, order or other picture.

Shapes: B images, C latent channels, H x W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3tune.cache.reading import Cache
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.catalog import Item
from sd3tune.data.planning import Plan
from sd3tune.files import digest
from sd3tune.records import EvalRecord
from sd3tune.training import flow
from sd3tune.training.batches import Batch, generator, load
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


BANDS = 5
"""Parts of equal width of the noise levels 0 to 1 that are reported apart."""

Rows = tuple[tuple[float, ...], ...]
"""A row for each picture, in it a number for each noise level."""


@dataclass(frozen=True)
class Seen:
    """What was measured of some pictures of one size."""

    placements: tuple[Placement, ...]
    losses: Rows
    drifts: Rows
    """Mean squared distance from the base model's prediction, at some of the levels."""
    errors: Rows
    """The base model's own loss there."""


def fixed_noise(item: Item, sigma: float, shape: torch.Size) -> Tensor:
    """The noise C H W of a picture at a noise level, drawn on the CPU. Levels count to six decimals."""
    picture = int(digest(item.pixels or str(item.path))[:16], 16)
    return torch.randn(shape, generator=generator(EVAL_SEED, picture, round(1e6 * sigma)))


def look(
    velocity: flow.Velocity, cache: Cache, placements: Sequence[Placement], *, sigmas: Sequence[float], device: torch.device,
    batch: int = 8, prior: flow.Velocity | None = None,
) -> Iterator[Seen]:  # fmt: skip
    """The loss of each picture at each noise level, group after group of one size, in an order that does not depend on ``batch``.

    One forward pass for each picture and level; with a ``prior`` one of the base model, too, at up to `DRIFT_LEVELS` of the levels.
    """
    compared = () if prior is None else spread(len(sigmas), DRIFT_LEVELS)
    for rows in _groups(placements, batch):
        held = _Held(load(cache, [(p, p.item.caption) for p in rows]), [p.item for p in rows], device)
        losses_B, drifts_B, errors_B = [], [], []
        for i, sigma in enumerate(sigmas):
            with torch.no_grad():
                model = held.ask(velocity, sigma)
                losses_B.append(held.cost(model))
                if prior is not None and i in compared:
                    base = held.ask(prior, sigma)
                    drifts_B.append(held.cost(model, base))
                    errors_B.append(held.cost(base))
        yield Seen(tuple(rows), _rows(losses_B), _rows(drifts_B), _rows(errors_B))


def _rows(by_level: Sequence[Tensor]) -> Rows:
    return tuple(map(tuple, torch.stack(tuple(by_level), 1).tolist())) if by_level else ()


class _Answer:
    """A velocity that was asked already, at the points in question."""

    def __init__(self, noise_BCHW: Tensor, sigma_B: Tensor, answer_BCHW: Tensor) -> None:
        self.noise_BCHW, self.sigma_B, self._answer_BCHW = noise_BCHW, sigma_B, answer_BCHW

    def __call__(self, noisy_BCHW: Tensor, sigma_B: Tensor, joint_BLD: Tensor, pooled_BP: Tensor) -> Tensor:
        return self._answer_BCHW


class _Held:
    """A batch with its fixed noise."""

    def __init__(self, batch: Batch, items: Sequence[Item], device: torch.device) -> None:
        self._items, self._device = items, device
        self.latent_BCHW = batch.latent_BCHW.float().to(device)
        self.joint_BLD, self.pooled_BP = batch.joint_BLD.to(device), batch.pooled_BP.to(device)
        self.mask_BHW = None if batch.mask_BHW is None else batch.mask_BHW.to(device)

    def ask(self, velocity: flow.Velocity, sigma: float) -> _Answer:
        noise_BCHW = torch.stack([fixed_noise(item, sigma, self.latent_BCHW.shape[1:]) for item in self._items]).to(self._device)
        sigma_B = torch.full((len(self.latent_BCHW),), sigma, device=self._device)
        noisy_BCHW = flow.mix(self.latent_BCHW, noise_BCHW, sigma_B)
        return _Answer(noise_BCHW, sigma_B, velocity(noisy_BCHW, sigma_B, self.joint_BLD, self.pooled_BP))

    def cost(self, answer: _Answer, to: _Answer | None = None) -> Tensor:
        """The loss of an answer, or its distance from another one: one number per picture."""
        return flow.loss(
            answer, self.latent_BCHW, self.joint_BLD, self.pooled_BP, sigma_B=answer.sigma_B, noise_BCHW=answer.noise_BCHW,
            mask_BHW=self.mask_BHW, prior=to,
        )  # fmt: skip


def losses_of(
    velocity: flow.Velocity, cache: Cache, placements: Sequence[Placement], *, sigmas: Sequence[float], device: torch.device,
    batch: int = 8,
) -> Rows:  # fmt: skip
    """The losses of pictures, in the order of `look`."""
    seen = look(velocity, cache, placements, sigmas=sigmas, device=device, batch=batch)
    return tuple(row for group in seen for row in group.losses)


def by_image(rows: Rows) -> tuple[float, ...]:
    """The mean of each picture over the levels."""
    return tuple(mean(row) for row in rows)


def mean(values: Sequence[float]) -> float:
    """The mean, the same in every order."""
    return math.fsum(values) / len(values)


def by_band(sigmas: Sequence[float], losses_by_sigma: Sequence[float]) -> tuple[float | None, ...]:
    """The mean over the levels in each of the `BANDS`, from picture to noise; nothing where no level lies."""
    bands: list[list[float]] = [[] for _ in range(BANDS)]
    for sigma, loss in zip(sigmas, losses_by_sigma, strict=True):
        bands[min(int(BANDS * sigma), BANDS - 1)].append(loss)
    return tuple(mean(found) if found else None for found in bands)


def evaluation_loss(
    velocity: flow.Velocity, cache: Cache, *, sigmas: Sequence[float], device: torch.device, step: int, batch: int = 8,
    prior: flow.Velocity | None = None, base: Rows | None = None, pooled: bool = False,
) -> EvalRecord:  # fmt: skip
    """Mean loss over the plan's held-out pictures, where their masks count, and over ``sigmas``: each picture counts alike.

    With a ``prior`` also that of as many training pictures, and the distance from the base model on the held-out ones: between
    two and three times the cost of the loss alone, which is one forward pass for each picture and level. ``base`` are the base
    model's own losses of the same pictures, to compare with. The caller puts the model into evaluation mode.
    """
    seen = list(look(velocity, cache, cache.plan.evaluation, sigmas=sigmas, device=device, batch=batch, prior=prior))
    held = [placement for group in seen for placement in group.placements]
    rows = tuple(row for group in seen for row in group.losses)
    by_sigma, losses = tuple(map(mean, zip(*rows, strict=True))), by_image(rows)
    learned: list[Placement] = []
    trained: Rows = ()
    drifts: tuple[float, ...] = ()
    if prior is not None:
        learned = [p for group in _groups(training_pictures(cache.plan, len(held)), batch) for p in group]
        trained = losses_of(velocity, cache, learned, sigmas=sigmas, device=device, batch=batch)
        error = mean(by_image(tuple(row for group in seen for row in group.errors)))
        drifts = tuple(mean(row) / error for group in seen for row in group.drifts)
    base_by_sigma = () if base is None else tuple(map(mean, zip(*base, strict=True)))
    base_loss = None if base is None else mean(by_image(base))
    names = {} if pooled else {name: [at for at, p in enumerate(held) if p.item.dataset.id == name] for name in _datasets(held)}
    return EvalRecord(
        step=step, loss=mean(losses), images=len(held), sigmas=tuple(sigmas), losses_by_sigma=by_sigma, losses_by_image=losses,
        train_losses_by_image=by_image(trained), train_images=len(training_pictures(cache.plan)) if prior is not None else 0,
        drifts_by_image=drifts, items=tuple(p.item.id for p in held), train_items=tuple(p.item.id for p in learned),
        base_loss=base_loss, relative=mean(losses) / base_loss if base_loss else None, losses_by_band=by_band(sigmas, by_sigma),
        base_losses_by_band=by_band(sigmas, base_by_sigma) if base is not None else (),
        losses_by_dataset={name: mean([losses[at] for at in places]) for name, places in names.items()},
    )  # fmt: skip


def _datasets(placements: Sequence[Placement]) -> list[str]:
    return sorted({placement.item.dataset.id for placement in placements})


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
