"""What a person is shown: a plan as a page, what the model sees, tokens, and what was noticed while decoding."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Workbench, write_datasets
from fakes import Fake
from PIL import Image, ImageFilter

import sd3tune as st
from sd3tune.cache import CacheBuilder
from sd3tune.cache.findings import near
from sd3tune.cli import main
from sd3tune.data.sheet import framed
from sd3tune.models.tokens import count_tokens, truncated


def scene(seed: int, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """Soft shapes with fine grain."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(soft, Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)), 0.15)


def plan_of(tmp_path: Path, entry: str = "", config: dict[str, object] | None = None) -> st.Plan:
    (tmp_path / "datasets.yaml").write_text(
        f"- {{id: p, instance_data_dir: pots, resolution: 64, caption_strategy: filename{entry and ', ' + entry}}}\n"
    )
    settings = {"cache_dir": str(tmp_path / "cache"), "validation_prompt": (), **(config or {})}
    return st.plan(st.discover(tmp_path / "datasets.yaml"), st.presets.playground(**settings))


@pytest.fixture
def pots(tmp_path: Path) -> Path:
    (tmp_path / "pots").mkdir()
    for n in range(12):
        scene(n).save(tmp_path / "pots" / f"pot_{n:02}.png")
    return tmp_path


# --- what is noticed -------------------------------------------------------------------------------------------------


def test_pictures_that_look_alike_are_named(pots: Path) -> None:
    """A smaller, recompressed copy is; twelve different pictures are not; before the build nothing is claimed."""
    plan = plan_of(pots)
    assert "near-duplicates and blur: not looked at yet" in str(plan)
    assert CacheBuilder(plan, Fake()).build().plan.warnings == ()
    scene(3).resize((180, 180)).save(pots / "pots" / "copy.jpg", quality=60)
    (pots / "pots" / "same.png").write_bytes((pots / "pots" / "pot_07.png").read_bytes())  # a note of the catalog, and no warning
    cache = CacheBuilder(plan_of(pots), Fake()).build()
    ((path, reason),) = [(p.path.name, p.reason) for p in cache.plan.warnings or ()]
    assert {path, reason.split(" ")[2]} == {"copy.jpg", "pot_03.png"}
    assert "not looked at yet" not in str(cache.plan)
    assert f"look at: {pots}/pots/" in str(cache.plan)
    again = CacheBuilder(plan_of(pots), Fake()).build()
    assert again.misses == 0
    assert again.plan.warnings == cache.plan.warnings, "it is remembered with the entry"


def test_a_held_out_picture_that_looks_like_a_training_one(pots: Path) -> None:
    """It is said that one of them is held out."""
    (pots / "held").mkdir()
    scene(5).resize((200, 200)).save(pots / "held" / "x.png")
    (pots / "both.yaml").write_text(
        "- {id: p, instance_data_dir: pots, resolution: 64, caption_strategy: filename}\n"
        "- {id: h, instance_data_dir: held, resolution: 64, caption_strategy: filename, dataset_type: eval}\n"
    )
    plan = st.plan(st.discover(pots / "both.yaml"), st.presets.playground(cache_dir=str(pots / "cache"), validation_prompt=()))
    ((path, reason),) = [(p.path.name, p.reason) for p in CacheBuilder(plan, Fake()).build().plan.warnings or ()]
    assert path == "x.png"
    assert "looks like pot_05.png" in reason
    assert reason.endswith("one of them is held out")


def test_blurred_pictures_are_named(pots: Path) -> None:
    """One that was blurred by two pixels of its cut is; the sharp ones are not."""
    scene(40).filter(ImageFilter.GaussianBlur(8)).save(pots / "pots" / "soft.png")
    warnings = CacheBuilder(plan_of(pots), Fake()).build().plan.warnings or ()
    assert [(p.path.name, p.reason.split(" (")[0]) for p in warnings] == [("soft.png", "looks blurred")]


