"""Adapters that begin with a file, have several ranks, or are brought to another rank."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from conftest import Workbench
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd3tune as st
from sd3tune import cli, playground
from sd3tune.models import adapters, components, decomposing, lora_files, lora_layouts
from sd3tune.models.adapters import Spec

MODEL = st.presets.playground()


@pytest.fixture(scope="module")
def bench(grown: Workbench) -> Workbench:
    """The whole playground: files for its own layers are read."""
    return grown


def moved(spec: Spec, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A skeleton-sized model with an adapter whose weights are random."""
    model = components.load_transformer(MODEL, torch.device("cpu"))
    weights = adapters.add_lora(model, spec, seed=seed)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return model, weights


def changes(weights: dict[str, Any], spec: Spec) -> dict[str, torch.Tensor]:
    """Layer -> change of what is in memory."""
    return {name: layer.change for name, layer in lora_files.lora_of(weights, spec, {}).layers.items()}


# --- init_lora -------------------------------------------------------------------------------------------------------


QUICK = [("diffusers", 4, 4.0), ("comfyui", 8, 32.0)]
REST = [("comfyui", 4, 4.0), ("diffusers", 8, 2.0), ("comfyui", 8, 2.0), ("diffusers", 8, 32.0)]


@pytest.mark.parametrize(("layout", "rank", "alpha"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.full) for row in REST)])
def test_a_run_begins_with_the_change_of_a_file(bench: Workbench, tmp_path: Path, layout: Any, rank: int, alpha: float) -> None:
    """Of either layout, of a smaller rank and another alpha: each layer's change is the file's."""
    given = Spec("attention", 4, 12.0)
    _, weights = moved(given)
    lora_files.write(tmp_path / "a.safetensors", lora_files.lora_of(weights, given, {}), layout)
    settings = {"lora_targets": "attention+context", "lora_rank": rank, "lora_alpha": alpha}
    trainer = bench.trainer(init_lora=str(tmp_path / "a.safetensors"), **settings)
    wanted = changes(weights, given)
    found = changes(trainer.engine.weights, Spec("attention+context", rank, alpha))
    for name, change in found.items():
        expected = wanted.get(name, torch.zeros_like(change))
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-7), name
    assert set(wanted) < set(found)
    assert "of 119 layers begin with what is in this file" in (trainer.folder.path / "train.log").read_text()


def test_resume_does_not_read_the_file_again(bench: Workbench, tmp_path: Path) -> None:
    """The checkpoint is what counts, and the file may be gone."""
    _, weights = moved(Spec("attention", 4, 4.0))
    path = tmp_path / "a.safetensors"
    lora_files.write(path, lora_files.lora_of(weights, Spec("attention", 4, 4.0), {}), "diffusers")
    whole = bench.trainer(init_lora=str(path), lora_rank=4, lora_targets="attention")
    for _ in range(2):
        whole.step()
    whole.checkpoint()
    path.unlink()
    again = st.Trainer.resume(whole.folder.path)
    assert whole.step().loss == again.step().loss


def test_files_that_do_not_fit_are_explained(bench: Workbench, tmp_path: Path) -> None:
    """A larger rank, layers without an adapter, a DoRA, another model: one message each, before anything changes."""
    given = Spec("attention", 4, 4.0)
    _, weights = moved(given)
    path = tmp_path / "a.safetensors"
    lora_files.write(path, lora_files.lora_of(weights, given, {}), "diffusers")
    cases = (
        ({"lora_rank": 2, "lora_targets": "attention"}, "has rank 4, and this run 2; set lora_rank: 4"),
        ({"lora_targets": ["to_q"]}, "gets no adapter in this run; widen lora_targets"),
        ({"use_dora": True, "lora_targets": "attention"}, "no DoRA; set use_dora: false"),
    )
    for settings, says in cases:
        config = bench.config(init_lora=str(path), **settings)
        with pytest.raises(st.CheckpointError, match=says):
            st.Trainer(config, bench.cache(config))
    save_file({name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in load_file(path).items()}, path)
    config = bench.config(init_lora=str(path), lora_targets="attention")
    with pytest.raises(st.CheckpointError, match=r"changes 160 x 320 values, and this model has 160 x 160"):
        st.Trainer(config, bench.cache(config))


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [stock.draw, pytest.param(partial(stock.elsewhere, "draw"), marks=pytest.mark.full)], ids=["here", "elsewhere"]
)
def test_ranks_by_name_reach_the_file_and_stock_diffusers(bench: Workbench, tmp_path: Path, draw: Any) -> None:
    """Shapes follow lora_rank_pattern, alpha / rank is the same everywhere, and diffusers reads every key and draws the same."""
    import numpy as np
    from PIL import Image

    trainer = bench.trainer(
        lora_rank=8, lora_alpha=16.0, lora_targets="attention", lora_rank_pattern={"to_out.0": 2, "transformer_blocks.0.attn.to_q": 5},
        lr_warmup_steps=0, learning_rate=5e-3,
    )  # fmt: skip
    ranks = {n.rsplit(".lora_", 1)[0]: w.shape[0] for n, w in trainer.engine.weights.items() if "lora_A" in n}
    for name, rank in ranks.items():
        assert rank == (2 if name.endswith("to_out.0") else 5 if name == "transformer_blocks.0.attn.to_q" else 8), name
    for _ in range(6):
        trainer.step()
    trainer.validate()
    trainer.save(tmp_path / "lora.safetensors")
    read = lora_layouts.read(tmp_path / "lora.safetensors")
    assert {n: layer.rank for n, layer in read.layers.items()} == ranks
    assert {layer.scale for layer in read.layers.values()} == {1.0}  # 16 / 8 is folded into B
    arguments = [str(playground.MODEL), str(tmp_path / "lora.safetensors"), str(tmp_path / "out.png"), "lock"]
    arguments.append(str(trainer.config.validation_seed))
    found = draw(*arguments)
    assert (found["missing"], found["unexpected"]) == ([], [])
    own = np.asarray(Image.open(trainer.folder.images(6) / "00.png"), dtype=int)
    assert np.abs(own - np.asarray(Image.open(tmp_path / "out.png"), dtype=int)).max() <= 2


