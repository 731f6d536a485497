"""Filling a model tensor by tensor from safetensors files, so that memory never holds more than the result and one layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.errors import ModelError
from sd3tune.files import digest
from sd3tune.models.freeing import give_back
from sd3tune.models.quantize import put

Change = Callable[[str, nn.Module], nn.Module]
"""From a loaded layer's name and itself to what stands in its place."""


PLACES = 256
"""How many places of a file are looked at to tell its weights from others."""


@dataclass(frozen=True)
class Piece:
    """Where a tensor is in a file: under which name, which third of its rows, and whether their two halves change places."""

    name: str
    third: int | None = None
    swapped: bool = False


class Weights:
    """The tensors of a folder's (or one) safetensors file by name, read one at a time."""

    def __init__(self, files: Mapping[str, Path], pieces: Mapping[str, Piece] | None = None) -> None:
        self._files, self._pieces = files, pieces or {}
        self._opened: dict[Path, Any] = {}

    @classmethod
    def of_folder(cls, folder: Path, variant: str | None = None, *, stem: str = "diffusion_pytorch_model") -> Weights:
        """The weights of a component in the diffusers layout, in one file or in several. Raises: ModelError."""
        from safetensors import SafetensorError, safe_open

        infix = f".{variant}" if variant else ""
        index = folder / f"{stem}.safetensors.index{infix}.json"
        single = folder / f"{stem}{infix}.safetensors"
        try:
            if index.is_file():
                return cls({name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()})
            with safe_open(single, framework="pt") as opened:
                return cls(dict.fromkeys(opened.keys(), single))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}: its weights cannot be read ({error}); download or copy the model again") from None

    def only(self, names: Collection[str]) -> Weights:
        """Those of some names: old files hold tables that are computed now."""
        return Weights({name: path for name, path in self._files.items() if name in names}, self._pieces)

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._files)

    @property
    def stamp(self) -> str:
        """Digest of names, sizes, times and headers of the files; reading all their bytes would take as long as quantising them."""
        parts: list[str | bytes] = []
        for path in sorted(set(self._files.values())):
            with path.open("rb") as opened:
                head = opened.read(8)
                parts += [path.name, str(path.stat().st_size), str(path.stat().st_mtime_ns), opened.read(int.from_bytes(head, "little"))]
        return digest(*parts)

    @property
    def sample(self) -> str:
        """Digest of headers, sizes and some bytes of the files, wherever and however old these are: other weights give another one."""
        parts: list[str | bytes] = []
        for path in sorted(set(self._files.values())):
            with path.open("rb") as opened:
                size, head = path.stat().st_size, opened.read(8)
                parts += [str(size), opened.read(int.from_bytes(head, "little"))]
                for place in range(PLACES):
                    opened.seek(size * place // PLACES)
                    parts.append(opened.read(4096))
        return digest(*parts)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from the file: copy it. Raises: ModelError."""
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt")
            return _piece(self._opened[path], self._pieces.get(name, Piece(name)))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {name} cannot be read ({error}); download or copy the model again") from None


def _piece(opened: Any, piece: Piece) -> Tensor:
    if piece.third is None:
        tensor: Tensor = opened.get_tensor(piece.name)
    else:
        rows = opened.get_slice(piece.name)
        height = rows.get_shape()[0] // 3
        tensor = rows[piece.third * height : (piece.third + 1) * height]
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.bfloat16()  # holds every value of fp8, and can be computed with everywhere
    if piece.swapped:
        one, two = tensor.chunk(2)
        tensor = torch.cat([two, one])
    return tensor


def fill(
    model: nn.Module, weights: Weights, *, dtype: torch.dtype, device: torch.device, change: Change, tied: Iterable[str] = (),
    wide: Collection[str] = (),
) -> None:  # fmt: skip
    """Give a model on the meta device its values, layer by layer, each replaced by what ``change`` makes of it.

    ``tied`` tensors are set by the caller; modules whose last name is ``wide`` stay in fp32.
    Raises: ModelError when names or shapes do not fit.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in set(tied)}
    odd = sorted(weights.names ^ set(wanted))
    if odd:
        what = "are missing" if odd[0] in wanted else "do not belong to this model"
        raise ModelError(f"the weights do not fit the model's config: {len(odd)} tensors {what}, e.g. {odd[0]}")
    for name in [name for name, _ in model.named_modules()]:  # names alone: a list of modules would keep each one that is replaced
        module = model.get_submodule(name)
        own = [(leaf, tensor) for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        for leaf, empty in own:
            full = f"{name}.{leaf}" if name else leaf
            if full not in wanted:
                continue
            value = weights.read(full)
            if value.shape != empty.shape:
                raise ModelError(f"{full} has shape {tuple(value.shape)}, and the model's config wants {tuple(empty.shape)}")
            kind = torch.float32 if name.rpartition(".")[2] in wide else dtype
            hold(module, leaf, value, device=device, dtype=kind if value.is_floating_point() else value.dtype)
        if own and (changed := change(name, module)) is not module:
            put(model, name, changed)
            give_back()


def hold(module: nn.Module, leaf: str, value: Tensor, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Set a module's own parameter or buffer to a copy of a value."""
    held = torch.empty(value.shape, dtype=dtype or value.dtype, device=device)
    held.copy_(value)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(held, requires_grad=False))
    else:
        module.register_buffer(leaf, held)
