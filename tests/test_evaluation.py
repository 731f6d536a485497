"""The evaluation loss: the same number always, beside the base model, by noise level and data set, when it falls due, and on what."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Workbench, write_datasets

import sd3tune as st
from sd3tune.data.buckets import Bucket, Placement
from sd3tune.data.catalog import Item
from sd3tune.data.datasets import Dataset
from sd3tune.data.simpletuner import from_simpletuner
from sd3tune.data.timeline import Phase, epochs_done, passes
from sd3tune.errors import ConfigError, DataError
from sd3tune.judging import Judge
from sd3tune.records import EvalRecord, of_row
from sd3tune.reporting.page import page
from sd3tune.reporting.trackers import numbers_of
from sd3tune.validation.evaluate import by_band, evaluation_loss, fixed_noise

CPU = torch.device("cpu")
HELD = Dataset(id="held", instance_data_dir="d", dataset_type="eval")
LEVELS = (0.25, 0.75)


def item(name: str, *, dataset: Dataset = HELD, caption: str = "x", path: str = "a.png") -> Item:
    return Item(dataset, Path(path), 64, 64, name, (caption,))


def toy(rows: list[Placement]) -> Any:
    """A cache whose latents are a function of the pictures' bytes."""
    values = {p.item.id: 0.1 * int(p.item.pixels) for p in rows}
    plan = SimpleNamespace(evaluation=tuple(rows), train=())
    return SimpleNamespace(
        plan=plan, latent=lambda p: torch.full((16, p.bucket.height // 8, 8), values[p.item.id]),
        texts=lambda captions: (torch.zeros(len(captions), 3, 2), torch.zeros(len(captions), 2)),
    )  # fmt: skip


def toy_rows(count: int = 11, *, dataset: Dataset = HELD) -> list[Placement]:
    return [Placement(item(str(n), dataset=dataset), Bucket(64, 64 + 16 * (n % 2))) for n in range(count)]


def half(noisy: torch.Tensor, sigma: torch.Tensor, joint: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """A velocity that is a function of each value alone, so that batches cannot matter."""
    return 0.5 * noisy


def test_noise_is_of_the_picture_and_the_level_alone() -> None:
    """The same bytes under another name, caption and data set have the same noise, to the bit; other bytes or levels have none of it."""
    shape = torch.Size((16, 64, 64))
    first = fixed_noise(item("1"), 0.25, shape)
    again = fixed_noise(item("1", path="b.png", caption="y", dataset=Dataset(id="o", instance_data_dir="o")), 0.25 + 1e-9, shape)
    assert torch.equal(first, again)
    others = [fixed_noise(item("2"), 0.25, shape), fixed_noise(item("1"), 0.75, shape)]
    for other in others:
        assert abs(float((first * other).mean())) < 0.02
        assert abs(float(other.mean())) < 0.02
        assert float(other.var()) == pytest.approx(1, abs=0.03)


def test_batches_and_other_pictures_do_not_matter() -> None:
    """What the model sees of each picture, and every number of the record, are the same bits in batches of 1, 3 and 8; a picture that is
    taken away changes no other one's loss."""
    rows = toy_rows()
    found, seen = [], []
    for batch in (1, 3, 8):
        points: dict[tuple[int, ...], set[bytes]] = {}

        def watched(noisy: torch.Tensor, sigma: torch.Tensor, joint: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
            for row in noisy:
                points.setdefault(tuple(row.shape), set()).add(row.numpy().tobytes())  # noqa: B023 (called in this turn)
            return half(noisy, sigma, joint, pooled)

        found.append(evaluation_loss(watched, toy(rows), sigmas=LEVELS, device=CPU, step=3, batch=batch))
        seen.append(points)
    assert found[0] == found[1] == found[2]
    assert seen[0] == seen[1] == seen[2]
    assert sum(map(len, seen[0].values())) == 22, "each picture has its own noise at each level"
    fewer = evaluation_loss(half, toy(rows[1:]), sigmas=LEVELS, device=CPU, step=3)
    losses = dict(zip(found[0].items, found[0].losses_by_image, strict=True))
    assert dict(zip(fewer.items, fewer.losses_by_image, strict=True)) == {p.item.id: losses[p.item.id] for p in rows[1:]}


def test_the_mean_is_over_pictures_whatever_their_data_set() -> None:
    """Eight of one data set and three of another: the mean counts pictures, the data sets' own means each alone; pooled there is one."""
    rows = [
        *toy_rows(8),
        *(Placement(item(str(n), dataset=Dataset(id="other", instance_data_dir="o")), Bucket(64, 64)) for n in (20, 30, 40)),
    ]
    found = evaluation_loss(half, toy(rows), sigmas=LEVELS, device=CPU, step=0)
    own = {p.item.id: p.item.dataset.id for p in rows}
    losses = dict(zip(found.items, found.losses_by_image, strict=True))
    for name, count in (("held", 8), ("other", 3)):
        mine = [loss for key, loss in losses.items() if own[key] == name]
        assert found.losses_by_dataset[name] == math.fsum(mine) / count
    assert found.loss == math.fsum(losses.values()) / 11
    assert found.loss == pytest.approx((8 * found.losses_by_dataset["held"] + 3 * found.losses_by_dataset["other"]) / 11)
    pooled = evaluation_loss(half, toy(rows), sigmas=LEVELS, device=CPU, step=0, pooled=True)
    assert pooled.losses_by_dataset == {}
    assert pooled.loss == found.loss


def test_bands_are_of_equal_width() -> None:
    """Fifths of 0 to 1, each the mean of its levels; 1 itself is in the last, and a fifth without a level has no number."""
    assert by_band((0.0, 0.1, 0.2, 0.5, 0.95, 1.0), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)) == (1.5, 4.0, 8.0, None, 24.0)


def test_the_base_is_what_it_is_compared_with() -> None:
    """The base's losses as they are handed in: their mean, the share of it, and both in each band."""
    rows = toy_rows(3)
    base = ((2.0, 4.0), (2.0, 6.0), (4.0, 6.0))
    found = evaluation_loss(half, toy(rows), sigmas=LEVELS, device=CPU, step=0, base=base)
    assert found.base_loss == 4.0
    assert found.relative == found.loss / 4.0
    assert found.base_losses_by_band == (None, 8 / 3, None, 16 / 3, None)
    assert found.losses_by_band == (None, found.losses_by_sigma[0], None, found.losses_by_sigma[1], None)


# --- in a run --------------------------------------------------------------------------------------------------------


QUICK: dict[str, Any] = {"validation_prompt": (), "learning_rate": 1e-2, "num_eval_images": 2, "lora_targets": ("to_q", "to_v")}


def updates(trainer: st.Trainer, count: int) -> None:
    for _ in range(count):
        trainer.step()


def test_it_moves_with_the_adapter_and_with_nothing_else(bench: Workbench) -> None:
    """Ten times the same record, with draws from torch's generator in between, in training mode, and after a resume; a run of another
    seed that is given the same adapter says the same bits. The base is asked once, stays what it was, and is where it began.
    """
    trainer = bench.trainer(lora_dropout=0.5, caption_dropout_probability=1.0, **QUICK)
    asked: list[int] = []
    prior = trainer.engine.prior
    assert prior is not None

    def watched(noisy: torch.Tensor, sigma: torch.Tensor, joint: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        asked.append(len(noisy))
        return prior(noisy, sigma, joint, pooled)

    trainer.engine.prior = watched
    before = trainer.evaluate()
    assert before.base_loss is not None
    assert before.relative == 1.0, "B = 0: the adapter is nothing yet"
    updates(trainer, 3)
    after = trainer.evaluate()
    assert after.loss != before.loss
    assert (after.base_loss, after.base_losses_by_band) == (before.base_loss, before.base_losses_by_band)
    assert after.relative == after.loss / after.base_loss  # type: ignore[operator]
    assert sum(asked) == 2 * 2 * (1 + 2), "once for all levels; the distance from it in each evaluation"
    for number in range(8):
        torch.manual_seed(number)
        torch.randn(number + 1)
        assert trainer.evaluate() == after
    trainer.checkpoint()
    resumed = st.Trainer.resume(trainer.folder.path)
    assert resumed.evaluate() == after
    other = bench.trainer(seed=7, lora_dropout=0.5, **QUICK)
    updates(other, 2)
    with torch.no_grad():
        for name, weight in trainer.engine.weights.items():
            other.engine.weights[name].copy_(weight)
    assert other.evaluate().losses_by_image == after.losses_by_image


def test_the_average_of_the_weights_has_its_own_number(bench: Workbench) -> None:
    """It is the loss of a run that has the average as its weights; the weights that train come back, bit by bit; the base is the same."""
    trainer = bench.trainer(use_ema=True, ema_decay=0.6, **QUICK)
    updates(trainer, 3)
    weights = {name: weight.detach().clone() for name, weight in trainer.engine.weights.items()}
    record = trainer.evaluate()
    assert record.ema_loss is not None
    assert record.ema_loss != record.loss
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.engine.weights.items())
    plain = bench.trainer(**QUICK)
    with torch.no_grad():
        for name, mean in trainer.engine.ema.items():
            plain.engine.weights[name].copy_(mean)
    alone = plain.evaluate()
    assert alone.loss == record.ema_loss
    assert alone.ema_loss is None
    assert (alone.base_loss, alone.losses_by_band[4] is None) == (record.base_loss, record.losses_by_band[4] is None)


def test_it_is_told_everywhere(bench: Workbench, tmp_path: Path) -> None:
    """In epochs of six updates with an interval of half of one, and of four updates: 0, 3, 4, 6, 8; names of trackers; the report."""
    trainer = bench.trainer(max_train_steps=8, eval_epoch_interval=0.5, eval_steps_interval=4, use_ema=True, **QUICK)
    found = [record for record in trainer.run() if isinstance(record, EvalRecord)]
    assert [record.step for record in found] == [0, 3, 4, 6, 8]
    last = found[-1]
    assert last.relative is not None
    assert numbers_of(last) == {
        "loss/val": last.loss, "loss/val/held": last.losses_by_dataset["held"], "loss/val_ema": last.ema_loss,
        "loss/val_relative": last.relative,
    }  # fmt: skip
    (row,) = [row for row in trainer.folder.read_history() if row["type"] == "eval" and row["step"] == 8]
    assert of_row(row) == last
    text = page(trainer.folder)
    assert f"{last.loss:.4f}, {last.relative:.1%} of the base model's {last.base_loss:.4f}" in text
    assert "<td>data set held</td>" in text
    assert any(f"<td>noise {n / 5:g} to {(n + 1) / 5:g}</td>" in text for n in range(5))


# --- when ------------------------------------------------------------------------------------------------------------

WHOLE = (Phase(0, 1, 10, frozenset("a")),)
CUT = (Phase(0, 1, 10, frozenset("a")), Phase(25, 4, 4, frozenset("ab")))
"""Epochs of ten batches, of which the third is cut short in its middle; then epochs of four."""


def due(found: tuple[Phase, ...], share: float, updates: int, accumulation: int = 1) -> list[int]:
    return [n for n in range(1, updates + 1) if passes(found, (n - 1) * accumulation, n * accumulation, share)]


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.5, [5, 10, 15, 20, 25, 30]), (1.0, [10, 20, 30]), (0.1, list(range(1, 31))), (0.3, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
     (0.25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30]), (1.5, [15, 30])],
)  # fmt: skip
def test_epoch_intervals_end_exactly(share: float, wanted: list[int]) -> None:
    """At the first update that has reached the share: a tenth of ten is each update, with no rounding on the way."""
    assert due(WHOLE, share, 30) == wanted


