"""One safetensors file per entry, written whole or not at all, with a checksum of its values inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.errors import CacheError
from sd3tune.files import digest, write_bytes

if TYPE_CHECKING:
    from torch import Tensor


KINDS = ("latents", "texts")


class Store:
    """The files under one cache folder. An entry's checksum is checked when it is first read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._checked: set[Path] = set()

    def path(self, kind: str, key: str) -> Path:
        """Where the entry is or would be."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def files(self, kind: str) -> Iterator[tuple[str, Path]]:
        """Key and file of each entry, in the order of the keys."""
        for path in sorted((self.root / kind).glob("??/*.safetensors")):
            if not path.name.startswith("."):
                yield path.stem, path

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there."""
        return self.path(kind, key).is_file()

    def damage(self, kind: str, key: str) -> str:
        """What is wrong with an entry that is there; the empty text when nothing is."""
        try:
            self.read(kind, key, ())
        except CacheError as error:
            return str(error)
        return ""

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], group: int) -> None:
        """Put an entry in place; ``group`` is the number encoded together. Raises: FileError."""
        from safetensors.torch import save

        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Not `save_file`: it hides a full disk in a SafetensorError, and has a temporary file of its own.
        # One piece of metadata, because safetensors writes several in an order that changes from call to call.
        write_bytes(self.path(kind, key), save(held, {"entry": f"{key} of {group} {checksum(held, group)}"}))

    def read(self, kind: str, key: str, names: Sequence[str]) -> list[Tensor]:
        """The named tensors of an entry. Raises: CacheError when it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(kind, key)
        try:
            with safe_open(path, framework="pt") as opened:
                if path not in self._checked:
                    said = (opened.metadata() or {}).get("entry", "").split(" ")
                    if said[0] != key or len(said) < 3 or not said[2].isdecimal():
                        raise CacheError(f"{path}: this file is another entry; {_AGAIN}")
                    values = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
                    if said[3:] != [checksum(values, int(said[2]))]:
                        raise CacheError(f"{path}: damaged (its values are not those that were written); {_AGAIN}")
                    self._checked.add(path)
                return [opened.get_tensor(name) for name in names]
        except (FileNotFoundError, IsADirectoryError):
            raise CacheError(f"{path}: not encoded yet; iterate the CacheBuilder to its end") from None
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: damaged ({error}); {_AGAIN}") from None


_AGAIN = "build the cache again, which encodes this entry anew"


def checksum(tensors: Mapping[str, Tensor], group: int) -> str:
    """SHA-256 over names, formats, shapes and values, and the number encoded together."""
    import torch

    parts: list[str | bytes] = [str(group)]
    for name in sorted(tensors):
        tensor = tensors[name]
        parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)