def test_a_pattern_that_names_nothing_is_refused() -> None:
    """It would silently train with the other rank."""
    model = components.skeleton(MODEL)
    with pytest.raises(st.ConfigError, match="lora_rank_pattern: no layer that gets an adapter has a name that ends with 'to_kk'"):
        adapters.add_lora(model, Spec("attention", 4, 4.0, ranks={"to_kk": 2}), seed=0)


# --- what a file says of itself --------------------------------------------------------------------------------------


def test_the_file_says_what_it_is(bench: Workbench, tmp_path: Path) -> None:
    """Title, architecture, resolution and a digest of the settings; another setting, another digest."""
    digests = set()
    for seed in (1, 2):
        trainer = bench.trainer(seed=seed)
        trainer.save(tmp_path / "my-style.safetensors")
        with safe_open(tmp_path / "my-style.safetensors", "pt") as opened:
            metadata = opened.metadata()
        assert metadata["modelspec.title"] == "my-style"
        assert metadata["modelspec.architecture"] == "stable-diffusion-3/lora"
        assert metadata["modelspec.resolution"] == "64x64"
        digests.add(metadata["sd3tune.config_sha256"])
    assert len(digests) == 2


# --- other ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"algo": "lokr", "factor": 4}, pytest.param({"algo": "lokr", "factor": 4, "linear_dim": 2}, marks=pytest.mark.full),
        pytest.param({"algo": "loha"}, marks=pytest.mark.full), {"algo": "full", "full_matrix": True},
    ],
    ids=str,
)  # fmt: skip
def test_lycoris_changes_become_lora(bench: Workbench, tmp_path: Path, values: dict[str, Any]) -> None:
    """At full rank the LoRA's change is LyCORIS' own; at a smaller one the printed error is the real one and the best possible."""
    config = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2, "apply_preset": {"target_module": ["Attention"]}, **values}
    (tmp_path / "c.json").write_text(json.dumps(config))
    trainer = bench.trainer(lora_type="lycoris", lycoris_config=str(tmp_path / "c.json"), lr_warmup_steps=0, learning_rate=2e-3)
    for _ in range(3):
        trainer.step()
    trainer.save(tmp_path / "l.safetensors")
    trainer.network.eval()
    own = {}
    for lora in trainer.network.loras:  # what the layer does, as get_diff_weight of 4.1.3 applies alpha / rank twice to LoKr
        if values["algo"] == "full":
            own[lora.lora_name] = lora.weight.detach() - lora._org_weight[0]
            continue
        eye = torch.eye(lora.org_module[0].in_features)
        with torch.no_grad():
            own[lora.lora_name] = (lora.org_module[0](eye) - lora.org_forward(eye)).T
    whole = decomposing.as_lora(tmp_path / "l.safetensors", 160)
    assert whole.error < 1e-4
    assert whole.biases == (119 if values["algo"] == "full" else 0)
    assert len(whole.lora.layers) == len(own)
    for name, layer in whole.lora.layers.items():
        wanted = own["lycoris_" + name.replace(".", "_")].reshape(layer.change.shape)
        assert torch.allclose(layer.change.float(), wanted.float(), atol=2e-3 * float(wanted.abs().max())), name
    small = decomposing.as_lora(tmp_path / "l.safetensors", 3)
    spectra = [torch.linalg.svdvals(change.reshape(change.shape[0], -1).double()) for change in own.values()]
    best = sum(float(s[3:].square().sum()) for s in spectra) / sum(float(s.square().sum()) for s in spectra)
    assert small.error == pytest.approx(best**0.5, rel=2e-3, abs=1e-6)
    assert {layer.rank for layer in small.lora.layers.values()} == {3}


def test_large_layers_are_decomposed_well() -> None:
    """Above the size for a whole decomposition the leading values are as good as the exact ones."""
    g = torch.Generator().manual_seed(0)
    decay = 0.9 ** torch.arange(64.0)
    change = (torch.randn(1200, 64, generator=g) * decay) @ torch.randn(64, 1100, generator=g) / 40
    down, up = decomposing._factors(change, 8)
    best = float(torch.linalg.svdvals(change)[8:].square().sum() ** 0.5)
    assert float((change - up @ down).norm()) <= 1.001 * best


def test_the_command_line_converts(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoKr needs --rank, and with it the loss is printed and the file is whole."""
    (tmp_path / "c.json").write_text(json.dumps({"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2, "factor": 4,
                                                 "apply_preset": {"target_module": ["Attention"]}}))  # fmt: skip
    trainer = bench.trainer(lora_type="lycoris", lycoris_config=str(tmp_path / "c.json"), lr_warmup_steps=0)
    trainer.step()
    trainer.save(tmp_path / "l.safetensors")
    file, out = str(tmp_path / "l.safetensors"), str(tmp_path / "o.safetensors")
    assert cli.main(["lora", "convert", file, "--out", out]) == 1
    assert "convert it with --rank" in capsys.readouterr().err
    assert cli.main(["lora", "convert", file, "--out", out, "--rank", "6"]) == 0
    assert "of the change is kept (relative error" in capsys.readouterr().out
    assert cli.main(["lora", "verify", out]) == 0
    assert cli.main(["lora", "convert", file, "--out", out + "2", "--rank", "0"]) == 1