def test_epoch_intervals_with_accumulation_and_stretches() -> None:
    """Updates of three batches pass what lies within them; an epoch that is cut short is over, and the next ones have their own length."""
    assert due(WHOLE, 0.5, 10, accumulation=3) == [2, 4, 5, 7, 9, 10]
    assert [epochs_done(CUT, n) for n in (0, 24, 25, 26, 29)] == [0, Fraction(24, 10), 3, Fraction(13, 4), 4]
    assert due(CUT, 0.5, 33) == [5, 10, 15, 20, 25, 27, 29, 31, 33]
    assert due(WHOLE, 0.05, 4) == [1, 2, 3, 4], "more often than updates: after each one"


def test_either_interval_is_enough() -> None:
    """Of updates, of epochs, or of both; an update has all its batches; nothing falls due without held-out pictures."""

    def steps(held: int = 1, **settings: Any) -> list[int]:
        plan: Any = SimpleNamespace(evaluation=("picture",) * held, phases=WHOLE, accumulation=3)
        judge = Judge(None, None, None, SimpleNamespace(plan=plan), CPU)  # type: ignore[arg-type]
        return [n for n in range(1, 11) if judge.evaluation_due(st.presets.playground(**settings), n)]

    assert steps() == []
    assert steps(eval_steps_interval=4) == [4, 8]
    assert steps(eval_epoch_interval=0.5) == [2, 4, 5, 7, 9, 10]
    assert steps(eval_steps_interval=4, eval_epoch_interval=1.5) == [4, 5, 8, 10]
    assert steps(held=0, eval_steps_interval=4, eval_epoch_interval=0.5) == []


