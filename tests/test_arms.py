"""Every precision with every kind of adapter, with and without checkpointing: gradients, resume, and files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sd3tune.models import adapters, components, lora_files
from sd3tune.models.adapters import Spec
from sd3tune.models.lycoris_adapters import add_lycoris, save_lycoris
from sd3tune.models.quantize import PRECISIONS, dequantised, put, quantise
from sd3tune.training.batches import Batch
from sd3tune.training.engine import Engine
from sd3tune.training.rules import Rules
from sd3tune.training.velocity import TransformerVelocity

LOKR: dict[str, Any] = {
    "algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 2, "factor": 8, "apply_preset": {"target_module": ["Attention"]},
}  # fmt: skip

AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""How far an adapter's gradients may be, relative to their norm, from those with the same weights written out: the kernels' rounding."""

READ = """
import json, sys, torch
from safetensors import safe_open
from diffusers import SD3Transformer2DModel
base, *files = sys.argv[1:]
found = {}
for file in files:
    model = SD3Transformer2DModel.from_pretrained(base)
    with safe_open(file, "pt") as opened:
        wanted, metadata = set(opened.keys()), opened.metadata()
        state = {name: opened.get_tensor(name) for name in wanted}
    if "lycoris_config" in metadata:
        from lycoris import create_lycoris_from_weights
        network, _ = create_lycoris_from_weights(1.0, file, model)
        network.apply_to()
        loaded = {name for name in network.state_dict()}
    else:
        declared = json.loads(metadata["lora_adapter_metadata"])
        model.load_lora_adapter(state, prefix="transformer", metadata=declared)
        loaded = {"transformer." + n.replace(".default_0", "") for n, _ in model.named_parameters() if "lora_" in n}
        loaded = {n.removesuffix(".weight") if "magnitude" in n else n for n in loaded}
        wanted = {n.removesuffix(".weight") if "magnitude" in n else n for n in wanted}
    found[file] = [sorted(wanted - loaded)[:3], sorted(loaded - wanted)[:3], len(loaded)]
assert not any(m.startswith("sd3tune") for m in sys.modules)
print(json.dumps(found))
"""


class Noise:
    """A picture of the model's own shapes a batch, as a function of k."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype

    def ids(self, k: int) -> tuple[str, ...]:
        return (str(k),)

    def part(self, k: int, places: range) -> Batch:
        g, c = torch.Generator().manual_seed(k), self.config
        shapes = ((1, c.in_channels, 8, 8), (1, 20, c.joint_attention_dim), (1, c.pooled_projection_dim))
        latent, joint, pooled = (torch.randn(shape, generator=g).to(self.dtype) for shape in shapes)
        return Batch(ids=(str(k),), latent_BCHW=latent, joint_BLD=joint, pooled_BP=pooled)


def base_of(flavour: str, folder: Path) -> Path:
    """A folder with the transformer's weights: the playground's own, or two blocks of a released one, random."""
    if flavour == "playground":
        from sd3tune import playground

        return playground.MODEL / "transformer"
    if not folder.is_dir():
        components.random(flavour, layers=2).save_pretrained(folder)
    return folder


def bases(folder: Path, dtype: torch.dtype, precision: str) -> tuple[Any, Any]:
    """The quantised model, and the same with its weights written out."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype).requires_grad_(False).train()
    quantise(model, precision)
    whole = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype).requires_grad_(False).train()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and isinstance(module, nn.Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype).requires_grad_(False)
            plain.weight.copy_(dequantised(module).reshape(plain.weight.shape))
            plain.bias = module.bias
            put(whole, name, plain)
    return model, whole


@contextmanager
def with_adapter(model: Any, kind: str, *, checkpointing: bool) -> Iterator[tuple[Any, Any, Any]]:
    """LyCORIS network, weights and their description of an adapter in a model, which then is as it was."""
    spec = Spec("attention", 4, 8.0, dora=kind == "dora")
    network, weights = add_lycoris(model, LOKR, seed=0) if kind == "lokr" else (None, adapters.add_lora(model, spec, seed=0))
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.no_grad():
        for name, weight in weights.items():
            if "magnitude" not in name:
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    yield network, weights, spec
    model.disable_gradient_checkpointing()
    if network is not None:
        network.restore()
    else:
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                put(model, name, module.get_base_layer())
        model.peft_config, model._hf_peft_config_loaded = {}, False


