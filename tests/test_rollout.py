"""Scheduled sampling: who walks and how far, what is learned there, and that it costs nothing when it is off."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from test_engine import Toy, ToyBatches, engine
from torch import Tensor

import sd3tune as st
from sd3tune.assembly import rollout_of
from sd3tune.data.simpletuner import from_simpletuner
from sd3tune.errors import ConfigError
from sd3tune.training import sigmas, solvers
from sd3tune.training.batches import Batch, generator, noise
from sd3tune.training.reflexflow import Reflex
from sd3tune.training.rollout import Rollout, grid, path
from sd3tune.training.velocity import SamplerVelocity, TransformerVelocity

ALWAYS = Rollout(3, probability=1.0)


# --- who, and how far ------------------------------------------------------------------------------------------------


def test_the_ramp() -> None:
    """0 before the start, from one probability to the other over the ramp, then the second for good; a start of 0 is 0."""
    line = Rollout(3, probability=1.0, prob_start=0.0, prob_end=0.5, ramp_steps=100, start_step=20)
    assert [line.chance(update) for update in (0, 19, 20, 45, 70, 120, 10_000)] == pytest.approx([0, 0, 0, 0.125, 0.25, 0.5, 0.5])
    down = replace(line, prob_start=0.8, prob_end=0.2, cosine=True)
    assert [down.chance(update) for update in (19, 20, 45, 70, 120)] == pytest.approx([0, 0.8, 0.8 - 0.3 * (1 - math.sqrt(0.5)), 0.5, 0.2])
    flat = Rollout(3, probability=0.3, prob_end=0.9, start_step=5)
    assert [flat.chance(update) for update in (4, 5, 1000)] == [0, 0.3, 0.3], "without a ramp, its ends say nothing"


def test_strategies() -> None:
    """Of 4000 pictures each count of steps comes as often as its share; half of all are rolled when the probability is a half."""
    wanted = {"uniform": (1 / 3, 1 / 3, 1 / 3), "biased_early": (3 / 6, 2 / 6, 1 / 6), "biased_late": (1 / 6, 2 / 6, 3 / 6)}
    drawn = {}
    for strategy, shares in wanted.items():
        rollout = Rollout(3, strategy, probability=0.5)  # type: ignore[arg-type]
        assert rollout.shares == pytest.approx(shares)
        offsets = [o for k in range(40) for o in rollout.offsets(seed=1, k=k, update=0, places=range(100))]
        count = Counter(offsets)
        assert count[0] / 4000 == pytest.approx(0.5, abs=0.03)
        assert [count[o] / (4000 - count[0]) for o in (1, 2, 3)] == pytest.approx(shares, abs=0.035)
        drawn[strategy] = offsets
    assert all(early <= late for early, late in zip(drawn["biased_early"], drawn["biased_late"], strict=True))


def test_draws_are_a_function_of_seed_batch_and_place() -> None:
    """Splitting a batch changes nothing; another seed, another batch or another place does."""
    half = Rollout(5, probability=0.5)
    whole = half.offsets(seed=1, k=7, update=3, places=range(64))
    assert half.offsets(seed=1, k=7, update=99, places=range(32)) + half.offsets(seed=1, k=7, update=0, places=range(32, 64)) == whole
    assert half.offsets(seed=1, k=7, update=3, places=[40, 2]) == (whole[40], whole[2])
    assert whole not in (half.offsets(seed=2, k=7, update=3, places=range(64)), half.offsets(seed=1, k=8, update=3, places=range(64)))
    assert len(set(whole)) == 6
    more = replace(half, probability=0.8).offsets(seed=1, k=7, update=3, places=range(64))
    assert all(b == a or not a for a, b in zip(whole, more, strict=True)), "a higher probability adds pictures and keeps the others"


# --- an update -------------------------------------------------------------------------------------------------------


class Spy:
    """The toy's velocity, as a sampler calls it: keeps what it was asked."""

    def __init__(self, toy: Any) -> None:
        self.toy, self.asked, self.points = toy, list[Tensor](), list[Tensor]()

    def __call__(self, noisy: Tensor, sigma: Tensor, joint: Tensor, pooled: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(sigma.clone())
        self.points.append(noisy.clone())
        return self.toy(noisy, sigma, joint, pooled)  # type: ignore[no-any-return]


def rolled(rollout: Rollout | None = ALWAYS, **changes: Any) -> tuple[Any, Toy, Spy]:
    made, toy = engine(**changes, rollout=rollout)
    made._walker = Spy(toy)
    made.guard.began = 0.5
    return made, toy, made._walker  # type: ignore[return-value]


def by_hand(toy: Toy, k: int, rollout: Rollout, update: int) -> tuple[Tensor, Tensor, list[int]]:
    """Latents seen and velocities to find in batch k, image by image with Euler's steps written out."""
    batch = ToyBatches()[k]
    count = len(batch.ids)
    sigma = sigmas.draw(count, scale=1.0, factor=3.0, stratified=True, rng=generator(5, k, 4))
    noises, seen, wanted, steps = noise(batch.latent_BCHW.shape, seed=5, k=k), [], [], []
    for place, offset in enumerate(rollout.offsets(seed=5, k=k, update=update, places=range(count))):
        x, n, levels = batch.latent_BCHW[place], noises[place], path(float(sigma[place]), offset, grid(3.0))
        z = (1 - levels[0]) * x + levels[0] * n
        for now, then in pairwise(levels):
            with torch.no_grad():
                z = z + (then - now) * toy(z[None], torch.tensor([now]), z, z)[0]
        seen.append(z)
        wanted.append((z - x) / levels[-1] if rollout.reaimed and len(levels) > 1 else n - x)
        steps.append(len(levels) - 1)
    losses = (toy(torch.stack(seen), sigma, sigma, sigma) - torch.stack(wanted)).square().flatten(1).mean(1)
    return losses, torch.stack(wanted), steps


@pytest.mark.parametrize("reaimed", [True, False])
def test_an_update_learns_where_the_model_walked_to(reaimed: bool) -> None:
    """Losses, gradient and number of passes of three updates equal those written out image by image; the walk is the live model's."""
    rollout = Rollout(3, probability=0.7, sampler="euler", reaimed=reaimed)
    made, toy, spy = rolled(rollout)
    for update in range(3):
        fresh = Toy()
        fresh.load_state_dict(toy.state_dict())
        parts = [by_hand(fresh, k, rollout, update) for k in (2 * update, 2 * update + 1)]
        losses = torch.cat([part[0] for part in parts])
        losses.mean().backward()
        spy.asked.clear()
        record = made.update(peak_learning_rate=0.05)
        assert record.losses == pytest.approx(losses.tolist(), rel=1e-4)
        norm = math.hypot(*fresh.a.grad.tolist(), float(fresh.b.grad))  # type: ignore[union-attr, arg-type]
        assert record.grad_norm == pytest.approx(norm, rel=1e-4)
        assert record.extra_forwards == sum(sum(part[2]) for part in parts) == sum(len(levels) for levels in spy.asked)
    plain, *_ = rolled(None)
    assert plain.update(peak_learning_rate=0.05).losses != rolled(rollout)[0].update(peak_learning_rate=0.05).losses


def test_samplers_orders_and_strategies_change_what_is_seen() -> None:
    """On a velocity that bends, the losses of some batches differ for each of them; dpm of order 1 is Euler."""

    def losses(**changes: Any) -> tuple[float, ...]:
        made, toy, _ = rolled(replace(Rollout(4, probability=1.0), **changes), shift=0.5)
        made.velocity = lambda z, s, *_: toy.a[0] * torch.sin(z) + toy.b + torch.cos(4 * s).view(-1, 1, 1, 1)
        made._walker = None
        return tuple(value for k in range(8) for value in made._forward(k)[1].loss_B.tolist())

    kinds: list[dict[str, Any]] = [
        {}, {"sampler": "euler"}, {"sampler": "dpm"}, {"order": 1}, {"strategy": "biased_early"}, {"strategy": "biased_late"},
        {"max_offset": 2}, {"reaimed": False},
    ]  # fmt: skip
    assert len({losses(**kind) for kind in kinds}) == len(kinds)
    assert losses(sampler="dpm", order=1) == losses(sampler="euler")


def test_the_ramp_follows_the_updates() -> None:
    """With two batches an update and a start after two updates, the first two are the plain ones, bit by bit, and the third is not."""
    made, *_ = rolled(replace(ALWAYS, start_step=2))
    plain, *_ = rolled(None)
    rows = [(made.update(peak_learning_rate=0.05), plain.update(peak_learning_rate=0.05)) for _ in range(3)]
    assert [ours.extra_forwards > 0 for ours, _ in rows] == [False, False, True]
    assert [ours.losses == theirs.losses for ours, theirs in rows] == [True, True, False]


@pytest.mark.parametrize("rollout", [Rollout(3), Rollout(3, ramp_steps=100, start_step=50, prob_end=1.0)])
def test_off_is_the_plain_run_bit_by_bit(rollout: Rollout) -> None:
    """Probability 0, or a ramp still to come: same losses, same weights, and the model is not called once more."""
    made, _, spy = rolled(rollout)
    plain, *_ = rolled(None)
    for _ in range(4):
        ours, theirs = made.update(peak_learning_rate=0.05), plain.update(peak_learning_rate=0.05)
        assert (ours.losses, ours.grad_norm, ours.extra_forwards) == (theirs.losses, theirs.grad_norm, 0)
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in made.weights.items())
    assert not spy.asked


