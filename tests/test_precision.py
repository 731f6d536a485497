"""The base in fewer bits: loaded layer by layer, trained on, resumed; and the released architectures with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from safetensors.torch import load_file, save_file
from torch import nn

import sd3tune as st
from sd3tune import playground
from sd3tune.errors import ModelError
from sd3tune.models import adapters, components
from sd3tune.models.adapters import Spec
from sd3tune.models.quantize import PRECISIONS, bytes_of, dequantised, is_quantised, quantise

ERRORS = {"int8-quanto": 0.02, "fp8-quanto": 0.04, "int4-quanto": 0.12, "nf4-bnb": 0.11, "int2-quanto": 0.6}
"""Precision -> the largest relative error of any layer's weights."""

CPU = torch.device("cpu")


def load(**settings: Any) -> Any:
    return components.load_transformer(st.presets.playground(**settings), CPU)


def test_loading_layer_by_layer_gives_what_diffusers_loads() -> None:
    """The same tensors bit for bit, buffers included, in each number format."""
    from diffusers import SD3Transformer2DModel

    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        stock = SD3Transformer2DModel.from_pretrained(playground.MODEL / "transformer", torch_dtype=dtype).state_dict()
        own = load(mixed_precision=precision).state_dict()
        assert own.keys() == stock.keys()
        assert all(torch.equal(own[name], stock[name]) and own[name].dtype == stock[name].dtype for name in stock)
    assert next(load(mixed_precision="bf16", base_model_default_dtype="fp32").parameters()).dtype == torch.float32


BUILT = ("int4-quanto", "int2-quanto")
"""Formats whose first use on a machine builds an extension, for two minutes."""


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=pytest.mark.full if p in BUILT else ()) for p in PRECISIONS if p != "no_change"]
)
def test_weights_in_fewer_bits(precision: str) -> None:
    """Each layer's error is the format's, the excluded ones are untouched, and the whole is smaller by what the bits say."""
    plain = {name: module for name, module in load().named_modules() if isinstance(module, nn.Linear)}
    model = load(base_model_precision=precision)
    kept = []
    for name, module in model.named_modules():
        if name in plain:
            weight = dequantised(module).float()
            error = float((weight - plain[name].weight).norm() / plain[name].weight.norm())
            assert error < ERRORS[precision], name
            kept += [name] if error == 0 else []
    assert kept == [name for name, module in plain.items() if not is_quantised(name, module)]
    assert all(name.startswith(("time_text_embed", "context_embedder", "norm_out", "proj_out")) for name in kept)
    bits = {"int8-quanto": 8, "fp8-quanto": 8, "int4-quanto": 4, "int2-quanto": 2, "nf4-bnb": 4}[precision]
    least = sum(m.weight.numel() * (bits / 8 if is_quantised(n, m) else 4) for n, m in plain.items())
    assert least < bytes_of(model) < least + 0.1 * bytes_of(load()), "scales and what is no linear layer come on top"


def test_the_modulation_may_stay_whole() -> None:
    """modulation_precision: bf16 leaves the AdaLN linears alone; they are a third of the blocks' weights."""
    same, whole = load(base_model_precision="int8-quanto"), load(base_model_precision="int8-quanto", modulation_precision="bf16")
    names = {n for n, m in whole.named_modules() if type(m) is nn.Linear} - {n for n, m in same.named_modules() if type(m) is nn.Linear}
    assert names
    assert all(name.endswith(("norm1.linear", "norm1_context.linear")) for name in names)


QUICK = [("int8-quanto", torch.float32, False), ("nf4-bnb", torch.bfloat16, True), ("nf4-bnb", torch.float32, False)]
ALL = [(p, dtype, dora) for p in PRECISIONS for dtype in (torch.float32, torch.bfloat16) for dora in (False, True)]


