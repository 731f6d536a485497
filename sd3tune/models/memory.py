"""What a run will hold in memory, by formula: weights, adapter, update rule, and what the backward pass needs.

The units of activations were measured (``saved_tensors_hooks``, tests/test_memory.py); kernels' own workspaces are not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from sd3tune.config.schema import RunConfig
from sd3tune.models import adapters, components
from sd3tune.models.quantize import is_quantised
from sd3tune.shown import Shown

GROUP = 128
"""Values that share a scale and a shift in quanto's int4 and int2."""

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


@dataclass(frozen=True, repr=False)
class Need(Shown):
    """Bytes of each part of a run's training, and of the encoders, which are gone by then."""

    base: float
    adapter: float
    optimizer: float
    activations: float
    context: float
    encoders: float

    @property
    def training(self) -> float:
        """Bytes at the peak of an update."""
        return self.base + self.adapter + self.optimizer + self.activations + self.context

    @property
    def peak(self) -> float:
        """Bytes at the peak of the run."""
        return max(self.training, self.encoders)

    def __str__(self) -> str:
        gb = {name: value / 1e9 for name, value in vars(self).items()}
        return (
            f"memory, predicted: training {self.training / 1e9:.1f} GB (base {gb['base']:.1f}, adapter {gb['adapter']:.2f}, optimizer "
            f"{gb['optimizer']:.2f}, activations {gb['activations']:.1f}, context {gb['context']:.1f})"
            + (f"; text encoders before it {gb['encoders']:.1f} GB" if self.encoders else "")
        )


def predict(config: RunConfig, *, side: int = 1024) -> Need:
    """What a configuration needs for training pictures of ``side`` x ``side`` px. Nothing is downloaded for a known model."""
    model = structure(config)
    context = 0.0 if config.model.model_flavour == "playground" else CONTEXT  # the playground is for CPUs
    width = {"no": 4, "bf16": 2, "fp16": 2}[config.model.mixed_precision]
    trained = adapter_parameters(model, config)
    weight = 2 + 2 if config.optimizer.optimizer == "adamw_bf16" else 4 + 4  # the weight, and its gradient
    mean = 4 if config.adapter.use_ema and config.adapter.ema_device == "accelerator" else 0
    return Need(
        base=base_bytes(model, config),
        adapter=trained * (weight + mean),
        optimizer=trained * STATES[config.optimizer.optimizer],
        activations=activation_bytes(model.config, config, side=side, width=width),
        context=context,
        encoders=encoder_bytes(config, width) + context,
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
    precision, rest = config.model.base_model_precision, components.rest_dtype(config).itemsize
    total = 0.0
    for name, module in model.named_modules():
        small = precision != "no_change" and is_quantised(name, module, config.model.modulation_precision)
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if small and leaf == "weight":
                total += weight_bytes(tensor.shape[0], tensor.shape[1], precision, rest)
            else:
                total += tensor.numel() * rest
    return total


def weight_bytes(rows: int, columns: int, precision: str, rest: int) -> float:
    """Bytes of one quantised weight with its scales; ``rest`` are the bytes of one scale of quanto's."""
    values = rows * columns
    if precision in ("int8-quanto", "fp8-quanto"):
        return values + rows * rest
    if precision == "nf4-bnb":
        block = 64 if columns % 64 == 0 else 32
        return values / 2 + values / block * (1 + 4 / 256)
    bits = 4 if precision == "int4-quanto" else 2
    group = GROUP
    while columns % group:  # quanto halves it until it divides a row
        group //= 2
    return values * bits / 8 + 2 * rest * values / group


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
    """Bytes of the three text encoders, which lie in memory together while texts are encoded."""
    if config.model.model_flavour == "playground":
        return 0.0
    total = 0.0
    for number, values in ENCODERS.items():
        precision = getattr(config.model, f"text_encoder_{number}_precision")
        if number == 3 and not config.model.use_t5:
            continue
        share = width if precision == "no_change" else weight_bytes(4096, values // 4096, precision, width) / values
        total += values * share
    return total