def test_what_the_guard_began_with_and_the_time_are_measured_without_rollouts() -> None:
    made, _, spy = rolled()
    plain, *_ = rolled(None)
    made.guard.began = plain.guard.began = None
    assert made._beginning() == plain._beginning()
    assert made.seconds_per_update() > 0
    assert not spy.asked


def test_the_share_of_nothing_is_measured_against_what_is_to_be_found() -> None:
    """A model that says zero loses exactly what nothing loses, however far a drift near the picture makes the target."""
    made, _, _ = rolled(Rollout(3, probability=1.0), shift=0.05)
    made.velocity = lambda noisy, *_: 0 * made.weights["x.lora_B.weight"] + 0 * noisy
    _, part = made._forward(0)
    _, plain = made._forward(0, rolled=False)
    assert torch.equal(part.loss_B, part.nothing_B)
    assert not torch.equal(part.nothing_B, plain.nothing_B)


def test_a_resumed_run_rolls_the_same() -> None:
    """2 + 2 updates through a state dict are the 4 updates, ramp and all."""
    rollout = Rollout(3, prob_end=1.0, ramp_steps=3)
    whole, *_ = rolled(rollout)
    records = [whole.update(peak_learning_rate=0.05) for _ in range(4)]
    first, *_ = rolled(rollout)
    for _ in range(2):
        first.update(peak_learning_rate=0.05)
    second, *_ = rolled(rollout)
    second.load_state_dict(first.state_dict())
    again = [second.update(peak_learning_rate=0.05) for _ in range(2)]
    assert [r.losses for r in again] == [r.losses for r in records[2:]]
    assert [r.extra_forwards for r in again] == [r.extra_forwards for r in records[2:]]


