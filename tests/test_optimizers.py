"""The update rules: what they compute, that bf16 follows fp32, and that a checkpoint holds all they remember."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import math
from typing import Any, get_args

import pytest
import torch
from conftest import Workbench
from safetensors.torch import load, save
from test_engine import ToyBatches
from test_trainer import same_state
from torch import Tensor, nn

import sd3tune as st
from sd3tune.config.optimizers import OPTIMIZERS
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.errors import CheckpointError, ConfigError
from sd3tune.models import capabilities
from sd3tune.training import optim
from sd3tune.training.adamw_bf16 import AdamWBF16, randomly_rounded
from sd3tune.training.engine import Engine
from sd3tune.training.optim import BUILDERS, Rule, averaged, new_optimizer, optimizer_state, require, restore_optimizer
from sd3tune.training.rules import Rules

RATES = {"prodigy": 1.0, "lion": 1e-3}


class Layers(nn.Module):
    """A velocity with a weight of 8192 values (bitsandbytes quantises the state of 4096 and more) and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(1)) / 8)
        self.b = nn.Parameter(torch.zeros(64, 4))

    def forward(self, noisy: Tensor, sigma: Tensor, joint: Tensor, pooled: Tensor) -> Tensor:
        flat = noisy.flatten(2).mean(2) @ torch.eye(4, 128) @ self.a.float()
        return noisy + torch.tanh(flat @ self.b.float() + flat[:, :4]).view(-1, 4, 1, 1)


def engine(name: str, **changes: Any) -> Engine:
    numbers: dict[str, Any] = {
        "seed": 5, "accumulation": 2, "sigmoid_scale": 1.0, "shift": 3.0, "stratified": True, "schedule": "constant_with_warmup",
        "warmup": 4, "total": 10, "max_grad_norm": 1.0, "rule": Rule(name),
    }  # fmt: skip
    layers = Layers()
    weights = {"x.lora_A.weight": layers.a, "x.lora_B.weight": layers.b}
    return Engine(layers, weights, ToyBatches(), Rules(**{**numbers, **changes}))  # type: ignore[arg-type]


def advance(made: Engine, name: str, updates: int) -> list[float]:
    return [made.update(peak_learning_rate=RATES.get(name, 1e-2)).loss for _ in range(updates)]


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint would give it back: tensors through safetensors, the rest through JSON."""
    tensors = {part: load(save({k: v.contiguous() for k, v in state[part].items()})) for part in ("adapter", "optimizer")}
    return {**json.loads(json.dumps({k: v for k, v in state.items() if k not in tensors})), **tensors}


# --- names and numbers -----------------------------------------------------------------------------------------------


def test_setting_table_and_builders_name_the_same_rules() -> None:
    """The setting's choices, what is known of them and how they are built agree, and the setting's meaning shows the defaults."""
    field = SECTION_CLASSES["optimizer"].__pydantic_fields__["optimizer"]  # type: ignore[attr-defined]
    assert set(get_args(field.annotation)) == set(OPTIMIZERS) == set(BUILDERS)
    assert "stableadamw: betas 0.9, 0.99, eps 1e-06, weight_decay 0.01" in field.description


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_shown_are_those_used(name: str) -> None:
    """The numbers of the table are what the built rule has, and the package's own defaults."""
    made, known = new_optimizer(Rule(name), {"a.b": nn.Parameter(torch.zeros(4))}, seed=0), OPTIMIZERS[name]
    own = {key: p.default for key, p in inspect.signature(type(made).__init__).parameters.items()}
    if name == "adamw":
        own = {key: p.default for key, p in inspect.signature(torch.optim.AdamW.__init__).parameters.items()}
    for key, value in known.options.items():
        assert own[key] == value, key
        assert made.defaults.get(key, value) == value
    if known.betas:
        assert tuple(own["betas"]) == known.betas
        assert made.defaults.get("betas", (made.defaults.get("beta1"), made.defaults.get("beta2"))) == known.betas


