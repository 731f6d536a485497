"""Choosing a checkpoint: the pictures are validation's own, votes are blind and never lost, the file is the checkpoint's adapter."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import sd3tune as st
from sd3tune import candidates, picking, playground
from sd3tune.candidates import promote, weights_of, whole_checkpoints
from sd3tune.cli import main
from sd3tune.errors import CheckpointError, ConfigError, FileError, TrainingError
from sd3tune.history import newest_chain
from sd3tune.models import components, lora_layouts
from sd3tune.picking import Picker
from sd3tune.records import ImageRecord, NoticeRecord, PreviewRecord, Record, ScoreRecord
from sd3tune.replaying import replay
from sd3tune.run_folder import RunFolder
from sd3tune.sampling import exchange, loaded
from sd3tune.validation import votes
from sd3tune.validation.sampler import Guidance, sample
from sd3tune.validation.shots import Shot
from sd3tune.validation.votes import Candidate, VoteRecord, ballots, pairs_of, ranking, read_votes, shuffled, wilson

FAST: dict[str, Any] = {"lr_warmup_steps": 0, "learning_rate": 5e-3, "eval_timesteps": 1, "num_eval_images": 2}


@pytest.fixture(scope="module")
def bench(grown: Workbench) -> Workbench:
    """The whole playground: its pictures are scored, and drawn by stock diffusers."""
    return grown


@pytest.fixture(scope="module")
def trained(bench: Workbench) -> Path:
    """A run with three checkpoints, and validation's pictures at each; its files are not to be changed."""
    trainer = bench.trainer(max_train_steps=6, evaluation_type="clip", **FAST)
    for _ in range(3):
        trainer.step()
        trainer.step()
        trainer.checkpoint()
        trainer.evaluate()
        trainer.validate()
    trainer.save(trainer.folder.lora)
    return trainer.folder.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with validation's pictures."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def picked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A copy without validation's pictures, every checkpoint drawn at two strengths, and the records of that; not to be changed."""
    path = tmp_path_factory.mktemp("picked") / "run"
    shutil.copytree(trained, path)
    shutil.rmtree(path / "images")
    return path, list(Picker(path, strengths=(0.5, 1.0)))


def pixels(path: Path) -> bytes:
    with Image.open(path) as opened:
        return opened.convert("RGB").tobytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_validations_own(trained: Path, picked: tuple[Path, list[Record]]) -> None:
    """Drawn from the checkpoints alone, by exchanging values, they are bit for bit what the run drew at these steps."""
    path, records = picked
    picker = Picker(path, strengths=(0.5, 1.0))
    assert [str(one) for one in picker.candidates] == ["step 2 x 0.5", "step 2", "step 4 x 0.5", "step 4", "step 6 x 0.5", "step 6"]
    seen = set()
    for step in (2, 4, 6):
        for number, found in enumerate(picker.row(Candidate(step, 1.0, picker.candidates[step - 1].mark))):
            assert found is not None
            assert pixels(found.path) == pixels(trained / "images" / f"step-{step:06d}" / f"{number:02d}.png")
    for one in picker.candidates:
        seen |= {pixels(found.path) for found in picker.row(one) if found}
    assert len(seen) == 12, "candidates must differ for this test to mean anything"
    drawn = [record for record in records if isinstance(record, ImageRecord)]
    assert [record.step for record in drawn] == [2] * 4 + [4] * 4 + [6] * 4
    assert sum(isinstance(record, PreviewRecord) for record in records) == 6 * 3
    assert not (path / "images").exists()


def test_the_price_comes_first(picked: tuple[Path, list[Record]], trained: Path) -> None:
    """Pictures, forwards and time before anything is drawn; what is there costs nothing."""
    path, (first, *_) = picked
    assert isinstance(first, NoticeRecord)
    assert re.fullmatch(r"12 pictures, 72 forwards of the model: about [\d.]+ (s|min)", first.text)
    assert Picker(path, strengths=(0.5, 1.0)).price == "all 12 pictures are there"
    assert Picker(path, strengths=(0.5, 1.0, 2.0)).price.startswith("6 pictures, 36 forwards of the model; the first step tells")
    assert Picker(trained).price == "all 6 pictures are there", "those of validation"


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(3.0), Guidance(3.0, (1,), 0.1, 0.7)])
def test_forwards_are_those_that_are_done(bench: Workbench, solver: Any, guidance: Guidance) -> None:
    """What is counted beforehand is what goes through the model."""
    rows = []

    def model(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        rows.append(len(hidden_states))
        return (torch.zeros_like(hidden_states),)

    text = st.cache.states.Text(torch.zeros(1, 4), torch.zeros(4))
    noise = torch.zeros(1, 16, 2, 2)
    scheduler = components.load_scheduler(bench.config(), solver, 3.0)
    for _ in sample(model, scheduler, positives=[text], negatives=[text], noise_BCHW=noise, steps=5, guidance=guidance):
        pass
    assert Shot("", "", "", 16, 16, 0, 5, guidance, solver=solver).forwards == sum(rows)


def test_a_second_picker_draws_nothing(picked: tuple[Path, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds every picture without a model, and writes none anew."""
    path, _ = picked
    before = files(path / "picks")
    monkeypatch.setattr(picking, "loaded", None)
    records = list(Picker(path, strengths=(0.5, 1.0)))
    assert [record.type for record in records] == ["notice"] + ["clip"] * 6
    assert files(path / "picks") == before