@pytest.mark.parametrize(
    ("precision", "dtype", "dora"),
    [pytest.param(*row, marks=() if row in QUICK or (row[2] and row[0].endswith("quanto")) else pytest.mark.full) for row in ALL],
)
def test_the_adapters_gradient_is_that_of_the_dequantised_base(precision: str, dtype: torch.dtype, dora: bool) -> None:
    """A LoRA (and a DoRA, where legal) on a quantised base learns what it would learn on the same weights unpacked."""
    if dora and precision.endswith("quanto"):
        with pytest.raises(st.ConfigError, match="use_dora needs the base's weights whole"):
            st.presets.playground(base_model_precision=precision, use_dora=True)
        return

    def gradient(model: Any) -> torch.Tensor:
        weights = adapters.add_lora(model, Spec("attention", 4, 4.0, dora=dora), seed=1)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in weights.items():
                if "lora_B" in name:
                    weight.normal_(0, 0.05, generator=g)
        inputs = {
            "hidden_states": torch.randn(2, 16, 8, 8, generator=g), "encoder_hidden_states": torch.randn(2, 32, 192, generator=g),
            "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, generator=g),
        }  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(**{k: v.to(dtype) for k, v in inputs.items()}, timestep=torch.tensor([300.0, 800.0])).sample
        out.float().square().mean().backward()
        return torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None])

    settings = {"mixed_precision": "no" if dtype == torch.float32 else "bf16"}
    small, plain = load(base_model_precision=precision, **settings), load(**settings)
    unpacked = {name: dequantised(module) for name, module in small.named_modules() if is_quantised_here(name, module)}
    for name, weight in unpacked.items():
        plain.get_submodule(name).weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    one, two = gradient(small), gradient(plain)
    error = float((one - two).norm() / two.norm())
    assert error < (0.06 if dtype == torch.bfloat16 else 2e-3), error


def is_quantised_here(name: str, module: nn.Module) -> bool:
    return hasattr(module, "weight") and hasattr(module, "in_features") and type(module) is not nn.Linear


@pytest.mark.parametrize("precision", ["int8-quanto", pytest.param("nf4-bnb", marks=pytest.mark.full)])
def test_a_run_on_a_small_base_learns_saves_and_resumes_bitwise(bench: Workbench, precision: str) -> None:
    """4 updates are 2 + 2 through a checkpoint; the file fits stock names; the manifest says the format."""
    whole = bench.trainer(base_model_precision=precision)
    for _ in range(4):
        whole.step()
    half = bench.trainer(base_model_precision=precision)
    for _ in range(2):
        half.step()
    half.checkpoint()
    again = st.Trainer.resume(half.folder.path)
    for _ in range(2):
        again.step()
    one, two = whole.state_dict()["adapter"], again.state_dict()["adapter"]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.save(whole.folder.lora) == 44


