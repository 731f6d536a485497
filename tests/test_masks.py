"""Masks: what counts in the loss, how they are found and cut, and the command that writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workbench, stored
from fakes import Fake
from PIL import Image
from test_engine import engine

import sd3tune as st
from sd3tune.cache.keys import mask_key
from sd3tune.cache.masking import cut_mask
from sd3tune.cli import main
from sd3tune.data.buckets import Bucket, Geometry
from sd3tune.data.entries import read_datasets
from sd3tune.data.sheet import framed
from sd3tune.data.simpletuner import from_simpletuner
from sd3tune.errors import ConfigError, DataError, ModelError
from sd3tune.models import masking
from sd3tune.training import flow
from sd3tune.training.batches import Batch, Batches, load
from sd3tune.validation.evaluate import evaluation_loss


def points(batch: int = 3, side: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (batch, 16, side, side)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), torch.linspace(0.1, 0.9, batch)


def loss(velocity: Any, mask: torch.Tensor | None, *, normalise: bool = True, measure: flow.Measure = flow.L2) -> torch.Tensor:
    latent, noise, sigma = points()
    return flow.loss(
        velocity, latent, torch.zeros(3, 1, 1), torch.zeros(3, 1), sigma_B=sigma, noise_BCHW=noise, mask_BHW=mask, mask_normalise=normalise,
        measure=measure,
    )  # fmt: skip


def gradient(mask: torch.Tensor | None, *, normalise: bool = True, measure: flow.Measure = flow.L2) -> torch.Tensor:
    """Of the summed loss with respect to the prediction."""
    predicted = torch.randn((3, 16, 32, 32), generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    loss(lambda *_: predicted, mask, normalise=normalise, measure=measure).sum().backward()
    assert predicted.grad is not None
    return predicted.grad


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [flow.L2, flow.Measure("huber"), flow.Measure("smooth_l1", 0.3)], ids=lambda m: m.loss_type)
@pytest.mark.parametrize("normalise", [True, False])
def test_a_full_mask_is_no_mask(measure: flow.Measure, normalise: bool) -> None:
    """Loss and gradient, bit for bit."""
    full = torch.ones(3, 32, 32)
    z = torch.randn((3, 16, 32, 32), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loss(lambda *_: z, full, normalise=normalise, measure=measure), loss(lambda *_: z, None, measure=measure))
    assert torch.equal(gradient(full, normalise=normalise, measure=measure), gradient(None, measure=measure))


@pytest.mark.parametrize("normalise", [True, False])
def test_nothing_outside_a_mask_has_a_gradient(normalise: bool) -> None:
    """Exactly zero where the mask is black, and nowhere else."""
    mask = (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3)) < 0.3).float()
    found = gradient(mask, normalise=normalise)
    outside = (mask == 0)[:, None].expand_as(found)
    assert not found[outside].any()
    assert found[~outside].all()


def test_normalised_a_tenth_of_a_picture_has_the_gradient_of_a_whole() -> None:
    """For a weight that all pixels share, within 2 %; without normalisation it is a tenth. Only the random errors make the difference."""
    latent, noise, sigma = points(side=128)
    mask = (torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(3)) < 0.1).float()
    assert mask.mean() == pytest.approx(0.1, abs=0.01)

    def of_shared(mask: torch.Tensor | None, normalise: bool) -> float:
        weight = torch.tensor(0.5, requires_grad=True)
        flow.loss(
            lambda z, *_: weight * z, latent, torch.zeros(3, 1, 1), torch.zeros(3, 1), sigma_B=sigma, noise_BCHW=noise, mask_BHW=mask,
            mask_normalise=normalise,
        ).mean().backward()  # fmt: skip
        assert weight.grad is not None
        return float(weight.grad)

    whole = of_shared(None, True)
    assert of_shared(mask, True) == pytest.approx(whole, rel=0.02)
    assert of_shared(mask, False) == pytest.approx(whole * float(mask.mean()), rel=0.05)


def test_grey_is_a_weight() -> None:
    """By hand: costs 1 and 9 under weights 1 and 1/2 are 5.5 / 1.5 normalised and 5.5 / 2 not; the scale of a mask cancels."""
    cost, mask = torch.tensor([[[[1.0, 9.0]]]]), torch.tensor([[[1.0, 0.5]]])
    assert float(flow.mean(cost, mask)) == pytest.approx(5.5 / 1.5)
    assert float(flow.mean(cost, mask, normalise=False)) == pytest.approx(5.5 / 2)
    assert float(flow.mean(cost, mask / 1000)) == pytest.approx(5.5 / 1.5)


def test_a_black_mask_has_no_loss_and_no_gradient() -> None:
    """Zero, not a number that is none; the other pictures of the batch are as without it."""
    mask = torch.ones(3, 32, 32)
    mask[1] = 0
    z = torch.zeros(3, 16, 32, 32)
    got, plain = loss(lambda *_: z, mask), loss(lambda *_: z, None)
    assert got.tolist() == [plain[0], 0, plain[2]]
    assert torch.isfinite(gradient(mask)).all()
    assert not gradient(mask)[1].any()


def test_an_update_obeys_mask_and_rule() -> None:
    """The engine hands both on: the loss of a half mask is that of the half, and with mask_normalise off half of that."""

    class Half:
        def ids(self, k: int) -> tuple[str, ...]:
            return ("x",)

        def part(self, k: int, places: range) -> Batch:
            latent, mask = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2)
            latent[:, :, 0], mask[:, 0] = 3.0, 1.0
            return Batch(("x",), latent, torch.zeros(1, 1, 1), torch.zeros(1, 1), mask_BHW=mask)

    losses = []
    for normalise in (True, False):
        made, _ = engine(accumulation=1, mask_normalise=normalise)
        made.batches = Half()  # type: ignore[assignment]
        losses.append(made.update(peak_learning_rate=0.0).loss)
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] == pytest.approx(2 * losses[1])


# --- files -----------------------------------------------------------------------------------------------------------


def noise_picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def noise_mask(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, size[::-1], dtype=np.uint8))


@pytest.fixture
def pots(tmp_path: Path) -> Path:
    """Four pictures of two sizes with masks under the same names, one of them in a folder below and with another ending."""
    for folder in ("pots/sub", "masks/sub"):
        (tmp_path / folder).mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.png", "c.png", "sub/d.png")):
        size = (128, 96) if n == 2 else (64, 64)
        noise_picture(n, size).save(tmp_path / "pots" / name)
        noise_mask(10 + n, size).save(tmp_path / "masks" / (name if n != 3 else "sub/d.bmp"))
    return tmp_path


def plan_of(folder: Path, entry: str = "", **values: Any) -> st.Plan:
    (folder / "datasets.yaml").write_text(
        "- {id: pots, instance_data_dir: pots, resolution: 64, caption_strategy: filename, conditioning_data: m"
        f"{entry and ', ' + entry}}}\n- {{id: m, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: masks}}\n"
    )
    settings = {"cache_dir": str(folder / "cache"), "validation_prompt": (), **values}
    return st.plan(st.discover(folder / "datasets.yaml"), st.presets.playground(**settings))


def by_name(plan: st.Plan) -> dict[str, Any]:
    return {p.item.path.name: p for p in plan.train if not p.mirrored}


def test_a_mask_is_cut_as_its_picture(pots: Path) -> None:
    """Against numpy: the mean of each 8 x 8 pixels of the resized mask at the picture's own cut, mirrored with it."""
    plan = plan_of(pots, "flip: horizontal, crop: true, crop_style: corner")
    cache = st.CacheBuilder(plan, Fake()).build()  # type: ignore[arg-type]
    for placement in plan.train:
        mask = np.asarray(Image.open(placement.item.mask.path), dtype=np.float64)  # type: ignore[union-attr]
        (width, height), left, top, bucket, mirrored = placement.geometry
        if mask.shape == (96, 128):  # the bucket is 64 x 64: resized to 85 x 64
            assert (width, height, left, top) == (85, 64, 21, 0)
            mask = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX), dtype=np.float64)
        mask = mask[top : top + bucket.height, left : left + bucket.width]
        mask = mask[:, ::-1] if mirrored else mask
        expected = mask.reshape(8, 8, 8, 8).mean((1, 3)) / 255
        assert np.allclose(cache.mask(placement).numpy(), expected, atol=1e-6)
        assert cache.mask_share(placement) == pytest.approx(expected.mean(), abs=1e-6)
    one, other = (cache.mask(p) for p in plan.train if p.item.path.name == "a.png")
    assert torch.equal(one, other.flip(1))
    assert not torch.equal(one, other)


