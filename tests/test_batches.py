"""Batch k is a function of (plan, seed, k)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3tune.cache import Cache
from sd3tune.data import Bucket, Catalog, Dataset, Item, Placement, Plan
from sd3tune.training.batches import Batches, epoch_order, fold, generator, noise

SHAPES = (Bucket(64, 64), Bucket(48, 80), Bucket(80, 48))
SEEDS = st.integers(0, 2**32 - 1)


def make_plan(images: int, *, batch: int = 3, repeats: int = 0, shapes: int = 2) -> Plan:
    dataset = Dataset(id="d", instance_data_dir="d")
    items = [Item(dataset, Path(f"{n}.png"), 64, 64, f"p{n}", (f"caption {n}",)) for n in range(images)]
    rows = [Placement(i, SHAPES[n % shapes], copy) for n, i in enumerate(items) for copy in range(repeats + 1)]
    return Plan(tuple(rows), (), ("",), Catalog((), tuple(items), (), ()), batch, 1, 10, "cache", 4, 16)


def batches_of(plan: Plan, seed: int = 1, dropout: float = 0.1, **more: Any) -> Batches:
    return Batches(cast(Cache, SimpleNamespace(plan=plan, **more)), seed=seed, caption_dropout=dropout)


PLANS = st.builds(make_plan, st.integers(1, 40), batch=st.integers(1, 9), repeats=st.integers(0, 2), shapes=st.integers(1, 3))


@given(PLANS, SEEDS, st.integers(0, 5))
@settings(deadline=None)
def test_every_placement_once_an_epoch(plan: Plan, seed: int, epoch: int) -> None:
    """An epoch holds each placement exactly once, in batches of one bucket, short ones included, and has the planned length."""
    per_epoch = plan.batches_per_epoch
    batches = batches_of(plan, seed)
    seen = [batches.placements(epoch * per_epoch + n) for n in range(per_epoch)]
    assert Counter(p for batch in seen for p in batch) == Counter(plan.train)
    for batch in seen:
        assert 1 <= len(batch) <= plan.batch_size
        assert len({p.bucket for p in batch}) == 1
    short = Counter(batch[0].bucket for batch in seen if len(batch) < plan.batch_size)
    assert all(count == 1 for count in short.values()), "at most the last of a bucket is short"


@given(PLANS, SEEDS, st.lists(st.integers(0, 300), min_size=1, max_size=12))
@settings(deadline=None)
def test_access_in_any_order(plan: Plan, seed: int, wanted: list[int]) -> None:
    """Batches asked for in any order, twice, or from a fresh object are those of a run from the beginning."""
    jumping, backwards = batches_of(plan, seed), batches_of(plan, seed)
    found = {k: (jumping.placements(k), jumping.dropped(k)) for k in wanted}
    again = {k: (backwards.placements(k), backwards.dropped(k)) for k in sorted(wanted, reverse=True)}
    assert found == again
    sequential = batches_of(plan, seed)
    for k in range(min(max(wanted) + 1, 60)):
        held = (sequential.placements(k), sequential.dropped(k))
        assert found.get(k, held) == held


def test_other_seeds_and_epochs_are_other_orders() -> None:
    """The order differs between seeds and between epochs, and the batches of buckets are mixed."""
    plan = make_plan(40, batch=4)
    orders = {epoch_order(plan, seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert epoch_order(plan, 3, 2) == epoch_order(plan, 3, 2)
    shapes = [batch[0].bucket for batch in epoch_order(plan, 0, 0)]
    assert shapes != sorted(shapes)
    assert shapes != sorted(shapes, reverse=True)
    partners = {frozenset(p.item.id for p in batch) for seed in range(4) for batch in epoch_order(plan, seed, 0)}
    assert len(partners) > 30, "pictures meet different ones"


def test_rate_of_caption_dropout() -> None:
    """About the asked share is dropped, independently of place and seed; 0 and 1 are exact."""
    plan = make_plan(16, batch=4, shapes=1)
    for p in (0.1, 0.5):
        for seed in (1, 2):
            rows = torch.tensor([batches_of(plan, seed, p).dropped(k) for k in range(1500)]).float()
            assert rows.mean() == pytest.approx(p, abs=4 * (p * (1 - p) / 6000) ** 0.5)
            assert rows.mean(0).tolist() == pytest.approx([p] * 4, abs=4.5 * (p * (1 - p) / 1500) ** 0.5)
    assert not any(any(batches_of(plan, 1, 0.0).dropped(k)) for k in range(500))
    assert all(all(batches_of(plan, 1, 1.0).dropped(k)) for k in range(500))


def test_caption_dropout_follows_the_seed() -> None:
    """Another seed drops other captions; a rising probability only adds to what is dropped."""
    plan = make_plan(16, batch=4, shapes=1)
    drops = [[batches_of(plan, seed, 0.5).dropped(k) for k in range(20)] for seed in range(5)]
    assert len({tuple(d) for d in drops}) == 5
    assert len(set(drops[0])) > 3, "it differs between batches too"
    few, many = batches_of(plan, 1, 0.2), batches_of(plan, 1, 0.6)
    assert all(b >= a for k in range(50) for a, b in zip(few.dropped(k), many.dropped(k), strict=True))


def test_a_batch_holds_what_was_placed() -> None:
    """Latents, texts and ids are in the order of the placements, and a dropped caption is the empty text."""
    plan = make_plan(12, batch=4, shapes=1)

    def latent(placement: Placement) -> torch.Tensor:
        return torch.full((1, 2, 2), float(placement.item.path.stem))

    def texts(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([float(caption.split()[1]) if caption else -1.0 for caption in captions])
        return values[:, None, None].expand(-1, 3, 2), values[:, None].expand(-1, 2)

    batches = batches_of(plan, 5, 0.5, latent=latent, texts=texts)
    for k in range(9):
        batch, placed, dropped = batches[k], batches.placements(k), batches.dropped(k)
        numbers = [float(p.item.path.stem) for p in placed]
        assert batch.ids == tuple(p.item.id for p in placed)
        assert batch.latent_BCHW[:, 0, 0, 0].tolist() == numbers
        expected = [-1.0 if drop else n for n, drop in zip(numbers, dropped, strict=True)]
        assert batch.joint_BLD[:, 2, 1].tolist() == batch.pooled_BP[:, 0].tolist() == expected
        assert batch.joint_BLD.shape == (4, 3, 2)


@given(SEEDS, st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_noise_is_drawn_image_by_image(seed: int, k: int, images: int, fewer: int) -> None:
    """The noise at a place is the same in a smaller batch, and equals that place's own generator."""
    shape = (4, 3, 5)
    whole = noise(torch.Size((images, *shape)), seed=seed, k=k)
    part = noise(torch.Size((min(images, fewer), *shape)), seed=seed, k=k)
    assert torch.equal(whole[: len(part)], part)
    last = torch.randn(shape, generator=generator(seed, k, 2, images - 1))
    assert torch.equal(whole[-1], last)


