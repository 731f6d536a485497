"""One update: its gradient, its limits, and that nothing changes when it fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd3tune.data import Bucket, Dataset, Item, Placement
from sd3tune.errors import CheckpointError, TrainingError
from sd3tune.training import flow, sigmas
from sd3tune.training.batches import Batch, generator, noise
from sd3tune.training.engine import Engine, Rules
from sd3tune.training.schedules import learning_rate
from sd3tune.validation.evaluate import evaluation_loss

RULES = Rules(
    seed=5, accumulation=2, sigmoid_scale=1.0, shift=3.0, stratified=True, schedule="constant", warmup=0, total=10, max_grad_norm=1e9
)


class Toy(nn.Module):
    """A velocity with two weights, named like an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, noisy: Tensor, sigma: Tensor, joint: Tensor, pooled: Tensor) -> Tensor:
        return self.a[0] * noisy + self.a[1] * sigma.view(-1, 1, 1, 1) + self.b


class ToyBatches:
    """Batch k has 2 images, except that every second one is short."""

    def ids(self, k: int) -> tuple[str, ...]:
        return tuple(f"{k}.{i}" for i in range(2 - k % 2))

    def part(self, k: int, places: range) -> Batch:
        latents = torch.stack([torch.full((4, 2, 2), float(k + i)) for i in places])
        return Batch(tuple(self.ids(k)[i] for i in places), latents, torch.zeros(len(places), 1, 1), torch.zeros(len(places), 1))

    def __getitem__(self, k: int) -> Batch:
        return self.part(k, range(len(self.ids(k))))


def engine(**changes: Any) -> tuple[Engine, Toy]:
    toy = Toy()
    weights = {"x.lora_A.weight": toy.a, "x.lora_B.weight": toy.b}
    return Engine(toy, weights, ToyBatches(), Rules(**{**RULES.__dict__, **changes})), toy  # type: ignore[arg-type]


def mean_loss(toy: Toy, ks: range) -> Tensor:
    """The mean over all images of several batches, written out."""
    losses = []
    for k in ks:
        batch = ToyBatches()[k]
        sigma = sigmas.draw(len(batch.ids), scale=1.0, factor=3.0, stratified=True, rng=generator(5, k, 4))
        losses.append(
            flow.loss(
                toy, batch.latent_BCHW, batch.joint_BLD, batch.pooled_BP, sigma_B=sigma,
                noise_BCHW=noise(batch.latent_BCHW.shape, seed=5, k=k),
            )
        )  # fmt: skip
    return torch.cat(losses).mean()


def test_an_update_is_adamw_on_the_mean_over_all_its_images() -> None:
    """Three updates of 2 + 1 images equal a hand-written loop with torch's AdamW on the mean of the 3 losses."""
    made, toy = engine()
    by_hand = Toy()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    for update in range(3):
        record = made.update(peak_learning_rate=0.01)
        loss = mean_loss(by_hand, range(2 * update, 2 * update + 2))
        assert record.loss == pytest.approx(float(loss), rel=1e-5)
        assert len(record.losses) == len(record.sigmas) == len(record.items) == 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(toy.a, by_hand.a, atol=1e-6)
    assert torch.allclose(toy.b, by_hand.b, atol=1e-6)


def test_gradient_norm_is_measured_before_clipping() -> None:
    """The recorded norm is that of the whole gradient, and clipping scales the update's gradient to the limit."""
    made, _ = engine(max_grad_norm=1e-3)
    toy = Toy()
    mean_loss(toy, range(2)).backward()
    norm = math.hypot(*toy.a.grad.tolist(), float(toy.b.grad))  # type: ignore[union-attr, arg-type]
    assert made.update(peak_learning_rate=0.01).grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-3
    clipped = math.hypot(*made.weights["x.lora_A.weight"].grad.tolist(), float(made.weights["x.lora_B.weight"].grad))  # type: ignore[union-attr, arg-type]
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """The error names step, losses and items; weights, moments and the step number are as before, and the next try repeats it."""
    made, toy = engine()
    made.update(peak_learning_rate=0.01)
    before = made.state_dict()
    made.velocity = lambda *a: toy(*a) * float("nan")
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"step 2: the gradient is nan .*items 2.0, 2.1, 3.0 .*not applied.*learning_rate"):
            made.update(peak_learning_rate=0.01)
    after = made.state_dict()
    assert after["updates"] == before["updates"] == 1
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(after[part][name], before[part][name]) for name in before[part])


