"""The board of training pictures, on histories whose answer is known and on a real run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workbench

from sd3tune.cli import main
from sd3tune.errors import CheckpointError
from sd3tune.validation.board import Board, board, board_of, forgetting_of, surely
from sd3tune.validation.sightings import Learned, expected, learned

PICTURES = tuple(f"p{n:02}" for n in range(10))


def curve(sigma: float) -> float:
    """A loss that depends much on the noise level, as real ones do."""
    return 0.2 + 1.5 * (1 - sigma) ** 2


def history(
    *, repeats: Mapping[str, int] | None = None, hard: Mapping[str, float] | None = None, fall: Mapping[str, float] | None = None,
    epochs: int = 40, noise: float = 0.05, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pictures that all learn ``fall`` (30 % when left out) of their loss over the run; each is a multiple of the curve."""
    rng, rows = random.Random(seed), list[dict[str, Any]]()
    own = {name: rng.uniform(0.85, 1.2) * (hard or {}).get(name, 1.0) for name in PICTURES}
    for epoch in range(epochs):
        order = [name for name in PICTURES for _ in range((repeats or {}).get(name, 1))]
        rng.shuffle(order)
        for name in order:
            sigma = rng.random()
            left = 1 - (fall or {}).get(name, 0.3) * epoch / (epochs - 1)
            loss = own[name] * left * curve(sigma) * math.exp(rng.gauss(0, noise))
            rows.append({"type": "step", "step": len(rows) + 1, "loss": loss, "losses": [loss], "sigmas": [sigma], "items": [name]})
    return rows


def by_id(rows: list[Learned]) -> dict[str, Learned]:
    return {row.id: row for row in rows}


def remarks(found: Board) -> dict[str, list[str]]:
    return {row.id: said for row in found.rows if (said := found.remarks(row))}


def test_what_is_never_learned_is_named() -> None:
    """One picture stays where it was while the others lose 30 %: it alone stands out, at the top, with its numbers."""
    found = board_of(history(fall={"p03": 0.0}))
    assert remarks(found) == {"p03": ["not learned"]}
    assert found.rows[0].id == "p03"
    rows = by_id(list(found.rows))
    assert rows["p03"].change is not None
    assert abs(rows["p03"].change.mean) < 0.05
    halves = (1 - 0.3 * 29.5 / 39) / (1 - 0.3 * 9.5 / 39) - 1
    for name in set(PICTURES) - {"p03"}:
        change = rows[name].change
        assert change is not None
        assert change.mean == pytest.approx(halves, abs=0.06)
        assert change.falls
    assert "not learned: p03 (unchanged (" in found.sentence


def test_what_learns_half_as_much_has_learned_less() -> None:
    """It falls, and by less than the others."""
    assert remarks(board_of(history(fall={"p03": 0.12}, noise=0.03))) == {"p03": ["learned less"]}


def test_what_is_repeated_five_times_dominates() -> None:
    """Five of fourteen appearances: 36 % of all updates, and about as much of all loss; its loss beside the others is not moved."""
    found = board_of(history(repeats={"p07": 5}))
    assert remarks(found) == {"p07": ["dominates"]}
    row = found.rows[0]
    assert (row.id, row.seen) == ("p07", 200)
    assert row.share == 5 / 14
    assert math.fsum(r.share for r in found.rows) == pytest.approx(1)
    assert math.fsum(r.share_of_loss for r in found.rows) == pytest.approx(1)
    assert "10 pictures, seen 40 to 200 times; dominates: p07 (36% of all updates" in found.sentence


def test_what_has_much_of_the_loss_dominates() -> None:
    """Seen as often as the others, with five times their loss; after three times it was seen that may be chance, and nothing is said."""
    assert remarks(board_of(history(hard={"p04": 5.0}))) == {"p04": ["dominates", "hard"]}
    assert "dominates" not in remarks(board_of(history(hard={"p04": 5.0}, epochs=3)))["p04"]


def test_the_noise_level_is_taken_out() -> None:
    """A picture that was only seen where losses are high is as hard as the others; one of twice the loss is hard, by that factor."""
    rows = history(hard={"p05": 2.0}, fall=dict.fromkeys(PICTURES, 0.0), noise=0.01)
    for row in rows:
        if row["items"] == ["p02"]:
            row["losses"] = [row["losses"][0] / curve(row["sigmas"][0])]
            row["sigmas"] = [0.3 * row["sigmas"][0]]
            row["losses"] = [row["losses"][0] * curve(row["sigmas"][0])]
    found = by_id(learned(rows))
    assert found["p02"].beside.mean == pytest.approx(1, abs=0.2), "its plain mean is twice that of the others"
    assert remarks(board_of(rows)) == {"p05": ["hard"]}
    typical = [found[name].beside.mean for name in PICTURES if name != "p05"]
    assert found["p05"].beside.mean / (sum(typical) / 9) == pytest.approx(2, rel=0.2)


def test_pictures_are_one_on_average() -> None:
    """The geometric mean over pictures is 1, whatever is repeated."""
    found = learned(history(repeats={"p07": 5}, hard={"p07": 1.4}))
    assert math.fsum(math.log(row.beside.mean) for row in found) / 10 == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_stands_out_where_all_are_alike(seed: int) -> None:
    """Ten pictures of one kind in five runs of chance: no word about any of them."""
    found = board_of(history(seed=seed, noise=0.2))
    assert remarks(found) == {}
    assert found.sentence == "10 pictures, seen 40 to 40 times; none of them stands out"


