"""Prior preservation: the base model's own prediction as the target, kept apart from the loss of what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from PIL import Image
from test_engine import Toy, engine
from test_lycoris import written

import sd3tune as st
from sd3tune.charts import save_losses
from sd3tune.cli import main
from sd3tune.data.entries import read_datasets
from sd3tune.errors import ConfigError, DataError, TrainingError
from sd3tune.training import flow
from sd3tune.training.batches import Batch
from sd3tune.validation.class_pictures import draw

BASE = 0.3
"""What the toy's base model multiplies with."""


class Mixed:
    """Every second batch is regularisation data."""

    def __init__(self, kinds: str = "lr") -> None:
        self.kinds = kinds

    def ids(self, k: int) -> tuple[str, ...]:
        return (f"{k}a", f"{k}b")

    def part(self, k: int, places: range) -> Batch:
        latent = torch.arange(32.0).reshape(2, 4, 2, 2)[list(places)] / 10
        ids, texts = tuple(self.ids(k)[i] for i in places), torch.zeros(len(places), 1, 1)
        return Batch(ids, latent, texts, texts[:, 0], regularisation=self.kinds[k % len(self.kinds)] == "r")


def mixed(kinds: str = "lr", **changes: Any) -> tuple[Any, Toy]:
    made, toy = engine(**{"accumulation": 2, **changes})
    made.batches = Mixed(kinds)  # type: ignore[assignment]
    made.prior = lambda noisy, *_: BASE * noisy
    return made, toy


# --- the target ------------------------------------------------------------------------------------------------------


def test_the_target_is_the_priors_prediction_of_the_same_points() -> None:
    """By hand: both see (1 - s) x + s n, the loss is their mean squared difference, and no gradient reaches the prior."""
    g = torch.Generator().manual_seed(0)
    latent, noise, sigma = torch.randn(2, 4, 3, 3, generator=g), torch.randn(2, 4, 3, 3, generator=g), torch.tensor([0.2, 0.8])
    text, pooled = torch.ones(2, 1, 1), torch.ones(2, 1)
    own, base = torch.tensor(0.9, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    seen: list[tuple[torch.Tensor, ...]] = []

    def prior(*given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return base * given[0]

    loss_B = flow.loss(lambda z, *_: own * z, latent, text, pooled, sigma_B=sigma, noise_BCHW=noise, prior=prior)
    noisy = flow.mix(latent, noise, sigma)
    assert torch.allclose(loss_B, (0.5 * noisy).square().flatten(1).mean(1))
    assert all(torch.equal(got, want) for got, want in zip(seen[0], (noisy, sigma, text, pooled), strict=True))
    loss_B.sum().backward()
    assert own.grad
    assert base.grad is None


def test_the_two_losses_are_apart() -> None:
    """``loss`` is of the pictures to learn from, ``regularisation_loss`` of the others, ``losses`` of all, in the order of the items."""
    made, _ = mixed()
    record = made.update(peak_learning_rate=0.0)
    assert record.items == ("0a", "0b", "1a", "1b")
    assert record.loss == pytest.approx(sum(record.losses[:2]) / 2)
    assert record.regularisation_loss == pytest.approx(sum(record.losses[2:]) / 2)
    alone, _ = mixed("r")
    record = alone.update(peak_learning_rate=0.0)
    assert record.loss is None, "nothing was there to learn from"
    assert record.regularisation_loss == pytest.approx(sum(record.losses) / 4)
    assert json.loads(json.dumps(record.as_dict()))["loss"] is None
    plain, _ = mixed("l")
    assert plain.update(peak_learning_rate=0.0).regularisation_loss is None


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_weight_is_that_of_the_gradient(weight: float) -> None:
    """The gradient is that of the mean over all pictures, regularisation pictures times the weight; the recorded loss is not weighted."""
    made, toy = mixed(regularisation_weight=weight)
    record = made.update(peak_learning_rate=0.0)
    got = toy.a.grad.clone()  # type: ignore[union-attr]
    halves = []
    for k, kinds in ((0, "l"), (1, "r")):
        one, toy = mixed("lr")
        one._optimizer.zero_grad(set_to_none=True)
        assert one.batches.part(k, range(2)).regularisation == (kinds == "r")
        one._backward(k, 4)
        halves.append(toy.a.grad.clone())  # type: ignore[union-attr]
    assert torch.allclose(got, halves[0] + weight * halves[1], rtol=1e-5)
    assert record.regularisation_loss == mixed()[0].update(peak_learning_rate=0.0).regularisation_loss


def test_an_engine_without_a_prior_says_so() -> None:
    made, _ = mixed("r")
    made.prior = None
    with pytest.raises(TrainingError, match="was not given the base model's velocity"):
        made.update(peak_learning_rate=0.1)


# --- a run -----------------------------------------------------------------------------------------------------------


def datasets(bench: Workbench, folder: Path, *, only: bool = False) -> Path:
    """The bench's pictures to learn from, and four of them again as regularisation data."""
    (folder / "class").mkdir(parents=True)
    for n, picture in enumerate(sorted((bench.root / "pictures" / "train").glob("*.png"))[:4]):
        with Image.open(picture) as opened:
            opened.convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / "class" / f"{n}.png")
        (folder / "class" / f"{n}.txt").write_text(picture.with_suffix(".txt").read_text())
    path = folder / "datasets.yaml"
    learn = f"- {{id: some, instance_data_dir: {bench.root}/pictures/train, resolution: 64}}\n"
    path.write_text(("" if only else learn) + "- {id: class, instance_data_dir: class, resolution: 64, is_regularisation_data: true}\n")
    return path


def trainer(bench: Workbench, folder: Path, **settings: Any) -> st.Trainer:
    path = folder / "datasets.yaml"
    config = bench.config(**{"max_train_steps": 12, "lr_warmup_steps": 0, "learning_rate": 2e-3, "validation_prompt": (), **settings})
    return st.Trainer(config, st.CacheBuilder(st.plan(st.discover(path), config), st.encoders(config)).build())


def is_class(run: st.Trainer, k: int) -> bool:
    return run.engine.batches.placements(k)[0].item.dataset.id == "class"


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {}, "lora-dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "int8": {"base_model_precision": "int8-quanto"},
    "nf4-dora": {"base_model_precision": "nf4-bnb", "use_dora": True}, "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "lokr": {"lora_type": "lycoris", "algo": {"algo": "lokr", "factor": 4}},
    "lokr-dora": {"lora_type": "lycoris", "algo": {"algo": "lokr", "factor": 4, "dora_wd": True}},
    "loha-int8": {"lora_type": "lycoris", "algo": {"algo": "loha"}, "base_model_precision": "int8-quanto"},
    "full": {"lora_type": "lycoris", "algo": {"algo": "full", "full_matrix": True}},
    "diag-oft": {"lora_type": "lycoris", "algo": {"algo": "diag-oft"}},
}  # fmt: skip
"""Kinds of adapters and bases."""