def test_input_perturbation_is_for_the_pictures_that_do_not_walk() -> None:
    """A rolled picture is seen where the model walked to from exact mixtures, and the others with the extra noise."""
    rollout = Rollout(3, probability=0.5, sampler="euler")
    made, _, _ = rolled(rollout, perturbation=0.5)
    both, _, _ = rolled(rollout)
    plain, _, _ = rolled(None, perturbation=0.5)
    for k in range(8):
        offsets = rollout.offsets(seed=5, k=k, update=k // 2, places=range(2 - k % 2))
        ours, unperturbed, unrolled = (e._forward(k)[1].loss_B for e in (made, both, plain))
        for place, offset in enumerate(offsets):
            assert ours[place] == pytest.approx(float((unperturbed if offset else unrolled)[place]), rel=1e-5)


# --- masks and regularisation ----------------------------------------------------------------------------------------


class Sided:
    """Two pictures; the right halves are masked, and every second batch is regularisation data."""

    def __init__(self, *, masked: bool = False, regularisation: bool = False) -> None:
        self.masked, self.regularisation = masked, regularisation

    def ids(self, k: int) -> tuple[str, ...]:
        return ("a", "b")

    def part(self, k: int, places: range) -> Batch:
        rows = list(places)
        mask = torch.tensor([1.0, 0.0]).repeat(len(rows), 2, 1) if self.masked else None
        latent, texts = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(k))[rows], torch.zeros(len(rows), 1, 1)
        ids = tuple(self.ids(k)[place] for place in rows)
        return Batch(ids, latent, texts, texts[:, 0], mask_BHW=mask, regularisation=self.regularisation)