# --- what is held out ------------------------------------------------------------------------------------------------


def pictures(folder: Path, rows: str, train: int = 12, heldout: int = 4) -> Path:
    datasets = write_datasets(folder, train=train, heldout=heldout)
    datasets.write_text(rows)
    return datasets


SHARED = "- {id: some, instance_data_dir: train, resolution: 64, eval_share: 0.25}\n"


def held(catalog: Any) -> set[str]:
    return {one.pixels for one in catalog.items if one.held_out}


def test_a_share_is_held_out(tmp_path: Path, bench: Workbench) -> None:
    """Three of twelve: never trained on, judged, and said by the plan and the manifest; a resumed run holds out the same."""
    datasets = pictures(tmp_path, SHARED)
    config = bench.config(validation_prompt=(), max_train_steps=5)
    plan = st.plan(st.discover(datasets), config)
    assert (plan.held_out, len(plan.evaluation), len(plan.train)) == (3, 3, 9)
    assert not {p.item.path for p in plan.train} & {p.item.path for p in plan.evaluation}
    assert "held out: 3 images; " in str(plan)
    assert "some: 3 of its 12 pictures are held out (eval_share 0.25)" in str(plan)
    cache = st.CacheBuilder(plan, st.encoders(config)).build()
    trainer = st.Trainer(config, cache)
    assert (trainer.manifest.images_used, trainer.manifest.images_held_out, trainer.manifest.images_judged) == (9, 3, 3)
    assert "9 to train on, 3 held out (3 of them judged), 0 refused" in str(trainer.manifest)
    record = trainer.evaluate()
    assert record.losses_by_dataset == {"some": record.loss}
    updates(trainer, 1)
    trainer.checkpoint()
    assert st.Trainer.resume(trainer.folder.path).evaluate().items == record.items
    few = st.plan(st.discover(datasets), config.replace(num_eval_images=2))
    assert (few.held_out, len(few.evaluation), len(few.train)) == (3, 2, 9)
    assert "held out: 3 images, 2 of them judged (num_eval_images)" in str(few)
    assert "held out: 3 images, none of them judged" in str(st.plan(st.discover(datasets), config.replace(eval_loss_disable=True)))


