"""LyCORIS adapters: trained, resumed, and read by lycoris itself in a process that does not know sd3tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from conftest import Workbench
from safetensors import safe_open
from stock import predicted

import sd3tune as st
from sd3tune.models.lycoris_adapters import DEFAULT, read_config

SMALL: dict[str, Any] = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 0.5, "apply_preset": {"target_module": ["Attention"]}}

STOCK = """
import sys, torch
from diffusers import SD3Transformer2DModel
from lycoris import create_lycoris_from_weights
base, file, out = sys.argv[1:]
model = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32).eval()
network, _ = create_lycoris_from_weights(1.0, file, model)
network.apply_to()
network.eval()
assert not any(m.startswith("sd3tune") for m in sys.modules)
g, c = torch.Generator().manual_seed(0), model.config
shapes = ((1, 16, 8, 8), (1, 32, c.joint_attention_dim), (1, c.pooled_projection_dim))
x, t, p = (torch.randn(shape, generator=g) for shape in shapes)
with torch.no_grad():
    torch.save(model(hidden_states=x, encoder_hidden_states=t, pooled_projections=p, timestep=torch.tensor([400.0])).sample, out)
"""


def written(folder: Path, **values: Any) -> str:
    path = folder / "lycoris_config.json"
    path.write_text(json.dumps({**SMALL, **values}))
    return str(path)


KINDS = ({"algo": "lokr", "factor": 4}, {"algo": "loha"}, {"algo": "full", "full_matrix": True}, {"algo": "lora"}, {"algo": "diag-oft"})


@pytest.mark.parametrize("values", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS[1:])], ids=lambda v: v["algo"])
def test_lycoris_reads_what_was_trained(bench: Workbench, tmp_path: Path, values: dict[str, Any]) -> None:
    """Begins as the base, learns, and its file gives the same prediction through lycoris alone."""
    trainer = bench.trainer(lora_type="lycoris", lycoris_config=written(tmp_path, **values), lr_warmup_steps=0, learning_rate=1e-2)
    model, network = trainer.transformer.eval(), trainer.network.eval()
    base = predicted(model)
    network.train()
    for _ in range(5):
        trainer.step()
    assert trainer.save(tmp_path / "adapter.safetensors") >= len(network.loras)
    network.eval()
    own = predicted(model)
    assert (own - base).abs().max() > 1e-3
    fresh.run(
        ["-c", STOCK, str(bench.root / "miniature"), str(tmp_path / "adapter.safetensors"), str(tmp_path / "out")], tmp_path / "said.txt"
    )
    assert (own - torch.load(tmp_path / "out")).abs().max() < 1e-4


def test_options_reach_lycoris_as_they_are(bench: Workbench, tmp_path: Path) -> None:
    """Fractions stay fractions, module_algo_map counts for its modules, and the class is left as it was for the next one."""
    from lycoris import LycorisNetwork

    before = dict(vars(LycorisNetwork))
    preset = {"target_module": ["Attention", "FeedForward"], "module_algo_map": {"FeedForward": {"algo": "loha", "dim": 2}}}
    trainer = bench.trainer(lora_type="lycoris", lycoris_config=written(tmp_path, algo="lora", apply_preset=preset))
    names = set(trainer.engine.weights)
    assert any("_ff_" in name and "hada" in name for name in names)
    assert any("_attn_" in name and "lora_down" in name for name in names)
    attention = next(lora for lora in trainer.network.loras if "_attn_" in lora.lora_name)
    assert float(attention.alpha) == 0.5
    assert {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()} == {
        name: value for name, value in before.items() if name.isupper()
    }
    trainer.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["lycoris_config"])["linear_alpha"] == 0.5


def test_a_lycoris_run_resumes_bitwise(bench: Workbench, tmp_path: Path) -> None:
    """4 updates are 2 + 2."""
    values: dict[str, Any] = {"lora_type": "lycoris", "lycoris_config": written(tmp_path, algo="lokr", factor=4)}
    whole, half = bench.trainer(**values), bench.trainer(**values)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        half.step()
    half.checkpoint()
    again = st.Trainer.resume(half.folder.path)
    for _ in range(2):
        again.step()
    assert all(torch.equal(again.engine.weights[name], whole.engine.weights[name]) for name in whole.engine.weights)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "cannot be read as JSON"), ("[1]", "is not an object"), ('{"algo": "lokrr"}', "algo 'lokrr' is none of lora, locon"),
        ('{"algo": "lokr", "multiplier": 1}', "linear_alpha is missing or no number"),
        ('{"algo": "lora", "multiplier": 1, "linear_alpha": 1}', "linear_dim is missing or no number"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, content: str, says: str) -> None:
    """One sentence for each mistake."""
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(st.ConfigError, match=says):
        read_config(str(tmp_path / "l.json"))
    with pytest.raises(st.ConfigError, match="cannot be read"):
        read_config(str(tmp_path / "nothing.json"))
    assert read_config(None) == DEFAULT


def test_contradictions(bench: Workbench, tmp_path: Path) -> None:
    """What cannot be is refused when the configuration is made, or before the first update."""
    quantised = bench.config(lora_type="lycoris", lycoris_config=written(tmp_path, algo="full"), base_model_precision="int8-quanto")
    with pytest.raises(st.ConfigError, match="algo full needs base_model_precision: no_change"):
        st.Trainer(quantised, bench.cache(quantised))
    with pytest.raises(st.ConfigError, match="lora_rank_pattern is about LoRA"):
        st.presets.playground(lora_type="lycoris", lora_rank_pattern={"to_q": 2})
    with pytest.raises(st.ConfigError, match="lycoris_config is set, but lora_type is standard"):
        st.presets.playground(lycoris_config="x.json")
    config = bench.config(lora_type="lycoris", lycoris_config=written(tmp_path, algo="lokr", apply_preset={"target_module": ["Nothing"]}))
    with pytest.raises(st.ConfigError, match="apply_preset matches no layer"):
        st.Trainer(config, bench.cache(config))


QUANTISED = [
    (algo, precision) for algo in ("lokr", "loha", "lora", "glora") for precision in ("int8-quanto", "fp8-quanto", "nf4-bnb", "int2-quanto")
]


@pytest.mark.parametrize(
    ("algo", "precision"),
    [pytest.param(*row, marks=() if row in (("lokr", "int8-quanto"), ("loha", "nf4-bnb")) else pytest.mark.full) for row in QUANTISED],
)
def test_lycoris_on_a_quantised_base(bench: Workbench, tmp_path: Path, algo: str, precision: str) -> None:
    """The gradients are those on the same base with its weights written out, and the file is read by the rules of any other."""
    from torch import nn

    from sd3tune.models.lycoris_adapters import add_lycoris
    from sd3tune.models.quantize import dequantised, put

    config = read_config(written(tmp_path, algo=algo, **({"factor": 4} if algo == "lokr" else {})))
    gradients = []
    for whole in (False, True):
        model = st.models.components.load_transformer(bench.config(base_model_precision=precision), torch.device("cpu"))
        for name, module in list(model.named_modules()):
            if whole and type(module) is not nn.Linear and isinstance(module, nn.Linear):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.weight = nn.Parameter(dequantised(module).float().reshape(module.out_features, -1), requires_grad=False)
                plain.bias = module.bias
                put(model, name, plain)
        network, weights = add_lycoris(model, config, seed=0)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        network.eval()
        g, c = torch.Generator().manual_seed(0), model.config
        shapes = ((1, 16, 8, 8), (1, 32, c.joint_attention_dim), (1, c.pooled_projection_dim))
        x, t, p = (torch.randn(shape, generator=g) for shape in shapes)
        model(
            hidden_states=x, encoder_hidden_states=t, pooled_projections=p, timestep=torch.tensor([400.0])
        ).sample.square().mean().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None]))
    assert len(gradients[0]) == len(gradients[1]) > 1000
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-3


def test_strength_of_the_validation_pictures(bench: Workbench, tmp_path: Path) -> None:
    """At strength 0 the pictures are the base's, at 1 they are not, and training goes on as if nothing had been drawn."""
    values = {
        "lora_type": "lycoris",
        "lycoris_config": written(tmp_path, algo="lokr", factor=4),
        "lr_warmup_steps": 0,
        "learning_rate": 2e-3,
    }
    trainer, quiet = bench.trainer(validation_lycoris_strength=0.0, **values), bench.trainer(**values)
    base = np.asarray(trainer.validate().rows[0][1][0], dtype=int)
    for _ in range(4):
        trainer.step()
        quiet.step()
    assert np.abs(np.asarray(trainer.validate().rows[1][1][0], dtype=int) - base).max() <= 1, "weights plus nothing, and weights"
    trainer.set(validation_lycoris_strength=1.0)
    assert trainer.step().loss == quiet.step().loss
    assert np.abs(np.asarray(trainer.validate().rows[1][1][0], dtype=int) - base).max() > 1
