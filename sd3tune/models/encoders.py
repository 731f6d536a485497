"""The text encoders and the autoencoder: their identity without loading, and a scope in which they are loaded.

Shapes: B pictures or texts, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled width.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd3tune.cache.conditioning import Conditioning
from sd3tune.cache.states import Moments, PartStates, TextStates, whole
from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.files import digest
from sd3tune.models import room
from sd3tune.models.components import (
    SUFFIXES,
    TEXT_NAMES,
    TEXT_PARTS,
    compute_dtype,
    folder_digest,
    load_vae,
    model_folder,
    named,
    pick_device,
    pixels,
    vae_dtype,
)
from sd3tune.models.freeing import give_back
from sd3tune.models.loading import Weights, fill
from sd3tune.models.quantize import expected_bytes, is_quantised, smaller

if TYPE_CHECKING:
    from PIL.Image import Image


VAE = "VAE"
"""What the autoencoder is called among the encoders."""

SMALL_TILE = 512
"""Side in px of the tiles in which a picture is encoded that does not fit as a whole."""


class EncoderHandle:
    """A light handle on the encoders of a configuration: their identity, and a scope in which they are loaded."""

    def __init__(self, config: RunConfig, device: str | None = None) -> None:
        self._config, self._device = config, device
        self._folder = model_folder(config)

    @cached_property
    def latent_fingerprint(self) -> str:
        """Of the autoencoder's files, number format, tiling and slicing."""
        model = self._config.model
        modes = f"tiling {model.vae_enable_tiling} slicing {model.vae_enable_slicing}"
        return digest(folder_digest(self._folder / "vae"), str(vae_dtype(self._config)), modes)

    @cached_property
    def text_fingerprint(self) -> str:
        """Of the encoders' and tokenizers' files, the length, the padding and the number format."""
        parts = [folder_digest(self._folder / part) for part in TEXT_PARTS]
        model = self._config.model
        precisions = (model.text_encoder_1_precision, model.text_encoder_2_precision, model.text_encoder_3_precision, str(model.use_t5))
        return digest(*parts, str(model.tokenizer_max_length), model.t5_padding, str(compute_dtype(self._config)), *precisions)

    @cached_property
    def conditioning(self) -> Conditioning:
        """How texts reach the transformer."""
        clip, model = self._json("text_encoder/config.json"), self._config.model
        return Conditioning(
            (int(clip["hidden_size"]), int(clip["projection_dim"])), model.tokenizer_max_length, model.t5_padding, model.use_t5,
            model.sd3_clip_uncond_behaviour, model.sd3_t5_uncond_behaviour,
        )  # fmt: skip

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of all entries of a plan, from the models' configurations alone."""
        vae, transformer = (self._json(f"{part}/config.json") for part in ("vae", "transformer"))
        area = sum(bucket.width * bucket.height for _, (_, _, _, bucket, _) in {(cut.item.path, cut.geometry) for cut in plan.cuts})
        latents = 2 * int(vae["latent_channels"]) * area // 64 * vae_dtype(self._config).itemsize
        t5 = self._config.model.tokenizer_max_length * int(transformer["joint_attention_dim"]) * compute_dtype(self._config).itemsize
        return latents + len(plan.texts) * (t5 + self._clip_bytes())

    def _clip_bytes(self) -> int:
        """Bytes of what both CLIPs give of one text."""
        values = 0
        for suffix in SUFFIXES[:2]:
            clip, tokenizer = self._json(f"text_encoder{suffix}/config.json"), self._json(f"tokenizer{suffix}/tokenizer_config.json")
            values += int(tokenizer.get("model_max_length", 77)) * int(clip["hidden_size"]) + int(clip["projection_dim"])
        return values * compute_dtype(self._config).itemsize

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / name).read_text())
        return found

    @contextmanager
    def load(self) -> Iterator[LoadedEncoders]:
        """A scope in which each encoder is loaded when it is needed, in place of the one before; memory is given back at its end."""
        loaded = LoadedEncoders(self._config, torch.device(self._device) if self._device else pick_device(), self._clip_bytes())
        try:
            yield loaded
        finally:
            loaded.release()


def encoders(config: RunConfig, *, device: str | None = None) -> EncoderHandle:
    """The encoders that a configuration names, to be loaded on the best device or on the one given. Raises: ModelError."""
    return EncoderHandle(config, device)