def test_names_and_order_do_not_choose(tmp_path: Path) -> None:
    """Renamed pictures are held out as before; a picture that is added moves at most one other; copies go together."""
    datasets = pictures(tmp_path, SHARED)
    first = held(st.discover(datasets))
    for number, path in enumerate(sorted((tmp_path / "train").glob("*.png"), reverse=True)):
        path.with_suffix(".txt").rename(tmp_path / "train" / f"{number:03}.txt")
        path.rename(tmp_path / "train" / f"{number:03}.png")
    assert held(st.discover(datasets)) == first
    for number, path in enumerate(sorted((tmp_path / "heldout").glob("*.png"))):
        shutil.copy(path, tmp_path / "train" / f"new{number}.png")
        shutil.copy(path.with_suffix(".txt"), tmp_path / "train" / f"new{number}.txt")
        now = held(st.discover(datasets))
        assert len(first - now) <= 1
        first = now
    one = next(i for i in st.discover(datasets).items if i.held_out)
    shutil.copy(one.path, tmp_path / "train" / "copy.png")
    (tmp_path / "train" / "copy.txt").write_text("another caption")
    twice = st.discover(datasets)
    assert held(twice) == first
    assert {i.path.name for i in twice.items if i.pixels == one.pixels} == {one.path.name, "copy.png"}
    assert all(i.held_out for i in twice.items if i.pixels == one.pixels)


