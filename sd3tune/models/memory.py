"""What a run will hold in memory, by formula: weights, adapter, update rule, and what the backward pass needs.

The units of activations were measured (``saved_tensors_hooks``, and the allocator's peak for the autoencoder; tests/test_memory.py);
kernels' own workspaces are not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from sd3tune.cache.encoding import HELD_BYTES
from sd3tune.config.schema import RunConfig
from sd3tune.models import adapters, components
from sd3tune.models.quantize import expected_bytes, weight_bytes
from sd3tune.shown import Shown

STATES = {
    "adamw": 8.0, "adamw_bf16": 6.0, "stableadamw": 8.0, "lion": 4.0, "adafactor": 0.1, "prodigy": 13.2, "schedulefree": 8.0,
    "bnb-adamw8bit": 2.0, "bnb-adamw8bit-paged": 2.0, "bnb-lion8bit": 1.0, "bnb-lion8bit-paged": 1.0,
}  # fmt: skip
"""Bytes that each update rule keeps for a weight."""


@dataclass(frozen=True)
class Units:
    """What a block saves for the backward pass, in units of tokens x width values, for each of its two streams."""

    image: float
    text: float
    last_text: float
    """The last block's text stream ends with its attention."""
    norm_image: float
    norm_text: float
    """More, where queries and keys are normalised."""
    second: float
    """More, for a second attention."""
    quanto_image: float
    quanto_text: float
    quanto_second: float
    """More beside quanto, which keeps the input of every linear layer."""


MIXED = Units(14.08, 10.03, 4.03, 6.05, 6.07, 14.15, 7.0, 7.0, 1.0)
"""In bf16 or fp16, with an adapter in fp32."""

WHOLE = Units(12.06, 11.02, 5.02, 2.01, 2.03, 7.11, 5.0, 6.0, 0.0)
"""In fp32."""

OUTSIDE = 0.53
"""Units of what comes before and after the blocks."""

CONTEXT = 0.7e9
"""Bytes that CUDA and its libraries take before anything is computed."""

ENCODERS = {1: 123_650_304, 2: 694_659_840, 3: 4_762_310_656}
"""Parameters of CLIP-L, CLIP-G and T5-XXL."""

VAE_VALUES, VAE_WIDTH, TILE = 83_819_683, 128, 1024
"""Parameters of the autoencoder, channels of its outermost layers, and the side of its tiles in px: smaller pictures are whole."""

VAE_ENCODE, VAE_DECODE = 5.1, 7.8
"""Values over the outermost channels and the pixels that it holds at its peak; convolutions of a CPU reorder theirs beside that."""


@dataclass(frozen=True, repr=False)
class Need(Shown):
    """Bytes of each part of a run's training, and of what is gone by then: the largest text encoder, and the autoencoder's work."""

    base: float
    adapter: float
    optimizer: float
    activations: float
    context: float
    encoders: float
    held: float
    """Of the machine's memory, for what the other text encoders gave."""
    encoding: float
    drawing: float
    """The autoencoder when it decodes a picture of the validation, beside what trains."""

    @property
    def training(self) -> float:
        """Bytes at the peak of an update."""
        return self.base + self.adapter + self.optimizer + self.activations + self.context

    @property
    def peak(self) -> float:
        """Bytes at the peak of the run."""
        return max(self.training, self.validation, self.encoders, self.encoding)

    @property
    def validation(self) -> float:
        """Bytes when a picture is decoded."""
        return self.base + self.adapter + self.optimizer + self.drawing + self.context

    def __str__(self) -> str:
        gb = {name: value / 1e9 for name, value in vars(self).items()}
        return (
            f"memory, predicted: training {self.training / 1e9:.1f} GB (base {gb['base']:.1f}, adapter {gb['adapter']:.2f}, optimizer "
            f"{gb['optimizer']:.2f}, activations {gb['activations']:.1f}, context {gb['context']:.1f})"
            + (f"; text encoders before it, one at a time, {gb['encoders']:.1f} GB and {gb['held']:.1f} GB of RAM" if self.held else "")
            + (f"; autoencoder before it {gb['encoding']:.1f} GB" if self.encoding else "")
            + (f"; validation {self.validation / 1e9:.1f} GB (autoencoder {gb['drawing']:.1f})" if self.drawing else "")
        )


