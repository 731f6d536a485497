"""One safetensors file per entry, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.errors import CacheError
from sd3tune.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor


class Store:
    """The files under one cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, key: str) -> Path:
        """Where the entry is or would be."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there."""
        return self.path(kind, key).is_file()

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], group: int) -> None:
        """Put an entry in place; ``group`` is the number encoded together. Raises: FileError."""
        from safetensors.torch import save

        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Not `save_file`: it hides a full disk in a SafetensorError, and has a temporary file of its own.
        # One piece of metadata, because safetensors writes several in an order that changes from call to call.
        write_bytes(self.path(kind, key), save(held, {"entry": f"{key} of {group}"}))

    def read(self, kind: str, key: str, names: Sequence[str]) -> list[Tensor]:
        """The named tensors of an entry. Raises: CacheError when it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(kind, key)
        try:
            with safe_open(path, framework="pt") as opened:
                if (opened.metadata() or {}).get("entry", "").split(" ")[0] != key:
                    raise CacheError(f"{path}: this file is another entry; delete it and build the cache again")
                return [opened.get_tensor(name) for name in names]
        except (FileNotFoundError, IsADirectoryError):
            raise CacheError(f"{path}: not encoded yet; iterate the CacheBuilder to its end") from None
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: damaged ({error}); delete it and build the cache again") from None
