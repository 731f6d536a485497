"""The verdict on a run's evaluations: what they measure, its words on constructed histories, and on two real runs."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench, write_datasets

import sd3tune as st
from sd3tune.progress import Line
from sd3tune.records import EvalRecord
from sd3tune.snapshot import Snapshot, after
from sd3tune.training import flow
from sd3tune.validation.evaluate import evaluation_loss, training_pictures
from sd3tune.validation.verdict import Change, change, jitter, student, verdict

IMAGES = 8


def history(
    held: Sequence[float], train: Sequence[float], drift: Sequence[float] | None = None, *, noise: float = 0.002, shake: float = 0.0,
    seed: int = 0, images: int = IMAGES, every: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluations with these means: pictures differ much from one another, and by ``noise`` of their own in each evaluation;
    ``shake`` moves all pictures of an evaluation together.
    """
    rng = random.Random(seed)
    own = [rng.uniform(0.5, 1.5) for _ in range(images)]
    own = [value * images / sum(own) for value in own]
    drift = drift or [0.0] * len(held)
    rows = []
    for number, (h, t, d) in enumerate(zip(held, train, drift, strict=True)):
        together = 1 + rng.gauss(0, shake)
        one, other = ([value * mean * together * (1 + rng.gauss(0, noise)) for value in own] for mean in (h, t))
        rows.append(
            {"type": "eval", "step": number * every, "loss": sum(one) / images, "sigmas": [0.5], "losses_by_image": one,
             "train_losses_by_image": other, "drifts_by_image": [d * value for value in own]}
        )  # fmt: skip
    return rows


def word(rows: list[dict[str, Any]]) -> str:
    found = verdict(rows)
    assert found is not None
    assert found.sentence.startswith(f"{found.word}: ")
    return found.word


def test_both_fall() -> None:
    """Held-out and training loss fall: still learning, with the fall since the last evaluation of the first three quarters."""
    rows = history([0.7, 0.6, 0.56, 0.54, 0.52], [0.7, 0.6, 0.55, 0.53, 0.51], [0, 0.1, 0.14, 0.16, 0.18], noise=0)
    assert str(verdict(rows)) == (
        "still learning: since step 300, held-out pictures down (-3.70% ± 0.69%), training pictures down (-3.77% ± 0.70%), "
        "distance from the base 18.0% of its error"
    )


def test_training_falls_and_held_out_rises() -> None:
    """Over-fitting, counted from the best evaluation, whose adapter is named."""
    rows = history([0.7, 0.55, 0.54, 0.56, 0.58], [0.7, 0.55, 0.50, 0.46, 0.42])
    assert word(rows) == "over-fitting"
    sentence = str(verdict(rows))
    assert "since step 200, held-out pictures up (+7." in sentence
    assert "training pictures down (-1" in sentence
    assert sentence.endswith("; the adapter of step 200 is the best so far")


def test_nothing_moves() -> None:
    """Flat, with the band that says how well that is known."""
    rows = history([0.7, 0.52, 0.52, 0.52, 0.52], [0.7, 0.51, 0.51, 0.51, 0.51], [0, 0.2, 0.2, 0.2, 0.2])
    assert word(rows) == "flat"
    assert "held-out pictures unchanged (" in str(verdict(rows))


def test_it_moves_without_a_gain() -> None:
    """Held-out loss flat while the predictions leave the base's: drifting; with less movement than the doubt about the gain, flat."""
    held, train = [0.7, 0.52, 0.52, 0.52, 0.52], [0.7, 0.51, 0.51, 0.51, 0.51]
    assert word(history(held, train, [0, 0.2, 0.22, 0.25, 0.33])) == "drifting"
    assert "moves away from the base without a gain" in str(verdict(history(held, train, [0, 0.2, 0.22, 0.25, 0.33])))
    assert word(history(held, train, [0, 0.2, 0.22, 0.25, 0.33], noise=0.2)) == "unclear"
    assert word(history(held, train, [0, 0.2, 0.22, 0.25, 0.255], noise=0)) == "flat"


def test_both_rise() -> None:
    """Held-out and training loss rise: drifting, not over-fitting."""
    means = [0.7, 0.55, 0.56, 0.58, 0.6, 0.62]
    rows = history(means, means)
    assert word(rows) == "drifting"
    assert "without learning anything: lower learning_rate; the adapter of step 100 is the best so far" in str(verdict(rows))


def test_a_run_that_recovers_is_learning() -> None:
    """Above its best, but falling for a quarter of the run: still learning."""
    means = [0.7, 0.5, *(0.62 - 0.005 * n for n in range(16))]
    assert word(history(means, means)) == "still learning"