def test_another_data_set_does_not_train_on_it(tmp_path: Path) -> None:
    """The same bytes elsewhere are left out, with the reason."""
    datasets = pictures(tmp_path, SHARED + "- {id: again, instance_data_dir: heldout, resolution: 64}\n")
    chosen = next(i for i in st.discover(datasets).items if i.held_out)
    shutil.copy(chosen.path, tmp_path / "heldout" / "zz.png")
    (tmp_path / "heldout" / "zz.txt").write_text("a caption")
    catalog = st.discover(datasets)
    assert "zz.png" not in {i.path.name for i in catalog.items}
    assert [p.reason for p in catalog.problems] == [f"is also held out, in data set 'some' as {chosen.path.name}; not trained on"]


def test_a_share_is_of_pictures_to_learn_from(tmp_path: Path) -> None:
    """It is refused where it means nothing; the last picture is never held out."""
    for more in ("dataset_type: eval", "is_regularisation_data: true"):
        path = tmp_path / "d.yaml"
        path.write_text(f"- {{id: a, instance_data_dir: p, eval_share: 0.5, {more}}}\n")
        with pytest.raises(ConfigError, match="eval_share is for pictures to learn from"):
            st.discover(path)
    datasets = pictures(tmp_path / "one", SHARED, train=1, heldout=1)
    assert not held(st.discover(datasets))


def test_each_data_set_has_its_pictures(tmp_path: Path, bench: Workbench) -> None:
    """num_eval_images counts each data set; eval_dataset_id leaves one; a name that is none is refused with those that there are."""
    rows = SHARED + "- {id: held, instance_data_dir: heldout, resolution: 64, dataset_type: eval}\n"
    catalog = st.discover(pictures(tmp_path, rows))
    counts: dict[str, int] = {}
    for placement in st.plan(catalog, bench.config(num_eval_images=2)).evaluation:
        counts[placement.item.dataset.id] = counts.get(placement.item.dataset.id, 0) + 1
    assert counts == {"some": 2, "held": 2}
    only = st.plan(catalog, bench.config(num_eval_images=9, eval_dataset_id="held"))
    assert {p.item.dataset.id for p in only.evaluation} == {"held"}
    assert len(only.evaluation) == 4
    assert len(only.train) == 9, "what is held out stays so"
    with pytest.raises(DataError, match=r"eval_dataset_id: no data set 'pots' has held-out pictures \(there: 'held', 'some'\)"):
        st.plan(catalog, bench.config(eval_dataset_id="pots"))


def test_settings_of_evaluation_are_imported(tmp_path: Path) -> None:
    """There num_eval_images counts batches; an interval of none is none."""
    given = {
        "model_family": "sd3", "pretrained_model_name_or_path": "x/y", "train_batch_size": 3, "num_eval_images": 5, "eval_timesteps": 10,
        "eval_steps_interval": None, "eval_epoch_interval": 0.25, "eval_dataset_pooling": True, "eval_dataset_id": "held",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(given))
    made = from_simpletuner(tmp_path / "config.json")
    evaluation = made.config.evaluation
    assert (evaluation.num_eval_images, evaluation.eval_timesteps, evaluation.eval_epoch_interval) == (15, 10, 0.25)
    assert (evaluation.eval_steps_interval, evaluation.eval_dataset_pooling, evaluation.eval_dataset_id) == (0, True, "held")
    said = {line.key: str(line) for line in made.report}
    assert "5 batches of 3 there; here it counts the pictures of each data set, 15" in said["num_eval_images"]
    assert said["eval_steps_interval"].startswith("not needed")
