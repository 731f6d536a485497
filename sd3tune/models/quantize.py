"""Frozen linear layers in fewer bits, through optimum-quanto and bitsandbytes, one layer at a time."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

EXCLUDED = ("*norm_out*", "*norm_q*", "*norm_k*", "*norm_added_*", "pos_embed*", "time_text_embed*", "context_embedder*", "proj_out*")
"""Left in the model's own format: norms, embedders and the last projection."""

MODULATION = r"(^|.*\.)norm1(_context)?\.linear$"
"""The AdaLN linears, a third of all weights of SD3; ``modulation_precision`` is about them."""

QUANTO = {"int8-quanto": "qint8", "int4-quanto": "qint4", "int2-quanto": "qint2", "fp8-quanto": "qfloat8_e4m3fn"}
"""Precision -> weight format of optimum-quanto."""

GROUP = 128
"""Values that share a scale and a shift in quanto's int4 and int2."""

PRECISIONS = ("no_change", *QUANTO, "nf4-bnb")


def is_quantised(name: str, module: nn.Module, modulation: str = "same") -> bool:
    """Whether a layer of the transformer is kept in fewer bits."""
    if not isinstance(module, nn.Linear) or any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED):
        return False
    if module.in_features % 32:
        return False  # no format has blocks for it
    return modulation == "same" or not re.match(MODULATION, name)


def smaller(linear: nn.Linear, precision: str) -> nn.Module:
    """A frozen linear layer in fewer bits, on the same device. The first int4 or int2 one builds an extension (about 80 s on a CPU)."""
    if precision == "nf4-bnb":
        return _nf4(linear)
    from optimum import quanto

    made = quanto.nn.QLinear.from_module(linear, weights=getattr(quanto, QUANTO[precision]))
    made.freeze()
    return made.requires_grad_(False)  # type: ignore[no-any-return]


def empty_nf4(linear: nn.Linear, dtype: torch.dtype) -> Any:
    """bitsandbytes' layer of the same size, without values."""
    from bitsandbytes.nn.modules import Linear4bit

    made: Any = Linear4bit(  # type: ignore[no-untyped-call]
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # On a CPU with AVX-512 a look in evaluation mode would repack the weights for good, and no gradient comes through after that (0.50.2).
    made.support_avx512bf16_for_cpu = False
    return made


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn.modules import Params4bit

    kept = linear.weight
    made = empty_nf4(linear, kept.dtype)
    # bitsandbytes' CPU kernel decodes wrongly when a row is not a whole number of blocks (0.50.2: an error of 23 % instead of 9 %).
    block = 64 if linear.in_features % 64 == 0 else 32
    made.weight = Params4bit(kept.detach(), requires_grad=False, quant_type="nf4", blocksize=block, compress_statistics=True)
    made.bias = linear.bias
    return made.to(kept.device).requires_grad_(False)  # type: ignore[no-any-return]


def quantise(model: nn.Module, precision: str, *, modulation: str = "same") -> None:
    """Replace the linear layers of a loaded model by smaller ones, one after the other, in place."""
    if precision == "no_change":
        return
    for name, module in list(model.named_modules()):
        if is_quantised(name, module, modulation):
            assert isinstance(module, nn.Linear)
            put(model, name, smaller(module, precision))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def dequantised(module: nn.Module) -> Tensor:
    """The weight that a linear layer, smaller or not, multiplies with."""
    weight: Any = module.weight
    found: Tensor = weight.detach()
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(weight.data, weight.quant_state)
    elif hasattr(weight, "qtype"):
        found = weight.dequantize()
    return found


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that holds a model's weights, those inside quantised ones included."""
    for parameter in (*model.parameters(), *model.buffers()):
        names = getattr(parameter, "__tensor_flatten__", None)
        state = getattr(parameter, "quant_state", None)
        if names is not None and hasattr(parameter, "qtype"):
            yield from _inner(parameter)
        else:
            yield parameter.data
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax


def _inner(tensor: Any) -> Iterator[Tensor]:
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__") and type(part) is not torch.Tensor:
            yield from _inner(part)
        else:
            yield part


def bytes_of(model: nn.Module) -> int:
    """Bytes that a model's weights take."""
    return sum(tensor.nbytes for tensor in tensors_of(model))


def expected_bytes(model: nn.Module, precision: str, *, modulation: str = "same", rest: int, without: Collection[str] = ()) -> float:
    """Bytes that a model will take, known from its structure; ``rest`` are those of a value that is not quantised.

    ``without`` are names of tensors that are others under a second name.
    """
    total = 0.0
    for name, module in model.named_modules():
        small = precision != "no_change" and is_quantised(name, module, modulation)
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if (f"{name}.{leaf}" if name else leaf) in without:
                continue
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