def test_ten_updates_that_move_nothing_are_an_error() -> None:
    """A B that is still zero after 10 updates stops the run."""
    made, toy = engine()
    made.velocity = lambda noisy, *_: noisy * toy.a[0] + 0 * toy.b
    with pytest.raises(TrainingError, match="adapter has not moved"):
        for _ in range(10):
            made.update(peak_learning_rate=0.01)
    assert made.updates == 10


def test_what_torch_draws_in_an_update_follows_the_seed_and_k() -> None:
    """Adapter dropout and the like: other numbers in each update, the same whatever was drawn before, and none of it leaks out."""
    drawn: list[list[float]] = []
    for start in (1, 2):
        made, toy = engine()
        drawn.append([])

        def velocity(*a: torch.Tensor, toy: Toy = toy, row: list[float] = drawn[-1]) -> torch.Tensor:
            row.append(float(torch.rand(())))
            return toy(*a)

        made.velocity = velocity
        made.guard.began = 0.5  # else the guard looks at some batches first
        torch.manual_seed(start)
        for _ in range(3):
            made.update(peak_learning_rate=0.01)
        after = float(torch.rand(()))
        torch.manual_seed(start)
        assert after == float(torch.rand(())), "the process's own generator is where it was"
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 6, "three updates of two batches each"