def test_a_mask_follows_its_picture_pixel_by_pixel(pots: Path) -> None:
    """A picture that is its own mask: the cut mask equals the cut picture's means, for odd sizes, random cuts, and a smaller mask."""
    from sd3tune.cache.decoding import cut

    soft = Image.fromarray(np.random.default_rng(5).integers(0, 255, (5, 6), dtype=np.uint8)).resize((150, 131), Image.Resampling.BICUBIC)
    for name in ("a", "b", "c", "sub/d"):
        soft.convert("RGB").save(pots / "pots" / f"{name}.png")
    (pots / "masks" / "sub" / "d.bmp").unlink()
    for name, size in (("a", (150, 131)), ("b", (300, 262)), ("c", (150, 131)), ("sub/d", (75, 66))):
        soft.resize(size, Image.Resampling.BICUBIC).save(pots / "masks" / f"{name}.png")
    plan = plan_of(pots, "crop: true, crop_style: random, crop_variants: 3, flip: horizontal")
    for placement in plan.cuts:
        seen = np.asarray(cut(placement).convert("L"), dtype=np.float64).reshape(8, 8, 8, 8).mean((1, 3)) / 255
        assert np.abs(cut_mask(placement) - seen).max() < (0.06 if placement.item.path.name == "d.png" else 0.03), placement.item.path
    assert len({p.geometry for p in plan.cuts}) >= 6


