"""The evaluation loss: held-out pictures, fixed noise, fixed noise levels, captions always on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sd3tune.cache.reading import Cache
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.records import EvalRecord
from sd3tune.training import flow
from sd3tune.training.batches import load, noise
from sd3tune.training.rules import Rules
from sd3tune.training.sigmas import common_factor, ladder

EVAL_SEED = 0
"""Apart from the run's seed, so that runs with different seeds are judged alike."""


def evaluation_levels(rules: Rules, placements: Sequence[Placement], count: int) -> tuple[float, ...]:
    """The fixed noise levels of every evaluation: those of training in equal parts; a shift by size is that of the mean size."""
    factor = common_factor(rules.shift, [(p.bucket.height // 8, p.bucket.width // 8) for p in placements])
    return ladder(count, scale=rules.sigmoid_scale, factor=factor, spread=rules.spread)


def evaluation_loss(
    velocity: flow.Velocity, cache: Cache, *, sigmas: Sequence[float], device: torch.device, step: int, batch: int = 8
) -> EvalRecord:
    """Mean loss over the plan's held-out pictures, where their masks count, and over ``sigmas``.

    The caller puts the model into evaluation mode.
    """
    sums = [0.0] * len(sigmas)
    count = 0
    for number, rows in enumerate(_groups(cache.plan.evaluation, batch)):
        held = load(cache, [(p, p.item.caption) for p in rows])
        noise_BCHW = noise(held.latent_BCHW.shape, seed=EVAL_SEED, k=number).to(device)
        latent_BCHW, joint_BLD, pooled_BP = held.latent_BCHW.float().to(device), held.joint_BLD.to(device), held.pooled_BP.to(device)
        mask_BHW = None if held.mask_BHW is None else held.mask_BHW.to(device)
        count += len(rows)
        for i, sigma in enumerate(sigmas):
            sigma_B = torch.full((len(rows),), sigma, device=device)
            with torch.no_grad():
                loss_B = flow.loss(
                    velocity, latent_BCHW, joint_BLD, pooled_BP, sigma_B=sigma_B, noise_BCHW=noise_BCHW, mask_BHW=mask_BHW
                )  # fmt: skip
            sums[i] += float(loss_B.sum())
    by_sigma = tuple(s / count for s in sums)
    return EvalRecord(step=step, loss=sum(by_sigma) / len(by_sigma), images=count, sigmas=tuple(sigmas), losses_by_sigma=by_sigma)


def _groups(placements: Sequence[Placement], size: int) -> Iterator[list[Placement]]:
    """Chunks of one bucket, in a fixed order."""
    by_bucket: dict[Bucket, list[Placement]] = {}
    for placement in placements:
        by_bucket.setdefault(placement.bucket, []).append(placement)
    for bucket in sorted(by_bucket):
        rows = by_bucket[bucket]
        yield from (rows[i : i + size] for i in range(0, len(rows), size))
