"""The memory formula against what models really hold and save."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Workbench

import sd3tune as st
from sd3tune.models import adapters, components, memory, savings
from sd3tune.models.adapters import Spec
from sd3tune.models.quantize import PRECISIONS, bytes_of, quantise

CPU = torch.device("cpu")


QUICK = [("no_change", "bf16", "same"), ("int8-quanto", "no", "bf16"), ("nf4-bnb", "bf16", "same"), ("int4-quanto", "no", "same")]
REST = [(p, mixed, kept) for p in PRECISIONS for mixed in ("no", "bf16") for kept in ("same", "bf16") if (p, mixed, kept) not in QUICK]


@pytest.mark.parametrize(("precision", "mixed", "modulation"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.full) for row in REST)])
def test_bytes_of_the_base(tmp_path: Any, precision: str, mixed: str, modulation: str) -> None:
    """Weights and scales of the playground's model, within 1 %."""
    config = st.presets.playground(
        base_model_precision=precision, mixed_precision=mixed, modulation_precision=modulation, cache_dir=str(tmp_path)
    )
    found = bytes_of(components.load_transformer(config, CPU))
    assert memory.predict(config).base == pytest.approx(found, rel=0.01)


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flavour", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_bytes_of_the_base_at_full_width(flavour: Any, precision: str) -> None:
    """Two blocks of each released model."""
    model = components.random(flavour, layers=2)
    config = st.RunConfig.make(model_flavour=flavour, base_model_precision=precision)
    expected = memory.base_bytes(components.random(flavour, layers=2, device="meta"), config)
    quantise(model, precision)
    assert expected == pytest.approx(bytes_of(model), rel=0.01)


def saved(model: Any, config: st.RunConfig, side: int, dtype: torch.dtype) -> int:
    """Bytes of all that one forward pass keeps for the backward pass, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not hasattr(p, "qtype")}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not hasattr(tensor, "qtype") and tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    c = model.config
    shapes = ((1, c.in_channels, side // 8, side // 8), (1, 77 + config.model.tokenizer_max_length, c.joint_attention_dim))
    x, t = (torch.randn(shape).to(dtype) for shape in shapes)
    mixed = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        pooled = torch.randn(1, c.pooled_projection_dim).to(dtype)
        out = model(hidden_states=x, encoder_hidden_states=t, pooled_projections=pooled, timestep=torch.tensor([500.0])).sample
    total = sum(seen.values())
    assert out.requires_grad
    return total


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "nf4-bnb"])
@pytest.mark.parametrize("flavour", ["sd3-medium", "sd35-medium", "sd35-large"])
def test_bytes_of_activations_at_full_width(flavour: Any, precision: str, checkpointing: bool) -> None:
    """Three blocks at 512 px in bf16, within 15 %; with checkpointing the block that is made anew is held beside the kept ones."""
    model = components.random(flavour, layers=3)
    quantise(model, precision)
    adapters.add_lora(model, Spec("attention", 16, 16.0), seed=0)
    config = st.RunConfig.make(model_flavour=flavour, base_model_precision=precision, gradient_checkpointing=checkpointing)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    found = saved(model, config, 512, torch.bfloat16)
    predicted = memory.activation_bytes(model.config, config, side=512, width=2)
    if checkpointing:  # the hooks see what stays; the formula adds the one block that the backward pass makes anew
        heads = model.config.num_attention_heads * 64
        block, second = memory.block_units(model.config, config, image=32 * 32, text=231, width=2)
        predicted -= 2 * heads * (block.both + second * bool(model.config.dual_attention_layers))
    assert predicted == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "nf4-bnb"])
def test_bytes_of_the_playgrounds_activations(bench: Workbench, precision: str) -> None:
    """In fp32, at 128 px, within 15 %."""
    config = bench.config(base_model_precision=precision, lora_targets="attention", gradient_checkpointing=False, train_batch_size=1)
    model = components.load_transformer(config, CPU)
    adapters.add_lora(model, Spec("attention", 16, 16.0), seed=0)
    found = saved(model, config, 128, torch.float32)
    assert memory.activation_bytes(model.config, config, side=128, width=4) == pytest.approx(found, rel=0.15)


SEVERAL = ["stableadamw", "lion", "prodigy", "schedulefree", "bnb-lion8bit", "adamw_bf16"]


@pytest.mark.parametrize("optimizer", ["adamw", "bnb-adamw8bit", *(pytest.param(name, marks=pytest.mark.full) for name in SEVERAL)])
def test_bytes_of_the_update_rule(bench: Workbench, optimizer: str) -> None:
    """What the rules hold after an update, and the adapter's own weights."""
    settings: dict[str, Any] = {"learning_rate": 1.0} if optimizer == "prodigy" else {}
    trainer = bench.trainer(optimizer=optimizer, lora_rank=64, lr_scheduler="constant_with_warmup", **settings)
    trainer.step()
    held = sum(t.nbytes for t in trainer.state_dict()["optimizer"].values())
    need = memory.predict(trainer.config)
    assert memory.adapter_parameters(memory.structure(trainer.config), trainer.config) == trainer.manifest.trainable_parameters
    assert need.optimizer == pytest.approx(held, rel=0.15)
    weights = sum(w.nbytes + w.grad.nbytes for w in trainer.engine.weights.values() if w.grad is not None)
    assert need.adapter == pytest.approx(weights, rel=0.01)


WIDE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "use_quant_conv": False,
    "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
"""The released autoencoder's shape. Source: its config.json."""