class LoadedEncoders:
    """Autoencoder and text encoders, of which one at a time lies in memory: the one that was asked last."""

    text_parts = TEXT_NAMES

    def __init__(self, config: RunConfig, device: torch.device, held_bytes: int) -> None:
        self._config, self._device, self.held_bytes = config, device, held_bytes
        self._name = ""
        self._held: Any = None

    def release(self) -> None:
        """Give the memory back."""
        self._name, self._held = "", None
        gc.collect()
        give_back()

    def _loaded(self, name: str) -> Any:
        """The autoencoder, or a text encoder with its tokenizer, in place of the one before."""
        if self._name != name:
            self.release()
            self._held = load_vae(self._config, self._device) if name == VAE else self._load_text(TEXT_NAMES.index(name))
            self._name = name
        return self._held

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image], *, tiled: bool = False) -> Moments:
        """Scaled posterior of pictures of one size: mean (z - shift_factor) * scaling_factor, deviation * scaling_factor."""
        vae = self._loaded(VAE)
        if tiled:  # its own tiles are as large as the pictures that SD3 knows
            vae.enable_tiling()
            side = min(vae.tile_sample_min_size, SMALL_TILE)
            vae.tile_latent_min_size = vae.tile_latent_min_size * side // vae.tile_sample_min_size
            vae.tile_sample_min_size = side
        pixels_BCHW = pixels(pictures).to(self._device, vae.dtype)
        posterior, scale = vae.encode(pixels_BCHW).latent_dist, vae.config.scaling_factor
        return Moments((posterior.mean - vae.config.shift_factor) * scale, posterior.std * scale)

    @torch.no_grad()
    def decode_latents(self, latent_BCHW: Tensor) -> list[Image]:
        """The pictures of scaled latents, as the pipeline shows them."""
        from PIL import Image

        vae = self._loaded(VAE)
        z_BCHW = latent_BCHW.to(self._device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels_BHWC = (vae.decode(z_BCHW).sample.float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(picture.numpy()) for picture in pixels_BHWC]

    def tokens_seen(self, texts: Sequence[str]) -> list[str]:
        """For each text what the encoders count in it, and what they do not see."""
        from sd3tune.models.tokens import count_tokens

        return ["; ".join(map(str, counts)) for counts in count_tokens(self._config, texts)]

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        """CLIP's penultimate states side by side, T5's last, and both pooled vectors, as diffusers' pipeline makes them."""
        return [whole(parts) for parts in zip(*(self.encode_part(part, texts) for part in TEXT_NAMES), strict=True)]

    @torch.no_grad()
    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        """What one text encoder gives of each text, in the machine's memory: a CLIP's penultimate states and pooled vector, T5's last."""
        tokenizer, encoder = self._loaded(part)
        length = self._config.model.tokenizer_max_length if part == "T5" else tokenizer.model_max_length
        padded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(self._device)
        ids_BL = padded.input_ids
        if part != "T5":
            out = encoder(ids_BL, output_hidden_states=True)
            return [PartStates(*rows) for rows in zip(out.hidden_states[-2].cpu(), out[0].cpu(), strict=True)]
        if encoder is None:  # as diffusers' pipeline does without its third encoder
            t5_BLD = torch.zeros((*ids_BL.shape, self._joint_width()), dtype=compute_dtype(self._config), device=self._device)
        else:
            t5_BLD = encoder(ids_BL)[0]
        if self._config.model.t5_padding == "zero":
            t5_BLD = t5_BLD.masked_fill(padded.attention_mask.unsqueeze(-1) == 0, 0)
        return [PartStates(hidden_LD, None) for hidden_LD in t5_BLD.cpu()]

    def _joint_width(self) -> int:
        return int(json.loads((model_folder(self._config) / "transformer" / "config.json").read_text())["joint_attention_dim"])

    def _load_text(self, number: int) -> tuple[Any, Any]:
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        tokenizer, _ = tokenizers(self._config)[number]
        if number == 2 and not self._config.model.use_t5:
            return tokenizer, None
        folder = model_folder(self._config) / f"text_encoder{SUFFIXES[number]}"
        precision = getattr(self._config.model, f"text_encoder_{number + 1}_precision")
        encoder_class = T5EncoderModel if number == 2 else CLIPTextModelWithProjection
        with named(folder):
            return tokenizer, load_text_encoder(encoder_class, folder, precision, compute_dtype(self._config), self._device)


def load_text_encoder(encoder_class: Any, folder: Path, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen text encoder, read layer by layer onto its device: no more of it lies in the machine's memory. Raises: ModelError."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        encoder = encoder_class(encoder_class.config_class.from_pretrained(folder))
    tied = set(encoder._tied_weights_keys or ())
    wide = (encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()

    def change(name: str, module: nn.Module) -> nn.Module:
        if precision == "no_change" or not is_quantised(name, module):
            return module
        assert isinstance(module, nn.Linear)
        return smaller(module, precision)

    room.require(folder.name, expected_bytes(encoder, precision, rest=dtype.itemsize, without=tied), precision=precision, device=device)
    weights = Weights.of_folder(folder, stem="model").only(set(encoder.state_dict()) - tied)
    fill(encoder, weights, dtype=dtype, device=device, change=change, tied=tied, wide=wide)
    encoder.tie_weights()
    return encoder.eval().requires_grad_(False).to(device)


def tokenizers(config: RunConfig) -> list[tuple[Any, int]]:
    """The three tokenizers with the length at which each cuts a text."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder, found = model_folder(config), []
    for suffix, kind in zip(SUFFIXES, (CLIPTokenizer, CLIPTokenizer, T5TokenizerFast), strict=True):
        with named(folder / f"tokenizer{suffix}"):
            tokenizer = kind.from_pretrained(folder / f"tokenizer{suffix}")
        found.append((tokenizer, config.model.tokenizer_max_length if kind is T5TokenizerFast else tokenizer.model_max_length))
    return found
