"""LoRA files of every layout: read, described, converted without loss, merged, and explained when they are something else."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from conftest import Workbench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd3tune as st3
from sd3tune import playground
from sd3tune.assembly import spec_of
from sd3tune.cli import main
from sd3tune.errors import CheckpointError
from sd3tune.models import components, lora_files, lora_layouts
from sd3tune.models.lora_layouts import Layer, LoraFile, as_tensors, largest_difference, parse, read

MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.23.attn2.to_out.0", "transformer_blocks.11.ff_context.net.0.proj",
           "transformer_blocks.5.norm1_context.linear", "proj_out", "time_text_embed.timestep_embedder.linear_1")  # fmt: skip


def lora(alpha: float = 4.0, rank: int = 8, dora: bool = False, seed: int = 0) -> LoraFile:
    g = torch.Generator().manual_seed(seed)
    layers = {
        name: Layer(
            torch.randn(rank, 24, generator=g), torch.randn(16, rank, generator=g), alpha, torch.rand(16, generator=g) if dora else None
        )
        for name in MODULES
    }
    return LoraFile("memory", layers, (), {"note": "kept"})


def through(file: LoraFile, *layouts: Any) -> LoraFile:
    for layout in layouts:
        file = parse(*as_tensors(file, layout), "here")
    return file


# --- round trips -----------------------------------------------------------------------------------------------------


@given(st.sampled_from([0.5, 1.0, 4.0, 8.0, 16.0, 32.0]), st.booleans())
@settings(deadline=None)
def test_round_trips_are_exact(alpha: float, dora: bool) -> None:
    """diffusers -> ComfyUI -> diffusers, and the other way round, alpha != rank included: the same bits, names and notes."""
    file = lora(alpha, dora=dora)
    for layouts in (
        ("diffusers",),
        ("comfyui",),
        ("diffusers", "comfyui"),
        ("comfyui", "diffusers"),
        ("diffusers", "comfyui", "diffusers"),
    ):
        again = through(file, *layouts)
        assert again.layers.keys() == file.layers.keys()
        assert again.unknown == ()
        assert again.metadata["note"] == "kept"
        for name, layer in file.layers.items():
            assert torch.equal(again.layers[name].change, layer.change), "a power of two is folded without rounding"
            if dora:
                assert torch.equal(again.layers[name].magnitude.reshape(-1), layer.magnitude)  # type: ignore[union-attr, arg-type]
    one = as_tensors(through(file, "diffusers"), "diffusers")[0]
    two = as_tensors(through(file, "diffusers", "comfyui"), "diffusers")[0]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_strengths_are_exact_to_rounding() -> None:
    """alpha 3 of rank 7 has the same effect to 1e-7."""
    file = lora(3.0, rank=7)
    assert 0 < largest_difference(file, through(file, "diffusers", "comfyui")) < 1e-7


def test_both_rules_give_the_same_effect() -> None:
    """By diffusers' rule (declared alpha / rank) and by ComfyUI's (alpha tensor / rank, 1 without one), each on its own file."""
    file = lora(32.0)
    tensors, metadata = as_tensors(file, "diffusers")
    declared = json.loads(metadata["lora_adapter_metadata"])
    comfy, _ = as_tensors(file, "comfyui")
    for name, layer in file.layers.items():
        a, b = tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"]
        assert torch.equal(declared["transformer.lora_alpha"] / declared["transformer.r"] * (b.double() @ a.double()), layer.change)
        assert torch.equal(b.double() @ a.double(), layer.change), "by ComfyUI's rule without an alpha, and by loaders without metadata"
        short = "lora_transformer_" + name.replace(".", "_")
        down, up, alpha = (comfy[f"{short}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert torch.equal(float(alpha) / down.shape[0] * (up.double() @ down.double()), layer.change)


def test_layers_of_different_rank() -> None:
    """Ranks that differ are declared layer by layer."""
    file = lora()
    small = Layer(torch.randn(2, 24), torch.randn(16, 2), 2.0)
    mixed = LoraFile("memory", {**file.layers, "proj_out": small}, (), {})
    tensors, metadata = as_tensors(mixed, "diffusers")
    declared = json.loads(metadata["lora_adapter_metadata"])
    assert declared["transformer.r"] == 8
    assert declared["transformer.rank_pattern"] == {"proj_out": 2}
    assert largest_difference(mixed, parse(tensors, metadata, "x")) == 0


# --- files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "down", "up", "layout"),
    [
        ("transformer.{}", "lora_A.weight", "lora_B.weight", "diffusers"),
        ("base_model.model.{}", "lora_A.weight", "lora_B.weight", "peft"),
        ("transformer.{}", "lora_A.default.weight", "lora_B.default.weight", "diffusers"),
        ("diffusion_model.{}", "lora_A.weight", "lora_B.weight", "diffusion_model"),
        ("lora_transformer_{}", "lora_down.weight", "lora_up.weight", "comfyui"),
        ("lycoris_{}", "lora_down.weight", "lora_up.weight", "lycoris"),
    ],
)  # fmt: skip
def test_names_of_other_tools(prefix: str, down: str, up: str, layout: str) -> None:
    """Every way to write the same layers is read as those layers."""
    file = lora(8.0)
    tensors = {}
    for name, layer in file.layers.items():
        shown = prefix.format(name if "." in prefix else name.replace(".", "_"))
        tensors |= {f"{shown}.{down}": layer.down_RI, f"{shown}.{up}": layer.up_OR}
    found = parse(tensors, {}, "x")
    assert found.layout == layout
    assert largest_difference(file, found) == 0


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "an adapter of Stable Diffusion 1, 2 or XL"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "an adapter of Flux"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "the names of Stability's own layout"),
        (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "a LyCORIS LoKr"),
        (["model.embed_tokens.weight"], "it holds 1 tensors, the first is model.embed_tokens.weight"), ([], "it is empty"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "an adapter of another model"),
    ],
)  # fmt: skip
def test_files_that_are_no_lora_of_sd3_are_explained(tmp_path: Path, names: list[str], says: str) -> None:
    """Never silently with zero keys."""
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"no LoRA of SD3 was found in it .*{says}"):
        read(tmp_path / "x.safetensors")


def test_what_a_file_is() -> None:
    """The base, ranks, strength, unknown keys and values that are not numbers are said."""
    wide = {
        f"transformer_blocks.{n}.attn{two}.to_q": Layer(torch.randn(4, 1536), torch.zeros(1536, 4), 8.0)
        for n in range(24) for two in ("", "2") if n < 13 or not two
    }  # fmt: skip
    assert LoraFile("diffusers", wide).base == "SD3.5 Medium"
    assert LoraFile("diffusers", {n: v for n, v in wide.items() if "attn2" not in n}).base == "SD3 Medium or SD3.5 Medium"
    tensors, metadata = as_tensors(LoraFile("x", wide), "comfyui")
    name = "lora_transformer_transformer_blocks_3_attn_to_q.lora_up.weight"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    said = str(parse({**tensors, "mystery": torch.zeros(1)}, metadata, "x"))
    assert "fits      SD3.5 Medium" in said
    assert "rank 4, alpha / rank 2" in said
    assert "NaN       transformer_blocks.3.attn.to_q" in said
    assert "unknown   mystery" in said


@given(st.dictionaries(st.text("abcdefghij._0123transformer_blockslora_Aweight", max_size=60), st.integers(0, 3), max_size=6))
@settings(deadline=None, max_examples=150)
def test_any_names_give_layers_or_a_checkpoint_error(names: dict[str, int]) -> None:
    """No other exception."""
    tensors = {name: torch.zeros([2] * size) for name, size in names.items()}
    with suppress(CheckpointError):
        assert parse(tensors, {"lora_adapter_metadata": "[1]"}, "x").layers


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_checkpoint_error(tmp_path: Path, data: bytes) -> None:
    """A file that is no safetensors file."""
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError):
        read(tmp_path / "x.safetensors")


# --- a trained adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "modules"), [("attention", 72), ("attention+context", 119), ("all-linear", 189)])
def test_presets_of_targets(bench: Workbench, tmp_path: Path, targets: str, modules: int) -> None:
    """Each preset trains its layers, and both files hold exactly them."""
    trainer = bench.trainer(model_flavour="playground", lora_targets=targets, lr_warmup_steps=0)
    for _ in range(2):
        trainer.step()
    for layout in ("diffusers", "comfyui"):
        trainer.save(tmp_path / f"{layout}.safetensors", layout)  # type: ignore[arg-type]
        found = read(tmp_path / f"{layout}.safetensors")
        assert len(found.layers) == modules
        memory = lora_files.lora_of(trainer.state_dict()["adapter"], spec_of(trainer.config), {})
        assert largest_difference(memory, found) == 0
    with safe_open(tmp_path / "comfyui.safetensors", "pt") as opened:
        assert "not for diffusers" in opened.metadata()["sd3tune.layout"]


HERE, ELSEWHERE = stock.predict, partial(stock.elsewhere, "predict")
DORA, BIG, ALL = {"use_dora": True, "lora_alpha": 4.0}, {"lora_alpha": 64.0}, {"lora_targets": "all-linear", "lora_alpha": 3.0}


@pytest.mark.parametrize(
    ("values", "predict"), [(DORA, HERE), *(pytest.param(v, ELSEWHERE, marks=pytest.mark.full) for v in ({"use_dora": True}, BIG, ALL))]
)
def test_stock_diffusers_predicts_what_the_trainer_predicts(bench: Workbench, tmp_path: Path, values: dict[str, Any], predict: Any) -> None:
    """DoRA, alpha = 4 x rank, and every linear layer: the transformer's output, here or in a process without sd3tune."""
    trainer = bench.trainer(model_flavour="playground", **values, lr_warmup_steps=0, learning_rate=5e-3)
    for _ in range(6):
        trainer.step()
    trainer.save(tmp_path / "lora.safetensors")
    predict(str(playground.MODEL), str(tmp_path / "lora.safetensors"), str(tmp_path / "out"))
    model = trainer.transformer.eval()
    own = stock.predicted(model)
    model.disable_adapters()
    base = stock.predicted(model)
    assert (own - torch.load(tmp_path / "out")).abs().max() < 1e-4
    assert (own - base).abs().max() > 1e-2


