"""The guard: what is judged before an update, and that nothing is left changed by one that is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from test_engine import ToyBatches, engine

from sd3tune.training.batches import Batch
from sd3tune.training.guard import BLOCK_FACTOR, GRADIENT_FACTOR, LOSS_FACTOR, Guard, GuardError, block_of, block_sizes, due, worst_block


def bits(made: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an engine's state, copied."""
    state = made.state_dict()
    return {f"{part}/{name}": value.clone() for part in ("adapter", "optimizer") for name, value in state[part].items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Poisoned(ToyBatches):
    """One image of batch 6 (update 4) is not a number."""

    def part(self, k: int, places: range) -> Batch:
        batch = super().part(k, places)
        if k == 6:
            batch.latent_BCHW[1] = math.nan
        return batch


def test_a_latent_that_is_no_number_changes_nothing_and_is_named() -> None:
    """NaN in one image of the fourth update: weights, moments and count are those before it, bit for bit."""
    made, _ = engine()
    made.batches = Poisoned()
    for _ in range(3):
        made.update(peak_learning_rate=0.01)
    before, random = bits(made), torch.get_rng_state()
    with pytest.raises(GuardError, match=r"step 4: the gradient is nan and the loss nan; items 6\.1 at noise levels 0\.\d+") as caught:
        made.update(peak_learning_rate=0.01)
    assert equal(bits(made), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert made.updates == 3
    assert made.whole
    refusal = caught.value.refusal
    assert (refusal.batch, refusal.items, refusal.runaway) == (3, ("6.1",), False)
    made.skip(refusal.batch)
    assert made.update(peak_learning_rate=0.01).items == ("8.0", "8.1", "9.0"), "the next update takes the batches after those"
    assert made.state_dict()["skipped"] == [3]


def test_a_poisoned_gradient_names_its_block() -> None:
    """A gradient made infinite in one weight is refused, and the block with it is named."""
    made, toy = engine()
    made.update(peak_learning_rate=0.01)
    before = bits(made)
    handle = toy.b.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GuardError, match="block x") as caught:
        made.update(peak_learning_rate=0.01)
    handle.remove()
    assert equal(bits(made), before)
    assert not caught.value.refusal.runaway


def test_weights_that_run_away_go_back_to_where_they_were_well() -> None:
    """A learning rate of 1000: refused at the next update, and weights and moments are those before the bad one, bit for bit."""
    made, _ = engine()
    for _ in range(4):
        made.update(peak_learning_rate=0.01)
    before = bits(made)
    made.update(peak_learning_rate=1000.0)
    with pytest.raises(GuardError) as caught:
        made.update(peak_learning_rate=1000.0)
    assert caught.value.refusal.runaway
    assert re.search(r"root mean square\); block [\w.]+\. The update was not applied\. Lower learning_rate, or set", str(caught.value))
    assert made.updates == 4
    assert equal(bits(made), before)


@pytest.mark.parametrize(
    ("loss", "norm", "said", "runaway"),
    [
        (0.5, 1.0, "", False),
        (LOSS_FACTOR * 2.0 - 0.01, 1.0, "", False),
        (LOSS_FACTOR * 2.0 + 0.01, 1.0, "the loss is 6.01", True),
        (0.5, 2.0 * GRADIENT_FACTOR - 0.1, "", False),
        (0.5, 2.0 * GRADIENT_FACTOR + 0.1, "the gradient's norm is 60.1", True),
        (math.nan, 1.0, "the gradient is 1.0 and the loss nan", False),
        (0.5, math.inf, "the gradient is inf", False),
    ],
)
def test_limits(loss: float, norm: float, said: str, runaway: bool) -> None:
    """The largest of the window (for losses here what predicting nothing costs, 2.0) times the factor is the limit."""
    guard = Guard()
    for number in range(8):
        guard.accept(0.5, 2.0 if number == 3 else 1.0, nothing=2.0)
    found, is_runaway = guard.objection(loss, norm, nothing=2.0)
    assert found.startswith(said)
    assert bool(found) == bool(said)
    assert is_runaway == runaway


def test_the_window_forgets_and_gradients_need_some_history() -> None:
    """A large norm 50 updates ago counts no more; with four updates no norm is judged."""
    guard = Guard()
    guard.accept(0.5, 1e6, nothing=2.0)
    for _ in range(3):
        guard.accept(0.5, 1.0, nothing=2.0)
    assert guard.objection(0.5, 1e9, nothing=2.0) == ("", False)
    for _ in range(46):
        guard.accept(0.5, 1.0, nothing=2.0)
    assert guard.objection(0.5, 1e5, nothing=2.0) == ("", False)
    guard.accept(0.5, 1.0, nothing=2.0)
    assert "norm" in guard.objection(0.5, 1e5, nothing=2.0)[0]


def test_a_model_that_has_forgotten_everything() -> None:
    """The mean of eight losses near that of predicting nothing, from one that began well: broken; one that began so is not."""
    for first, said in ((0.8, True), (1.3, False)):
        guard = Guard(began=first / 2)
        for _ in range(2):
            guard.accept(first, 1.0, nothing=2.0)
        for _ in range(5):
            assert guard.objection(1.7, 1.0, nothing=2.0)[1] is False
            guard.accept(1.7, 1.0, nothing=2.0)
        assert guard.objection(1.7, 1.0, nothing=2.0)[1] is False, "five of the last eight and this one: 0.74 on average is not enough"
        guard.accept(1.7, 1.0, nothing=2.0)
        why, runaway = guard.objection(1.7, 1.0, nothing=2.0)
        assert ("the last 8 losses are 0.79 of predicting nothing, and began at 0.40" in why, runaway) == (said, said)


def test_a_block_that_grows() -> None:
    """Ten times its own size since the last look, counted from 0.01: 0.1 is the limit of one that has hardly begun."""
    guard = Guard(blocks={"a": 0.02, "b": 1e-6})
    assert guard.grown({"a": 0.02 * BLOCK_FACTOR, "b": 0.01 * BLOCK_FACTOR}) == ("", "")
    assert guard.grown({"a": 0.0201 * BLOCK_FACTOR, "b": 0.0})[0] == "a"
    assert guard.grown({"a": 0.02, "b": 0.0101 * BLOCK_FACTOR})[0] == "b"
    assert guard.grown({"a": math.nan}) == ("a", "the adapter is not finite")


def test_sizes_and_names_of_blocks() -> None:
    """Root mean square over all weights of a block; names of peft and of LyCORIS."""
    weights = {
        "transformer_blocks.3.attn.to_q.lora_A.weight": torch.tensor([[3.0, 4.0]]),
        "transformer_blocks.3.attn.to_q.lora_B.weight": torch.zeros(2, 1),
        "lycoris_transformer_blocks_11_attn_to_k.lokr_w1": torch.full((2, 2), 2.0),
    }
    assert block_sizes(weights) == {"transformer_blocks.3": pytest.approx(2.5), "transformer_blocks.11": pytest.approx(2.0)}
    assert block_of("context_embedder.lora_A.weight") == "context_embedder"
    some = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    assert worst_block(some) == ""
    some["lycoris_transformer_blocks_11_attn_to_k.lokr_w1"].grad = torch.ones(2, 2)
    some["transformer_blocks.3.attn.to_q.lora_A.weight"].grad = torch.tensor([[0.0, 1.0]])
    assert worst_block(some) == "transformer_blocks.11"
    assert [step for step in range(32) if due(step)] == [*range(11), 20, 30]
