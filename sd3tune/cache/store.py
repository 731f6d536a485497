"""Shards: files of many entries each, written whole or not at all, read through a memory map, with a checksum for every entry.

A shard is a safetensors file. Its header is the index: the tensors are called ``<key>.<name>``, and the metadata holds each
entry's checksum, the number encoded together, and facts about the picture. There is no other index that could be out of step,
so several processes may write to one cache at the same time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sd3tune.errors import CacheError
from sd3tune.files import digest, explained, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("latents", "texts", "masks")
_AGAIN = "build the cache again, which encodes this entry anew"


@dataclass(frozen=True)
class Entry:
    """What is written of one picture or text: tensors, how many were encoded together, and facts in numbers."""

    key: str
    tensors: Mapping[str, Tensor]
    group: int
    facts: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """SHA-256 over the key, the facts, and the names, formats, shapes and values of the tensors."""
        import torch

        parts: list[str | bytes | memoryview] = [self.key, str(self.group), json.dumps(dict(self.facts), sort_keys=True)]
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), tensor.flatten().view(torch.uint8).numpy().data]
        return digest(*parts)


class Stamp(NamedTuple):
    """What changes when a file is written again."""

    inode: int
    size: int
    time: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file. Raises: OSError."""
        found = os.stat(path)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Shard:
    """One file, opened: its header read, its values mapped when first asked for. Raises: OSError, ValueError when it is no shard."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp, self._name = path, Stamp.of(path), str(path)
        with path.open("rb") as opened:
            self._start = 8 + int.from_bytes(opened.read(8), "little")
            if not 8 < self._start <= self.stamp.size:
                raise ValueError("it is cut short")
            header = json.loads(opened.read(self._start - 8))
        try:
            about = json.loads(header.pop("__metadata__")["entries"])
            self.about = {key: (int(group), str(checksum), dict(facts)) for key, (group, checksum, facts) in about.items()}
            self._where: dict[str, dict[str, tuple[str, list[int], int, int]]] = {key: {} for key in self.about}
            for name, row in header.items():
                key, _, tensor = name.partition(".")
                begin, end = (self._start + int(offset) for offset in row["data_offsets"])
                if not self._start <= begin <= end <= self.stamp.size:
                    raise ValueError("it is cut short")
                self._where[key][tensor] = (row["dtype"], row["shape"], begin, end)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its header is not that of a shard ({type(error).__name__})") from None
        self._bytes: Tensor | None = None
        self._checked: dict[str, Entry] = {}

    def changed(self) -> bool:
        """Whether the file was written again or taken away since it was opened."""
        try:
            found = os.stat(self._name)
        except OSError:
            return True
        return (found.st_ino, found.st_size, found.st_mtime_ns) != self.stamp

    def size(self, key: str) -> int:
        """Bytes of an entry's values."""
        return sum(end - begin for _, _, begin, end in self._where[key].values())

    def entry(self, key: str) -> Entry:
        """The entry, its tensors being views of the memory map. Raises: ValueError when it is damaged."""
        known = self._checked.get(key)
        if known is None:
            group, checksum, facts = self.about[key]
            known = Entry(key, {name: self._view(*row) for name, row in self._where[key].items()}, group, facts)
            if known.checksum != checksum:
                raise ValueError("its values are not those that were written")
            self._checked[key] = known
        return known

    def _view(self, dtype: str, shape: list[int], begin: int, end: int) -> Tensor:
        import torch

        if self._bytes is None:
            self._bytes = torch.from_file(str(self.path), shared=False, size=self.stamp.size, dtype=torch.uint8)
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        if dtype not in kinds:
            raise ValueError(f"the number format {dtype} is not one of {', '.join(kinds)}")
        try:
            return self._bytes[begin:end].view(kinds[dtype]).view(shape)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"its header does not fit its values ({error})") from None