def predict(config: RunConfig, *, side: int = 1024) -> Need:
    """What a configuration needs for training pictures of ``side`` x ``side`` px. Nothing is downloaded for a known model."""
    model = structure(config)
    known = config.model.model_flavour != "playground"
    context = CONTEXT if known else 0.0  # the playground is for CPUs
    width = {"no": 4, "bf16": 2, "fp16": 2}[config.model.mixed_precision]
    trained = adapter_parameters(model, config)
    weight = 2 + 2 if config.optimizer.optimizer == "adamw_bf16" else 4 + 4  # the weight, and its gradient
    drawn = (
        [vae_bytes(config, VAE_DECODE, size, config.drawn_together(*size)) for size in config.validation_sizes] if config.prompts else []
    )
    mean = 4 if config.adapter.use_ema and config.adapter.ema_device == "accelerator" else 0
    return Need(
        base=base_bytes(model, config),
        adapter=trained * (weight + mean),
        optimizer=trained * STATES[config.optimizer.optimizer],
        activations=activation_bytes(model.config, config, side=side, width=width),
        context=context,
        encoders=encoder_bytes(config, width) + context,
        held=HELD_BYTES if known else 0,
        encoding=vae_bytes(config, VAE_ENCODE, (side, side), config.data.vae_batch_size) + context,
        drawing=max(drawn, default=0),
    )


def structure(config: RunConfig) -> Any:
    """The transformer without values."""
    flavour = config.model.model_flavour
    return _known(flavour) if flavour in components.SHAPES else components.skeleton(config)


@cache
def _known(flavour: str) -> Any:
    return components.random(flavour, device="meta")


def base_bytes(model: nn.Module, config: RunConfig) -> float:
    """Bytes of the frozen transformer's weights."""
    m = config.model
    return expected_bytes(model, m.base_model_precision, modulation=m.modulation_precision, rest=components.rest_dtype(config).itemsize)


def adapter_parameters(model: Any, config: RunConfig) -> int:
    """Weights that a LoRA trains; of a LyCORIS network, whose kinds differ, that of a LoRA of the same layers at rank 16."""
    targets, rank = config.adapter.lora_targets, config.adapter.lora_rank
    if config.adapter.lora_type == "lycoris":
        targets, rank = "attention+context", 16
    endings = adapters.endings(targets)
    chosen = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and any(name.endswith("." + e) for e in endings)
    ]
    magnitude = config.adapter.use_dora
    return sum(rank * (m.in_features + m.out_features) + magnitude * m.out_features for m in chosen)


def activation_bytes(shape: Any, config: RunConfig, *, side: int, width: int) -> float:
    """Bytes that the forward pass of one batch saves for the backward pass, ``width`` bytes a value."""
    heads = shape.num_attention_heads * shape.attention_head_dim
    image = (side // 8 // shape.patch_size) ** 2
    text = 77 + config.model.tokenizer_max_length
    unit = heads * width * config.data.train_batch_size
    block, second = block_units(shape, config, image=image, text=text, width=width)
    edges = OUTSIDE * (image + text)
    if config.memory.gradient_checkpointing is False:
        last = (WHOLE if width == 4 else MIXED).last_text * text + block.image
        return float(unit * ((shape.num_layers - 1) * block.both + last + len(shape.dual_attention_layers or ()) * second + edges))
    return float(unit * (shape.num_layers * (image + text) + block.both + second * bool(shape.dual_attention_layers) + edges))


class Block(NamedTuple):
    """Values over the width that one block saves for its two streams."""

    image: float
    text: float

    @property
    def both(self) -> float:
        """Of both streams."""
        return self.image + self.text


def block_units(shape: Any, config: RunConfig, *, image: int, text: int, width: int) -> tuple[Block, float]:
    """What a whole block saves, and how much more one with a second attention does."""
    units = WHOLE if width == 4 else MIXED
    quanto, normed = config.model.base_model_precision.endswith("quanto"), bool(shape.qk_norm)
    of_image = units.image + units.norm_image * normed + units.quanto_image * quanto
    of_text = units.text + units.norm_text * normed + units.quanto_text * quanto
    return Block(of_image * image, of_text * text), (units.second + units.quanto_second * quanto) * image


def encoder_bytes(config: RunConfig, width: int) -> float:
    """Bytes of the largest text encoder: they lie in memory one at a time."""
    if config.model.model_flavour == "playground":
        return 0.0
    found = [0.0]
    for number, values in ENCODERS.items():
        precision = getattr(config.model, f"text_encoder_{number}_precision")
        if number == 3 and not config.model.use_t5:
            continue
        share = width if precision == "no_change" else weight_bytes(4096, values // 4096, precision, width) / values
        found.append(values * share)
    return max(found)


def vae_bytes(config: RunConfig, units: float, size: tuple[int, int], images: int) -> float:
    """Bytes of the autoencoder and of its work on so many pictures of a size at once, in tiles or one by one as the settings say."""
    if config.model.model_flavour == "playground":
        return 0.0
    width = components.vae_dtype(config).itemsize
    most = TILE if config.model.vae_enable_tiling else max(size)
    area = min(size[0], most) * min(size[1], most) * (1 if config.model.vae_enable_slicing else images)
    return width * (VAE_VALUES + units * VAE_WIDTH * area)
