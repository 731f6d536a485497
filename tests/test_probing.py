"""The learning-rate probe: everything is put back, every rate sees the same, and what it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Workbench
from test_engine import engine
from test_trainer import updates

import sd3tune as st
from sd3tune import probing
from sd3tune.errors import ConfigError
from sd3tune.training.guard import GuardError
from sd3tune.training.optim import BUILDERS, Rule, unusable
from sd3tune.validation.probed import Probed
from sd3tune.validation.rates import Trial, advise

RATES = (1e-4, 1e-3, 30.0)
QUICK: dict[str, Any] = {"validation_prompt": (), "lora_targets": ("to_q",), "lora_rank": 2}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged at one noise level instead of six."""
    monkeypatch.setattr(probing, "LEVELS", 1)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@contextmanager
def left_as_it_was(trainer: st.Trainer) -> Iterator[None]:
    """Asserts that a block changes nothing that an update, or the process's random numbers, depend on."""
    made = trainer.engine
    before, rules, healthy = copy.deepcopy(trainer.state_dict()), made.rules, copy.deepcopy(made._healthy)
    random = torch.get_rng_state()
    yield
    assert same(trainer.state_dict(), before)
    assert same(made._healthy, healthy)
    assert made.rules == rules
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.transformer.training


@pytest.mark.parametrize("done", [0, pytest.param(3, marks=pytest.mark.full)])
def test_everything_is_put_back(bench: Workbench, done: int) -> None:
    """Before the first update and in the middle; with an average and dropout; a rate that runs away is a row. The updates that follow
    are those of a run that was not probed, bit for bit.
    """
    settings: dict[str, Any] = {**QUICK, "use_ema": True, "lora_dropout": 0.1}
    plain, probed = bench.trainer(**settings), bench.trainer(**settings)
    plain.engine.guard.began = probed.engine.guard.began = None  # so that the look at the first batches is put back, too
    expected = updates(plain, done + 2)
    got = updates(probed, done)
    with left_as_it_was(probed):
        records = []
        for record in st.lr_probe(probed, rates=RATES, updates=4):
            records.append(record)
            assert probed.steps_done == done, "also between two records"
    got += updates(probed, 2)
    assert got == expected
    assert same(plain.engine.state_dict(), probed.engine.state_dict())
    well = [(r.learning_rate, r.updates) for r in records if r.learning_rate < 1]
    assert well == [(0.0, 0), *((rate, n) for rate in RATES[:2] for n in (1, 2, 4))]
    (away,) = [r for r in records if r.refused]
    assert away.learning_rate == 30
    assert away.last
    assert away.losses_by_image == ()
    assert {r.step for r in records} == {done}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the card is gone")])
def test_an_end_in_the_middle_puts_everything_back(bench: Workbench, error: Any) -> None:
    """Ctrl-C or an error in the third update, and the same while a rate is judged; nothing is said to be done."""
    trainer = bench.trainer(**QUICK)
    updates(trainer, 1)
    inner = trainer.engine.velocity
    for calls in (3, 6):
        left = [calls]

        def velocity(*points: torch.Tensor, left: list[int] = left) -> torch.Tensor:
            left[0] -= 1
            if left[0] == 0:
                raise error
            return inner(*points)

        probe = st.lr_probe(trainer, rates=RATES, updates=4)
        records = iter(probe)
        next(records)
        trainer.engine.velocity = velocity
        with left_as_it_was(trainer):
            with pytest.raises(type(error) if isinstance(error, Exception) else error):
                list(records)
            trainer.engine.velocity = inner
    assert not [row for row in trainer.folder.read_history() if row["type"] == "notice" and "probe" in row["text"]]


def test_every_rate_sees_the_same_batches_and_noise(bench: Workbench) -> None:
    """All updates and all judging of each rate ask the model about the same points; its updates have that rate from the first on."""
    trainer = bench.trainer(**QUICK)
    updates(trainer, 1)
    inner, asked = trainer.engine.velocity, []

    def velocity(*points: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(p.detach().clone() for p in points))
        return inner(*points)

    update, used = trainer.engine.update, []

    def noted(**numbers: Any) -> Any:
        record = update(**numbers)
        used.append(record.learning_rate)
        return record

    trainer.engine.velocity, trainer.engine.update = velocity, noted  # type: ignore[method-assign]
    starts = [len(asked) for _ in st.lr_probe(trainer, rates=(1e-4, 2e-4, 4e-4), updates=4)]
    first, second = asked[starts[0] : starts[3]], asked[starts[3] : starts[6]]
    assert len(first) == len(second) > 4
    assert all(torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))
    assert used == [1e-4] * 4 + [2e-4] * 4 + [4e-4] * 4
    assert not torch.equal(first[0][1], first[1][1]), "each update has noise levels of its own"