class Store:
    """The shards under one cache folder. An entry's checksum is checked when it is first read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._shards: dict[str, dict[Path, Shard]] = {kind: {} for kind in KINDS}
        self._places: dict[str, dict[str, list[Shard]]] = {kind: {} for kind in KINDS}
        self.unreadable: dict[Path, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that others wrote, changed or removed."""
        for kind in KINDS:
            known = self._shards[kind]
            found = {path: shard for path in self._files(kind) if (shard := self._opened(known.get(path), path))}
            if found != known:
                self._shards[kind] = found
                self._places[kind] = {}
                for shard in sorted(found.values(), key=lambda s: (-s.stamp.time, s.path)):
                    for key in shard.about:
                        self._places[kind].setdefault(key, []).append(shard)

    def _files(self, kind: str) -> Iterator[Path]:
        try:
            with os.scandir(self.root / kind) as rows:
                names = sorted(row.name for row in rows if row.name.endswith(".safetensors") and not row.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from (self.root / kind / name for name in names)

    def _opened(self, shard: Shard | None, path: Path) -> Shard | None:
        try:
            if shard is None or shard.stamp != Stamp.of(path):
                shard = Shard(path)
            self.unreadable.pop(path, None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            self.unreadable[path] = f"{path}: not a readable shard ({error}); its entries are encoded again"
            return None
        return shard

    def entries(self, kind: str) -> Iterator[tuple[str, Shard]]:
        """Key and shard of each entry, in the order of the keys."""
        for key, shards in sorted(self._places[kind].items()):
            yield key, shards[0]

    def shards(self, kind: str) -> list[Shard]:
        """Every readable shard."""
        return list(self._shards[kind].values())

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there."""
        return key in self._places[kind]

    def damage(self, kind: str, key: str) -> str:
        """What is wrong with an entry that is there; the empty text when nothing is."""
        try:
            self.entry(kind, key)
        except CacheError as error:
            return str(error)
        return ""

    def write(self, kind: str, entries: Sequence[Entry]) -> None:
        """Put entries in place, as one shard that is named by their keys. Raises: FileError."""
        from safetensors.torch import save

        held = [Entry(e.key, {n: t.detach().cpu().contiguous() for n, t in e.tensors.items()}, e.group, e.facts) for e in entries]
        about = {e.key: (e.group, e.checksum, dict(e.facts)) for e in sorted(held, key=lambda e: e.key)}
        tensors = {f"{e.key}.{name}": tensor for e in held for name, tensor in e.tensors.items()}
        # Not `save_file`: it hides a full disk in a SafetensorError, and has a temporary file of its own.
        # One piece of metadata, because safetensors writes several in an order that changes from call to call.
        path = self.root / kind / f"{digest(*sorted(about))[:32]}.safetensors"
        write_bytes(path, save(tensors, {"entries": json.dumps(about)}))
        self.refresh()

    def entry(self, kind: str, key: str) -> Entry:
        """An entry, its tensors being views that no one may write to. Raises: CacheError when it is missing or damaged."""
        if not (shards := self._places[kind].get(key)) or any(shard.changed() for shard in shards):
            self.refresh()
        problem = f"{self.root / kind}: {key} is not encoded yet; iterate the CacheBuilder to its end"
        for shard in self._places[kind].get(key, ()):
            try:
                return shard.entry(key)
            except (ValueError, OSError, RuntimeError) as error:
                problem = f"{shard.path}: {key} is damaged ({error}); {_AGAIN}"
        raise CacheError(problem)

    def read(self, kind: str, key: str, names: Sequence[str]) -> list[Tensor]:
        """The named tensors of an entry: views, to be copied from. Raises: CacheError when it is missing or damaged."""
        found = self.entry(kind, key).tensors
        if missing := [name for name in names if name not in found]:
            raise CacheError(f"{self.root / kind}: {key} has no {', '.join(missing)}; {_AGAIN}")
        return [found[name] for name in names]

    def facts(self, kind: str, key: str) -> dict[str, Any]:
        """What was noted of the picture; nothing when it is not there."""
        shards = self._places[kind].get(key)
        return shards[0].about[key][2] if shards else {}

    def _home(self, kind: str, key: str) -> Shard | None:
        """The shard that an entry is read from; none when every one is damaged."""
        for shard in self._places[kind].get(key, ()):
            with suppress(ValueError, OSError, RuntimeError):
                shard.entry(key)
                return shard
        return None

    def remove(self, unwanted: Mapping[str, set[str]]) -> int:
        """Take entries out, kind by kind, and return the bytes that this freed; other entries stay bit for bit. Raises: FileError."""
        before = sum(shard.stamp.size for kind in KINDS for shard in self.shards(kind))
        for kind, keys in unwanted.items():
            for shard in self.shards(kind):
                if keys.isdisjoint(shard.about):
                    continue
                kept = [key for key in shard.about if key not in keys and self._home(kind, key) is shard]
                if whole := [shard.entry(key) for key in kept]:
                    self.write(kind, whole)
                with explained(shard.path):
                    shard.path.unlink(missing_ok=True)
        self.refresh()
        return before - sum(shard.stamp.size for kind in KINDS for shard in self.shards(kind))