def test_the_evaluation_loss_is_the_mean_over_pictures_and_levels() -> None:
    """Twelve pictures of two sizes, a model that says zero: the mean of the noise's square, at every step the same."""
    dataset = Dataset(id="d", instance_data_dir="d", dataset_type="eval")
    rows = [Placement(Item(dataset, Path(f"{n}"), 64, 64, f"{n}", ("x",)), Bucket(64, 64 + 16 * (n % 2))) for n in range(12)]
    latents = {p.item.id: torch.full((16, p.bucket.height // 8, 8), 0.1 * n) for n, p in enumerate(rows)}
    cache: Any = SimpleNamespace(
        plan=SimpleNamespace(evaluation=tuple(rows)), latent=lambda p: latents[p.item.id],
        texts=lambda captions: (torch.zeros(len(captions), 3, 2), torch.zeros(len(captions), 2)),
    )  # fmt: skip
    asked: list[float] = []

    def zero(noisy: torch.Tensor, sigma: torch.Tensor, joint: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        asked.extend(sigma.tolist())
        return torch.zeros_like(noisy)

    record = evaluation_loss(zero, cache, sigmas=(0.25, 0.75), device=torch.device("cpu"), step=3)
    wanted = sum(1 + (0.1 * n) ** 2 for n in range(12)) / 12
    assert record.images == 12
    assert record.loss == pytest.approx(wanted, rel=0.02)
    assert record.losses_by_sigma == pytest.approx((wanted, wanted), rel=0.02)
    assert sorted(asked) == [0.25] * 12 + [0.75] * 12
    assert evaluation_loss(zero, cache, sigmas=(0.25, 0.75), device=torch.device("cpu"), step=99).losses_by_sigma == record.losses_by_sigma


def test_state_round_trip_continues_bitwise() -> None:
    """2 + 2 updates through a state dict are the 4 updates."""
    whole, _ = engine()
    losses = [whole.update(peak_learning_rate=0.05).loss for _ in range(4)]
    first, _ = engine()
    halves = [first.update(peak_learning_rate=0.05).loss for _ in range(2)]
    second, _ = engine()
    second.load_state_dict(first.state_dict())
    halves += [second.update(peak_learning_rate=0.05).loss for _ in range(2)]
    assert halves == losses
    assert all(torch.equal(whole.state_dict()["optimizer"][k], v) for k, v in second.state_dict()["optimizer"].items())


def test_a_state_of_another_adapter_is_refused_and_changes_nothing() -> None:
    """The message counts and names the differing weights."""
    made, toy = engine()
    state = made.state_dict()
    state["adapter"] = {"y.lora_A.weight": torch.zeros(2), "x.lora_B.weight": torch.tensor(9.0)}
    with pytest.raises(CheckpointError, match=r"2 weights differ, e\.g\. x\.lora_A"):
        made.load_state_dict(state)
    assert float(toy.b) == 0


def test_measuring_the_time_changes_nothing() -> None:
    """``seconds_per_update`` leaves no gradient and no trace in the next update."""
    made, _ = engine()
    plain, _ = engine()
    assert made.seconds_per_update() > 0
    assert all(w.grad is None for w in made.weights.values())
    assert made.update(peak_learning_rate=0.01).losses == plain.update(peak_learning_rate=0.01).losses


@pytest.mark.parametrize(
    ("schedule", "update", "expected"),
    [
        ("constant", 0, 1.0), ("constant_with_warmup", 0, 0.1), ("constant_with_warmup", 9, 1.0), ("constant_with_warmup", 99, 1.0),
        ("cosine", 4, 0.5), ("cosine", 10, 1.0), ("cosine", 60, 0.5), ("cosine", 110, 0.0),
    ],
)  # fmt: skip
def test_learning_rate_schedule(schedule: str, update: int, expected: float) -> None:
    """Warm-up of 10 is linear; cosine is half way down in the middle and zero at the end of 110."""
    assert learning_rate(update, peak=1.0, schedule=schedule, warmup=10, total=110) == pytest.approx(expected)


def test_the_average_is_its_closed_form_after_4000_steps() -> None:
    """A weight that jumps once: the average follows as the product of the decays says, to 1e-6 (a bf16 average would stand still)."""
    from sd3tune.training.engine import ema_decay

    made, _ = engine()
    made.rules = replace(made.rules, ema_decay=0.995)
    name, weight = next(iter(made.weights.items()))
    made.ema = {name: weight.detach().clone()}
    start = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.3).add_(0.01)
    left = 1.0
    for step in range(1, 4001):
        made._follow(step)
        left *= ema_decay(step, 0.995)
        if step in (1, 10, 100, 4000):
            expected = weight.detach() + (start - weight.detach()) * left
            assert torch.allclose(made.ema[name], expected, atol=1e-6)
    assert torch.allclose(made.ema[name], weight.detach(), atol=1e-6)
    assert [round(ema_decay(n, 0.9999), 3) for n in (1, 2, 10, 100, 1000)] == [0.0, 0.182, 0.526, 0.917, 0.991]


def test_a_scaled_loss_gives_the_same_updates_and_survives_an_overflow() -> None:
    """With a scale the adapter is what it is without (powers of two); an overflow halves the scale and does the same batches again."""
    plain, _ = engine()
    scaled, _ = engine()
    scaled.rules = replace(scaled.rules, scaled=True)
    scaled._scale = 2.0**10
    for _ in range(3):
        assert plain.update(peak_learning_rate=0.05).loss == scaled.update(peak_learning_rate=0.05).loss
    assert all(torch.equal(plain.weights[name], scaled.weights[name]) for name in plain.weights)

    real, overflows = scaled._backward, [2.0**10, 2.0**9]

    def overflowing(k: int, images: int) -> Any:
        part = real(k, images)
        if scaled._scale in overflows:
            next(w for w in scaled.weights.values() if w.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return part

    scaled._backward = overflowing  # type: ignore[method-assign]
    assert scaled.update(peak_learning_rate=0.05).loss == plain.update(peak_learning_rate=0.05).loss
    assert scaled._scale == 2.0**8
    assert all(torch.equal(plain.weights[name], scaled.weights[name]) for name in plain.weights)
    state = scaled.state_dict()
    again, _ = engine()
    again.rules = replace(again.rules, scaled=True)
    again.load_state_dict(state)
    assert again._scale == 2.0**8