def test_bands_widen_with_the_number_of_pictures() -> None:
    """2.5 % shared out over the pictures: 1.96 deviations for one, 3.48 for a hundred."""
    assert surely(1) == pytest.approx(1)
    assert 1.95996 * surely(100) == pytest.approx(3.4808, abs=1e-3)


def test_what_does_not_count() -> None:
    """Regularisation pictures, updates of them alone, losses that are 0 or no number; and a run without any update."""
    rows = history()
    plain = learned(rows)
    extra = [
        {"type": "step", "step": 500, "loss": None, "losses": [9.0], "sigmas": [0.5], "items": ["kept"]},
        {"type": "step", "step": 501, "loss": 1.0, "losses": [9.0, math.nan, 0.0], "sigmas": [0.5] * 3, "items": ["kept", "p01", "p02"]},
    ]
    assert learned([*rows, *extra], stays={"kept"}) == plain
    assert board_of([]).sentence == "no training picture was seen yet"
    assert "no training picture" in board_of([])._repr_html_()


def test_fixed_noise_and_what_lies_outside() -> None:
    """Evaluations say exactly how much some pictures have learned, and how far the model went on others."""
    evals: list[dict[str, Any]] = [
        {"type": "eval", "step": s, "sigmas": [0.5], "train_items": ["p01", "p02"], "train_losses_by_image": losses,
         "drifts_by_image": drifts, "relative": relative}
        for s, losses, drifts, relative in ((0, [1.0, 2.0], [0.0, 0.0], 1.0), (50, [0.7, 2.1], [0.02, 0.06], 0.9))
    ]  # fmt: skip
    found = by_id(learned(history(), evals))
    assert (found["p01"].fixed, found["p02"].fixed, found["p03"].fixed) == (pytest.approx(-0.3), pytest.approx(0.05), None)
    assert forgetting_of(evals) == (
        "forgetting: on 2 pictures outside the training set the predictions are 4.00% of the base's error away from the base's at step 50, "
        "0.00% at step 0, where the loss is 90.0% of the base's"
    )
    assert forgetting_of([]) == ""
    assert learned(history(), evals[:1])[1].fixed is None, "one evaluation is no change"


def test_it_is_shown_as_text(tmp_path: Path) -> None:
    """Names of files in the table and in the page, escaped; the chart has both views, and the picture its sentence."""
    found = board_of(history(fall={"p03": 0.0}, epochs=12), names={"p03": "<b>pot</b>.png"})
    lines = str(found).splitlines()
    assert lines[0] == found.sentence
    assert lines[3].startswith("<b>pot</b>.png  12 ")
    assert len(lines) == 2 + 1 + 10
    page = found._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;pot&lt;/b&gt;.png" in page
    figure = found.chart()
    assert [len(axes.collections[0].get_offsets()) + len(axes.collections[1].get_offsets()) for axes in figure.axes] == [10, 10]
    assert [text.get_text() for text in figure.axes[1].texts] == ["<b>pot</b>.png"]


def test_a_real_run(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every picture is there with its file's name, the counts are those of the history; the verb says the same and draws."""
    trainer = bench.trainer(max_train_steps=12, validation_prompt=(), learning_rate=1e-3, lora_targets=("to_q", "to_v"))
    for _ in trainer.run():
        pass
    found = board(trainer.folder.path)
    train = {p.item.path.name for p in trainer.cache.plan.train}
    assert {found.name(row) for row in found.rows} == train
    assert sum(row.seen for row in found.rows) == 24
    assert sum(row.fixed is not None for row in found.rows) == 4
    assert "4 pictures outside the training set" in found.forgetting
    chart = tmp_path / "board.png"
    assert main(["board", str(trainer.folder.path), "--chart", str(chart)]) == 0
    said = capsys.readouterr().out
    assert found.sentence in said
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert main(["board", str(tmp_path)]) == 1
    assert "not a run folder (there is no history.jsonl)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="not a run folder"):
        board(tmp_path)


def test_a_hard_picture_at_high_noise_does_not_bend_the_levels() -> None:
    """Half of what was seen above 0.5 is one picture that is e times as hard: both it and the levels are found, and no other is moved."""
    rng, rows = random.Random(3), list[tuple[str, float]]()
    for _ in range(400):
        rows += [(name, rng.random()) for name in PICTURES[1:5]] + [(PICTURES[0], 0.5 + 0.5 * rng.random())] * 2
    own = [PICTURES.index(name) for name, _ in rows]
    value = [2 - 3 * sigma + (name == PICTURES[0]) for name, sigma in rows]
    level = expected(np.array([sigma for _, sigma in rows]), np.array(value), np.array(own), 5)
    rest = [v - float(at) for v, at in zip(value, level, strict=True)]
    means = [sum(r for r, o in zip(rest, own, strict=True) if o == n) / own.count(n) for n in range(5)]
    assert means[0] - means[1] == pytest.approx(1, abs=0.02)
    assert max(means[1:]) - min(means[1:]) < 0.02
