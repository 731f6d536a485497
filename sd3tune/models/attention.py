"""Which kernel computes attention while pictures are drawn: a scope around the transformer's forward, never a change of torch.

SD3's layers call ``torch.nn.functional.scaled_dot_product_attention`` themselves (JointAttnProcessor2_0 in
diffusers/models/attention_processor.py) and know no backend, so diffusers' ``set_attention_backend`` does nothing for SD3.
Shapes: B pictures, N heads, L tokens, E width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sd3tune.errors import ModelError

MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
EFFICIENT, CUDNN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
NATIVE: Mapping[str, Sequence[SDPBackend]] = {
    "native-math": (MATH,), "native-efficient": (EFFICIENT, FLASH, CUDNN, MATH), "native-flash": (FLASH, EFFICIENT, CUDNN, MATH),
    "cudnn": (CUDNN, FLASH, EFFICIENT, MATH),
}  # fmt: skip
"""torch's own kernels; those after the first stand in for calls that it cannot do."""

SAGE: Mapping[str, str] = {
    "sageattention": "sageattn", "sageattention-int8-fp16-triton": "sageattn_qk_int8_pv_fp16_triton",
    "sageattention-int8-fp16-cuda": "sageattn_qk_int8_pv_fp16_cuda", "sageattention-int8-fp8-cuda": "sageattn_qk_int8_pv_fp8_cuda",
}  # fmt: skip
"""The package's functions."""

MECHANISMS = ("auto", *NATIVE, *SAGE)

Capability = tuple[int, int]
GPUS: Mapping[str, tuple[Capability, Capability]] = {
    "native-flash": ((8, 0), (99, 0)), "cudnn": ((8, 0), (99, 0)), "sageattention": ((8, 0), (99, 0)),
    "sageattention-int8-fp16-triton": ((8, 0), (12, 0)), "sageattention-int8-fp16-cuda": ((8, 0), (12, 0)),
    "sageattention-int8-fp8-cuda": ((8, 9), (9, 0)),
}  # fmt: skip
"""Compute capabilities for which kernels are made: from the first, below the second. Source: torch; sageattention/core.py of 2.2."""

AUTO = "set attention_mechanism: auto"
PICKS = "set attention_mechanism: sageattention, which picks the kernel for the GPU, or auto"
INSTALL = "pip install sageattention"
INSTALL_2 = "pip install sageattention==2.2.0 --no-build-isolation"

HALF, WIDTHS = (torch.float16, torch.bfloat16), (64, 96, 128)
"""Number formats and widths of a head that every version of sageattention takes. SD3's heads have 64."""

LIMIT = 0.1
"""Largest relative difference from torch's attention: int8 with smoothed keys is at 0.01 and fp8 at 0.03 of the playground's layers."""
COMPARED = 38
"""Calls of a shape that are compared: as many as the largest model has blocks, so that every layer is."""


def unable(mechanism: str, device: torch.device) -> str:
    """Why a mechanism does not work here, and what to set instead; the empty text when it does. Nothing is computed."""
    if mechanism == "auto" or (device.type == "cpu" and mechanism in ("native-math", "native-flash")):
        return ""
    try:
        attention(mechanism)
    except ModelError as error:
        return str(error)
    if device.type != "cuda":
        return f"attention_mechanism: {mechanism} needs a GPU of NVIDIA and this is {device.type}; {AUTO}"
    if torch.version.hip and (mechanism in SAGE or mechanism == "cudnn"):
        return f"attention_mechanism: {mechanism} needs a GPU of NVIDIA and this is one of AMD; {AUTO}"
    if mechanism == "cudnn" and not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return f"attention_mechanism: {mechanism} needs cuDNN, which this torch has not; {AUTO}"
    found = torch.cuda.get_device_capability(device)
    least, below = GPUS.get(mechanism, ((0, 0), (99, 0)))
    if torch.version.hip or least <= found < below:
        return ""
    upto = f" and less than {_dotted(below)}" if below < (99, 0) else ""
    instead = PICKS if mechanism != "sageattention" and mechanism in SAGE and found >= (8, 0) else AUTO
    return (
        f"attention_mechanism: {mechanism} needs compute capability {_dotted(least)} or more{upto}, the GPU has {_dotted(found)}; {instead}"
    )


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def attention(mechanism: str) -> AbstractContextManager[Any]:
    """A scope, to be entered as often as wanted, in which ``mechanism`` computes attention. ``auto`` leaves the choice to torch.

    The others hold for the thread that enters it; torch's own kernels (``NATIVE``) are a choice of the whole process until the block ends.
    Keep the object: it knows which shapes were compared. Raises: ModelError for a package that is missing, with the line that installs it.
    """
    if mechanism not in MECHANISMS:
        raise ModelError(f"attention_mechanism: there is no {mechanism}; it is one of {', '.join(MECHANISMS)}")
    if mechanism == "auto":
        return nullcontext()
    return Native(NATIVE[mechanism]) if mechanism in NATIVE else Sage(mechanism, _function(mechanism))


