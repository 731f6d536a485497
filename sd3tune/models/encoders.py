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
from sd3tune.cache.states import Moments, TextStates
from sd3tune.config.schema import RunConfig
from sd3tune.data.planning import Plan
from sd3tune.files import digest
from sd3tune.models.components import (
    SUFFIXES,
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
from sd3tune.models.loading import Weights, fill
from sd3tune.models.quantize import is_quantised, smaller

if TYPE_CHECKING:
    from PIL.Image import Image


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
        values = self._config.model.tokenizer_max_length * int(transformer["joint_attention_dim"])
        for suffix in SUFFIXES[:2]:
            clip, tokenizer = self._json(f"text_encoder{suffix}/config.json"), self._json(f"tokenizer{suffix}/tokenizer_config.json")
            values += int(tokenizer.get("model_max_length", 77)) * int(clip["hidden_size"]) + int(clip["projection_dim"])
        return latents + len(plan.texts) * values * compute_dtype(self._config).itemsize

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / name).read_text())
        return found

    @contextmanager
    def load(self) -> Iterator[LoadedEncoders]:
        """Encoders for the duration of the block; memory is given back at its end."""
        loaded = LoadedEncoders(self._config, torch.device(self._device) if self._device else pick_device())
        try:
            yield loaded
        finally:
            loaded.release()


def encoders(config: RunConfig, *, device: str | None = None) -> EncoderHandle:
    """The encoders that a configuration names, to be loaded on the best device or on the one given. Raises: ModelError."""
    return EncoderHandle(config, device)


class LoadedEncoders:
    """Autoencoder and text encoders; each is loaded when first asked for, and the two never lie in memory together."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._vae: Any = None
        self._texts: list[tuple[Any, Any]] = []

    def release(self) -> None:
        """Give the memory back."""
        self._vae, self._texts = None, []
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image], *, tiled: bool = False) -> Moments:
        """Scaled posterior of pictures of one size: mean (z - shift_factor) * scaling_factor, deviation * scaling_factor."""
        if self._vae is None:
            self.release()
            self._vae = load_vae(self._config, self._device)
        if tiled:
            self._vae.enable_tiling(True)
        pixels_BCHW = pixels(pictures).to(self._device, self._vae.dtype)
        posterior, scale = self._vae.encode(pixels_BCHW).latent_dist, self._vae.config.scaling_factor
        return Moments((posterior.mean - self._vae.config.shift_factor) * scale, posterior.std * scale)

    @torch.no_grad()
    def decode_latents(self, latent_BCHW: Tensor) -> list[Image]:
        """The pictures of scaled latents, as the pipeline shows them."""
        from PIL import Image

        if self._vae is None:
            self.release()
            self._vae = load_vae(self._config, self._device)
        z_BCHW = latent_BCHW.to(self._device, self._vae.dtype) / self._vae.config.scaling_factor + self._vae.config.shift_factor
        pixels_BHWC = (self._vae.decode(z_BCHW).sample.float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(picture.numpy()) for picture in pixels_BHWC]

    def tokens_seen(self, texts: Sequence[str]) -> list[str]:
        """For each text what the encoders count in it, and what they do not see."""
        from sd3tune.models.tokens import count_tokens

        return ["; ".join(map(str, counts)) for counts in count_tokens(self._config, texts)]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        """CLIP's penultimate states side by side, T5's last, and both pooled vectors, as diffusers' pipeline makes them."""
        if not self._texts:
            self.release()
            self._texts = self._load_texts()
        hidden, pooled = [], []
        for tokenizer, encoder in self._texts[:2]:
            out = encoder(self._tokens(tokenizer, texts, tokenizer.model_max_length).input_ids, output_hidden_states=True)
            pooled.append(out[0])
            hidden.append(out.hidden_states[-2])
        tokenizer, encoder = self._texts[2]
        tokens = self._tokens(tokenizer, texts, self._config.model.tokenizer_max_length)
        if encoder is None:  # as diffusers' pipeline does without its third encoder
            width = self._joint_width()
            t5_BLD = torch.zeros((*tokens.input_ids.shape, width), dtype=hidden[0].dtype, device=self._device)
        else:
            t5_BLD = encoder(tokens.input_ids)[0]
        if self._config.model.t5_padding == "zero":
            t5_BLD = t5_BLD.masked_fill(tokens.attention_mask.unsqueeze(-1) == 0, 0)
        clip_BLD, pooled_BP = torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)
        return [TextStates(*rows) for rows in zip(clip_BLD, t5_BLD, pooled_BP, strict=True)]

    def _joint_width(self) -> int:
        return int(json.loads((model_folder(self._config) / "transformer" / "config.json").read_text())["joint_attention_dim"])

    def _tokens(self, tokenizer: Any, texts: Sequence[str], length: int) -> Any:
        """Token numbers and the mask of those that are the text's."""
        padded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return padded.to(self._device)

    def _load_texts(self) -> list[tuple[Any, Any]]:
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        folder, loaded = model_folder(self._config), []
        classes = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
        for (tokenizer, _), suffix, encoder_class in zip(tokenizers(self._config), SUFFIXES, classes, strict=True):
            if suffix == "_3" and not self._config.model.use_t5:
                loaded.append((tokenizer, None))
                continue
            precision = getattr(self._config.model, f"text_encoder_{len(loaded) + 1}_precision")
            with named(folder / f"text_encoder{suffix}"):
                encoder = load_text_encoder(
                    encoder_class, folder / f"text_encoder{suffix}", precision, compute_dtype(self._config), self._device
                )
            loaded.append((tokenizer, encoder))
        return loaded


def load_text_encoder(encoder_class: Any, folder: Path, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen text encoder; one in fewer bits is read layer by layer, so that it never lies in memory whole. Raises: ModelError."""
    if precision == "no_change":
        encoder = encoder_class.from_pretrained(folder, dtype=dtype)
        return encoder.eval().requires_grad_(False).to(device)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        encoder = encoder_class(encoder_class.config_class.from_pretrained(folder))
    tied = set(encoder._tied_weights_keys or ())
    wide = (encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()

    def change(name: str, module: nn.Module) -> nn.Module:
        if not is_quantised(name, module):
            return module
        assert isinstance(module, nn.Linear)
        return smaller(module, precision)

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