def test_prior_and_student_see_the_same_rolled_pictures() -> None:
    """The target is the prior's prediction there, whatever the aim; the walk is the student's; ReflexFlow keeps out."""
    for reflex in (None, Reflex(1.0, 10.0, 1.0)):
        made, toy, spy = rolled(replace(ALWAYS, reflex=reflex))
        seen: list[tuple[Tensor, Tensor]] = []
        student: list[Tensor] = []

        def prior(noisy: Tensor, sigma: Tensor, *_: Tensor, rows: list[Any] = seen) -> Tensor:
            rows.append((noisy, sigma))
            return 0.3 * noisy

        def velocity(*given: Tensor, toy: Toy = toy, rows: list[Tensor] = student) -> Tensor:
            rows.append(given[0])
            return toy(*given)

        made.batches, made.prior, made.velocity = Sided(regularisation=True), prior, velocity
        loss, part = made._forward(0)
        assert torch.equal(seen[0][0], student[0])
        assert part.loss_B.tolist() == pytest.approx((toy(*seen[0], None, None) - 0.3 * seen[0][0]).square().flatten(1).mean(1).tolist())
        assert float(loss.detach()) == pytest.approx(float(part.loss_B.sum()))
        assert part.extra_forwards == sum(len(levels) for levels in spy.asked) > 0
        exact = made.batches.part(0, range(2)).latent_BCHW + part.sigma_B.view(-1, 1, 1, 1)
        assert not torch.allclose(student[0], exact)


def test_what_a_mask_hides_teaches_nothing() -> None:
    """A weight that acts on the hidden half alone has no gradient, rolled or not, and the rest has the gradient of half a picture."""
    for reflex in (None, Reflex(1.0, 10.0, 1.0), Reflex(0.0, 0.0, 1.0)):
        made, _toy, _ = rolled(replace(ALWAYS, reflex=reflex))
        made.batches = Sided(masked=True)
        left, right = (torch.tensor(0.4, requires_grad=True) for _ in range(2))
        made._walker = None

        def velocity(noisy: Tensor, *_: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            return torch.stack([left, right]) * noisy

        made.velocity = velocity
        loss, part = made._forward(0)
        loss.backward()
        assert part.extra_forwards > 0
        assert left.grad
        assert right.grad is not None
        assert float(right.grad) == pytest.approx(0, abs=1e-6)


# --- a run -----------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"validation_prompt": (), "lora_dropout": 0.2}
ON: dict[str, Any] = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 0.8}


def test_a_run_without_rollouts_is_the_plain_run(bench: Workbench) -> None:
    """On the playground, with adapter dropout: a probability of 0 changes no bit, another one does; the evaluation never rolls."""
    off = {**ON, "scheduled_sampling_probability": 0.0, "scheduled_sampling_reflexflow": True}
    runs = [bench.trainer(**QUICK, **more) for more in ({}, off, ON)]
    records = [[run.step() for _ in range(2)] for run in runs]
    states = [run.engine.state_dict()["adapter"] for run in runs]
    assert [r.losses for r in records[0]] == [r.losses for r in records[1]]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert [r.losses for r in records[0]] != [r.losses for r in records[2]]
    assert [sum(r.extra_forwards for r in row) for row in records[:2]] == [0, 0]
    assert all(r.extra_forwards > 0 for r in records[2])
    runs[2].engine.load_state_dict(runs[0].engine.state_dict())
    assert runs[2].evaluate().losses_by_sigma == runs[0].evaluate().losses_by_sigma
    assert "rollout " not in str(runs[0].manifest)
    assert rollout_of(bench.config(**{**ON, "scheduled_sampling_max_step_offset": 0})) is None


def test_the_manifest_says_what_a_rollout_costs(bench: Workbench) -> None:
    """The expected passes of an update, a mean over the run, are those counted in the records; the plan's time is longer by them."""
    run = bench.trainer(
        **QUICK, **ON, scheduled_sampling_ramp_steps=10, scheduled_sampling_prob_end=1.0, scheduled_sampling_reflexflow=True
    )
    assert "rollout   0 of the pictures at update 0 to 1 at 10 in a line, up to 2 of 28 sampler steps (uniform) by unipc" in str(
        run.manifest
    )
    made, _ = engine(rollout=run.engine.rules.rollout, accumulation=1)
    total, images = 0, 0
    for k in range(run.total):
        for seed in range(20):
            made.rules = replace(made.rules, seed=seed)
            total += made._forward(k)[1].extra_forwards
            images += len(made.batches.ids(k))
    each_update = len(run.cache.plan.train) / run.cache.plan.updates_per_epoch
    assert run.manifest.extra_forwards == pytest.approx(total / images * each_update, rel=0.05)
    assert run.manifest.extra_forwards > 0.8 * 2.5 * each_update * 0.9, "most of 1.5 steps and one more, nearly always at the end"
    assert json.loads((run.folder.path / "manifest.json").read_text())["extra_forwards"] == run.manifest.extra_forwards