def test_too_little_to_say() -> None:
    """Nothing with one evaluation or with older ones of other pictures; one picture is unclear; what is not finite is drifting."""
    rows = history([0.7, 0.6], [0.7, 0.6])
    assert verdict(rows[:1]) is None
    assert verdict([{**rows[0], "losses_by_image": []}, rows[1]]) is None
    named = {"items": ["a", "b"], "train_items": []}
    assert verdict([{**rows[0], **named}, {**rows[1], **named, "items": ["a", "c"]}]) is None
    assert verdict([{**rows[0], **named}, {**rows[1], **named}]) is not None
    assert verdict([{**rows[0], "sigmas": [0.4]}, rows[1]]) is None
    assert verdict([{key: value for key, value in rows[0].items() if "by_image" not in key}, rows[1]]) is None
    assert verdict([{**rows[0], "step": 100}, rows[1]]) is None, "the same moment again"
    assert word(history([0.7, 0.6], [0.7, 0.6], images=1)) == "unclear"
    assert word([rows[0], {**rows[1], "loss": math.nan}]) == "drifting"
    assert word(history([0.5, 0.5], [0.5, 0.5], noise=0.3)) == "unclear"
    assert "more held-out pictures" in str(verdict(history([0.5, 0.5], [0.5, 0.5], noise=0.3)))


@pytest.mark.parametrize(("noise", "shake"), [(0.02, 0.0), (0.0, 0.01), (0.01, 0.005)])
def test_noise_is_not_called_a_trend(noise: float, shake: float) -> None:
    """Around a constant: independent noise of pictures, or a shaking of all pictures together; at most 5 % of 400 runs are more
    than flat or unclear.
    """
    words = [word(history([0.5] * 13, [0.5] * 13, noise=noise, shake=shake, seed=seed)) for seed in range(400)]
    assert words.count("flat") + words.count("unclear") >= 380, {one: words.count(one) for one in set(words)}


def test_a_trend_is_seen_through_noise() -> None:
    """A rise of 6 % over the last half with 1 % of noise in each picture: at least 95 % of 100 runs are called over-fitting."""
    held = [0.7, 0.6, 0.55, 0.53, 0.525, 0.52, 0.525, 0.53, 0.535, 0.54, 0.545, 0.55, 0.555]
    train = [0.7 * 0.96**n for n in range(13)]
    words = [word(history(held, train, noise=0.01, seed=seed)) for seed in range(100)]
    assert words.count("over-fitting") >= 95


def test_all_training_pictures_are_no_sample() -> None:
    """Two training pictures, both looked at, that fall unlike one another: known exactly; two of many: the band of two."""
    rows = history([0.5, 0.55], [0.5, 0.25], noise=0, images=2)
    rows[1]["train_losses_by_image"][0] *= 0.5
    assert "training pictures unchanged" in str(verdict([{**row, "train_images": 1000} for row in rows]))
    exact = str(verdict([{**row, "train_images": 2} for row in rows]))
    assert re.search(r"training pictures down \(-[\d.]+% ± 0.00%\)", exact)


def test_the_band_is_students() -> None:
    """Four differences of 0.1, 0.2, 0.3, 0.4: mean 0.25, half width 3.182 * 0.1291 / 2; in 10,000 draws 95 % of bands hold the truth."""
    found = change([1, 1, 1, 1], [1.1, 1.2, 1.3, 1.4], 1)
    assert (found.mean, found.band) == (pytest.approx(0.25), pytest.approx(0.2054, abs=1e-4))
    assert change([2], [1], 2) == Change(-0.5, math.inf)
    assert (student(2), student(31), student(1000)) == (12.706, 2.042, pytest.approx(1.962, abs=0.002))
    rng = random.Random(1)
    held = 0
    for _ in range(10_000):
        row = change([0.0] * 5, [rng.gauss(0.3, 1) for _ in range(5)], 1)
        held += abs(row.mean - 0.3) <= row.band
    assert held / 10_000 == pytest.approx(0.95, abs=0.01)


def test_jitter_is_what_goes_to_and_fro() -> None:
    """None in a smooth curve; of independent noise about 0.8 deviations; a sharp bend counts by its smaller side;
    four values say nothing.
    """
    assert jitter([0.7, 0.6, 0.55, 0.53, 0.52]) == 0
    assert jitter([0.7, 0.5, 0.6, 0.5]) == 0
    assert jitter([0.7, 0.5, 0.51, 0.52, 0.53]) == pytest.approx(0.01 / math.sqrt(3))
    rng = random.Random(2)
    found = [jitter([rng.gauss(0, 0.1) for _ in range(13)]) for _ in range(500)]
    assert 0.075 < sum(found) / len(found) < 0.09