TOLERANCE = {"lokr-dora": 1e-10}
"""Lengths of rows divided and multiplied again: a zero adapter is the base but for rounding, so its loss is too (3e-13 here)."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("lora-dropout", "nf4-dora", "lokr") else pytest.mark.full) for kind in ADAPTERS]
)
def test_the_prior_is_the_base_with_every_adapter(bench: Workbench, tmp_path: Path, kind: str) -> None:
    """At zero its loss is 0 and has no gradient; after updates the prior is still the base, bit for bit; gradients reach the adapter."""
    datasets(bench, tmp_path)
    settings = dict(ADAPTERS[kind])
    if "algo" in settings:
        settings["lycoris_config"] = written(tmp_path, **settings.pop("algo"))
    run = trainer(bench, tmp_path, **settings)
    made = run.engine
    first = next(k for k in range(20) if is_class(run, k))
    probe = run.cache.text("")
    g = torch.Generator().manual_seed(0)
    noisy, sigma = torch.randn(2, 16, 8, 8, generator=g), torch.tensor([0.3, 0.7])
    given = (noisy, sigma, torch.stack([probe.joint_LD] * 2), torch.stack([probe.pooled_P] * 2))
    prior = run.engine.prior
    assert prior is not None
    before = prior(*given)
    part = made._backward(first, 2)
    assert part.regularisation
    assert float(part.loss_B.max()) <= TOLERANCE.get(kind, 0.0)
    made._optimizer.zero_grad(set_to_none=True)
    modes = {name: module.training for name, module in run.transformer.named_modules()}
    for _ in range(3):
        run.step()
    assert torch.equal(prior(*given), before), "the base answers, whatever the adapter has learned"
    with torch.no_grad():
        assert not torch.equal(made.velocity(*given), before), "the adapter is on again"
    assert {name: module.training for name, module in run.transformer.named_modules()} == modes
    assert all(weight.requires_grad for weight in made.weights.values())
    part = made._backward(first, 2)
    assert float(part.loss_B.min()) > 0
    assert any(weight.grad is not None and weight.grad.any() for weight in made.weights.values())


def test_a_run_with_regularisation(bench: Workbench, tmp_path: Path) -> None:
    """Shown in plan and manifest; both losses in the history; it resumes bit for bit; the chart leaves out what has no loss."""
    datasets(bench, tmp_path)
    run = trainer(bench, tmp_path, regularisation_weight=0.5)
    assert "stays     class: 4 pictures whose target is the base model's own prediction, weight 0.5" in str(run.manifest)
    assert "class: regularisation; the target is what the base model predicts" in str(run.cache.plan)
    records = []
    for n in range(8):
        if n == 4:
            run.checkpoint()
            run = st.Trainer.resume(run.folder.path)
        records.append(run.step())
    whole = trainer(bench, tmp_path, regularisation_weight=0.5)
    assert [whole.step().losses for _ in range(8)] == [record.losses for record in records]
    kinds = {(r.loss is None, r.regularisation_loss is None) for r in records}
    assert kinds == {(True, False), (False, True)}
    assert max(r.regularisation_loss for r in records if r.regularisation_loss is not None) > 0
    lines = [line for line in run.folder.read_history() if line["type"] == "step"]
    assert [line["loss"] for line in lines] == [r.loss for r in records]
    save_losses(run.folder)
    assert "loss" in str(st.runs(run.folder.path.parent))
    path = tmp_path / "datasets.yaml"
    path.write_text(path.read_text().replace(", is_regularisation_data: true", ""))
    config = run.config
    changed = st.CacheBuilder(st.plan(st.discover(path), config), st.encoders(config)).build()
    with pytest.raises(st.CheckpointError, match="are not those of the run"):
        st.Trainer.resume(run.folder.path, changed)


def test_nothing_to_learn_is_an_error(bench: Workbench, tmp_path: Path) -> None:
    """Regularisation alone trains nothing; and it is no way to hold pictures out."""
    path = datasets(bench, tmp_path, only=True)
    with pytest.raises(DataError, match="there is nothing to learn: every data set to train on has is_regularisation_data"):
        st.discover(path)
    path.write_text("- {id: a, instance_data_dir: class, dataset_type: eval, is_regularization_data: true}\n")
    with pytest.raises(ConfigError, match="is for pictures to train on, not for dataset_type eval"):
        read_datasets(path)


# --- class pictures --------------------------------------------------------------------------------------------------

FEW = ["--set", "validation_num_inference_steps=2", "--set", "validation_seed=7"]


def test_class_pictures_are_the_base_models_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With captions; a lost one is drawn again bit for bit, those that are there stay; other settings are refused."""
    out = tmp_path / "class"
    words = ["data", "class-pictures", str(out), "--prompt", "lock", *FEW]
    assert main([*words, "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 pictures drawn, 0 were there" in said
    assert f"- {{id: class, instance_data_dir: {out}, is_regularisation_data: true" in said
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert sorted(first) == ["000000.png", "000000.txt", "000001.png", "000001.txt", "class-pictures.json"]
    assert first["000000.txt"] == b"lock\n"
    assert first["000000.png"] != first["000001.png"]
    (out / "000000.png").unlink()
    (out / "000001.png").write_bytes(b"kept")
    assert main([*words, "--count", "3"]) == 0
    assert "2 pictures drawn, 1 were there" in capsys.readouterr().out
    assert (out / "000000.png").read_bytes() == first["000000.png"]
    assert (out / "000001.png").read_bytes() == b"kept"
    for changed, message in (
        ([*words[:4], "cat", *FEW], "its pictures were drawn with other settings"),
        ([*words[:2], str(tmp_path), *words[3:]], "is not empty, and its pictures are not from this command"),
        (["data", "class-pictures", str(tmp_path / "new")], "class-pictures needs a new folder, --prompt"),
    ):
        assert main(changed) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_class_pictures_are_what_validation_draws(bench: Workbench, tmp_path: Path) -> None:
    """Picture 0 is the validation picture of the base model, pixel by pixel; prompts take turns."""
    run = bench.trainer(validation_prompt=("lock", "croissant"), validation_num_inference_steps=2)
    list(run.validation())
    drawn = [path for path, _ in draw(run.config, ["croissant", "lock"], tmp_path / "class", 2)]
    with Image.open(drawn[0]) as one, Image.open(run.folder.images(0) / "01.png") as other:
        far = max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))
    assert far <= 1, "texts that are encoded in another company differ by rounding"
    assert [path.with_suffix(".txt").read_text() for path in drawn] == ["croissant\n", "lock\n"]