def test_drawing_goes_on_where_it_stopped(run: Path, picked: tuple[Path, list[Record]]) -> None:
    """Broken off after one picture and with one lost later, the pictures end the same: batches are drawn whole."""
    shutil.rmtree(run / "images")
    whole = {name: pixels(picked[0] / "picks" / name) for name in files(picked[0] / "picks") if name.endswith(".png")}
    for record in (records := iter(Picker(run, steps=(4,), evaluation_type="none"))):
        if isinstance(record, ImageRecord):
            records.close()  # type: ignore[attr-defined]
            break
    assert len(list((run / "picks").glob("*.png"))) == 1
    assert Picker(run, steps=4).price.startswith("2 pictures, 12 forwards")
    for _ in Picker(run, steps=4, evaluation_type="none"):
        pass
    drawn = [path for path in (run / "picks").glob("*.png") if path.name != "grid.png"]
    assert len(drawn) == 2
    assert all(pixels(path) == whole[path.name] for path in drawn)


def test_only_the_same_adapter_and_model_count(run: Path) -> None:
    """Validation's picture of another adapter, and another precision of the base, are no pictures of this candidate."""
    picker = Picker(run, steps=6)
    assert picker.price == "all 2 pictures are there"
    other = Picker(run, steps=6, base_model_precision="int8-quanto")
    assert other.price.startswith("2 pictures")
    assert other.place(other.candidates[0], other.shots[0]) != picker.place(picker.candidates[0], picker.shots[0])
    assert Picker(run, steps=6, validation_guidance=2.0).price.startswith("2 pictures")
    path = run / "images" / "step-000006" / "00.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "adapter": "0" * 64}))
    assert picker.price.startswith("2 pictures, 12 forwards")


def test_a_block_that_the_model_has_not_is_refused(run: Path) -> None:
    """Before anything is loaded or drawn."""
    picker = Picker(run, steps=6, validation_guidance_skip_layers=[50], validation_guidance=4.0)
    with pytest.raises(st.ConfigError, match=r"validation_guidance_skip_layers: \[50\] is beyond this model's blocks, 0 to 11"):
        list(picker)
    assert not (run / "picks").exists()


