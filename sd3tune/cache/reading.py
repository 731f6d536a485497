"""The encoded plan: ask by placement or by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.cache.conditioning import Conditioning, Words
from sd3tune.cache.keys import latent_key, mask_key, text_key
from sd3tune.cache.states import Encoders, Shower, Text, TextStates, joined
from sd3tune.cache.store import Store
from sd3tune.data import sheet
from sd3tune.data.buckets import Placement
from sd3tune.data.planning import Plan
from sd3tune.shown import Shown

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """A placement as the model sees it: the picture of its latent, and what the encoders count in its caption."""

    placement: Placement
    picture: Image
    tokens: str


@dataclass(frozen=True, repr=False)
class Sheet(Shown):
    """What the model sees, for a person to look at."""

    rows: tuple[Seen, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{row.placement.item.path.name}, {row.placement.bucket}: {row.placement.item.caption} [{row.tokens}]" for row in self.rows
        )

    def _repr_html_(self) -> str:
        cells = [(sheet.framed(row.placement), "how it is cut") for row in self.rows]
        seen = [(row.picture, f"{row.placement.item.caption} [{row.tokens}]") for row in self.rows]
        return sheet.sheet(cell for pair in zip(cells, seen, strict=True) for cell in pair)


class Coverage(Shown):
    """How much of a plan is encoded already. ``unknown`` cuts are of pictures that were not hashed yet."""

    def __init__(self, rows: Sequence[tuple[str, int, int]], unknown: int) -> None:
        self.rows, self.unknown = tuple(rows), unknown

    @property
    def complete(self) -> bool:
        """Whether nothing is left to encode."""
        return not self.unknown and all(there == needed for _, there, needed in self.rows)

    def __str__(self) -> str:
        said = [f"{there:,} of {needed:,} {kind}" for kind, there, needed in self.rows]
        more = f"; {self.unknown:,} of the others are not hashed yet" if self.unknown else ""
        return f"already encoded: {', '.join(said)}{more}"


def mask_key_of(cut: Placement) -> str:
    """The key of a cut's mask; the empty text when it has none, or when its bytes are not hashed."""
    return mask_key(cut.item.mask_pixels, cut.item.mask.kind, cut.geometry) if cut.item.mask else ""


class Cache:
    """The encoded plan. Values are views of the files: copy from them, never write to them."""

    def __init__(self, plan: Plan, encoders: Encoders, *, store: Store | None = None, hits: int = 0, misses: int = 0) -> None:
        self.plan, self.hits, self.misses = plan, hits, misses
        self._store = store or Store(Path(plan.cache_dir))
        self._latent_mark, self._text_mark = encoders.latent_fingerprint, encoders.text_fingerprint
        self._encoders = encoders

    @property
    def conditioning(self) -> Conditioning:
        """How texts reach the transformer."""
        return self._encoders.conditioning

    def latent(self, placement: Placement) -> Tensor:
        """Scaled posterior mean C H W. Raises: CacheError."""
        return self.moments(placement)[0]

    def moments(self, placement: Placement) -> tuple[Tensor, Tensor]:
        """Scaled posterior mean and deviation, each C H W. Raises: CacheError."""
        mean, deviation = self._store.read("latents", self.latent_key(placement), ("mean_CHW", "deviation_CHW"))
        return mean, deviation

    def mask(self, placement: Placement) -> Tensor:
        """Weights H W of its latent pixels, 0 to 1; only for placements whose item has a mask. Raises: CacheError."""
        return self._store.read("masks", mask_key_of(placement), ("mask_HW",))[0]

    def mask_share(self, placement: Placement) -> float:
        """The mean weight of its mask, 0 to 1; 1 when it has none."""
        return float(self._store.facts("masks", mask_key_of(placement)).get("coverage", 1.0))

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Of the text encoders and of the autoencoder that made it."""
        return self._text_mark, self._latent_mark

    def text(self, text: Words) -> Text:
        """Joint states L D and pooled P of a text, with zeros for no text where the settings say so. Raises: CacheError."""
        joint_BLD, pooled_BP = self.texts([text])
        return Text(joint_BLD[0], pooled_BP[0])

    def states(self, text: str) -> TextStates:
        """The stored states of a text: what the encoders gave, whatever stands for no text. Raises: CacheError."""
        return TextStates(*self._store.read("texts", text_key(text, self._text_mark), TextStates._fields))

    def texts(self, texts: Sequence[Words]) -> tuple[Tensor, Tensor]:
        """Joint states B L D and pooled B P of several texts. Raises: CacheError."""
        return joined([self.conditioning.states(text, self.states) for text in texts])

    def latent_key(self, placement: Placement) -> str:
        """The key of a cut picture; the empty text while the picture is not hashed."""
        return latent_key(placement.item.pixels, placement.geometry, self._latent_mark, placement.item.dataset.background)

    def sheet(self, loaded: Shower, count: int = 12) -> Sheet:
        """What the model sees: pictures decoded from the cached latents, how they were cut, their captions and tokens.

        ``loaded`` are encoders in memory: ``with st.encoders(config).load() as loaded: cache.sheet(loaded)``. Raises: CacheError.
        """
        shown = list({p.item.path: p for p in self.plan.train}.values())
        shown = shown[:: max(1, len(shown) // count)][:count]
        tokens = loaded.tokens_seen([p.item.caption for p in shown])
        pictures = [loaded.decode_latents(self.latent(p)[None])[0] for p in shown]
        return Sheet(tuple(Seen(p, picture, said) for p, picture, said in zip(shown, pictures, tokens, strict=True)))

    def coverage(self, plan: Plan | None = None) -> Coverage:
        """How much of a plan (its own, if none is given) is encoded with these encoders."""
        plan = plan or self.plan
        cuts = {(cut.item.path, cut.geometry): self.latent_key(cut) for cut in plan.cuts}
        texts = [text_key(text, self._text_mark) for text in plan.texts]
        latents = set(cuts.values()) - {""}
        unknown = sum(not key for key in cuts.values())
        there = sum(self._store.has("latents", key) for key in latents)
        rows = [("latents", there, len(latents) + unknown), ("texts", sum(self._store.has("texts", key) for key in texts), len(texts))]
        if masks := {mask_key_of(cut) for cut in plan.cuts} - {""}:
            rows.append(("masks", sum(self._store.has("masks", key) for key in masks), len(masks)))
        return Coverage(rows, unknown)
