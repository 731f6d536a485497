"""Previews: the Tiny AutoEncoder shows what the autoencoder would, from the very latents that the sampler holds, when they are due."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import sd3tune as st
from sd3tune import playground
from sd3tune.data.images import read_rgb
from sd3tune.errors import ModelError
from sd3tune.models import components, tiny
from sd3tune.models.components import pixels
from sd3tune.validation.sampler import decode

CPU = torch.device("cpu")


def psnr(found: list[Image.Image], wanted: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio over all pictures, in dB."""
    error = (pixels(found) - pixels(wanted)).square().mean()
    return -10 * math.log10(max(float(error), 1e-12) / 4)


@pytest.fixture(scope="module")
def shown() -> tuple[list[Image.Image], Tensor]:
    """What the autoencoder decodes of the held-out pictures' latents, and the latents as the sampler would end with them."""
    pictures = []
    for path in sorted((playground.PICTURES / "heldout").glob("*.png")):
        with path.open("rb") as opened:
            pictures.append(read_rgb(opened).resize((64, 64), Image.Resampling.LANCZOS))
    config = st.presets.playground(vae_dtype="fp32")
    with st.encoders(config, device="cpu").load() as loaded:
        latent_BCHW = loaded.encode_images(pictures).mean_BCHW
    return decode(components.load_vae(config, CPU), latent_BCHW), latent_BCHW


def test_previews_look_like_the_pictures(shown: tuple[list[Image.Image], Tensor]) -> None:
    """Measured: 22.7 dB against the autoencoder's own decoding (grey: 8.2), and 20.6 when scale and shift are undone first."""
    wanted, latent_BCHW = shown
    config = st.presets.playground(vae_dtype="fp32")
    small = tiny.load_tiny(config, CPU)
    assert psnr(tiny.previews(small, latent_BCHW), wanted) > 21.7
    vae = components.load_vae(config, CPU).config
    undone = tiny.previews(small, latent_BCHW / vae.scaling_factor + vae.shift_factor)
    assert psnr(undone, wanted) < psnr(tiny.previews(small, latent_BCHW), wanted) - 1


def test_a_preview_is_a_picture_of_its_latent_alone(shown: tuple[list[Image.Image], Tensor]) -> None:
    """One by one as together, 8 px a latent pixel, oblong too, from bf16 too; nothing learns."""
    _, latent_BCHW = shown
    small = tiny.load_tiny(playground.PREVIEWER, CPU)
    together, alone = tiny.previews(small, latent_BCHW[:3]), tiny.previews(small, latent_BCHW[1:2])
    assert [picture.size for picture in together] == [(64, 64)] * 3
    assert psnr(alone, together[1:2]) > 48
    assert tiny.previews(small, latent_BCHW[:1, :, :4])[0].size == (64, 32)
    assert psnr(tiny.previews(small, latent_BCHW[:1].bfloat16()), together[:1]) > 30
    assert small.dtype == torch.float32
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize(
    ("every", "steps", "wanted"),
    [(5, 20, [5, 10, 15, 20]), (5, 28, [5, 10, 15, 20, 25]), (1, 3, [1, 2, 3]), (7, 6, []), (6, 6, [6])],
)
def test_exactly_every_nth_step(every: int, steps: int, wanted: list[int]) -> None:
    """Neither the first nor the last one for its own sake, and none outside of sampling."""
    assert [step for step in range(-every, steps + 2 * every) if tiny.due(step, every, steps)] == wanted


def test_bytes_of_pictures(shown: tuple[list[Image.Image], Tensor]) -> None:
    """PNG keeps every value, JPEG is smaller and close."""
    picture = shown[0][0].resize((512, 512), Image.Resampling.BICUBIC)
    png, jpeg = tiny.as_png(picture), tiny.as_jpeg(picture)
    with Image.open(io.BytesIO(png)) as again:
        assert (again.format, again.tobytes()) == ("PNG", picture.tobytes())
    with Image.open(io.BytesIO(jpeg)) as again:
        assert again.format == "JPEG"
        assert psnr([again.convert("RGB")], [picture]) > 30
    assert len(tiny.as_jpeg(picture, quality=40)) < len(jpeg) < len(png) / 3


def test_which_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The playground's own for the playground, taesd3 for every other model, which is not fetched when the hub is off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert tiny.load_tiny(st.presets.playground(), CPU).config.latent_channels == 16
    with pytest.raises(
        ModelError, match=r"^madebyollin/taesd3: it is not in the local cache, and HF_HUB_OFFLINE is set; .* validation_preview: false"
    ):
        tiny.load_tiny(st.RunConfig.make(model_flavour="sd35-medium"), CPU)


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    """Where, what, and what to set."""
    with pytest.raises(ModelError, match=r"/nowhere: no such folder; set validation_preview: false"):
        tiny.load_tiny(tmp_path / "nowhere", CPU)
    with pytest.raises(ModelError, match=r"vae: no Tiny AutoEncoder, but AutoencoderKL; set validation_preview: false"):
        tiny.load_tiny(playground.MODEL / "vae", CPU)
    with pytest.raises(ModelError, match=r"config\.json: cannot be read \(.*\); set validation_preview: false"):
        tiny.load_tiny(tmp_path, CPU)
    copy = Path(shutil.copytree(playground.PREVIEWER, tmp_path / "taesd"))
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"taesd: cannot be loaded \(.*\); download or copy the model again"):
        tiny.load_tiny(copy, CPU)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"taesd/config\.json: holds no table; set validation_preview: false"):
        tiny.load_tiny(copy, CPU)