def test_a_pick_can_be_drawn_again(picked: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """Its adapter stays although its checkpoint goes and the run tidies up; what stands inside it draws the same bits."""
    shutil.copytree(picked[0], tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    picker = Picker(folder.path, strengths=0.5)
    path = picker.place(picker.candidates[0], picker.shots[1])
    shutil.rmtree(folder.checkpoint_folder)
    folder.drop_adapters()
    *_, last = replay(path)
    assert isinstance(last, NoticeRecord)
    assert last.text.endswith("drawn again, and the same, bit for bit")


def test_grid_and_text_say_what_is_known(picked: tuple[Path, list[Record]]) -> None:
    """Step, strength, the loss of that step, the mean CLIP score; the grid is on the disk."""
    path, records = picked
    picker = Picker(path, strengths=(0.5, 1.0))
    for _ in picker:
        pass
    history = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in history if row["type"] == "eval"}
    scores = [record for record in records if isinstance(record, ScoreRecord)]
    wanted = [
        f"{one}\nloss {losses[one.step]:.4f}{'' if one.strength == 1 else ' at 1'}\nCLIP {score.mean:.3f}"
        for one, score in zip(picker.candidates, scores, strict=True)
    ]
    assert [label for label, _ in picker.grid().rows] == wanted
    assert picker.grid().columns == ("lock", "croissant")
    assert str(picker).splitlines()[2] == f"step 2, loss {losses[2]:.4f}, CLIP {scores[1].mean:.3f}, 2 of 2 pictures"
    own = [row for row in history if row["type"] == "clip" and row["step"] == 4]
    assert scores[3].scores == pytest.approx(own[0]["scores"])
    with Image.open(path / "picks" / "grid.png") as opened:
        assert opened.tobytes() == picker.grid().image().tobytes()
        about = json.loads(opened.text["sd3tune"])  # type: ignore[attr-defined]
    assert about == json.loads((path / "picks" / "grid.json").read_text())
    assert [row["label"] for row in about["rows"]] == wanted
    assert about["columns"] == ["lock", "croissant"]
    for row, candidate in zip(about["rows"], picker.candidates, strict=True):
        for cell in row["cells"]:
            shot = json.loads((path / cell["file"]).with_suffix(".json").read_text())["shot"]
            assert (cell["shot"], cell["shot"]["strength"]) == (shot, candidate.strength)


def test_other_prompts_are_encoded_and_drawn(run: Path) -> None:
    """A prompt that no text encoder had read, with other settings; what a failed picture says stands in its cell."""
    picker = Picker(run, "a lock made of glass", steps=(2,), validation_num_inference_steps=2)
    assert [record.prompt for record in picker if isinstance(record, ImageRecord)] == ["a lock made of glass"]
    (found,) = picker.row(picker.candidates[0])
    assert found is not None
    found.path.unlink()
    row = json.loads(found.path.with_suffix(".json").read_text())
    found.path.with_suffix(".json").write_text(json.dumps({**row, "problem": "it is too hot"}))
    assert picker.grid().rows[0][1] == ("it is too hot",)
    assert picker.price.startswith("1 pictures")


SMALL = {
    "algo": "lokr",
    "factor": 4,
    "multiplier": 1.0,
    "linear_dim": 4,
    "linear_alpha": 0.5,
    "apply_preset": {"target_module": ["Attention"]},
}


def test_lycoris_is_drawn_as_it_was_judged(bench: Workbench, tmp_path: Path) -> None:
    """A network's values are exchanged too, live prompts count, and its file is the trainer's; what cannot be done is said."""
    (tmp_path / "kind.json").write_text(json.dumps(SMALL))
    trainer = bench.trainer(**FAST, max_train_steps=2, lora_type="lycoris", lycoris_config=str(tmp_path / "kind.json"))
    trainer.set(validation_prompt=("croissant",))
    own = {}
    for step in (1, 2):
        trainer.step()
        trainer.checkpoint()
        trainer.validate()
        own[step] = pixels(trainer.folder.images(step) / "00.png")
    assert own[1] != own[2]
    shutil.rmtree(trainer.folder.path / "images")
    picker = Picker(trainer.folder.path)
    assert sum(isinstance(record, ImageRecord) for record in picker) == 2
    assert {one.step: pixels(found.path) for one in picker.candidates for found in picker.row(one) if found} == own
    trainer.save(tmp_path / "own.safetensors")
    mine, theirs = load_file(picker.promote(2).path), load_file(tmp_path / "own.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="a strength cannot be folded into a LyCORIS file; use it at that strength"):
        picker.promote(Candidate(2, 0.5), fold=True)
    with pytest.raises(ConfigError, match="a LyCORIS file has lycoris' own layout"):
        picker.promote(2, layout="comfyui")


def test_of_a_schedule_free_run_the_average_is_drawn(bench: Workbench) -> None:
    """A candidate's weights are those that validation judges, bit for bit, and not the ones that train."""
    trainer = bench.trainer(**FAST, max_train_steps=2, optimizer="schedulefree", lr_scheduler="constant_with_warmup")
    trainer.step()
    trainer.step()
    trainer.checkpoint()
    drawn, judged = weights_of(trainer.folder, trainer.config, Candidate(2)), trainer.engine.result()
    assert drawn.keys() == judged.keys()
    assert all(torch.equal(drawn[name], judged[name]) for name in judged)
    trained = load_file(candidates.adapter_file(trainer.folder, 2))
    assert not all(torch.equal(drawn[name], trained[name]) for name in trained)


def test_exchanged_values_are_those_of_a_fresh_load(trained: Path) -> None:
    """The model that had another checkpoint in it predicts what a newly loaded one does, bit for bit, at every strength."""
    folder = RunFolder(trained)
    config, cpu = st.RunConfig.load(folder.config), torch.device("cpu")
    file = candidates.adapter_file
    with loaded(config, file(folder, 2), cpu) as (one, _), loaded(config, file(folder, 6), cpu) as (fresh, _):
        before = predicted(one)
        exchange(one, None, weights_of(folder, config, Candidate(6)), "step 6")
        assert torch.equal(predicted(one), predicted(fresh))
        assert not torch.equal(predicted(one), before)
        less = dict(list(weights_of(folder, config, Candidate(2)).items())[1:])
        with pytest.raises(CheckpointError, match="step 2: is of another adapter than the run's settings describe; 1 weights differ"):
            exchange(one, None, less, "step 2")
        assert torch.equal(predicted(one), predicted(fresh)), "nothing is changed by what does not fit"


def predicted(model: Any) -> torch.Tensor:
    g, c = torch.Generator().manual_seed(0), model.config
    x, t, p = (torch.randn(s, generator=g) for s in ((1, 16, 8, 8), (1, 9, c.joint_attention_dim), (1, c.pooled_projection_dim)))
    with torch.no_grad():
        found: torch.Tensor = model(hidden_states=x, encoder_hidden_states=t, pooled_projections=p, timestep=torch.tensor([400.0])).sample
    return found


# --- which checkpoints there are --------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_damaged_and_missing_checkpoints_are_named(run: Path) -> None:
    """Left out when all are asked for, named when one is; a checkpoint that goes or changes later is named, too."""
    picker = Picker(run)
    damage(run / "checkpoints" / "step-000004" / "adapter.safetensors")
    assert [one.step for one in Picker(run).candidates] == [2, 6]
    with pytest.raises(CheckpointError, match=r"step-000004 is damaged \(adapter.safetensors is not what was written\); there are 2, 6$"):
        Picker(run, steps=(2, 4))
    with pytest.raises(CheckpointError, match=r"run: there is no checkpoint of step 3; there are 2, 6$"):
        Picker(run, steps=3)
    with pytest.raises(CheckpointError, match=r"step-000004: damaged: adapter.safetensors is not what was written; choose another step"):
        picker.promote(picker.candidates[1])
    shutil.rmtree(run / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match="step-000002: the checkpoint is gone; a run keeps checkpoints_total_limit of them"):
        picker.promote(picker.candidates[0])
    with pytest.raises(CheckpointError, match="step-000006: is another checkpoint by now"):
        picker.promote(Candidate(6, 1.0, "0" * 64))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no whole checkpoint to choose from"):
        Picker(run)
    assert not list(run.glob("picked*"))


def test_what_a_run_left_behind_is_no_candidate(run: Path) -> None:
    """After going back to step 2 the checkpoints beyond it are of another run, and so are their losses."""
    (run / "checkpoints" / "step-000006").rename(run / "checkpoints" / "step-000006.old")
    with (run / "history.jsonl").open("a") as history:
        history.write(json.dumps({"type": "segment", "step": 2, "from_step": 2, "parent": 0, "segment": 1, "why": "rollback"}) + "\n")
    picker = Picker(run)
    assert [one.step for one in picker.candidates] == [2]
    assert list(picker.losses) == [2]
    with pytest.raises(CheckpointError, match=r"step-000004 was left behind when the run went back to an earlier step; there are 2$"):
        whole_checkpoints(RunFolder(run), (4,))


def test_the_untrained_adapter_is_no_candidate(bench: Workbench) -> None:
    """A checkpoint of step 0 is drawn only when it is asked for, and never promoted."""
    trainer = bench.trainer(**FAST, max_train_steps=1)
    trainer.checkpoint()
    with pytest.raises(CheckpointError, match="there is no whole checkpoint to choose from"):
        Picker(trainer.folder.path)
    trainer.step()
    trainer.checkpoint()
    assert [one.step for one in Picker(trainer.folder.path).candidates] == [1]
    assert [one.step for one in Picker(trainer.folder.path, steps=(0, 1)).candidates] == [0, 1]
    with pytest.raises(CheckpointError, match="nothing was learned yet at step 0; choose another step"):
        promote(trainer.folder, Candidate(0))


def test_the_newest_chain() -> None:
    """A segment counts up to where the next one on the way to now left it; one that was given up does not count."""

    def branch(segment: int, parent: int, from_step: int) -> dict[str, Any]:
        return {"type": "segment", "segment": segment, "parent": parent, "from_step": from_step, "step": from_step}

    assert newest_chain([]) == {0: math.inf}
    assert newest_chain([branch(1, 0, 100)]) == {1: math.inf, 0: 100}
    assert newest_chain([branch(1, 0, 100), branch(2, 1, 150)]) == {2: math.inf, 1: 150, 0: 100}
    assert newest_chain([branch(1, 0, 100), branch(2, 1, 50)]) == {2: math.inf, 1: 50, 0: 50}
    assert newest_chain([branch(1, 0, 100), branch(2, 0, 300)]) == {2: math.inf, 0: 300}


# --- votes ------------------------------------------------------------------------------------------------------------


def test_ballots_do_not_tell(picked: tuple[Path, list[Record]]) -> None:
    """Neither names of files nor what a ballot shows of itself, nor its pictures' texts say whose picture it is."""
    path, _ = picked
    names = [name for name in files(path / "picks") if name.endswith(".png") and name != "grid.png"]
    assert all(re.fullmatch(r"[0-9a-f]{64}\.png", name) for name in names)
    picker = Picker(path, strengths=(0.5, 1.0))
    marks = {one.mark for one in picker.candidates}
    found = list(picker.ballots())
    assert len(found) == math.comb(6, 2) * 2
    for number, ballot in enumerate(found, start=1):
        assert repr(ballot) == f"Ballot(number={number}, of=30, prompt={ballot.prompt!r})"
        assert ballot.left.info == ballot.right.info == {}
        shown = ballot._repr_png_()
        assert not any(word.encode() in shown for word in ("sd3tune", "step", *marks))
        assert ballot.left.tobytes() != ballot.right.tobytes()
    rows = {one: [pixels(f.path) for f in picker.row(one) if f] for one in picker.candidates}
    for ballot in found:
        column = ["lock", "croissant"].index(ballot.prompt)
        assert ballot.left.tobytes() == rows[ballot._pair.one][column]
        assert ballot.right.tobytes() == rows[ballot._pair.other][column]


def test_order_and_sides_are_functions_of_the_seed() -> None:
    """The same seed gives the same, another one another; sides are fair; more candidates leave the others' order as it is."""
    few, shots = [Candidate(n, 1.0, f"{n:064x}") for n in range(8)], ["a", "b", "c"]
    pairs = pairs_of(few, shots)
    assert len(pairs) == len({pair.key for pair in pairs}) == 28 * 3
    assert shuffled(pairs, 0) == shuffled(pairs[::-1], 0)
    assert shuffled(pairs, 0) != shuffled(pairs, 1)
    assert sorted(pair.key for pair in shuffled(pairs, 3)) == sorted(pair.key for pair in pairs)
    turned = [pair.one < pair.other for seed in range(20) for pair in shuffled(pairs, seed)]
    assert abs(sum(turned) / len(turned) - 0.5) < 4 * 0.5 / math.sqrt(len(turned))
    first = [pair.key for seed in range(5) for pair in shuffled(pairs, seed)[:10]]
    assert len(set(first)) > 30, "another seed begins with others"
    more = [*few, Candidate(9, 1.0, f"{9:064x}")]
    kept = [pair for pair in shuffled(pairs_of(more, shots), 0) if {pair.one, pair.other} <= set(few)]
    assert kept == shuffled(pairs, 0)


def test_each_pair_is_asked_once_and_votes_outlive_a_kill(picked: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """A process that is killed with SIGKILL between two votes loses none; a torn last line costs one vote, and no other."""
    path = tmp_path / "run"
    shutil.copytree(picked[0], path)
    child = os.fork()
    if child == 0:
        try:
            picker = Picker(path)
            for number, ballot in enumerate(picker.ballots()):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                picker.vote(ballot, "left")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    picker = Picker(path)
    first = list(read_votes(picker.votes_file))
    assert [(vote.step, vote.answer) for vote in first] == [(1, "left"), (2, "left")]
    rest = list(picker.ballots())
    assert [ballot.of for ballot in rest] == [4] * 4
    assert {ballot._pair.key for ballot in rest}.isdisjoint({vote.key for vote in first})
    picker.vote(rest[0], "same")
    data = picker.votes_file.read_bytes()
    picker.votes_file.write_bytes(data[:-20])
    assert list(read_votes(picker.votes_file)) == first
    again = next(picker.ballots())
    assert again._pair == rest[0]._pair
    for ballot in picker.ballots():
        picker.vote(ballot, "right")
    assert len(read_votes(picker.votes_file)) == 6
    assert list(picker.ballots()) == []
    assert len(list(picker.ballots(seed=1))) == 6, "another seed asks again"
    assert picker.ranking().votes == 6
    assert Picker(path, steps=(2, 4)).ranking().votes == 2, "votes on others do not count"
    with pytest.raises(ConfigError, match="'middle' is no answer; say 'left', 'right' or 'same'"):
        picker.vote(again, "middle")  # type: ignore[arg-type]


def test_nothing_to_compare_is_said(picked: tuple[Path, list[Record]], run: Path) -> None:
    """One candidate alone, or pictures that are not drawn."""
    shutil.rmtree(run / "images")
    for picker in (Picker(picked[0], steps=2), Picker(run)):
        with pytest.raises(TrainingError, match="no two pictures to compare yet: iterate over a picker of two or more candidates first"):
            next(picker.ballots())


def vote(left: Candidate, right: Candidate, answer: Any) -> VoteRecord:
    return VoteRecord(step=1, left=left, right=right, shot="s", answer=answer)


def test_ranking_finds_the_order_of_simulated_voters() -> None:
    """Voters of the Bradley-Terry kind, 0.8 apart, over blind ballots: the order comes out, whatever side it was on."""
    rng, known = random.Random(4), [Candidate(n, 1.0, f"{n:064x}") for n in (500, 100, 400, 200, 300)]
    quality = {one: 0.8 * n for n, one in enumerate(known)}
    blank, cast = Image.new("RGB", (1, 1)), []
    shots = [str(n) for n in range(60)]
    for ballot in ballots(pairs_of(known, shots), 0, lambda *_: blank, {shot: shot for shot in shots}):
        left, right = quality[ballot._pair.one], quality[ballot._pair.other]
        answer = "same" if rng.random() < 0.1 else "left" if rng.random() < 1 / (1 + math.exp(right - left)) else "right"
        cast.append(votes.answered(ballot, answer, len(cast)))
    found = ranking(cast, known)
    assert [standing.candidate for standing in found.standings] == known[::-1]
    assert found.votes == 600
    assert found.clear
    assert found == ranking(random.Random(0).sample(cast, len(cast)), known), "a function of the votes, not of their order"
    few = ranking(cast[:10], known)
    assert not few.clear
    assert "leads, but its interval overlaps with others'" in str(few)


def test_shares_and_intervals() -> None:
    """Ties are halves; Wilson's interval has its known values, and holds what it says for simulated votes."""
    a, b, c = (Candidate(n) for n in (1, 2, 3))
    found = ranking([vote(a, b, "left"), vote(b, a, "same"), vote(b, a, "left"), vote(a, c, "left")], [a, b])
    assert [(one.candidate, one.votes, one.share) for one in found.standings] == [(a, 3, 0.5), (b, 3, 0.5)]
    assert str(ranking([vote(a, b, "right")], [a, b, c])).splitlines()[1:] == [
        "step 2: won 100% (21% to 100%) of 1", "step 3: no votes yet", "step 1: won 0% (0% to 79%) of 1",
    ]  # fmt: skip
    assert str(ranking([], [a, b])) == "no votes yet"
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(0.5, 0) == (0.0, 1.0)
    rng, held = random.Random(1), 0
    for _ in range(2000):
        low, high = wilson(sum(rng.random() < 0.7 for _ in range(40)) / 40, 40)
        held += low <= 0.7 <= high
    assert 0.93 < held / 2000 < 0.97


def test_votes_are_of_adapters_and_not_of_numbers() -> None:
    """Another checkpoint of the same step, and another strength, are other candidates."""
    then, now, half = Candidate(100, 1.0, "a"), Candidate(100, 1.0, "b"), Candidate(100, 0.5, "a")
    cast = [vote(then, half, "left")]
    assert ranking(cast, [then, half]).votes == 1
    assert ranking(cast, [now, half]).votes == 0
    assert len({pair.key for pair in pairs_of([then, now, half], ["s"])}) == len(list(combinations(range(3), 2)))


# --- the file of the chosen one ---------------------------------------------------------------------------------------


def test_stock_diffusers_draws_the_promoted_file(picked: tuple[Path, list[Record]], tmp_path: Path) -> None:
    """Loaded by diffusers' own loader, the file draws the pick: as it is, and with the strength folded in."""
    picker = Picker(picked[0], strengths=(0.5, 1.0))
    stock = StableDiffusion3Pipeline.from_pretrained(playground.MODEL, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    pictures = {}
    for candidate in picker.candidates[2:4]:
        made = picker.promote(candidate, tmp_path / f"{candidate.strength}.safetensors", fold=True)
        assert str(made.verified) == "192 tensors, 96/96 modules, max difference 0"
        stock.load_lora_weights(made.path)
        picture = stock(
            "lock", num_inference_steps=3, guidance_scale=picker.shots[0].guidance.scale, width=64, height=64, max_sequence_length=16,
            generator=torch.Generator().manual_seed(picker.shots[0].seed),
        ).images[0]  # fmt: skip
        stock.unload_lora_weights()
        pictures[candidate] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
    for candidate, drawn in pictures.items():
        own = {one: torch.frombuffer(bytearray(pixels(picker.place(one, picker.shots[0]))), dtype=torch.uint8).int() for one in pictures}
        assert (drawn - own.pop(candidate)).abs().max() <= 2
        assert all((drawn - other).abs().max() > 4 for other in own.values()), "the strength must be seen for this to mean anything"


def test_promoted_files(run: Path, tmp_path: Path) -> None:
    """The last checkpoint's file is the run's own; nothing is overwritten; both layouts hold the same change; a strength only if asked."""
    folder = RunFolder(run)
    first, second = promote(folder, Candidate(6)), promote(folder, Candidate(4, 0.5))
    assert (first.path, second.path) == (run / "picked.safetensors", run / "picked-2.safetensors")
    own, mine = load_file(folder.lora), load_file(first.path)
    assert own.keys() == mine.keys()
    assert all(torch.equal(own[name], mine[name]) for name in own)
    notes = [lora_layouts.read(path).metadata for path in (folder.lora, first.path)]
    assert {key: value for key, value in notes[1].items() if notes[0].get(key) != value} == {"modelspec.title": "picked"}
    assert str(second) == f"{second.path}: step 4 x 0.5, 192 tensors, 96/96 modules, max difference 0; use it at strength 0.5"
    whole, half = (
        promote(folder, Candidate(4, 0.5), tmp_path / f"{fold}.safetensors", layout="comfyui", fold=fold) for fold in (False, True)
    )
    assert lora_layouts.largest_difference(lora_layouts.read(second.path), lora_layouts.read(whole.path)) == 0
    one, other = (lora_layouts.read(made.path).layers for made in (whole, half))
    assert all(torch.equal(0.5 * one[name].change, other[name].change) for name in one)
    assert str(half).endswith("; the strength is in it, so use it at 1")
    with pytest.raises(FileError, match=r"True.safetensors: is already there; give another name"):
        promote(folder, Candidate(2), half.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: not a run folder"),
        (["RUN", "--steps", "2", "5"], "there is no checkpoint of step 5; there are 2, 4, 6"),
        (["RUN", "--prompt", " "], "a prompt is empty; write what to draw"),
        (["RUN", "--strength", "-1"], "validation_adapter_strength: -1.0 is not allowed"),
        (["RUN", "--set", "validation_guidence=2"], "did you mean 'validation_guidance'?"),
        (["RUN", "--set", "validation_prompt=[]"], "there is nothing to draw: name a prompt, and a strength"),
        (["RUN", "--promote", "5"], "there is no checkpoint of step 5; there are 2, 4, 6"),
        (["RUN", "--promote", "6", "--out", "RUN/lora.safetensors"], "lora.safetensors: is already there; give another name"),
        (["RUN", "--promote", "6", "--strength", "0.5", "1"], "--promote writes one file; give one --strength"),
        (["RUN", "--fold"], "--out and --fold belong to --promote STEP"),
    ],
)
def test_mistakes_are_one_message(trained: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a sentence; nothing is written."""
    before = files(trained)
    assert main(["grid", *(word.replace("RUN", str(trained)) for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert files(trained) == before


def test_the_command_draws_and_promotes(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``sd3tune grid`` saves the grid and prints the table; with ``--promote`` it only writes the file."""
    assert main(["grid", str(run), "--promote", "4", "--out", str(tmp_path / "mine.safetensors")]) == 0
    assert "step 4, 192 tensors, 96/96 modules, max difference 0" in capsys.readouterr().out
    assert not (run / "picks").exists()
    assert main(["grid", str(run), "--steps", "2", "6"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 6, loss [\d.]+, CLIP [\d.]+, 2 of 2 pictures$", out, re.M)
    assert f"grid: {run / 'picks' / 'grid.png'}" in out
    assert (run / "picks" / "grid.png").is_file()
