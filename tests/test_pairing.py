"""A picture and its caption never part: pictures whose latents hold their own number, captions that do, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from PIL import Image

import sd3tune as st
from sd3tune.cache.conditioning import Conditioning
from sd3tune.cache.states import Moments, PartStates
from sd3tune.training.batches import Batches

HERE = Path(__file__).parent


class Numbers:
    """Encoders that give each picture and each caption the number that is in it."""

    latent_fingerprint = text_fingerprint = "numbers"
    conditioning = Conditioning((1, 1))
    text_parts, held_bytes = ("CLIP-L", "CLIP-G", "T5"), 48

    @contextmanager
    def load(self) -> Iterator[Numbers]:
        yield self

    def encode_images(self, pictures: Sequence[Image.Image], *, tiled: bool = False) -> Moments:
        mean = torch.tensor([float(np.asarray(p)[..., 0].mean()) for p in pictures])[:, None, None, None].expand(-1, 1, 2, 2)
        return Moments(mean, torch.zeros_like(mean))

    def encode_part(self, part: str, texts: Sequence[str]) -> list[PartStates]:
        shapes = {"CLIP-L": (2, 1), "CLIP-G": (2, 2), "T5": (4, 3)}
        values = [float(t.split()[-1]) if t else -1.0 for t in texts]
        return [PartStates(torch.full(shapes[part], v), None if part == "T5" else torch.full((2,), v)) for v in values]


def read(datasets: Path, start: int, stop: int, step: int = 1, draw: Any = "mean") -> list[str]:
    """What is in the batches, a line for each picture: batch, file, whether it is mirrored, its number, the numbers of its caption."""
    config = st.presets.playground(cache_dir=str(datasets.parent / "cache"), validation_prompt=(), train_batch_size=3)
    cache = st.CacheBuilder(st.plan(st.discover(datasets), config), Numbers()).build()  # type: ignore[arg-type]
    batches, found = Batches(cache, seed=5, caption_dropout=0.3, latent_draw=draw), []
    for k in range(start, stop, step):
        b, rows = batches[k], batches.placements(k)
        assert len(b.ids) == len(rows)
        for place, row in enumerate(rows):
            said = {*b.joint_BLD[place].flatten().tolist(), *b.pooled_BP[place].tolist()}
            found.append(json.dumps([k, row.item.path.name, row.mirrored, round(b.latent_BCHW[place].mean().item(), 3), sorted(said)]))
    return found


def read_elsewhere(datasets: Path, start: int, stop: int) -> list[str]:
    """The same by a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_pairing import *; "
    code += f"print(*read(Path({str(datasets)!r}), {start}, {stop}), sep='\\n')"
    return fresh.run(["-c", code], datasets.parent / "said.txt").splitlines()


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """Forty pictures of five shapes in two data sets, with repeats, mirroring and several captions."""
    for n in range(40):
        folder = tmp_path / ("one" if n % 3 else "two")
        folder.mkdir(exist_ok=True)
        size = [(64, 64), (80, 48), (48, 80), (96, 64), (64, 96)][n % 5]
        Image.fromarray(np.full((size[1], size[0], 3), 5 * n + 10, np.uint8)).save(folder / f"{n * 7919 % 1000}.png")
        (folder / f"{n * 7919 % 1000}.txt").write_text("\n".join(f"line {line} of {5 * n + 10}" for line in range(1 + n % 3)))
    (tmp_path / "datasets.yaml").write_text(
        "- {id: one, instance_data_dir: one, resolution: 64, repeats: 1}\n"
        "- {id: two, instance_data_dir: two, resolution: 64, flip: horizontal, probability: 3, train_batch_size: 2}\n"
    )
    return tmp_path / "datasets.yaml"


def test_picture_and_caption_never_part(datasets: Path) -> None:
    """Over two epochs with repeats, mirroring, dropout, a resumed reader and two readers that share the work."""
    whole = read(datasets, 0, 70)
    seen: Counter[bool] = Counter()
    for line in whole:
        _, name, _, latent, said = json.loads(line)
        number = next(n for n in range(40) if name == f"{n * 7919 % 1000}.png")
        assert latent == 5 * number + 10, line
        assert said in ([float(latent)], [-1.0]), line
        seen[said == [-1.0]] += 1
    assert 0.2 < seen[True] / sum(seen.values()) < 0.4
    assert read_elsewhere(datasets, 31, 70) == [line for line in whole if int(line[1:].split(",")[0]) >= 31], "a resumed reader goes on"
    parts = [read(datasets, rank, 70, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole), "two readers see what one sees"
    assert read(datasets, 0, 70, 1, "sample") == whole, "with no deviation, a draw is the mean"
