"""A quantised base that is read from the cache is, bit for bit, the one that was made; in a process of its own it runs."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from conftest import Workbench

import sd3tune as st
from sd3tune.models import components, quantised_files
from sd3tune.models.quantize import PRECISIONS, tensors_of

CPU = torch.device("cpu")

RELOAD = """
import json, sys, torch
import sd3tune as st
from sd3tune.models import components, quantised_files
from sd3tune.models.quantize import tensors_of
precision, cache, dtype = sys.argv[1:]
config = st.presets.playground(base_model_precision=precision, cache_dir=cache, mixed_precision=dtype)
quantised_files.write = None  # it must be there already
before = components.fill
components.fill = None
model = components.load_transformer(config, torch.device("cpu"))
kind = components.compute_dtype(config)
c, g = model.config, torch.Generator().manual_seed(0)
shapes = ((1, 16, 8, 8), (1, 32, c.joint_attention_dim), (1, c.pooled_projection_dim))
x, t, p = (torch.randn(shape, generator=g).to(kind) for shape in shapes)
out = model(hidden_states=x.requires_grad_(), encoder_hidden_states=t, pooled_projections=p, timestep=torch.tensor([400.0])).sample
out.float().square().mean().backward()
assert bool(x.grad.isfinite().all()) and bool(x.grad.any())
torch.save(([tensor.clone() for tensor in tensors_of(model)], out.detach()), cache + "/again")
"""


QUICK = [("nf4-bnb", "bf16")]
REST = [(p, mixed) for p in PRECISIONS if p != "no_change" for mixed in ("no", "bf16") if (p, mixed) not in QUICK]


@pytest.mark.parametrize(("precision", "mixed"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.full) for row in REST)])
def test_what_is_read_is_what_was_made(tmp_path: Path, precision: str, mixed: str) -> None:
    """Every tensor's bits, and a forward and backward pass in a new process that may not quantise."""
    config = st.presets.playground(base_model_precision=precision, cache_dir=str(tmp_path), mixed_precision=mixed)
    made = components.load_transformer(config, CPU)
    bits = [tensor.clone() for tensor in tensors_of(made)]
    fresh.run(["-c", RELOAD, precision, str(tmp_path), mixed], tmp_path / "said.txt")
    again, out = torch.load(tmp_path / "again")
    assert len(again) == len(bits) > 100
    assert all(one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(bits, again, strict=True))
    assert out.isfinite().all()


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    """A flipped bit and a cut file are noticed, and the next load writes a good one."""
    config = st.presets.playground(base_model_precision="int8-quanto", cache_dir=str(tmp_path))
    bits = [tensor.clone() for tensor in tensors_of(components.load_transformer(config, CPU))]
    (path,) = (tmp_path / "models").glob("*.safetensors")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 4
    for bad in (bytes(flipped), good[:5000], b""):
        path.write_bytes(bad)
        skeleton = components.skeleton(config)
        settings = {"precision": "int8-quanto", "modulation": "same", "dtype": torch.float32, "device": CPU}
        assert not quantised_files.read(path, skeleton, **settings)
        found = [tensor.clone() for tensor in tensors_of(components.load_transformer(config, CPU))]
        assert all(torch.equal(one, two) for one, two in zip(bits, found, strict=True))
        assert quantised_files.read(path, components.skeleton(config), **settings)


def test_each_format_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Precision, the AdaLN setting and the number format of the rest are part of the name; training settings are not."""
    for settings in (
        {},
        {"modulation_precision": "bf16"},
        {"mixed_precision": "bf16"},
        {"base_model_precision": "nf4-bnb"},
        {"lora_rank": 2},
    ):
        config = st.presets.playground(**{"base_model_precision": "int8-quanto", "cache_dir": str(tmp_path), **settings})
        components.load_transformer(config, CPU)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 4


def test_stats_count_it(bench: Workbench) -> None:
    """`sd3tune cache stats` says how much lies there."""
    from sd3tune.cache import upkeep

    config = bench.config(base_model_precision="int8-quanto")
    components.load_transformer(config, CPU)
    found = upkeep.stats(config.run.cache_dir)
    assert found.entries["models"] >= 1
    assert found.size["models"] > 1e6
    assert json.dumps(found.size)