def peak_of(work: Any) -> int:
    """Most bytes that the allocator had given at once while something ran."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held, most = 0, 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.full
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_bytes_of_the_autoencoders_work(what: str) -> None:
    """At full width, at 128 px in fp32, within 15 %; its weights are counted to the last."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**WIDE).eval()
    assert sum(p.numel() for p in vae.parameters()) == memory.VAE_VALUES
    assert vae.tile_sample_min_size == memory.TILE
    given = torch.randn(1, 3, 128, 128) if what == "encode" else torch.randn(1, 16, 16, 16)
    found = peak_of(lambda: getattr(vae, what)(given))
    config = st.RunConfig.make(model_flavour="sd35-medium", vae_dtype="fp32")
    units = memory.VAE_ENCODE if what == "encode" else memory.VAE_DECODE
    assert memory.vae_bytes(config, units, (128, 128), 1) - 4 * memory.VAE_VALUES == pytest.approx(found, rel=0.15)


def test_the_autoencoder_in_tiles_and_one_by_one() -> None:
    """Slicing makes four pictures one; tiles bound a large picture and leave those of the models' own size as they are."""
    plain, sliced, tiled = (
        st.RunConfig.make(model_flavour="sd35-medium", **more) for more in ({}, {"vae_enable_slicing": True}, {"vae_enable_tiling": True})
    )
    weights = 2 * memory.VAE_VALUES

    def work(config: st.RunConfig, size: tuple[int, int], images: int) -> float:
        return memory.vae_bytes(config, memory.VAE_ENCODE, size, images) - weights

    assert work(plain, (1024, 1024), 4) == 4 * work(sliced, (1024, 1024), 4) == 4 * 2 * 5.1 * 128 * 1024**2
    assert work(tiled, (1024, 1024), 1) == work(plain, (1024, 1024), 1)
    assert work(tiled, (2048, 2048), 1) == work(plain, (2048, 2048), 1) / 4


def test_the_peak_before_training_is_one_encoder() -> None:
    """T5 in bf16 and not the sum of three; what the CLIPs gave is in RAM; validation has the autoencoder beside the model."""
    config = st.RunConfig.make(model_flavour="sd35-medium", vae_batch_size=4, validation_prompt="a pot")
    need = memory.predict(config)
    assert need.encoders == 2 * memory.ENCODERS[3] + memory.CONTEXT
    assert memory.predict(config.replace(use_t5=False)).encoders == 2 * memory.ENCODERS[2] + memory.CONTEXT
    assert need.held == 512 * 2**20
    assert need.validation == pytest.approx(need.base + need.adapter + need.optimizer + need.context + need.drawing)
    assert need.drawing == 2 * (memory.VAE_VALUES + 7.8 * 128 * 1024**2)
    assert memory.predict(config.replace(validation_prompt=())).drawing == 0
    assert need.peak == max(need.training, need.encoders)
    assert "text encoders before it, one at a time, 10.2 GB and 0.5 GB of RAM; autoencoder before it 6.3 GB; validation" in str(need)


def test_checkpointing_acts_and_changes_nothing(bench: Workbench) -> None:
    """Each block runs twice in an update, dropout included, and the losses and the adapter are the same."""
    counts, results = [], []
    for on in (False, True):
        trainer = bench.trainer(gradient_checkpointing=on, lora_dropout=0.3, lr_warmup_steps=0)
        runs: list[int] = []
        trainer.transformer.transformer_blocks[0].attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        losses = [trainer.step().loss for _ in range(3)]
        counts.append(len(runs))
        results.append((losses, trainer.state_dict()["adapter"]))
    assert counts == [3, 6]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, weight in results[0][1].items():
        assert torch.allclose(weight, results[1][1][name], atol=1e-7), name


def test_automatic_checkpointing_is_for_gpus(bench: Workbench) -> None:
    """Off on a CPU, whose memory is not what is scarce."""
    from sd3tune.assembly import checkpointing

    assert not checkpointing(bench.config(), CPU)
    assert checkpointing(bench.config(), torch.device("cuda"))
    assert not checkpointing(bench.config(gradient_checkpointing=False), torch.device("cuda"))


@pytest.mark.parametrize("room", [5e9, 11e9, 16e9, 24e9, 80e9, 1e13])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_largest_batch_fits_and_the_next_does_not(precision: Any, room: float) -> None:
    config = st.RunConfig.make(model_flavour="sd35-medium", base_model_precision=precision)
    found = savings.largest_batch(config, side=1024, room=room)
    fits = [memory.predict(config.replace(train_batch_size=size), side=1024).peak < room for size in range(1, savings.MOST + 1)]
    assert found == sum(fits)
    assert fits == sorted(fits, reverse=True), "a larger batch never takes less"
    said = savings.batches(config, side=1024, room=room)
    assert said.startswith(f"Largest batch size that fits: {found}") == bool(found)
    assert said.endswith("or more.") == (found == savings.MOST)


def test_a_base_in_fewer_bits_is_named_where_it_makes_room() -> None:
    config = st.RunConfig.make(model_flavour="sd35-medium", train_batch_size=1)
    own, smaller = (
        savings.largest_batch(config.replace(base_model_precision=name), side=1024, room=16e9) for name in ("no_change", "int8-quanto")
    )
    assert 0 < own < smaller < savings.MOST
    assert savings.batches(config, side=1024, room=16e9) == f"Largest batch size that fits: {own}, with a base in int8-quanto {smaller}."
    assert savings.batches(config, side=1024, room=1e9) == ""
    whole = config.replace(use_dora=True)  # which needs the base's weights whole
    dora = savings.largest_batch(whole, side=1024, room=16e9)
    assert savings.batches(whole, side=1024, room=16e9) == f"Largest batch size that fits: {dora}."