def test_betas_and_options_arrive() -> None:
    """What is set by hand is what the rule has."""
    made = new_optimizer(Rule("lion", 0.8, None, (("weight_decay", 0.5),)), {"a.b": nn.Parameter(torch.zeros(4))}, seed=0)
    assert (made.defaults["beta1"], made.defaults["beta2"], made.defaults["weight_decay"]) == (0.8, 0.99, 0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_finds_a_minimum(name: str) -> None:
    """300 steps on (w - 1)^2 from 0 end near 1; Adafactor's steps are relative to the weights, so it begins at a half and is told more."""
    relative = name == "adafactor"
    weight = nn.Parameter(torch.full((4096,), 0.5 if relative else 0.0))
    made = new_optimizer(Rule(name), {"a.b": weight}, seed=0)
    for step in range(300):
        made.param_groups[0]["lr"] = 1.0 if name == "prodigy" else 0.02 * (5 if relative else 1) * (1 - step / 300)
        made.zero_grad()
        (weight.float() - 1).square().sum().backward()
        made.step()
    found = averaged(made, {"a.b": weight}).get("a.b", weight).detach().float()
    assert float((found - 1).abs().max()) < (0.2 if name == "schedulefree" else 0.1)


def test_lion_is_its_formula() -> None:
    """Three updates by hand: sign of b1 m + (1 - b1) g, then m with b2."""
    weight, mean, by_hand = nn.Parameter(torch.tensor([1.0, -1.0])), torch.zeros(2), torch.tensor([1.0, -1.0])
    made = new_optimizer(Rule("lion"), {"a.b": weight}, seed=0)
    made.param_groups[0]["lr"] = 0.1
    for gradient in ([1.0, -2.0], [-3.0, 0.5], [0.1, 0.1]):
        weight.grad = torch.tensor(gradient)
        made.step()
        by_hand -= 0.1 * (0.9 * mean + 0.1 * weight.grad).sign()
        mean = 0.99 * mean + 0.01 * weight.grad
    assert torch.allclose(weight, by_hand)


# --- bf16 follows fp32 -----------------------------------------------------------------------------------------------

GRADIENTS = {
    "constant": lambda step: 1e-2,
    "stops": lambda step: 1e-2 if step < 1000 else 0.0,
    "shrinks tenfold": lambda step: 1e-2 if step < 500 else 1e-3,
    "changes its sign": lambda step: 1e-2 if step % 100 < 70 else -1e-2,
}


def moved(start: float, course: str, steps: int, rate: float) -> tuple[Tensor, float]:
    """How far 10,000 equal bf16 elements have moved, and one fp32 element under PyTorch's AdamW."""
    small, exact = nn.Parameter(torch.full((10_000,), start)), nn.Parameter(torch.tensor([start]))
    rules = new_optimizer(Rule("adamw_bf16"), {"a.b": small}, seed=3), torch.optim.AdamW([exact], lr=rate)
    assert small.dtype == torch.bfloat16
    begin = float(small.detach()[0])
    exact.data.fill_(begin)
    for step in range(steps):
        for rule, weight in zip(rules, (small, exact), strict=True):
            rule.param_groups[0]["lr"] = rate
            weight.grad = torch.full_like(weight, GRADIENTS[course](step))
            rule.step()
    whole = small.detach().double() + rules[0].state[small]["rest"].double()
    return whole - begin, float(exact.detach().double()) - begin


@pytest.mark.parametrize("course", GRADIENTS)
@pytest.mark.parametrize(("start", "rate"), [(0.0, 1e-3), (1.0, 1e-4)])
def test_bf16_follows_fp32(course: str, start: float, rate: float) -> None:
    """Over 2,000 steps the mean of 10,000 elements is within 5 % of fp32 AdamW's path and each within 15 %, also for steps below bf16's
    last digit."""
    got, wanted = moved(start, course, 2000, rate)
    assert float(got.mean()) == pytest.approx(wanted, rel=0.05)
    assert float((got - wanted).abs().max()) < 0.15 * abs(wanted)


def test_bf16_moments_are_those_of_adamw() -> None:
    """After gradients of 1e-2, then 1e-3, the mean gradient and the mean square are AdamW's within 5 % on average."""
    weight = nn.Parameter(torch.zeros(10_000))
    made = new_optimizer(Rule("adamw_bf16"), {"a.b": weight}, seed=3)
    first = second = 0.0
    for step in range(3000):
        gradient = 1e-2 if step < 1000 else 1e-3
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight.grad = torch.full_like(weight, gradient)
        made.param_groups[0]["lr"] = 1e-4
        made.step()
        if step in (3, 999, 1010, 2999):
            state = made.state[weight]
            assert float(state["exp_avg"].double().mean()) == pytest.approx(first, rel=0.05)
            assert float(state["exp_avg_sq"].double().mean()) == pytest.approx(second, rel=0.05)


def test_random_rounding_is_right_on_average() -> None:
    """A third of the way between two bf16 numbers rounds up a third of the time; bf16 numbers stay; what is drawn follows the seed."""
    rng = torch.Generator().manual_seed(1)
    value = torch.full((100_000,), 1 + 2**-7 / 3)
    rounded = randomly_rounded(value, rng)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float((rounded > 1).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    stays = torch.tensor([0.0, -1.5, 3.0e-5]).bfloat16().float()
    assert torch.equal(randomly_rounded(stays, rng).float(), stays)
    assert float(randomly_rounded(-value, rng).double().mean()) == pytest.approx(-float(value[0]), abs=1e-4)


def test_bf16_draws_from_no_other_generator() -> None:
    """PyTorch's own generator is where it was; another seed rounds otherwise."""
    ends = []
    for seed in (1, 1, 2):
        weight = nn.Parameter(torch.full((512,), 0.3).bfloat16())
        made = AdamWBF16([weight], lr=1e-3, seed=seed)
        torch.manual_seed(0)
        for _ in range(3):
            weight.grad = torch.full_like(weight, 0.1)
            made.step()
        after = float(torch.rand(()))
        torch.manual_seed(0)
        assert after == float(torch.rand(()))
        ends.append(made.state[weight]["exp_avg"].clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_and_three_are_six(name: str) -> None:
    """Bit by bit, with everything through safetensors and JSON into another process' fresh engine."""
    whole = engine(name)
    losses = advance(whole, name, 6)
    first = engine(name)
    halves = advance(first, name, 3)
    state = through_files(first.state_dict())
    second = engine(name)
    advance(second, name, 1)  # what it remembers of its own must not survive
    second.load_state_dict(state)
    halves += advance(second, name, 3)
    assert halves == losses
    ends = [made.state_dict() for made in (whole, second)]
    assert ends[0]["optimizer_numbers"] == ends[1]["optimizer_numbers"]
    for part in ("adapter", "optimizer"):
        assert ends[0][part].keys() == ends[1][part].keys()
        for key, tensor in ends[0][part].items():
            assert tensor.dtype == ends[1][part][key].dtype
            assert torch.equal(tensor, ends[1][part][key]), key
    assert any(float(w.detach().float().abs().sum()) > 0 for w in [whole.weights["x.lora_B.weight"]])


def test_numbers_of_the_whole_group_are_restored() -> None:
    """Prodigy's found rate and schedule-free training's sums are in the state, by name."""
    for name, keys in {"prodigy": {"d", "d_max", "d_numerator", "k"}, "schedulefree": {"k", "weight_sum", "lr_max"}}.items():
        made = engine(name)
        advance(made, name, 3)
        numbers = made.state_dict()["optimizer_numbers"]
        assert {f"all/{key}" for key in keys} <= set(numbers)
        assert numbers["all/k"] == 3


def test_a_checkpoint_from_before_the_numbers_still_reads() -> None:
    """AdamW's state has no plain numbers: a state without them continues bit by bit."""
    whole, first, second = engine("adamw"), engine("adamw"), engine("adamw")
    losses = advance(whole, "adamw", 4)
    advance(first, "adamw", 2)
    state = first.state_dict()
    assert state.pop("optimizer_numbers") == {}
    second.load_state_dict(state)
    assert advance(second, "adamw", 2) == losses[2:]


def test_what_no_checkpoint_can_hold_is_refused() -> None:
    """Anything but tensors and plain numbers is named, and a state of another adapter too."""
    weight = nn.Parameter(torch.zeros(2))
    made = new_optimizer(Rule(), {"a.b": weight}, seed=0)
    made.state[weight]["nested"] = {"deep": torch.ones(2), "count": 3}
    tensors, numbers = optimizer_state(made, {"a.b": weight})
    assert (list(tensors), numbers) == (["a.b/nested/deep"], {"a.b/nested/count": 3})
    made.state.clear()
    restore_optimizer(made, {"a.b": weight}, tensors, numbers)
    assert made.state[weight]["nested"]["count"] == 3
    made.state[weight]["set"] = {1, 2}
    with pytest.raises(CheckpointError, match=r"AdamW: a\.b/set is a set"):
        optimizer_state(made, {"a.b": weight})
    with pytest.raises(CheckpointError, match=r"remembers c\.d, which this adapter does not have"):
        restore_optimizer(made, {"a.b": weight}, {"c.d/exp_avg": torch.ones(2)}, {})


# --- schedule-free weights, live settings, clipping ------------------------------------------------------------------


def test_schedule_free_is_judged_by_its_average_and_trains_on() -> None:
    """Inside the block the weights are x = the package's eval weights; after it they are y again, bit by bit; saving takes x."""
    made = engine("schedulefree")
    advance(made, "schedulefree", 5)
    training = {name: weight.detach().clone() for name, weight in made.weights.items()}
    judge: Any = copy.deepcopy((made._optimizer, list(made.weights.values())))
    judge[0].eval()
    average = [p.detach().clone() for p in judge[0].param_groups[0]["params"]]
    with made.judged():
        for weight, wanted in zip(made.weights.values(), average, strict=True):
            assert torch.allclose(weight, wanted, atol=1e-7)
        state = made.state_dict()
        assert all(torch.equal(state["adapter"][name], training[name]) for name in training), "a checkpoint holds what trains"
    assert all(torch.equal(made.weights[name], training[name]) for name in training)
    result = list(made.result().values())
    assert all(torch.allclose(result[i], average[i], atol=1e-7) for i in range(len(average)))
    assert not torch.equal(result[1], training["x.lora_B.weight"])


def test_an_update_in_the_middle_of_judging_trains_the_right_weights() -> None:
    """Whoever steps while pictures are drawn gets the update that would have come anyway."""
    plain, disturbed = engine("schedulefree"), engine("schedulefree")
    advance(plain, "schedulefree", 5)
    advance(disturbed, "schedulefree", 4)
    with disturbed.judged():
        advance(disturbed, "schedulefree", 1)
    assert all(torch.equal(plain.weights[name], disturbed.weights[name]) for name in plain.weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_may_change_between_updates(name: str) -> None:
    """An update at a hundredth of the rate moves the weights far less than one at the whole rate; averaging goes on without it."""
    moves = []
    for share in (1.0, 0.01):
        made = engine(name, schedule="constant")
        advance(made, name, 3)
        before = made.weights["x.lora_A.weight"].detach().float().clone()
        made.update(peak_learning_rate=share * RATES.get(name, 1e-2))
        moves.append(float((made.weights["x.lora_A.weight"].detach().float() - before).norm()))
    assert moves[1] < (0.5 if name == "schedulefree" else 0.2) * moves[0]


def test_clipping_by_value_limits_each_element() -> None:
    """No element is above the limit, those below stay, and the recorded norm is that of the whole gradient before."""
    plain, clipped = engine("adamw", max_grad_norm=1e9), engine("adamw", clip_method="value", max_grad_norm=1e-3)
    norms = [made.update(peak_learning_rate=1e-2).grad_norm for made in (plain, clipped)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name in plain.weights:
        whole, limited = plain.weights[name].grad, clipped.weights[name].grad
        assert torch.equal(whole.clamp(-1e-3, 1e-3), limited)  # type: ignore[union-attr, arg-type]
    assert float(plain.weights["x.lora_B.weight"].grad.abs().max()) > 1e-3  # type: ignore[union-attr]


def test_the_limit_may_change_between_updates() -> None:
    """``max_grad_norm`` of an update counts before the one at the start."""
    made = engine("adamw", max_grad_norm=1e9)
    made.update(peak_learning_rate=1e-2, max_grad_norm=1e-4)
    norm = math.hypot(*(float(w.grad.norm()) for w in made.weights.values()))  # type: ignore[union-attr]
    assert norm == pytest.approx(1e-4, rel=1e-3)


# --- what this machine can do ----------------------------------------------------------------------------------------


def test_what_does_not_work_here_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paging needs a GPU; a missing package names the extra; a rule that fails its trial says why."""
    cpu = torch.device("cpu")
    for name in ("adamw", "adamw_bf16", "bnb-adamw8bit", "bnb-lion8bit", "prodigy", "schedulefree", "stableadamw", "lion", "adafactor"):
        require(name, cpu)
    for name in ("bnb-adamw8bit-paged", "bnb-lion8bit-paged"):
        with pytest.raises(ConfigError, match=f"{name} moves its state .* no CUDA GPU; use {name.removesuffix('-paged')}"):
            require(name, cpu)

    def broken(*_: Any, **__: Any) -> torch.optim.Optimizer:
        raise NotImplementedError("no kernel")

    monkeypatch.setitem(optim.BUILDERS, "bnb-lion8bit", broken)
    with pytest.raises(ConfigError, match=r"bnb-lion8bit does not work on this machine \(no kernel\); use adamw"):
        require("bnb-lion8bit", cpu)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "prodigyopt" else found(name, *a))
    with pytest.raises(ConfigError, match=r"prodigy needs .*\(prodigyopt\); pip install 'sd3tune\[optimizers\]'"):
        require("prodigy", cpu)


def test_trainer_and_doctor_say_so_too(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is refused before its model is loaded; doctor has the same sentence; the configuration itself may be written here."""
    config = bench.config(optimizer="bnb-lion8bit-paged")
    cache = bench.cache(config)
    with pytest.raises(st.ConfigError, match=r"this machine: 1 problem\n  - optimizer bnb-lion8bit-paged moves its state"):
        st.Trainer(config, cache)
    monkeypatch.setattr(capabilities, "probe", lambda: {})  # trying each format is of another test
    assert "bad   settings   optimizer bnb-lion8bit-paged moves its state" in str(st.doctor(config))


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adamw_bf16", "schedulefree", *(pytest.param(n, marks=pytest.mark.full) for n in ("prodigy", "bnb-adamw8bit"))]
)
def test_a_real_run_resumes_and_saves(bench: Workbench, name: str) -> None:
    """4 updates are 2 + 2 through the run folder; the file is written and verified; the average is what is saved."""
    settings: dict[str, Any] = {
        "optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 1e-3, "lr_scheduler": "constant", "max_train_steps": 4,
        "validation_prompt": (), "use_ema": True,
    }  # fmt: skip
    whole, first = bench.trainer(**settings), bench.trainer(**settings)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.checkpoint()
    second = st.Trainer.resume(first.folder.path)
    evaluated = second.evaluate().loss
    assert evaluated == first.evaluate().loss
    for _ in range(2):
        second.step()
    assert same_state(whole.state_dict(), second.state_dict())
    assert second.save(second.folder.path / "lora.safetensors") > 0
    assert all(mean.dtype == torch.float32 for mean in second.engine.ema.values())