def constant(value: float, asked: list[float]) -> flow.Velocity:
    """A velocity that says the same everywhere and notes the noise levels it was asked at."""

    def velocity(noisy: torch.Tensor, sigma: torch.Tensor, joint: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        asked.extend(sigma.tolist())
        return torch.full_like(noisy, value)

    return velocity


def test_an_evaluation_measures_training_pictures_and_the_distance_from_the_base(bench: Workbench) -> None:
    """Model 0.3 and base 0.1 everywhere: squared distance 0.04 of the base's own loss, at four of the eight levels; four of the twelve
    training pictures, as their own evaluation would see them. What was measured before is the same to the bit, and so is every call.
    """
    cache, levels, cpu = bench.cache(bench.config()), tuple((2 * i + 1) / 16 for i in range(8)), torch.device("cpu")
    asked: list[float] = []
    based: list[float] = []
    model, base = constant(0.3, asked), constant(0.1, based)
    found = evaluation_loss(model, cache, sigmas=levels, device=cpu, step=1, prior=base)
    assert len(asked) == 2 * 4 * 8
    assert sorted(based) == sorted(4 * levels[1::2])
    alone = evaluation_loss(model, cache, sigmas=levels, device=cpu, step=1)
    assert (found.loss, found.losses_by_sigma, found.losses_by_image) == (alone.loss, alone.losses_by_sigma, alone.losses_by_image)
    assert math.fsum(found.losses_by_image) / 4 == pytest.approx(found.loss, rel=1e-6)
    error = evaluation_loss(base, cache, sigmas=levels[1::2], device=cpu, step=1).loss
    assert found.drifts_by_image == pytest.approx((0.04 / error,) * 4, rel=1e-4)
    shown = training_pictures(cache.plan, 4)
    assert [p.item.id for p in shown] == [p.item.id for p in training_pictures(cache.plan)][1::3]
    assert (len(found.train_losses_by_image), found.train_images) == (4, 12)
    assert evaluation_loss(model, cache, sigmas=levels, device=cpu, step=9, prior=base).train_losses_by_image == found.train_losses_by_image


@pytest.mark.parametrize(("updates", "every", "rate", "warmup"), [(9, 3, 8e-3, 0), pytest.param(40, 20, 3e-3, 5, marks=pytest.mark.full)])
def test_a_run_on_two_pictures_over_fits(grown: Workbench, tmp_path: Path, updates: int, every: int, rate: float, warmup: int) -> None:
    """Some updates at a high rate on two pictures: the held-out loss rises in the end, and the verdict is over-fitting."""
    datasets = write_datasets(tmp_path, train=2, heldout=4)
    settings: dict[str, Any] = {"lr_scheduler": "constant", "learning_rate": rate, "eval_steps_interval": every, "eval_timesteps": 4}
    config = grown.config(validation_prompt=(), max_train_steps=updates, lr_warmup_steps=warmup, **settings)
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(datasets), config), st.encoders(config)).build())
    found = [record for record in trainer.run() if isinstance(record, EvalRecord)]
    assert found[0].verdict == ""
    assert found[-1].loss > 1.03 * min(record.loss for record in found)
    assert found[-1].verdict.startswith(f"over-fitting: since step {every}, held-out pictures up (")
    assert f"the adapter of step {every} is the best so far" in found[-1].verdict
    rows = [row for row in trainer.folder.read_history() if row["type"] == "eval"]
    assert [row["verdict"] for row in rows] == [record.verdict for record in found]
    assert found[-1].verdict in trainer.folder.log.read_text()


def test_a_healthy_run_does_not(grown: Workbench) -> None:
    """The playground's pictures at its rate: learning, in the progress line and in the panel's log, too."""
    trainer = grown.trainer(validation_prompt=(), learning_rate=1e-3, max_train_steps=10)
    line, now, said = Line(trainer), Snapshot(), ""
    for record in trainer.run():
        line.read(record)
        if isinstance(record, EvalRecord):
            changes, said = after(now, record)
            now = replace(now, **changes)
    assert now.verdict.startswith(("still learning: since step 0", "unclear: since step 0")), now.verdict
    assert line.text().endswith(now.verdict)
    assert now.verdict in said
    assert trainer.evaluate().verdict == now.verdict
