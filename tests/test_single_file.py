"""Single files in the layout of Stability and ComfyUI give, bit for bit, the model that diffusers makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

import sd3tune as st
from sd3tune import playground
from sd3tune.models import components, single_file
from sd3tune.models.loading import fill
from sd3tune.models.quantize import bytes_of

CPU = torch.device("cpu")
OWN = playground.MODEL / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bench(grown: Workbench) -> Workbench:
    """The whole playground: its weights lie in one file, too."""
    return grown


def stability(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The layout of the released single files, built the other way round: three layers put together, halves exchanged."""
    made: dict[str, Any] = {}
    for name, tensor in state.items():
        piece = single_file.piece_of(name, depth)
        if piece.swapped:
            one, two = tensor.chunk(2)
            tensor = torch.cat([two, one])
        if piece.third is None:
            made[piece.name] = tensor
        else:
            made.setdefault(piece.name, [None] * 3)[piece.third] = tensor
    return {name: torch.cat(value) if isinstance(value, list) else value.clone() for name, value in made.items()}


def small(**shape: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8, **shape,
    )  # fmt: skip


@pytest.mark.parametrize("prefix", single_file.PREFIXES)
@pytest.mark.parametrize("shape", [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}], ids=str)
def test_every_tensor_is_the_one_that_diffusers_finds(tmp_path: Path, shape: dict[str, Any], prefix: str) -> None:
    """SD3, SD3.5 Large and SD3.5 Medium in small, against diffusers' own converter."""
    model = small(**shape)
    single = stability(model.state_dict(), 3)
    path = tmp_path / "m.safetensors"
    extra = {"first_stage_model.x": torch.zeros(1), "text_encoders.clip_l.y": torch.zeros(1)} if prefix.startswith("model.") else {}
    save_file({prefix + name: tensor for name, tensor in single.items()} | extra, path)
    reference = convert_sd3_transformer_checkpoint_to_diffusers(dict(single))
    with torch.device("meta"):
        empty = small(**shape)
    fill(empty, single_file.open_single(path, empty.state_dict(), 3), dtype=torch.float32, device=CPU, change=lambda name, module: module)
    found = empty.state_dict()
    assert found.keys() == reference.keys() == model.state_dict().keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name]), name
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """The playground's transformer in one file."""
    path = tmp_path / "playground.safetensors"
    depth = components.skeleton(st.presets.playground()).config.num_layers
    save_file({"model.diffusion_model." + n: t for n, t in stability(load_file(OWN), depth).items()}, path)
    return path


def test_a_run_from_one_file_is_the_run_from_the_folder(bench: Workbench, single: Path) -> None:
    """The same losses to the last bit; quantised too, and its file in the cache is another one."""
    for precision in ("no_change", "int8-quanto"):
        one = bench.trainer(base_model_precision=precision)
        two = bench.trainer(base_model_precision=precision, pretrained_model_name_or_path=str(single))
        assert [one.step().loss for _ in range(2)] == [two.step().loss for _ in range(2)]
        assert bytes_of(one.transformer) == bytes_of(two.transformer)


def test_a_file_in_fp8_holds_its_values(tmp_path: Path, single: Path) -> None:
    """Every value of fp8 is one of bf16, so nothing is lost."""
    rough = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in load_file(single).items()}
    save_file(rough, tmp_path / "fp8.safetensors")
    config = st.presets.playground(pretrained_model_name_or_path=str(tmp_path / "fp8.safetensors"))
    found = components.load_transformer(config, CPU).state_dict()
    name = "transformer_blocks.2.attn.to_k.weight"
    source = rough["model.diffusion_model.joint_blocks.2.x_block.attn.qkv.weight"].float()
    assert torch.equal(found[name], source.chunk(3)[1])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "it looks like a LoRA; name it as init_lora"),
        (["double_blocks.0.x"], "it looks like a model of Flux"),
        (["model.diffusion_model.input_blocks.0.x"], "it looks like a model of Stable Diffusion 1, 2 or XL"),
        (["transformer_blocks.0.attn.to_q.weight"], "diffusers' own layout; name its folder"),
        (["something"], "it holds 1 tensors, the first is something"),
        ([], "it is empty"),
        (["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.x_block.attn.qkv.scale_weight"], "fp8 with scales of their own"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "not the model that model_flavour names: 1 blocks instead of"),
    ],
)
def test_other_files_are_explained(tmp_path: Path, names: list[str], says: str) -> None:
    """Each in one sentence, with the file."""
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(3, 2) for name in names}, path)
    with pytest.raises(st.ModelError, match=re.escape(says)) as caught:
        components.load_transformer(st.presets.playground(pretrained_model_name_or_path=str(path)), CPU)
    assert str(path) in str(caught.value)


def test_what_does_not_go_together_is_refused(tmp_path: Path, single: Path) -> None:
    """A file without a flavour, a missing file, a file that is cut, a tensor that is missing."""
    with pytest.raises(st.ConfigError, match="model_flavour must name the model whose encoders go with it"):
        st.RunConfig.make(pretrained_model_name_or_path="sd3.5_large.safetensors")
    for path, says in ((tmp_path / "none.safetensors", "cannot be read as safetensors"), (single, "cannot be read as safetensors")):
        if path == single:
            path.write_bytes(path.read_bytes()[:999])
        with pytest.raises(st.ModelError, match=says):
            components.load_transformer(st.presets.playground(pretrained_model_name_or_path=str(path)), CPU)


def test_a_missing_tensor_is_named(single: Path) -> None:
    """By the name that diffusers gives it."""
    save_file({n: t for n, t in load_file(single).items() if not n.endswith("joint_blocks.1.x_block.mlp.fc2.bias")}, single)
    with pytest.raises(st.ModelError, match=r"1 tensors are missing, e.g. transformer_blocks.1.ff.net.2.bias"):
        components.load_transformer(st.presets.playground(pretrained_model_name_or_path=str(single)), CPU)


def test_merging_begins_with_the_file(bench: Workbench, tmp_path: Path, single: Path) -> None:
    """`lora merge` into a single file's model gives what merging into the folder gives."""
    from sd3tune.models import lora_layouts, merging

    trainer = bench.trainer(lr_warmup_steps=0)
    trainer.step()
    trainer.step()
    trainer.save(tmp_path / "l.safetensors")
    lora = lora_layouts.read(tmp_path / "l.safetensors")
    for name, settings in (("a", {}), ("b", {"pretrained_model_name_or_path": str(single)})):
        merging.merge(lora, st.presets.playground(**settings), tmp_path / name, strength=0.5)
    one, two = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