def test_near_finds_every_pair() -> None:
    """Against the count of differing bits of every pair."""
    rng = np.random.default_rng(0)
    rows = [int(v) for v in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    rows += (
        [rows[n] ^ (0b11111111 << n) for n in range(5)] + [rows[n] ^ (1 << n) ^ (0b111 << (n + 9)) for n in range(10)] + [0, 1, 2**64 - 1]
    )
    wanted = [
        (i, j, (rows[i] ^ rows[j]).bit_count())
        for i in range(len(rows)) for j in range(i + 1, len(rows))
        if (rows[i] ^ rows[j]).bit_count() <= 4 and 8 <= rows[i].bit_count() <= 56
    ]  # fmt: skip
    assert list(near(rows)) == wanted
    assert len(wanted) == 10


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_plan_shows_itself(pots: Path) -> None:
    """Sizes with their counts, problems, pictures with captions; names cannot bring markup in."""
    Image.new("RGB", (8, 8)).save(pots / "pots" / "<script>alert(1)<.png")
    scene(20, (256, 128)).save(pots / "pots" / "a wide & <b>.png")
    page = plan_of(pots)._repr_html_()
    assert re.search(r"<td>64x64</td>.*?<td>12</td>", page)
    assert re.search(r"<td>96x48</td>.*?<td>1</td>", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;.png" in page
    assert "8x8 px is too small" in page
    assert page.count("<figure") == 12
    assert 'alt="a wide &amp; &lt;b&gt;.png, 96x48: a wide &amp; &lt;b&gt;"' in page
    for data in re.findall(r"base64,([^\"]+)", page):
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 180


def test_the_frame_is_where_the_cut_is(pots: Path) -> None:
    """What lies outside the cut is pale, what lies inside is not, and the frame is red."""
    Image.new("RGB", (400, 200), (0, 0, 255)).save(pots / "pots" / "blue.png")
    plan = plan_of(pots, "crop: true, crop_style: corner")
    shown = framed(next(p for p in plan.train if p.item.path.name == "blue.png"))
    assert shown is not None
    assert shown.size == (180, 90)
    assert shown.getpixel((10, 45))[0] > 120, "outside"  # type: ignore[index]
    assert shown.getpixel((135, 45)) == (0, 0, 255), "inside"
    assert shown.getpixel((90, 45)) == (255, 0, 0)
    assert framed(plan.train[0]) is not None
    (pots / "pots" / "pot_00.png").write_bytes(b"gone bad")
    assert framed(plan.train[1 if plan.train[0].item.path.name == "blue.png" else 0]) is None


def test_what_the_model_sees(bench: Workbench) -> None:
    """Pictures decoded from the cached latents are those that were cut (18 dB at least), each with its caption and its tokens."""
    from sd3tune.cache.decoding import cut

    config = bench.config()
    cache = bench.cache(config)
    with st.encoders(config).load() as loaded:
        seen = cache.sheet(loaded, 5)
    assert len(seen.rows) in (5, 6)
    for row in seen.rows:
        real, shown = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).float() for p in (cut(row.placement), row.picture))
        assert 10 * torch.log10(255**2 / (real - shown).square().mean()) > 18
        assert row.placement.item.caption in str(seen)
        assert re.search(r"CLIP-L \d+ of \d+ tokens; CLIP-G \d+ of \d+ tokens; T5 \d+ of \d+ tokens", row.tokens)
    assert seen._repr_html_().count("<figure") == 2 * len(seen.rows)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_and_what_is_lost() -> None:
    """Short texts are whole; of a long one each encoder sees a beginning, and beginning and rest are the text."""
    config = st.presets.playground()
    long = "a small red pot with a blue lid, " * 9 + "and a very last word"
    short, cut = count_tokens(config, ["lock", long])
    assert [t.encoder for t in cut] == ["CLIP-L", "CLIP-G", "T5"]
    assert all(t.lost == "" and t.count <= t.limit for t in short)
    for tokens in cut:
        assert tokens.count > tokens.limit
        assert long.endswith(tokens.lost)
        kept = long[: len(long) - len(tokens.lost)]
        assert 0.5 * tokens.limit / tokens.count < len(kept) / len(long) < 2 * tokens.limit / tokens.count
        again = count_tokens(config, [kept.strip()])[0]
        assert next(t for t in again if t.encoder == tokens.encoder).lost == ""
    assert len(truncated(config, ["lock", long])) == 1
    assert "T5 16 of " in truncated(config, ["lock", long])[0]


def test_plan_says_how_large_the_cache_becomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figure of `sd3tune plan` is that of the entries' values."""
    datasets = write_datasets(tmp_path)
    arguments = ["--data", str(datasets), "--set", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "already encoded: 0 of 16 latents, 0 of " in said
    assert "16 of the others are not hashed yet" in said
    config = st.presets.playground(cache_dir=str(tmp_path / "cache"))
    builder = CacheBuilder(st.plan(st.discover(datasets), config), st.encoders(config))
    builder.build()
    held = sum(shard.size(key) for kind in ("latents", "texts") for key, shard in builder.store.entries(kind))
    assert st.encoders(config).bytes_of(builder.plan) == held
    assert f"about {held / 1e6:,.1f} MB" in said
    assert builder.coverage().complete
    assert main(["plan", *arguments]) == 0
    assert "not hashed yet" not in capsys.readouterr().out.split("already encoded")[0]