def _function(mechanism: str) -> Callable[..., Tensor]:
    try:
        package = import_module("sageattention")
    except (ImportError, OSError) as error:
        raise ModelError(f"attention_mechanism: {mechanism} needs sageattention ({error}); {INSTALL}, or {AUTO}") from None
    found: Callable[..., Tensor] | None = getattr(package, SAGE[mechanism], None)
    if found is None:
        raise ModelError(f"attention_mechanism: {mechanism} needs sageattention 2, which has {SAGE[mechanism]}; {INSTALL_2}, or {AUTO}")
    return found


class Native(AbstractContextManager[None]):
    """torch's kernels in an order of preference, for the calls inside."""

    def __init__(self, kernels: Sequence[SDPBackend]) -> None:
        self._kernels = list(kernels)
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        scope = sdpa_kernel(self._kernels, set_priority=len(self._kernels) > 1)
        scope.__enter__()
        self._entered.append(scope)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered.pop().__exit__(kind, error, trace)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of torch's scaled_dot_product_attention: query, key and value are B N L E."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is compared once for all."""
        return tuple(self.query.shape), tuple(self.key.shape), self.query.dtype, self.is_causal, self.scale

    @property
    def fits(self) -> bool:
        """Whether sageattention can do it: no mask, no dropout, no gradient, halves of one kind and shape, a width that it knows."""
        q, k, v = self.query, self.key, self.value
        if self.attn_mask is not None or self.dropout_p or self.enable_gqa:
            return False
        if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            return False
        if self.is_causal and q.shape[2] != k.shape[2]:
            return False
        alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and q.shape[3] == k.shape[3]
        return alike and q.dtype in HALF and q.shape[3] in WIDTHS and all(tensor.stride(-1) == 1 for tensor in (q, k, v))


class Sage(TorchFunctionMode):
    """Answers torch's attention with a function of sageattention inside its blocks; what that cannot do goes to torch."""

    def __init__(self, mechanism: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._mechanism, self._function = mechanism, function
        self._compared: Counter[tuple[Any, ...]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **given)
        call = Call(*args, **given)
        if not call.fits:
            return func(*args, **given)
        if self._compared[call.kind] >= COMPARED:
            return self._function(call.query, call.key, call.value, is_causal=call.is_causal, sm_scale=call.scale)
        found = self._first(call)
        self._compare(call, found, func(*args, **given))
        self._compared[call.kind] += 1
        return found

    def _first(self, call: Call) -> Tensor:
        """Raises: ModelError when the kernel refuses; want of memory passes as it is."""
        try:
            return self._function(call.query, call.key, call.value, is_causal=call.is_causal, sm_scale=call.scale)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"attention_mechanism: {self._mechanism} fails on this machine ({error}); {AUTO}") from error

    def _compare(self, call: Call, found: Tensor, wanted: Tensor) -> None:
        """Raises: ModelError when a result is not torch's within ``LIMIT`` of its norm."""
        same = found.shape == wanted.shape
        difference = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12)) if same else float("inf")
        if not difference <= LIMIT:  # NaN is none of both
            raise ModelError(
                f"attention_mechanism: {self._mechanism} gives wrong results here: the relative difference from torch's attention is "
                f"{difference:.2g}, the limit {LIMIT} (query {tuple(call.query.shape)}, {call.query.dtype}); {AUTO}, or install another "
                "version of sageattention"
            )