def test_full_black_and_segmented(pots: Path) -> None:
    """White is exactly 1, black exactly 0, and a segmentation counts wherever anything is not black."""
    for name, value in (("a", 255), ("b", 0)):
        Image.new("L", (64, 64), value).save(pots / "masks" / f"{name}.png")
    thin = Image.new("L", (128, 96))
    thin.putpixel((64, 48), 3)
    thin.save(pots / "masks" / "c.png")
    cuts = by_name(plan_of(pots))
    assert (cut_mask(cuts["a.png"]) == 1).all()
    assert (cut_mask(cuts["b.png"]) == 0).all()
    segmented = by_name(_segmented(pots))
    assert sorted(set(cut_mask(segmented["c.png"]).ravel().tolist())) == [0, 1]
    assert cut_mask(segmented["c.png"]).sum() == 1


def _segmented(folder: Path) -> st.Plan:
    plan_of(folder)
    path = folder / "datasets.yaml"
    path.write_text(path.read_text().replace("conditioning_type: mask", "conditioning_type: segmentation"))
    return st.plan(st.discover(path), st.presets.playground(cache_dir=str(folder / "cache"), validation_prompt=()))


def test_alpha_channels_are_masks(pots: Path) -> None:
    """The mask is how opaque each pixel is; a picture without an alpha channel is an error."""
    for n, name in enumerate(("a", "b", "c", "sub/d")):
        picture = Image.open(pots / "pots" / f"{name}.png").convert("RGB")
        picture.putalpha(noise_mask(n, picture.size))
        picture.save(pots / "pots" / f"{name}.png")
    path = pots / "alpha.yaml"
    path.write_text("- {id: pots, instance_data_dir: pots, resolution: 64, caption_strategy: filename, mask_from_alpha: true}\n")
    config = st.presets.playground(cache_dir=str(pots / "cache"), validation_prompt=())
    plan = st.plan(st.discover(path), config)
    cache = st.CacheBuilder(plan, Fake()).build()  # type: ignore[arg-type]
    expected = np.asarray(noise_mask(0), dtype=np.float64).reshape(8, 8, 8, 8).mean((1, 3)) / 255
    assert np.allclose(cache.mask(by_name(cache.plan)["a.png"]).numpy(), expected, atol=1e-6)
    noise_picture(1).save(pots / "pots" / "b.png")
    with pytest.raises(DataError, match=r"pots/b\.png: it has no alpha channel to be its mask \(mask_from_alpha in data set 'pots'\)"):
        st.discover(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: (p / "masks" / "b.png").unlink(),
         r"pots/b\.png: it has no mask, nor have 0 more of the 4 pictures of data set 'pots'; looked for .*masks/b with .*\.png"),
        (lambda p: noise_mask(1, (64, 32)).save(p / "masks" / "a.png"), r"masks/a\.png: it is 64x32 px, another shape than .*pots/a\.png"),
        (lambda p: (p / "masks" / "a.png").write_bytes(b"no"), r"masks/a\.png: mask of data set 'pots': not a readable picture"),
        (lambda p: noise_mask(1).save(p / "masks" / "sub" / "d.webp"), r"sub/d\.png: data set 'm' has 2 masks for it, d\.bmp and d\.webp"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_masks_is_said_before_anything_is_encoded(pots: Path, change: Any, says: str) -> None:
    change(pots)
    with pytest.raises(DataError, match=says):
        plan_of(pots)


def test_a_black_mask_leaves_its_picture_out(pots: Path) -> None:
    """With a reason; with random cuts of which some are black, that is said and those have no loss; with nothing left it is an error."""
    Image.new("L", (64, 64)).save(pots / "masks" / "b.png")
    side = Image.new("L", (128, 96))
    side.paste(255, (0, 0, 30, 96))
    side.save(pots / "masks" / "c.png")
    plan = plan_of(pots, "crop: true, crop_style: random, crop_variants: 6")
    for _ in range(2):  # the second build reads what the first one wrote
        built = st.CacheBuilder(plan, Fake()).build().plan  # type: ignore[arg-type]
        assert [(p.path.name, p.reason) for p in built.problems] == [
            ("b.png", "its mask is black in every cut, so nothing of it would count")
        ]
        assert "b.png" not in by_name(built)
        said = [p.reason for p in built.warnings or () if p.path.name == "c.png"]
        assert len(said) == 1
        assert "its mask is black in" in said[0]
        assert "of its 6 cuts; these have no loss" in said[0]
    for name in ("a.png", "c.png", "sub/d.bmp"):
        Image.new("L", (128, 96) if name == "c.png" else (64, 64)).save(pots / "masks" / name)
    with pytest.raises(DataError, match=r"no picture is left to train on:\n.*its mask is black"):
        st.CacheBuilder(plan_of(pots), Fake()).build()  # type: ignore[arg-type]


def test_edits_are_noticed_by_content(pots: Path) -> None:
    """Another mask: its entry alone is new, and the picture's identity; pictures keep entries bit for bit; a late edit is refused."""
    before_masks = pots / "plain.yaml"
    before_masks.write_text("- {id: pots, instance_data_dir: pots, resolution: 64, caption_strategy: filename}\n")
    config = st.presets.playground(cache_dir=str(pots / "cache"), validation_prompt=())
    bare = st.CacheBuilder(st.plan(st.discover(before_masks), config), Fake()).build()  # type: ignore[arg-type]
    latents = stored(pots / "cache")
    assert not any(name.startswith("masks") for name in latents)
    first = st.CacheBuilder(plan_of(pots), Fake()).build()  # type: ignore[arg-type]
    assert first.misses == 4, "the masks alone"
    assert "4 of 4 masks" in str(first.coverage())
    assert {k: v for k, v in stored(pots / "cache").items() if not k.startswith("masks")} == latents
    ids = {p.item.path.name: p.item.id for p in first.plan.train}
    assert not set(ids.values()) & {p.item.id for p in bare.plan.train}
    noise_mask(77).save(pots / "masks" / "a.png")
    again = st.CacheBuilder(plan_of(pots), Fake()).build()  # type: ignore[arg-type]
    assert (again.misses, again.hits) == (1, first.hits + 4 - 1)
    changed = {p.item.path.name for p in again.plan.train if p.item.id != ids[p.item.path.name]}
    assert changed == {"a.png"}
    late = plan_of(pots)
    noise_mask(78).save(pots / "masks" / "a.png")
    noise_picture(79).save(pots / "pots" / "b.png")
    records = [r for r in st.CacheBuilder(plan_of(pots), Fake()) if not r.reused and r.kind not in ("pictures", "states")]  # type: ignore[arg-type]
    assert sorted((r.kind, Path(r.name).name) for r in records) == [("latents", "b.png"), ("masks", "a.png")]
    noise_mask(80).save(pots / "masks" / "c.png", compress_level=1)
    said = [r.problem for r in st.CacheBuilder(replace(late, cache_dir=str(pots / "other")), Fake()) if r.problem]  # type: ignore[arg-type]
    assert any("masks/a.png was changed since it was looked at; discover and plan again" in text for text in said)


def test_a_key_of_masks_stays_what_it_is() -> None:
    """Reference value: existing caches stay valid; kind, bytes and cut make another one."""
    geometry = Geometry((64, 64), 0, 0, Bucket(64, 64))
    assert mask_key("0" * 64, "mask", geometry)[:16] == "c8358525a1b7e85d"
    cuts = (geometry, geometry._replace(mirrored=True), geometry._replace(left=1))
    assert len({mask_key(pixels * 64, kind, cut) for pixels in "01" for kind in ("mask", "segmentation") for cut in cuts}) == 12
    assert mask_key("", "mask", geometry) == ""


def test_how_often_a_mask_counts(pots: Path) -> None:
    """By (seed, k, place): the same again, about the share asked for, whole masks or none, and 1 is always."""
    cache = st.CacheBuilder(plan_of(pots, train_batch_size=3), Fake()).build()  # type: ignore[arg-type]
    always = Batches(cache, seed=1, caption_dropout=0.0)
    often, again, other = (Batches(cache, seed=s, caption_dropout=0.0, masked_probability=0.6) for s in (1, 1, 2))
    masked = []
    for k in range(60):
        one = often[k].mask_BHW
        assert one is not None
        assert torch.equal(one, again[k].mask_BHW)  # type: ignore[arg-type]
        for got, whole in zip(one, always[k].mask_BHW, strict=True):  # type: ignore[arg-type]
            assert torch.equal(got, whole) or (got == 1).all()
            masked.append(torch.equal(got, whole))
    assert sum(masked) / len(masked) == pytest.approx(0.6, abs=0.12)
    assert any(not torch.equal(often[k].mask_BHW, other[k].mask_BHW) for k in range(10))  # type: ignore[arg-type]


def test_the_evaluation_looks_where_masks_count(pots: Path) -> None:
    """Held-out pictures have masks of their own: the loss is the mean inside them; those without count everywhere."""
    (pots / "datasets.yaml").write_text(
        "- {id: pots, instance_data_dir: pots, resolution: 64, caption_strategy: filename}\n"
        "- {id: held, dataset_type: eval, instance_data_dir: held, resolution: 64, caption_strategy: filename, conditioning_data: m}\n"
        "- {id: m, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: masks}\n"
    )
    (pots / "held").mkdir()
    noise_picture(50).save(pots / "held" / "a.png")
    config = st.presets.playground(cache_dir=str(pots / "cache"), validation_prompt=())
    cache = st.CacheBuilder(st.plan(st.discover(pots / "datasets.yaml"), config), Fake()).build()  # type: ignore[arg-type]
    (held,) = cache.plan.evaluation
    assert load(cache, [(next(p for p in cache.plan.train), "")]).mask_BHW is None
    seen: list[torch.Tensor] = []

    def velocity(noisy: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append(noisy)
        return noisy

    record = evaluation_loss(velocity, cache, sigmas=(0.5,), device=torch.device("cpu"), step=0)
    latent = cache.latent(held)[None].float()
    error = (seen[0] - (2 * (seen[0] - 0.5 * latent) - latent)).square().mean(1)[0]
    mask = cache.mask(held)
    assert record.loss == pytest.approx(float((error * mask).sum() / mask.sum()), rel=1e-4)


def test_masks_are_shown(pots: Path) -> None:
    """The plan says where they are from, the sheet is blue where they are dark, the manifest has their mean share."""
    from sd3tune.manifest import masks_of

    Image.new("L", (64, 64)).save(pots / "masks" / "b.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(pots / "masks" / "a.png")
    plan = plan_of(pots)
    assert "pots: counted by masks from m" in str(plan)
    assert "m: masks from" in str(plan.catalog)
    sheet = framed(by_name(plan)["a.png"])
    assert sheet is not None
    left, right = (np.asarray(sheet, dtype=float)[20:160, part].mean((0, 1)) for part in (slice(20, 80), slice(100, 160)))
    assert right[2] > 190 > 60 > right[0]
    assert abs(left[2] - left[0]) < 25
    cache = st.CacheBuilder(plan, Fake()).build()  # type: ignore[arg-type]
    ((name, count, mean, least),) = masks_of(cache)
    shares = [cache.mask_share(p) for p in cache.plan.cuts]
    assert (name, count) == ("pots", 3)
    assert mean == pytest.approx(sum(shares) / 3)
    assert 0 < least == min(shares)


# --- datasets.yaml and SimpleTuner's files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "a", "instance_data_dir": "x", "conditioning_data": "m"}], "no enabled data set 'm' with dataset_type: conditioning"),
        ([{"id": "m", "instance_data_dir": "x", "dataset_type": "conditioning"}], "conditioning_type is missing: mask or segmentation"),
        ([{"id": "a", "instance_data_dir": "x"}, {"id": "m", "instance_data_dir": "x", "dataset_type": "conditioning", "conditioning_type":
           "mask"}], "data set 'm': its masks belong to no data set; write conditioning_data: m"),
        ([{"id": "a", "instance_data_dir": "x", "conditioning_type": "mask"}], "conditioning_type belongs to the entry with the masks"),
        ([{"id": "a", "instance_data_dir": "x", "mask_from_alpha": True, "conditioning_data": "m"}], "both say where masks come from"),
        ([{"id": "m", "type": "huggingface", "dataset_name": "x/y", "dataset_type": "conditioning", "conditioning_type": "mask"}],
         "masks are files in a folder"),
        ([{"id": "m", "instance_data_dir": "x", "dataset_type": "conditioning", "conditioning_type": "canny"}], "conditioning_type"),
    ],
)  # fmt: skip
def test_entries_that_contradict_each_other(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    (tmp_path / "datasets.yaml").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=says):
        read_datasets(tmp_path / "datasets.yaml")


def test_keys_of_pictures_on_masks_are_said_to_be_unnecessary(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "instance_data_dir": "x", "conditioning_data": ["m"]},
        {"id": "m", "instance_data_dir": "y", "dataset_type": "conditioning", "conditioning_type": "mask", "resolution": 64, "crop": True},
    ]
    (tmp_path / "datasets.yaml").write_text(json.dumps(rows))
    found, notes = read_datasets(tmp_path / "datasets.yaml")
    assert found[0].conditioning_data == "m"
    assert notes == tuple(f"{key} is not needed on masks: they are cut as their pictures" for key in ("crop", "resolution"))