def test_verbs(bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect, verify, convert and merge, with their messages; nothing is overwritten."""
    trainer = bench.trainer(model_flavour="playground", lr_warmup_steps=0, learning_rate=5e-3)
    for _ in range(3):
        trainer.step()
    file, comfy, merged = tmp_path / "lora.safetensors", tmp_path / "comfy.safetensors", tmp_path / "merged"
    trainer.save(file)
    assert main(["lora", "inspect", str(file)]) == 0
    assert "layers    96, rank 16, alpha / rank 1" in capsys.readouterr().out
    assert main(["lora", "verify", str(file)]) == 0
    assert "96/96 layers, all values finite" in capsys.readouterr().out
    assert main(["lora", "convert", str(file), "--to", "comfyui", "--out", str(comfy)]) == 0
    assert "288 tensors, 96/96 modules, max difference 0" in capsys.readouterr().out
    assert main(["lora", "convert", str(file), "--to", "comfyui", "--out", str(comfy)]) == 1
    assert "is already there; give another name" in capsys.readouterr().err
    assert main(["lora", "convert", str(file)]) == 1
    assert "convert needs --out" in capsys.readouterr().err
    assert main(["lora", "merge", str(comfy), "--out", str(merged), "--strength", "0.5"]) == 0
    assert "96 layers changed at strength 0.5" in capsys.readouterr().out
    base = load_file(playground.MODEL / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = load_file(merged / "diffusion_pytorch_model.safetensors")
    for name, layer in read(file).layers.items():
        expected = base[f"{name}.weight"].double() + 0.5 * layer.change
        assert torch.allclose(changed[f"{name}.weight"].double(), expected, atol=2e-3), "to the rounding of the base's own format"
    same = set(base) - {f"{name}.weight" for name in read(file).layers}
    assert all(torch.equal(base[name], changed[name]) for name in same)
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel.from_pretrained(merged)
    tensors = load_file(file)
    name = next(iter(tensors))
    wrong = {name.replace("transformer_blocks.0", "transformer_blocks.77"): tensors[name]}
    other = name.replace("lora_A", "lora_B")
    wrong[other.replace("transformer_blocks.0", "transformer_blocks.77")] = tensors[other]
    save_file(wrong, tmp_path / "wrong.safetensors")
    assert main(["lora", "verify", str(tmp_path / "wrong.safetensors")]) == 1
    assert "this model has no such layer" in capsys.readouterr().err
    assert main(["lora", "inspect", str(tmp_path / "nothing")]) == 1
    assert "cannot be read as safetensors" in capsys.readouterr().err


def test_a_file_that_lost_its_effect_is_not_kept(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate compares the effect by another reader: a wrong alpha in the file stops the save."""
    trainer = bench.trainer(lora_alpha=4.0, lr_warmup_steps=0)
    trainer.step()
    real = lora_layouts.as_tensors

    def unfolded(file: LoraFile, layout: Any) -> Any:
        whole = LoraFile(file.layout, {n: Layer(v.down_RI, v.up_OR, float(v.rank)) for n, v in file.layers.items()}, (), file.metadata)
        return real(whole, layout)

    monkeypatch.setattr(lora_layouts, "as_tensors", unfolded)
    with pytest.raises(CheckpointError, match="the file's effect differs"):
        trainer.save(tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_average_of_the_adapter(bench: Workbench) -> None:
    """use_ema: the average is saved beside the adapter, is part of the checkpoint, and a resumed run goes on with it bitwise."""
    values: dict[str, Any] = {
        "use_ema": True,
        "ema_decay": 0.5,
        "max_train_steps": 4,
        "lr_warmup_steps": 0,
        "validation_prompt": (),
        "eval_loss_disable": True,
    }
    whole = bench.trainer(**values)
    for _ in whole:
        pass
    file = read(whole.folder.lora.with_name("lora-ema.safetensors"))
    assert largest_difference(file, read(whole.folder.lora)) > 1e-3
    half = bench.trainer(**values)
    for _ in range(2):
        half.step()
    half.checkpoint()
    again = st3.Trainer.resume(half.folder.path)
    for _ in range(2):
        again.step()
    assert all(torch.equal(again.engine.ema[name], whole.engine.ema[name]) for name in whole.engine.ema)
    assert components.skeleton(whole.config) is not None