@pytest.mark.parametrize(
    "precision", ["nf4-bnb", *(pytest.param(name, marks=pytest.mark.full) for name in ("int8-quanto", "int2-quanto", "fp8-quanto"))]
)
def test_a_look_does_not_change_what_is_learned(bench: Workbench, precision: str) -> None:
    """Pictures and the held-out loss on the way: the same updates as without, for every kind of layer."""
    quiet, watched = bench.trainer(base_model_precision=precision), bench.trainer(base_model_precision=precision)
    for _ in range(2):
        quiet.step()
        watched.step()
        watched.evaluate()
    watched.validate()
    assert quiet.step().loss == watched.step().loss
    one, two = quiet.state_dict()["adapter"], watched.state_dict()["adapter"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_formats_in_one_process_do_not_disturb_each_other(bench: Workbench) -> None:
    """Trainers of different precision take turns; each does what it does alone."""
    alone = [bench.trainer(base_model_precision=p) for p in ("no_change", "int8-quanto")]
    expected = [[t.step().loss for _ in range(2)] for t in alone]
    together = [bench.trainer(base_model_precision=p) for p in ("no_change", "int8-quanto")]
    found: list[list[float]] = [[], []]
    for _ in range(2):
        for losses, trainer in zip(found, together, strict=True):
            losses.append(trainer.step().loss)
    assert found == expected


def test_text_encoders_in_fewer_bits() -> None:
    """The states move a little and the key changes, so nothing is mixed up in the cache; without T5 its states are zeros."""
    plain = st.presets.playground()
    with st.encoders(plain).load() as loaded:
        (expected,) = loaded.encode_texts(["a red pot"])
    small = plain.replace(text_encoder_3_precision="int8-quanto")
    with st.encoders(small).load() as loaded:
        (found,) = loaded.encode_texts(["a red pot"])
    assert torch.equal(found.clip_LD, expected.clip_LD)
    error = float((found.t5_LD - expected.t5_LD).norm() / expected.t5_LD.norm())
    assert 0 < error < 0.05
    without = plain.replace(use_t5=False)
    with st.encoders(without).load() as loaded:
        (none,) = loaded.encode_texts(["a red pot"])
    assert none.t5_LD.shape == expected.t5_LD.shape
    assert not none.t5_LD.any()
    assert len({st.encoders(c).text_fingerprint for c in (plain, small, without, plain.replace(text_encoder_1_precision="nf4-bnb"))}) == 4


# --- files that do not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the playground's model."""
    import shutil

    return Path(shutil.copytree(playground.MODEL, tmp_path / "model"))


def refused(model: Path, says: str) -> None:
    config = st.RunConfig.make(pretrained_model_name_or_path=str(model), mixed_precision="no")
    with pytest.raises(ModelError, match=says):
        components.load_transformer(config, CPU)


def test_weights_that_do_not_fit_are_named(model: Path) -> None:
    """A missing tensor, one too many, another shape, a cut file: each is one ModelError."""
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    name = "transformer_blocks.3.attn.to_q.weight"
    save_file({k: v for k, v in whole.items() if k != name}, path)
    refused(model, f"1 tensors are missing, e.g. {name}")
    save_file({**whole, "other": torch.zeros(2)}, path)
    refused(model, "1 tensors do not belong to this model, e.g. other")
    save_file({**whole, name: torch.zeros(3, 3)}, path)
    refused(model, rf"{name} has shape \(3, 3\), and the model's config wants \(160, 160\)")
    path.write_bytes(path.read_bytes()[:1000])
    refused(model, "its weights cannot be read")
    path.unlink()
    refused(model, "its weights cannot be read")


def test_weights_in_several_files(model: Path) -> None:
    """An index with several files is read as one."""
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    names = sorted(whole)
    rows = {}
    for number in range(3):
        part = {name: whole[name] for name in names[number::3]}
        save_file(part, path.with_name(f"part-{number}.safetensors"))
        rows |= dict.fromkeys(part, f"part-{number}.safetensors")
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": rows}))
    path.unlink()
    config = st.RunConfig.make(pretrained_model_name_or_path=str(model), mixed_precision="no")
    loaded = components.load_transformer(config, CPU).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


# --- the released architectures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "parameters", "buffer", "modules", "trainable"),
    [
        ("sd3-medium", 2_028_328_000, 56_623_104, 96, 4_718_592),
        ("sd35-medium", 2_243_171_520, 226_492_416, 148, 7_274_496),
        ("sd35-large", 8_056_627_520, 89_653_248, 152, 11_829_248),
    ],
)
def test_sizes_of_the_released_models(flavour: str, parameters: int, buffer: int, modules: int, trainable: int) -> None:
    """Parameters, the position table, and what a LoRA of rank 16 on the attention trains."""
    model = components.random(flavour, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffer
    weights = adapters.add_lora(model, Spec("attention", 16, 16.0), seed=0)
    assert len(weights) == 2 * modules
    assert sum(w.numel() for w in weights.values()) == pytest.approx(trainable, rel=0.01)


MEASURE = """
import json, os, sys, torch
from pathlib import Path
import diffusers, optimum.quanto
from sd3tune.models import components
from sd3tune.models.loading import Weights, fill
from sd3tune.models.quantize import bytes_of, is_quantised, smaller
def anonymous():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
    return int(rows["RssAnon"].split()[0]) * 1024
import threading, time
with torch.device("meta"):
    model = diffusers.SD3Transformer2DModel.from_config(diffusers.SD3Transformer2DModel.load_config(sys.argv[1]))
layer = max(p.numel() for p in model.parameters()) * 2
warm = torch.nn.Linear(64, 64).bfloat16(); smaller(warm, "int8-quanto")
before, peak, stop = anonymous(), [0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
def change(name, module):
    return smaller(module, "int8-quanto") if is_quantised(name, module) else module
fill(model, Weights.of_folder(Path(sys.argv[1])), dtype=torch.bfloat16, device=torch.device("cpu"), change=change)
stop.append(1)
print(json.dumps({"grown": peak[0] - before, "size": bytes_of(model), "layer": layer}))
"""


@pytest.mark.full
def test_loading_never_holds_the_whole_model(tmp_path: Path) -> None:
    """Two blocks of SD3.5 Large at int8: the memory of its own grows to at most 1.3 times the quantised size and one layer."""
    components.random("sd35-large", layers=2).save_pretrained(tmp_path / "large")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "large")], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["grown"] < 1.3 * found["size"] + found["layer"], found


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavour", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_every_precision_steps_at_full_width(flavour: str, precision: str) -> None:
    """Two blocks of each released architecture: a forward and backward pass in bf16 reaches every weight of the adapter."""
    model = components.random(flavour, layers=2)
    quantise(model, precision)
    weights = adapters.add_lora(model, Spec("attention", 4, 4.0), seed=0)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            hidden_states=torch.randn(1, 16, 16, 16).bfloat16(), encoder_hidden_states=torch.randn(1, 32, 4096).bfloat16(),
            pooled_projections=torch.randn(1, 2048).bfloat16(), timestep=torch.tensor([500.0]),
        ).sample  # fmt: skip
    out.float().square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() and w.grad.any() for w in weights.values())