def test_simpletuners_masks(pots: Path) -> None:
    """Linked either way they are ours; there a masked loss is not normalised, and the probability is for segmentations."""
    base = {"model_type": "lora", "model_family": "sd3", "pretrained_model_name_or_path": "x", "masked_loss_probability": 0.5}
    for kind, link in (("mask", "conditioning_data"), ("segmentation", "source_dataset_id")):
        pictures = {"id": "p", "type": "local", "instance_data_dir": "pots", "caption_strategy": "filename", "resolution": 64}
        masks = {"id": "m", "type": "local", "dataset_type": "conditioning", "conditioning_type": kind, "instance_data_dir": "masks",
                 "resolution": 64, "caption_strategy": "textfile", "cache_dir_vae": "y"}  # fmt: skip
        pictures |= {"conditioning_data": "m"} if link == "conditioning_data" else {}
        masks |= {"source_dataset_id": "p"} if link == "source_dataset_id" else {}
        (pots / "config.json").write_text(json.dumps(base))
        (pots / "multidatabackend.json").write_text(json.dumps([pictures, masks]))
        made = from_simpletuner(pots / "config.json")
        assert made.datasets[0]["conditioning_data"] == "m"
        assert set(made.datasets[1]) == {"id", "type", "dataset_type", "conditioning_type", "instance_data_dir"}
        assert not made.config.objective.mask_normalise
        lines = {line.where + line.key: line for line in made.report}
        assert "not divided by its mask's area" in lines["mask_normalise"].why
        assert lines["m.resolution"].fate == "not needed"
        assert lines["masked_loss_probability"].fate == ("was silently ignored there" if kind == "mask" else "taken over")
        assert made.config.objective.masked_loss_probability == (1.0 if kind == "mask" else 0.5)
        _, datasets = made.save(pots / kind)
        for folder in ("pots", "masks"):
            (pots / kind / folder).symlink_to(pots / folder)
        assert {item.mask.kind for item in st.discover(datasets).items if item.mask} == {kind}
    (pots / "multidatabackend.json").write_text(json.dumps([{**pictures, "instance_data_dir": "pots"}]))
    plain = from_simpletuner(pots / "config.json")
    assert plain.config.objective.mask_normalise
    assert "mask_normalise" not in str(plain)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_with_masks_resumes_and_is_its_own(bench: Workbench, tmp_path: Path) -> None:
    """Full masks train bit for bit as none; half ones otherwise; the manifest says so; the run goes on from its own manifest."""
    masks = tmp_path / "masks"
    masks.mkdir()
    pictures = sorted((bench.root / "pictures" / "train").glob("*.png"))
    for picture in pictures:
        with Image.open(picture) as opened:
            Image.new("L", opened.size, 255).save(masks / picture.name)
    plain = (bench.root / "pictures" / "datasets.yaml").read_text().replace("train,", f"{bench.root}/pictures/train,")
    plain = plain.replace("heldout,", f"{bench.root}/pictures/heldout,")
    (tmp_path / "datasets.yaml").write_text(
        plain.replace("{id: some,", "{id: some, conditioning_data: m,")
        + "- {id: m, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: masks}\n"
    )

    def trainer() -> st.Trainer:
        config = bench.config(max_train_steps=6)
        return st.Trainer(config, st.CacheBuilder(st.plan(st.discover(tmp_path / "datasets.yaml"), config), st.encoders(config)).build())

    without = bench.trainer(max_train_steps=6)
    full = trainer()
    assert "masks     some: 12 pictures with a mask; on average 100.0% of a picture counts, at least 100.0%" in str(full.manifest)
    for _ in range(3):
        one, other = without.step(), full.step()
        assert one.losses == other.losses
    assert all(torch.equal(a, full.engine.weights[name]) for name, a in without.engine.weights.items())
    for picture in pictures:
        with Image.open(masks / picture.name) as opened:
            half = Image.new("L", opened.size)
            half.paste(255, (0, 0, half.width // 2, half.height))
        half.save(masks / picture.name)
    halves = trainer()
    assert halves.step().losses != full.step().losses
    halves.checkpoint()
    resumed = st.Trainer.resume(halves.folder.path)
    assert resumed.step().losses == halves.step().losses
    Image.new("L", (9, 9), 255).resize(half.size).save(masks / pictures[0].name)
    with pytest.raises(st.CheckpointError, match="the pictures, captions or batch settings are not those of the run"):
        st.Trainer.resume(halves.folder.path)


# --- the command -----------------------------------------------------------------------------------------------------


def test_masks_from_boxes_and_alpha(pots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PNG, L, the picture's size and name; what is there stays; nothing is written among the pictures; what is said can be pasted."""
    before = {p: p.read_bytes() for p in (pots / "pots").rglob("*.png")}
    out = pots / "out"
    assert main(["data", "masks", str(pots / "pots"), str(out), "--from", "box", "--box", "0.25,0,0.75,1"]) == 0
    said = capsys.readouterr().out
    assert "4 masks in" in said
    assert "in which 50.0% of a picture counts on average" in said
    assert f"- {{id: masks, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: {out}}}" in said
    with Image.open(out / "sub" / "d.png") as opened:
        assert (opened.mode, opened.size, opened.format) == ("L", (64, 64), "PNG")
        assert np.array_equal(np.asarray(opened), np.tile(np.repeat([0, 255, 0], [16, 32, 16]).astype(np.uint8), (64, 1)))
    (out / "a.png").write_bytes(b"mine")
    assert main(["data", "masks", str(pots / "pots"), str(out), "--from", "alpha"]) == 0
    assert "left out: a.png: is already there, and stays as it is" in capsys.readouterr().out
    assert (out / "a.png").read_bytes() == b"mine"
    picture = noise_picture(3)
    picture.putalpha(noise_mask(4))
    (pots / "alpha").mkdir()
    picture.save(pots / "alpha" / "x.webp", lossless=True, exact=True)
    assert main(["data", "masks", str(pots / "alpha"), str(pots / "out2"), "--from", "alpha"]) == 0
    assert np.array_equal(np.asarray(Image.open(pots / "out2" / "x.png")), np.asarray(noise_mask(4)))
    assert {p: p.read_bytes() for p in (pots / "pots").rglob("*.png")} == before
    capsys.readouterr()
    for words, message in (
        ([str(pots / "pots"), str(pots / "pots" / "m"), "--from", "box"], "lies in the folder of the pictures"),
        ([str(pots / "pots"), str(out), "--from", "box", "--box", "0.5,0,0.2,1"], "a box is left,top,right,bottom in shares from 0 to 1"),
        ([str(pots / "pots"), str(out), "--from", "model"], "--from alpha, --from box or --from model NAME"),
        ([str(pots / "pots"), "--from", "box"], "masks needs IN OUT"),
    ):
        assert main(["data", "masks", *words]) == 1
        assert message in capsys.readouterr().err


def test_masks_from_a_model(pots: Path) -> None:
    """A tiny segmentation model with random weights: each mask is the union of its labels, background left out; no torchvision needed."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    torch.manual_seed(0)
    labels = {0: "background", 1: "pot", 2: "lid"}
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, id2label=labels, label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight, std=30.0)
    model.save_pretrained(pots / "model")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(pots / "model")
    shares = {}
    for chosen in ((), ("pot",), ("lid",), ("background",)):
        rows = list(masking.masks_of(pots / "pots", pots / f"out{len(shares)}", masking.model(str(pots / "model"), chosen)))
        assert not [row for row in rows if row.problem]
        shares[chosen] = np.stack([np.asarray(Image.open(pots / f"out{len(shares)}" / n)) for n in ("a.png", "b.png")])
    assert np.array_equal(shares[()], np.maximum(shares["pot",], shares["lid",]))
    assert np.array_equal(shares[()] == 0, shares["background",] == 255)
    assert set(np.unique(shares[()])) == {0, 255}
    with pytest.raises(ModelError, match="it has no label 'cat'; it has background, lid, pot"):
        masking.model(str(pots / "model"), ("cat",))
    with pytest.raises(ModelError, match="cannot be loaded as an image-segmentation model"):
        masking.model(str(pots / "pots"))