def engine(model: Any, weights: Any, dtype: torch.dtype) -> Engine:
    rules = Rules(
        seed=0, accumulation=1, sigmoid_scale=1.0, shift=3.0, stratified=False, schedule="constant", warmup=0, total=10, max_grad_norm=1.0
    )
    return Engine(TransformerVelocity(model, dtype), weights, Noise(model.config, dtype), rules)  # type: ignore[arg-type]


def gradient(model: Any, weights: Any, dtype: torch.dtype) -> Tensor:
    """The gradient of one batch's loss."""
    made = engine(model, weights, dtype)
    made._backward(0, 1)
    return torch.cat([w.grad.flatten() if w.grad is not None else torch.zeros(w.numel()) for w in weights.values()]).double()


def arms(precision: str) -> Iterator[tuple[str, bool]]:
    for kind in ("lora", "dora", "lokr"):
        for checkpointing in (False, True):
            if not (kind == "dora" and precision.endswith("quanto")):
                yield kind, checkpointing


def written(path: Path, network: Any, weights: Any, spec: Spec, folder: Path) -> Path:
    """An adapter's file."""
    if network is not None:
        save_lycoris(path, network, weights, {}, LOKR)
        return path
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        skeleton = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder))
    lora_files.save_lora(path, weights, spec, skeleton=skeleton, notes={})
    return path


def check(
    flavour: str, precision: str, tmp_path: Path, base: Path, dtype: torch.dtype = torch.float32, some: Sequence[tuple[str, bool]] = ()
) -> None:
    """Every arm of a precision, or some of them."""
    folder, files = base_of(flavour, base), []
    quantised, whole = bases(folder, dtype, precision)
    for kind, checkpointing in some or arms(precision):
        with with_adapter(whole, kind, checkpointing=False) as (_, weights, _):
            expected = gradient(whole, weights, dtype)
        with with_adapter(quantised, kind, checkpointing=checkpointing) as (network, weights, spec):
            found = gradient(quantised, weights, dtype)
            assert found.isfinite().all()
            assert found.any()
            error = float((found - expected).norm() / expected.norm())
            print(f"{flavour} {dtype} {precision} {kind} checkpointing {checkpointing}: gradients differ by {error:.1e}")
            assert error < AGREEMENT[dtype], (kind, checkpointing)
            first = engine(quantised, weights, dtype)
            first.update(peak_learning_rate=1e-4)
            state = first.state_dict()
            wanted = first.update(peak_learning_rate=1e-4).loss
            first.load_state_dict(state)
            assert first.update(peak_learning_rate=1e-4).loss == wanted, "a resumed update is the same"
            files.append(str(written(tmp_path / f"{kind}-{checkpointing}.safetensors", network, weights, spec, folder)))
    said = fresh.run(["-c", READ, str(folder), *files], tmp_path / "read.txt")
    for file, (missing, unexpected, count) in json.loads(said.splitlines()[-1]).items():
        assert (missing, unexpected) == ([], []), file
        assert count > 10


def test_an_arm_of_each_adapter(tmp_path: Path) -> None:
    """LoRA, DoRA and LoKr on the precision that allows all three."""
    check("playground", "nf4-bnb", tmp_path, tmp_path / "base", some=(("lora", True), ("dora", False), ("lokr", True)))


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "nf4-bnb"])
def test_arms_of_the_playground(tmp_path: Path, precision: str) -> None:
    """LoRA, DoRA where legal, and LoKr; with and without checkpointing."""
    check("playground", precision, tmp_path, tmp_path / "base")


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
def test_arms_in_bf16(tmp_path: Path, precision: str) -> None:
    """The same in bf16; on the playground, because a CPU without bf16 of its own takes twenty times as long for the backward passes."""
    check("playground", precision, tmp_path, tmp_path / "base", torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavour", ["playground", "sd3-medium", "sd35-medium", "sd35-large"])
def test_arms_at_full_width(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, flavour: str, precision: str) -> None:
    """Two blocks of each released architecture, every precision."""
    check(flavour, precision, tmp_path, tmp_path_factory.getbasetemp() / f"arms-{flavour}")
