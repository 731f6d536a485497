"""Validation pictures are what stock diffusers draws."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import sd3tune as st
from sd3tune import playground
from sd3tune.cache.states import Text, joined
from sd3tune.models import components
from sd3tune.validation.sampler import Guidance, decode, sample, start_noise


@pytest.fixture(scope="module")
def stock() -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(playground.MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_texts(stock: Any, prompt: str) -> tuple[Text, Text]:
    """Positive and negative embeddings as the stock pipeline makes them."""
    positive, negative, pooled, negative_pooled = stock.encode_prompt(prompt, None, None, max_sequence_length=16)
    return Text(positive[0], pooled[0]), Text(negative[0], negative_pooled[0])


CASES = [
    ("euler", 1.0, (), 64, 64), ("euler", 4.0, (), 64, 64), ("euler", 5.5, (0, 11), 48, 80), ("unipc", 4.0, (7, 8, 9), 80, 48),
    ("dpm", 4.0, (7, 8, 9), 64, 64), ("heun", 4.0, (7, 8, 9), 64, 64),
    *(pytest.param(*row, marks=pytest.mark.full) for row in (("euler", 4.0, (7, 8, 9), 64, 64), ("unipc", 1.0, (), 64, 64))),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "scale", "layers", "width", "height"), CASES)
def test_sampler_equals_stock_pipeline_bit_for_bit(
    stock: Any, solver: str, scale: float, layers: tuple[int, ...], width: int, height: int
) -> None:
    """Same embeddings, same seeds: the same latents to the last bit, two prompts at once, with and without (skip-layer) guidance."""
    texts = [stock_texts(stock, prompt) for prompt in ("lock", "cat face")]
    positives, negatives = [positive for positive, _ in texts], [negative for _, negative in texts]
    name, shift, options = components.SOLVERS[solver]
    before = stock.scheduler
    stock.scheduler = getattr(diffusers, name).from_config(before.config, **{shift: 3.0}, **options)
    try:
        expected = stock(
            prompt_embeds=torch.stack([t.joint_LD for t in positives]), pooled_prompt_embeds=torch.stack([t.pooled_P for t in positives]),
            negative_prompt_embeds=torch.stack([t.joint_LD for t in negatives]),
            negative_pooled_prompt_embeds=torch.stack([t.pooled_P for t in negatives]),
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], skip_guidance_layers=list(layers) or None,
            skip_layer_guidance_stop=0.6, num_inference_steps=8, guidance_scale=scale, width=width, height=height, output_type="latent",
        ).images  # fmt: skip
    finally:
        stock.scheduler = before
    noise = start_noise((16, height // 8, width // 8), [3, 4], torch.float32)
    guidance = Guidance(scale, layers, skip_stop=0.6)
    walk = sample(
        stock.transformer, components.load_scheduler(st.presets.playground(), solver, 3.0), positives=positives, negatives=negatives,
        noise_BCHW=noise, steps=8, guidance=guidance,
    )  # fmt: skip
    walked = list(walk)
    assert [step for step, _ in walked] == list(range(1, 16 if solver == "heun" else 9))
    assert torch.equal(walked[-1][1], expected)
    if layers:
        assert guidance.active_steps(8) == (1, 2, 3, 4)


def test_active_steps_of_the_recommended_setting() -> None:
    """30 steps, 0.01 to 0.2: steps 1 to 5; 28 steps: also 1 to 5; 20 steps: 1 to 3; without guidance none."""
    assert Guidance(4.0, (7, 8, 9)).active_steps(20) == (1, 2, 3), "step 4 of 20 is at 0.2, and the end is not part of it"
    assert Guidance(4.0, (7, 8, 9)).active_steps(30) == (1, 2, 3, 4, 5)
    assert Guidance(4.0, (7, 8, 9)).active_steps(28) == (1, 2, 3, 4, 5)
    assert Guidance(4.0, (7, 8, 9), 0.25, 0.5).active_steps(20) == (6, 7, 8, 9), "after a quarter of 20, before a half"
    assert Guidance(1.0, (7, 8, 9)).active_steps(30) == ()


def test_decoding_equals_stock_pipeline(stock: Any) -> None:
    """The picture of a latent is the stock pipeline's picture."""
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = latent / stock.vae.config.scaling_factor + stock.vae.config.shift_factor
    with torch.no_grad():
        expected = stock.image_processor.postprocess(stock.vae.decode(raw, return_dict=False)[0], output_type="pil")[0]
    assert decode(stock.vae, latent)[0].tobytes() == expected.tobytes()


def test_encoders_agree_with_stock_pipeline(stock: Any) -> None:
    """Cached states are the stock pipeline's prompt embeddings, for captions and for the empty text."""
    config = st.presets.playground()
    with st.encoders(config).load() as loaded:
        got = loaded.encode_texts(["lock", "", "an unusually long caption that goes far beyond sixteen tokens in every tokenizer"])
    for states, prompt in zip(got, ["lock", ""], strict=False):
        expected, *_ = stock.encode_prompt(prompt, None, None, max_sequence_length=16, do_classifier_free_guidance=False)
        assert torch.allclose(joined([states])[0], expected, atol=1e-5)
    pooled = stock.encode_prompt("lock", None, None, max_sequence_length=16)[2]
    assert torch.allclose(got[0].pooled_P, pooled[0], atol=1e-5)


def test_latents_are_scaled_as_the_vae_config_says(stock: Any) -> None:
    """(z - shift) * scale of the posterior's mean; decoding it gives the picture back to 25 dB."""
    from PIL import Image

    from sd3tune.data.images import read_rgb

    picture = read_rgb(playground.PICTURES / "train" / "key.png").resize((64, 64), Image.Resampling.LANCZOS)
    config = st.presets.playground()
    with st.encoders(config).load() as loaded:
        latent, deviation = loaded.encode_images([picture])
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = stock.vae.encode(pixels).latent_dist
        z = posterior.mode()
    assert torch.allclose(deviation, posterior.std * stock.vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(latent, (z - stock.vae.config.shift_factor) * stock.vae.config.scaling_factor, atol=1e-5)
    back = decode(components.load_vae(config, torch.device("cpu")), latent)[0]
    restored = torch.frombuffer(bytearray(back.tobytes()), dtype=torch.uint8).float() / 255
    original = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    assert -10 * float((restored - original).square().mean().log10()) > 25
