"""Which data sets are seen when."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sd3tune as st3
from sd3tune.data import Catalog, Dataset, Item, Placement, Plan
from sd3tune.data.buckets import Bucket
from sd3tune.data.timeline import Phase, phases, start_of_epoch
from sd3tune.errors import DataError
from sd3tune.training.batches import Batches


def sets(**windows: dict[str, int]) -> list[Dataset]:
    return [Dataset(id=name, instance_data_dir="d", **window) for name, window in windows.items()]  # type: ignore[arg-type]


def plan_of(datasets: list[Dataset], count: int, *, batch: int = 2, accumulation: int = 1, steps: int = 20) -> Plan:
    rows = [
        Placement(Item(d, Path(f"{d.id}{n}.png"), 64, 64, f"{d.id}{n}", (d.id,)), Bucket(64, 64)) for d in datasets for n in range(count)
    ]
    return Plan(tuple(rows), (), ("",), Catalog(tuple(datasets), (), (), ()), batch, accumulation, steps, "cache", 4, 16)


def batches_of(plan: Plan) -> Batches:
    return Batches(cast(Any, SimpleNamespace(plan=plan)), seed=1, caption_dropout=0.0)


def test_without_windows_there_is_one_phase() -> None:
    """All data sets, all the time."""
    assert phases(sets(a={}, b={}), {"a": 3, "b": 2}, 1) == (Phase(0, 1, 5, frozenset("ab")),)


def test_steps() -> None:
    """A set joins after start_step updates and leaves after end_step, and each change begins a new epoch."""
    found = phases(sets(a={}, b={"start_step": 4, "end_step": 7}), {"a": 3, "b": 2}, 2)
    assert found == (Phase(0, 1, 3, frozenset("a")), Phase(8, 4, 5, frozenset("ab")), Phase(14, 6, 3, frozenset("a")))


def test_epochs() -> None:
    """A set joins with start_epoch and is seen to the end of end_epoch, whole epochs long."""
    found = phases(sets(a={"end_epoch": 2}, b={"start_epoch": 2}), {"a": 3, "b": 2}, 1)
    assert found == (Phase(0, 1, 3, frozenset("a")), Phase(3, 2, 5, frozenset("ab")), Phase(8, 3, 2, frozenset("b")))
    assert [start_of_epoch(found, e) for e in (1, 2, 3, 4, 5)] == [0, 3, 8, 10, 12]


WINDOWS = st.fixed_dictionaries({}, optional={"start_step": st.integers(0, 9), "start_epoch": st.integers(1, 4)})


@given(WINDOWS, WINDOWS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
@settings(deadline=None, max_examples=60)
def test_every_batch_is_of_a_set_whose_window_is_open(a: Any, b: Any, count: int, batch: int, accumulation: int, data: Any) -> None:
    """For any windows, each batch is of a set that is seen then, and an epoch that is not cut short holds every placement once."""
    a = {**a, "end_step": a.get("start_step", 0) + data.draw(st.integers(1, 9))} if data.draw(st.booleans()) else a
    b = {**b, "end_epoch": b.get("start_epoch", 1) + data.draw(st.integers(0, 2))} if data.draw(st.booleans()) else b
    plan = plan_of(sets(always={}, a=a, b=b), count, batch=batch, accumulation=accumulation)
    batches = batches_of(plan)
    shown: dict[int, Counter[str]] = {}
    for k in range(60):
        phase = next(p for p in reversed(plan.phases) if p.start <= k)
        epoch = phase.epoch + (k - phase.start) // phase.length
        rows = batches.placements(k)
        (dataset,) = {p.item.dataset.id: p.item.dataset for p in rows}.values()
        update = k // accumulation
        assert dataset.start_epoch <= epoch <= (dataset.end_epoch or epoch)
        if (k - phase.start) % phase.length == 0 or phase.start % accumulation == 0:
            assert dataset.start_step <= update < (dataset.end_step or update + 1)
        shown.setdefault(epoch, Counter()).update(str(p.item.path) for p in rows)
    for number, phase in enumerate(plan.phases):
        end = plan.phases[number + 1].start if number + 1 < len(plan.phases) else 60
        for epoch in range(phase.epoch, phase.epoch + (min(end, 60) - phase.start) // phase.length):
            assert shown[epoch] == Counter(str(p.item.path) for p in plan.train if p.item.dataset.id in phase.datasets)


def test_a_new_phase_is_not_the_old_one_again() -> None:
    """The epochs of a later phase have orders of their own, also when a set comes back alone."""
    plan = plan_of(sets(a={}, b={"start_step": 20, "end_step": 40}), 20)
    batches = batches_of(plan)
    orders = [tuple(p.item.path.name for k in range(start, start + 10) for p in batches.placements(k)) for start in (0, 10, 40, 50)]
    assert len(set(orders)) == 4


def test_appearances_are_counted() -> None:
    """What the plan says of how often a picture is seen is what the batches do, set by set."""
    plan = plan_of(sets(a={"end_epoch": 4}, b={"start_step": 5}), 5, batch=2, accumulation=2, steps=23)
    seen = Counter(p for k in range(46) for p in batches_of(plan).placements(k))
    for name, (least, most) in plan.appearances.items():
        counts = [count for p, count in seen.items() if p.item.dataset.id == name]
        assert least <= min(counts) <= max(counts) <= most
        assert most - least <= 2
    total = sum(seen.values()) / len({p.item.path for p in plan.train})
    said = float(plan.sentence().split("each image ")[1].split(" ")[0])
    assert said == pytest.approx(total, abs=0.2), "but for short batches"
    assert "from update 1 (epoch 1): a" in str(plan)
    assert "from update 6 " in str(plan)


def pots(tmp_path: Path, yaml: str, **config: Any) -> Plan:
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        for n in range(4):
            Image.new("RGB", (64, 64), (n, 1, ord(name))).save(tmp_path / name / f"{n}.png")
    (tmp_path / "datasets.yaml").write_text(yaml)
    return st3.plan(st3.discover(tmp_path / "datasets.yaml"), st3.presets.playground(train_batch_size=2, **config))


ENTRY = "- {{id: {0}, instance_data_dir: {0}, resolution: 64, caption_strategy: filename, {1}}}\n"


def test_a_gap_is_an_error_that_names_the_update(tmp_path: Path) -> None:
    """A run in which nothing is seen from some update on is refused; a shorter one is not."""
    yaml = ENTRY.format("a", "end_step: 10") + ENTRY.format("b", "start_step: 12")
    with pytest.raises(DataError, match=r"from update 11 \(epoch 6\) on, no data set is seen; widen start_step"):
        pots(tmp_path, yaml, max_train_steps=20, lr_warmup_steps=0)
    assert pots(tmp_path, yaml, max_train_steps=10, lr_warmup_steps=0).steps == 10


def test_epochs_of_a_run_count_what_is_seen(tmp_path: Path) -> None:
    """num_train_epochs: two of one set (2 batches), then one of both (4)."""
    yaml = ENTRY.format("a", "") + ENTRY.format("b", "start_epoch: 3")
    assert pots(tmp_path, yaml, num_train_epochs=3, max_train_steps=None).steps == 8


def test_small_sizes_are_repeated_when_asked(tmp_path: Path) -> None:
    """allow_dataset_oversubscription fills a batch, and leaves data sets alone whose repeats are set by hand."""
    yaml = ENTRY.format("a", "max_num_samples: 1") + ENTRY.format("b", "max_num_samples: 1, repeats: 1")
    plan = pots(tmp_path, yaml, allow_dataset_oversubscription=True)
    assert Counter(p.item.dataset.id for p in plan.train) == {"a": 2, "b": 2}
    plan = pots(
        tmp_path,
        yaml.replace("max_num_samples: 1, repeats: 1", "max_num_samples: 1, repeats: 1, train_batch_size: 5"),
        allow_dataset_oversubscription=True,
    )
    assert Counter(p.item.dataset.id for p in plan.train) == {"a": 2, "b": 2}, "what is set by hand stays"
    plan = pots(tmp_path, yaml)
    assert Counter(p.item.dataset.id for p in plan.train) == {"a": 1, "b": 2}
    assert "`repeats: 1`, or `train_batch_size: 1`, or `small_bucket: merge`, or `allow_dataset_oversubscription: true`" in str(plan)


def test_diff_says_what_is_encoded_anew(tmp_path: Path) -> None:
    """Another size cuts every picture again; a new caption is one text."""
    old = pots(tmp_path, ENTRY.format("a", ""))
    same = pots(tmp_path, ENTRY.format("a", ""))
    assert "pictures to encode: 0 (0 of them" in old.diff(same)
    assert "texts to encode: 0; no longer needed: 0" in old.diff(same)
    larger = dataclasses.replace(
        old, train=tuple(dataclasses.replace(p, bucket=Bucket(48, 48)) for p in old.train), texts=(*old.texts, "x")
    )
    assert "pictures to encode: 4 (4 of them cut otherwise than before); no longer needed: 4" in old.diff(larger)
    assert "texts to encode: 1; no longer needed: 0" in old.diff(larger)
    both = pots(tmp_path, ENTRY.format("a", "") + ENTRY.format("b", ""))
    assert "pictures to encode: 4 (0 of them" in old.diff(both)
    assert "images: 4 before, 8 now" in old.diff(both)