def test_noise_differs_and_is_normal() -> None:
    """Seeds, batches and places have noise of their own, with mean 0 and variance 1, and torch's generator is left alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = [noise(torch.Size((3, 4, 8, 8)), seed=seed, k=k) for seed in range(4) for k in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(image.flatten().tolist()) for batch in drawn for image in batch}) == 48
    values = torch.cat([d.flatten() for d in drawn])
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5


def test_fold_keeps_numbers_apart() -> None:
    """No two short rows of small numbers fold to the same seed, and the result is one that torch takes."""
    rows = [(s, *rest) for s in (0, 1, 11, 42, 111) for n in range(13) for rest in [(), (n,), *((n, m) for m in range(13))]]
    folded = {fold(*row) for row in set(rows)}
    assert len(folded) == len(set(rows))
    assert all(0 <= value < 2**63 for value in folded)
    assert fold(42, 7, 1) == 8873385399728680736, "a change here changes every run that is resumed"


def test_a_drawn_latent_is_mean_plus_deviation_times_noise() -> None:
    """``latent_draw: sample`` draws by (seed, k) and place, the same whenever batch k is asked for."""
    plan = make_plan(12, batch=4, shapes=1)

    def moments(placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4, 8, 8), float(placement.item.path.stem)), torch.full((4, 8, 8), 0.5)

    def texts(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(captions), 3, 2), torch.zeros(len(captions), 2)

    cache = cast(Cache, SimpleNamespace(plan=plan, latent=lambda p: moments(p)[0], moments=moments, texts=texts))
    drawn = Batches(cache, seed=3, caption_dropout=0.0, latent_draw="sample")
    mean = Batches(cache, seed=3, caption_dropout=0.0)
    spread = torch.cat([drawn[k].latent_BCHW - mean[k].latent_BCHW for k in range(12)])
    assert spread.std() == pytest.approx(0.5, rel=0.03)
    assert abs(spread.mean()) < 0.02
    assert torch.equal(drawn[7].latent_BCHW, Batches(cache, seed=3, caption_dropout=0.0, latent_draw="sample")[7].latent_BCHW)
    assert len({tuple(row.flatten().tolist()) for row in spread}) == len(spread)
    assert not torch.allclose(spread[0], 0.5 * noise(torch.Size((4, 4, 8, 8)), seed=3, k=0)[0], atol=0.05), "not the noise of training"


def test_a_data_sets_offset_moves_its_noise_levels() -> None:
    """``timestep_sampling_offset`` reaches the batch, and an offset in the logit moves every level up before the shift."""
    from sd3tune.training.sigmas import draw, shift

    rows = make_plan(2, batch=2, shapes=1)
    dataset = Dataset(id="d", instance_data_dir="d", timestep_sampling_offset=1.5)
    moved = replace(rows, train=tuple(replace(p, item=replace(p.item, dataset=dataset)) for p in rows.train))
    cache = cast(
        Cache, SimpleNamespace(plan=moved, latent=lambda p: torch.zeros(1, 2, 2), texts=lambda c: (torch.zeros(2), torch.zeros(2)))
    )
    assert Batches(cache, seed=3, caption_dropout=0.0)[0].sigma_offset == 1.5
    plain = draw(64, scale=1.0, factor=1.0, stratified=True, rng=generator(1), offset=0.0).double()
    higher = draw(64, scale=1.0, factor=3.0, stratified=True, rng=generator(1), offset=1.5).double()
    assert torch.allclose(higher, shift(torch.sigmoid(torch.logit(plain) + 1.5), 3.0), atol=1e-5)