def test_the_walk_is_without_dropout_and_modes_come_back(bench: Workbench) -> None:
    """As a sampler calls it: twice the same with dropout on, and no gradient; the next training pass drops out again."""
    run = bench.trainer(**{**QUICK, "lora_dropout": 0.5})
    for _ in range(2):
        run.step()
    velocity = run.engine.velocity
    assert isinstance(velocity, TransformerVelocity)
    walker = SamplerVelocity(velocity)
    batch = run.engine.batches[0]
    given = batch.latent_BCHW, torch.full((len(batch.ids),), 0.6), batch.joint_BLD, batch.pooled_BP
    with run._judge._evaluating():
        wanted = velocity(*given).detach()
    first = walker(*given)
    assert torch.equal(first, wanted)
    assert not first.requires_grad
    assert run.transformer.training
    assert not torch.equal(velocity(*given), velocity(*given))
    walked = run.engine._walker
    assert isinstance(walked, SamplerVelocity)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"beta1 and _beta2 are both 0.*raise one"):
        st.presets.playground(
            **ON, scheduled_sampling_reflexflow=True, scheduled_sampling_reflexflow_beta1=0.0, scheduled_sampling_reflexflow_beta2=0.0
        )
    with pytest.raises(ConfigError, match=r"start_step \(150\) is not before the end of the run \(max_train_steps = 150\).*lower it"):
        st.presets.playground(**ON, scheduled_sampling_start_step=150)
    st.presets.playground(scheduled_sampling_start_step=300, scheduled_sampling_reflexflow_beta1=0.0)


def test_simpletuners_settings(tmp_path: Path) -> None:
    """The Dreambooth guide's rollout: timesteps of 1000 become sampler steps, ReflexFlow is written out, a start of 0 is 0."""
    prefix = "scheduled_sampling_"
    given = {"model_family": "sd3", "model_flavour": "sd35-medium", f"{prefix}probability": 1.0, f"{prefix}ramp_steps": 1000}
    (tmp_path / "config.json").write_text(
        json.dumps({**given, f"{prefix}max_step_offset": 10, f"{prefix}sampler": "dpm", f"{prefix}reflexflow": None})
    )
    made = from_simpletuner(tmp_path / "config.json")
    o, said = made.config.objective, str(made)
    assert (o.scheduled_sampling_max_step_offset, o.scheduled_sampling_reflexflow, o.scheduled_sampling_target) == (1, True, "straight")
    assert (o.scheduled_sampling_sampler, o.scheduled_sampling_prob_start, o.scheduled_sampling_prob_end) == ("dpm", 0.0, 0.5)
    assert (o.scheduled_sampling_reflexflow_alpha, o.scheduled_sampling_reflexflow_beta1) == (1.0, 10.0)
    for line in (
        "max_step_offset: 10 timesteps of 1000 there", "reflexflow: it is not set, which means on there", "target: straight",
        "sampler: there SD3 walks by Euler", "prob_start: a start of 0 means scheduled_sampling_probability (1) there",
    ):  # fmt: skip
        assert line in said, line
    (tmp_path / "config.json").write_text(json.dumps({**given, f"{prefix}max_step_offset": 0, f"{prefix}reflexflow": "none"}))
    off = from_simpletuner(tmp_path / "config.json")
    assert not off.config.objective.scheduled_sampling_reflexflow
    assert "which means on there" not in str(off)
    (tmp_path / "config.json").write_text(json.dumps({**given, f"{prefix}max_step_offset": 100, f"{prefix}reflexflow": False}))
    plain = from_simpletuner(tmp_path / "config.json").config.objective
    assert (plain.scheduled_sampling_max_step_offset, plain.scheduled_sampling_reflexflow) == (3, False)


def test_a_walk_without_a_walker_is_the_velocitys() -> None:
    """An engine that was given none walks with what it trains."""
    made, toy, _ = rolled()
    alone, _ = engine(rollout=ALWAYS)
    assert alone._forward(0)[1].loss_B.tolist() == made._forward(0)[1].loss_B.tolist()
    assert (
        solvers.walk(toy, torch.ones(1, 4, 2, 2), torch.zeros(1, 1, 1), torch.zeros(1, 1), paths=[(0.5,)], sampler="dpm", order=2).mean()
        == 1
    )