def test_it_says_what_it_costs_and_what_it_found(bench: Workbench) -> None:
    """Before, the number of rates and the time; after, a rate with its reason as text and as a page; one notice in the history, no
    update, no checkpoint. Without rates they go outwards from the configured one.
    """
    trainer = bench.trainer(validation_prompt=(), lora_rank=4, learning_rate=3e-3)
    probe = st.lr_probe(trainer, updates=4)
    assert str(probe).startswith(
        "learning-rate probe: at most 9 rates x 4 updates, judged by 4 held-out pictures at 1 noise levels after 1, 2, 4"
    )
    assert probe.seconds > 0
    found = probe.run()
    tried = [t.rate for t in found.trials]
    assert 3e-3 in tried
    assert 4 <= len(tried) <= 9
    assert all(b / a == pytest.approx(10**0.5) for a, b in pairwise(tried))
    assert found.rate is not None
    assert found.low <= found.rate <= found.high
    assert str(found).startswith(
        f"learning_rate {found.rate:.1e}, anything from {found.low:.1e} to {found.high:.1e}: after 1, 2 and 4 updates"
    )
    assert "change of the loss on 4 held-out pictures, with 95 % bands" in str(found)
    assert found._repr_html_().startswith("<svg")
    rows = trainer.folder.read_history()
    assert [row["type"] for row in rows] == ["notice"]
    assert found.sentence in rows[0]["text"]
    assert not trainer.folder.checkpoints()


def test_without_held_out_pictures_training_pictures_judge(bench: Workbench) -> None:
    """All twelve, and the probe says so."""
    trainer = bench.trainer(**QUICK, eval_loss_disable=True)
    assert "judged by 12 training pictures" in str(st.lr_probe(trainer))


def test_what_cannot_be_probed_is_said(bench: Workbench) -> None:
    """Too few updates, too few rates, or an optimizer that finds its own rate: one sentence, and what to do."""
    trainer = bench.trainer(**QUICK)
    with pytest.raises(ConfigError, match="updates: 3 is too few"):
        st.lr_probe(trainer, updates=3)
    for rates in ((1e-3, 1e-2), (1e-3, 1e-3, 1e-2), (0.0, 1e-3, 1e-2)):
        with pytest.raises(ConfigError, match="not three or more different positive numbers"):
            st.lr_probe(trainer, rates=rates)
    if not unusable("prodigy", torch.device("cpu")):
        with pytest.raises(ConfigError, match="prodigy finds its rate itself over many updates"):
            st.lr_probe(bench.trainer(**QUICK, optimizer="prodigy", learning_rate=1.0))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_rehearsal_leaves_no_trace_in_any_optimizer(name: str) -> None:
    """2 updates, 3 that do not count at a 10 times higher rate, 2 more: the 4 updates, bit for bit; also before the first update."""
    if unusable(name, torch.device("cpu")):
        pytest.skip(f"{name} {unusable(name, torch.device('cpu'))}")
    for first in (0, 2):
        plain, _ = engine(rule=Rule(name), ema_decay=0.9)
        probed, _ = engine(rule=Rule(name), ema_decay=0.9)
        expected = [plain.update(peak_learning_rate=0.01).losses for _ in range(first + 2)]
        got = [probed.update(peak_learning_rate=0.01).losses for _ in range(first)]
        with probed.rehearsal():
            for _ in range(3):
                probed.update(peak_learning_rate=0.1)
        got += [probed.update(peak_learning_rate=0.01).losses for _ in range(2)]
        assert got == expected
        assert same(plain.state_dict(), probed.state_dict())


def test_a_runaway_right_after_a_resume_goes_back_to_the_resumed_state() -> None:
    """Thirteen updates, a new engine with that state, a rate of 1000: the guard's error, and the state of update 13 again."""
    first, _ = engine(total=50)
    for _ in range(13):
        first.update(peak_learning_rate=0.001)
    second, _ = engine(total=50)
    second.load_state_dict(first.state_dict())
    second.update(peak_learning_rate=1000.0)
    with pytest.raises(GuardError):
        second.update(peak_learning_rate=1000.0)
    assert second.updates == 13
    assert same(second.state_dict(), first.state_dict())


def test_the_page_says_what_the_text_says() -> None:
    """A chart with a line for each number of updates, its band and its range, then the table; a rate that ran away has its reason."""
    base = (1.0, 1.1, 0.9, 1.0)
    trials = tuple(Trial(r, {4: tuple(v - s for v in base), 8: tuple(v - 2 * s for v in base)}) for r, s in ((1e-4, 0.1), (1e-3, 0.2)))
    trials += (Trial(1e-2, {}, "the loss is 9 < 10"),)
    found = Probed(5e-4, base, trials, advise(base, trials, 100), "4 held-out pictures")
    html = found._repr_html_()
    assert html.count(" updates</text>") == 2
    assert html.count("<rect") == 1
    assert "the loss is 9 &lt; 10" in html
    assert "1.0e-02  ran away: the loss is 9 < 10" in str(found)
