"""The adapter file: verified when written, and the same picture in another program."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import stock
import torch
from conftest import Workbench
from PIL import Image
from safetensors.torch import load_file, save_file

import sd3tune as st
from sd3tune import playground
from sd3tune.assembly import spec_of
from sd3tune.models import adapters, components
from sd3tune.models.adapters import Spec
from sd3tune.models.lora_files import expected_names, lora_of, verify

PRESET = st.presets.PLAYGROUND["lora_targets"]


@pytest.mark.parametrize(
    ("alpha", "targets", "count"),
    [(4.0, PRESET, 192), *(pytest.param(16.0, *row, marks=pytest.mark.full) for row in ((PRESET, 192), ("attention", 144)))],
)
def test_stock_diffusers_draws_the_trainers_own_picture(
    bench: Workbench, tmp_path: Path, alpha: float, targets: str | tuple[str, ...], count: int
) -> None:
    """A fresh process with diffusers alone: no missing and no unexpected key, and the validation picture to 2/255."""
    trainer = bench.trainer(model_flavour="playground", lora_alpha=alpha, lora_targets=targets, lr_warmup_steps=0, learning_rate=5e-3)
    base = np.asarray(trainer.validate().rows[0][1][0], dtype=int)
    for _ in range(6):
        trainer.step()
    trainer.validate()
    trainer.save(tmp_path / "lora.safetensors")
    out = tmp_path / "stock.png"
    arguments = [str(playground.MODEL), str(tmp_path / "lora.safetensors"), str(out), "lock", str(trainer.config.validation_seed)]
    assert stock.elsewhere("draw", *arguments) == {"missing": [], "unexpected": [], "count": count}
    own = np.asarray(Image.open(trainer.folder.images(6) / "00.png"), dtype=int)
    drawn = np.asarray(Image.open(out), dtype=int)
    assert np.abs(own - drawn).max() <= 2
    assert np.abs(own - base).max() > 8, "the adapter must have changed the picture for this test to mean anything"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_q", "to_kk"), "no linear layer of this model is called 'to_kk'; did you mean 'to_k'?"),
        (("ff.net.0.pro",), "did you mean 'ff.net.0.proj'?"),
        (("norm_q",), "no linear layer of this model is called 'norm_q'"),
        (("zzz",), "there are attn.add_k_proj, "),
        ((), "lora_targets is an empty list"),
        ("attn", "'attn' is not allowed: it should be 'attention', 'attention+context' or 'all-linear' or a list"),
    ],
)
def test_targets_that_name_nothing_are_refused(targets: str | tuple[str, ...], message: str) -> None:
    """Before anything is trained, with the nearest name that the model has."""
    with pytest.raises(st.ConfigError, match=re.escape(message)):
        adapters.check_targets(components.skeleton(st.presets.playground(lora_targets=targets)), targets)


def test_a_target_is_a_whole_name_ending() -> None:
    """``to_out.0`` leaves ``to_add_out`` alone, and ``norm1.linear`` leaves ``norm1_context.linear`` alone."""
    config = st.presets.playground(lora_targets=["norm1.linear", "to_out.0"])
    weights = adapters.add_lora(components.skeleton(config), Spec(config.adapter.lora_targets, 2, 2.0), seed=0)
    layers = {name.split(".", 2)[2].rsplit(".lora_", 1)[0] for name in weights}
    assert layers == {"norm1.linear", "attn.to_out.0", "attn2.to_out.0"}


def test_alpha_is_folded_into_b(bench: Workbench, tmp_path: Path) -> None:
    """With alpha 4 at rank 16 the file's B is a quarter of the trainer's, A is untouched, alpha = rank is declared."""
    trainer = bench.trainer(lora_alpha=4.0)
    for _ in range(3):
        trainer.step()
    path = tmp_path / "lora.safetensors"
    assert trainer.save(path) == 44
    written, own = load_file(path), trainer.state_dict()["adapter"]
    for name, tensor in own.items():
        factor = 0.25 if ".lora_B." in name else 1.0
        assert torch.equal(written["transformer." + name], tensor * factor)
    with __import__("safetensors").safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    declared = json.loads(metadata["lora_adapter_metadata"])
    assert declared["transformer.r"] == declared["transformer.lora_alpha"] == 16
    assert (metadata["sd3tune.alpha"], metadata["sd3tune.rank"]) == ("4.0", "16")


def test_verification_notices_every_kind_of_damage(bench: Workbench, tmp_path: Path) -> None:
    """A changed value, a missing tensor, a foreign name and a wrong shape are each an error that names the tensor."""
    trainer = bench.trainer()
    for _ in range(2):
        trainer.step()
    path = tmp_path / "lora.safetensors"
    trainer.save(path)
    good = load_file(path)
    spec = spec_of(trainer.config)
    names = expected_names(components.skeleton(trainer.config), spec)
    lora = lora_of(trainer.state_dict()["adapter"], spec, {})

    def check(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
        save_file(tensors, path)
        return verify(path, good, lora, names)[:2]

    assert check(good) == (len(good), 22) == (44, 22)
    name = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    with pytest.raises(st.CheckpointError, match=f"{name} does not read back"):
        check({**good, name: good[name] + 1e-7})
    with pytest.raises(st.CheckpointError, match="1 names do not fit"):
        check({k: v for k, v in good.items() if k != name})
    with pytest.raises(st.CheckpointError, match="1 names do not fit"):
        check({**good, "transformer.other.lora_A.weight": torch.zeros(2)})
    with pytest.raises(st.CheckpointError, match=f"{name} does not read back"):
        check({**good, name: good[name][:, :8].contiguous()})


def test_a_save_that_does_not_verify_is_not_kept(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier file stays when the new one reads back wrong."""
    import safetensors.torch

    trainer = bench.trainer()
    path = tmp_path / "lora.safetensors"
    trainer.save(path)
    before = path.read_bytes()
    trainer.step()
    real = safetensors.torch.save
    monkeypatch.setattr(safetensors.torch, "save", lambda held, *rest: real({k: v * 1.001 for k, v in held.items()}, *rest))
    with pytest.raises(st.CheckpointError, match="does not read back as it was written"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
