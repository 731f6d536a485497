"""What is found in folders, where captions come from, how pictures are cut."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sd3tune as st3
from sd3tune.config import presets
from sd3tune.data import Bucket, Dataset, Item, Placement, Plan, discover
from sd3tune.data.buckets import bucket_of, enlargement, place
from sd3tune.data.images import read_rgb, size
from sd3tune.errors import ConfigError, DataError
from sd3tune.files import file_digest


def picture(
    path: Path, width: int = 32, height: int = 24, color: Any = (200, 30, 90), mode: str = "RGB", caption: str | None = "a pot", **save: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), color).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def break_file(path: Path, how: str) -> Path:
    picture(path, 64, 64)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif how == "text":
        path.write_text("this is not a picture")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        picture(path, 8, 8)
    return path


def digest_of(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder", p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
    }


def item(width: int, height: int, name: str = "a", *, resolution: int = 64, crop: bool = False, repeats: int = 0) -> Item:
    dataset = Dataset(id="d", instance_data_dir="d", resolution=resolution, crop=crop, repeats=repeats)
    return Item(dataset, Path(name), width, height, name, (f"caption {name}",))


def plan_of(folder: Path, **values: Any) -> Plan:
    return st3.plan(discover(folder), presets.playground(lr_warmup_steps=0, **values))


BREAKS = {
    "truncated": "not a readable picture",
    "text": "not a readable picture",
    "empty": "not a readable picture",
    "small": "8x8 px is too small",
}


# --- discover --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", BREAKS)
def test_a_folder_of_broken_files_stops(tmp_path: Path, how: str) -> None:
    """When no picture can be used, one DataError names the folder, a file and the reason."""
    for number in range(3):
        break_file(tmp_path / f"{number}.png", how)
    with pytest.raises(DataError) as caught:
        discover(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "none of its 3 pictures can be used" in message
    assert f"0.png: {BREAKS[how]}" in message


def test_empty_missing_and_wrong_sources_stop(tmp_path: Path) -> None:
    """An empty folder, a folder that is not there, and a file in its place each say which and why."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: it holds no picture \(\.avif"):
        discover(empty)
    with pytest.raises(DataError, match=r"absent: no such folder \(from "):
        discover(tmp_path / "absent")
    with pytest.raises(DataError, match=r"one\.png: is a file, not a folder"):
        discover(picture(tmp_path / "one.png"))
    yaml = tmp_path / "datasets.yaml"
    yaml.write_text("[{id: x, instance_data_dir: absent}]")
    with pytest.raises(DataError, match=r"'x': .*absent does not exist; correct instance_data_dir"):
        discover(yaml)
    yaml.write_text("[{id: x, instance_data_dir: one.png}]")
    with pytest.raises(DataError, match=r"one\.png is a file, not a folder"):
        discover(yaml)


def test_broken_pictures_are_rows_not_failures(tmp_path: Path) -> None:
    """Three broken of ten give seven items and three problems, and nothing in the folder changes."""
    for number in range(7):
        picture(tmp_path / f"{number}.png", color=(number, 0, 0))
    for how in ("truncated", "text", "small"):
        break_file(tmp_path / f"x-{how}.png", how)
    before = digest_of(tmp_path)
    catalog = discover(tmp_path)
    assert len(catalog.items) == 7
    assert [p.path.name for p in catalog.problems] == ["x-small.png", "x-text.png", "x-truncated.png"]
    assert all(p.reason for p in catalog.problems)
    assert str(catalog).count("refused: ") == 3
    assert "<pre>" in catalog._repr_html_()
    plan = st3.plan(catalog, presets.playground())
    assert "x-small.png: 8x8 px is too small" in str(plan)
    assert digest_of(tmp_path) == before


def test_order_is_by_path_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    """Items come in the order of their paths, also from folders below; names that begin with a point do not count."""
    for name in ("b.png", "a/z.png", "c.webp", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    assert [i.path.relative_to(tmp_path).as_posix() for i in discover(tmp_path).items] == ["a/z.png", "b.png", "c.webp"]


@given(st.binary(max_size=40), st.integers(0, 200), st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff"]))
@settings(max_examples=120, deadline=None)
def test_no_picture_file_escapes(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, kind: str) -> None:
    """Overwriting any bytes of a picture gives an item or a problem, never an exception."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    picture(folder / "good.png")
    data = picture(folder / f"bad.{kind}", mode="L", color=90).read_bytes()
    (folder / f"bad.{kind}").write_bytes(data[:at] + junk + data[at + len(junk) :])
    catalog = discover(folder)
    assert len(catalog.items) + len(catalog.problems) == 2
    (folder / f"bad.{kind}").unlink()


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_part_of_the_size(tmp_path: Path, orientation: int) -> None:
    """A picture's size is that of the picture as shown, and its pixels are upright."""
    exif = Image.Exif()
    exif[274] = orientation
    path = picture(tmp_path / "a.jpg", 48, 32, exif=exif)
    expected = (32, 48) if orientation >= 5 else (48, 32)
    assert size(path) == read_rgb(path).size == expected


def test_transparency_is_on_white(tmp_path: Path) -> None:
    """What shows through is white, half-transparent colours are mixed with it, palettes included."""
    clear = picture(tmp_path / "clear.png", color=(255, 0, 0, 0), mode="RGBA")
    half = picture(tmp_path / "half.png", color=(255, 0, 0, 128), mode="RGBA")
    grey = picture(tmp_path / "grey.png", color=(0, 0), mode="LA")
    palette = tmp_path / "palette.png"
    Image.new("P", (16, 16), 0).save(palette, transparency=0)
    assert read_rgb(clear).getpixel((3, 3)) == (255, 255, 255)
    assert read_rgb(half).getpixel((3, 3)) == (255, 127, 127)
    assert read_rgb(grey).getpixel((3, 3)) == (255, 255, 255)
    assert read_rgb(palette).getpixel((3, 3)) == (255, 255, 255)
    assert all(read_rgb(p).mode == "RGB" for p in (clear, half, grey, palette))


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"a pot", "a pot"), (b"\xef\xbb\xbfa pot\n", "a pot"), (b"a\r\npot\r\n", "a pot"), (b"a\npot,\n\n  glazed\t", "a pot, glazed"),
        ("grüner Topf".encode(), "grüner Topf"),
    ],
)  # fmt: skip
def test_captions_are_read_as_one_line(tmp_path: Path, data: bytes, caption: str) -> None:
    """A byte order mark, Windows line ends and several lines do not become part of the text."""
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes(data)
    (tmp_path / "d.yaml").write_text("[{id: a, instance_data_dir: ., disable_multiline_split: true}]")
    assert discover(tmp_path / "d.yaml").items[0].captions == (caption,)


def test_a_caption_that_is_not_text_is_a_problem(tmp_path: Path) -> None:
    """Invalid UTF-8 is a problem of that picture that names the caption's file."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    catalog = discover(tmp_path)
    assert [i.path.name for i in catalog.items] == ["a.png"]
    assert catalog.problems[0].reason.startswith("b.txt is not UTF-8 text")


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_missing_captions_stop_the_plan(tmp_path: Path, caption: str | None) -> None:
    """Pictures without a caption stop, with what to do; allowed by name, they are trained on the empty text."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", caption=caption)
    assert [p.name for p in discover(tmp_path).missing_captions] == ["b.png"]
    with pytest.raises(DataError, match=r"1 of 2 pictures have no caption, the first is .*b\.png; .*allow_missing_captions: true"):
        plan_of(tmp_path)
    assert len(plan_of(tmp_path, allow_missing_captions=True).train) == 2


def test_captions_from_file_names(tmp_path: Path) -> None:
    """``caption_strategy: filename`` reads the name without its ending, underscores as blanks, and needs no text file."""
    picture(tmp_path / "pots" / "a_red__pot.v2.png", caption=None)
    (tmp_path / "d.yaml").write_text("[{id: x, instance_data_dir: pots, caption_strategy: filename}]")
    catalog = discover(tmp_path / "d.yaml")
    assert catalog.items[0].caption == "a red pot.v2"
    assert not catalog.missing_captions


def test_identity_is_content(tmp_path: Path) -> None:
    """An item's id follows bytes and caption, not its name or place."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    picture(tmp_path / "c.png", caption="another")
    made = st3.plan(discover(tmp_path), presets.playground(aspect_bucket_alignment=64))
    a, c, b = (p.item for p in made.hashed({str(i.path): file_digest(i.path) for i in made.catalog.items}).train)
    assert a.id == b.id
    assert c.id != a.id


# --- datasets.yaml ---------------------------------------------------------------------------------------------------


def test_relative_folders_are_beside_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder does not depend on where the program is started; entries that are disabled are left out."""
    picture(tmp_path / "a" / "pots" / "1.png")
    picture(tmp_path / "a" / "held" / "2.png", color=(1, 2, 3))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yaml = tmp_path / "a" / "datasets.yaml"
    yaml.write_text(
        "- {id: pots, instance_data_dir: pots, resolution: 64, repeats: 2}\n"
        "- {id: held, instance_data_dir: ./held, dataset_type: eval}\n"
        "- {id: off, instance_data_dir: nowhere, disabled: true}\n"
    )
    before = digest_of(tmp_path / "a")
    catalog = discover(yaml)
    assert [d.id for d in catalog.datasets] == ["pots", "held"]
    assert [i.path for i in catalog.items] == [tmp_path / "a" / "pots" / "1.png", tmp_path / "a" / "held" / "2.png"]
    plan = st3.plan(catalog, presets.playground())
    assert [(len(plan.train), len(plan.evaluation))] == [(3, 1)]
    assert digest_of(tmp_path / "a") == before


def test_every_mistake_of_the_yaml_is_in_one_report(tmp_path: Path) -> None:
    """Unknown keys with the nearest, bad values, missing keys and ids used twice are reported together."""
    yaml = tmp_path / "datasets.yaml"
    yaml.write_text(
        "- {id: a, instance_data_dir: x, resolutoin: 64}\n"
        "- {id: a, instance_data_dir: x, repeats: true}\n"
        "- {id: a, instance_data_dir: x}\n"
        "- {id: b}\n"
        "- {id: c, instance_data_dir: x, type: aws}\n"
    )
    with pytest.raises(ConfigError) as caught:
        discover(yaml)
    report = str(caught.value)
    assert report.startswith(f"{yaml}: 5 problems")
    for part in (
        "'a': unknown key 'resolutoin'; did you mean 'resolution'?",
        "repeats: ",
        "id 'a' is used twice",
        "'b': instance_data_dir",
        "'c': aws_bucket_name is missing; or write instance_data_dir: s3://bucket/folder, without type",
    ):
        assert part in report


@pytest.mark.parametrize(
    "text", ["", "{}", "a: 1", "[1]", "[[", "- {id: 1}", "- {1: 2}", "- {id: '', instance_data_dir: x}", "- &a {id: *a}"]
)
def test_a_yaml_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    """Anything but a list of data sets is a ConfigError that names the file."""
    yaml = tmp_path / "datasets.yml"
    yaml.write_text(text)
    with pytest.raises(ConfigError, match=r"datasets\.yml: \d+ problem"):
        discover(yaml)


@pytest.mark.parametrize(
    "text", ["[]", "- {id: a, instance_data_dir: pots, dataset_type: eval}", "- {id: a, instance_data_dir: pots, disabled: true}"]
)
def test_nothing_to_train_on_stops(tmp_path: Path, text: str) -> None:
    """Held-out or disabled data alone is not enough."""
    picture(tmp_path / "pots" / "a.png")
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(DataError, match="nothing to train on"):
        discover(tmp_path / "d.yaml")


# --- buckets ---------------------------------------------------------------------------------------------------------

LENGTHS = st.integers(16, 4000)
ALIGNMENTS = st.sampled_from([16, 32, 64, 128])


def placed(one: Item, alignment: int) -> list[Placement]:
    made = place(one, alignment)
    assert isinstance(made, list), made
    return made


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [
        (1280, 768, (1344, 768)), (1920, 1080, (1344, 768)), (768, 1024, (896, 1152)), (1000, 1500, (832, 1280)), (1500, 1000, (1280, 832)),
        (512, 2048, (512, 2048)), (3000, 3000, (1024, 1024)), (100, 100, (1024, 1024)),
    ],
)  # fmt: skip
def test_buckets_are_simpletuners(width: int, height: int, wanted: tuple[int, int]) -> None:
    """The worked examples of its tables at one megapixel in steps of 64."""
    (placement,) = placed(item(width, height, resolution=1024), 64)
    assert placement.bucket == wanted


def test_buckets_of_the_playground() -> None:
    """The sizes that the playground was trained at, from pictures of those shapes."""
    assert [placed(item(*size), 16)[0].bucket for size in ((224, 224), (224, 140), (140, 224))] == [(64, 64), (80, 48), (48, 80)]


@pytest.mark.parametrize(
    ("kind", "resolution", "shape", "wanted"),
    [
        ("pixel", 1024, 1.5, (1536, 1024)), ("pixel", 1024, 0.5, (1024, 2048)), ("area", 1.0, 1.0, (1024, 1024)),
        ("area", 0.25, 1.0, (512, 512)), ("area", 0.5, 1.0, (704, 704)), ("pixel_area", 1024, 1.0, (1024, 1024)),
    ],
)  # fmt: skip
def test_units_of_the_resolution(kind: Any, resolution: float, shape: float, wanted: tuple[int, int]) -> None:
    """Shorter side, megapixels, and side of a square of the same area."""
    assert bucket_of(Dataset(id="d", instance_data_dir="d", resolution=resolution, resolution_type=kind), shape, 64) == wanted


CUTS = st.fixed_dictionaries(
    {},
    optional={
        "crop": st.booleans(),
        "crop_aspect": st.sampled_from(["square", "preserve", "closest", "random"]),
        "crop_style": st.sampled_from(["center", "corner", "random"]),
        "crop_aspect_buckets": st.lists(st.floats(0.25, 4), min_size=1, max_size=5).map(tuple),
        "resolution_type": st.sampled_from(["pixel", "pixel_area"]),
        "max_upscale_threshold": st.floats(0, 3),
        "repeats": st.integers(0, 3),
        "flip": st.sampled_from(["none", "horizontal"]),
    },
)


@given(LENGTHS, LENGTHS, st.integers(128, 2048), ALIGNMENTS, CUTS, st.integers(0, 2))
@settings(deadline=None, max_examples=300)
def test_laws_of_a_placement(width: int, height: int, resolution: int, alignment: int, cuts: dict[str, Any], reduce: int) -> None:
    """Any picture at any resolution: sides in multiples, the cut inside the resized picture, no enlargement beyond the threshold."""
    if cuts.get("crop_aspect") in ("closest", "random"):
        cuts.setdefault("crop_aspect_buckets", (1.0,))
    large = {"maximum_image_size": resolution * 2.0, "target_downsample_size": resolution * 1.25} if reduce else {}
    dataset = Dataset(id="d", instance_data_dir="d", resolution=resolution, **cuts, **large)
    made = place(Item(dataset, Path("a"), width, height, "a", ("x",)), alignment)
    if not isinstance(made, list):
        assert dataset.max_upscale_threshold is not None
        assert "would be enlarged by more than max_upscale_threshold" in made.reason
        return
    assert len(made) == (dataset.repeats + 1) * (2 if dataset.flip == "horizontal" else 1)
    assert len({(p.copy, p.mirrored) for p in made}) == len(made)
    for placement in made:
        resized, left, top, bucket, mirrored = placement.geometry
        assert bucket == placement.bucket
        assert mirrored == placement.mirrored
        assert bucket.width % alignment == bucket.height % alignment == 0
        assert min(bucket) >= alignment
        assert 0 <= left <= resized[0] - bucket.width
        assert 0 <= top <= resized[1] - bucket.height
        assert 0 <= placement.cropped < 1
        assert abs(resized[0] / width - resized[1] / height) <= 1 / min(width, height), "one scale for both sides"
        if dataset.max_upscale_threshold is not None:
            assert enlargement(width, height, bucket) <= 1 + dataset.max_upscale_threshold
        if not dataset.crop or not reduce:
            assert resized[0] == bucket.width or resized[1] == bucket.height, "no slack on one side"
        if not dataset.crop or dataset.crop_style == "center":
            assert abs(resized[0] - bucket.width - 2 * left) <= 1
            assert abs(resized[1] - bucket.height - 2 * top) <= 1
        if dataset.crop and dataset.crop_style == "corner":
            assert (left + bucket.width, top + bucket.height) == resized
        if dataset.crop and dataset.crop_aspect == "square":
            assert bucket.width == bucket.height


def test_the_guides_example_of_a_large_picture() -> None:
    """Above 1536 px a picture is scaled to 1280 px and 1024 px are cut out of that; below, it just covers its bucket."""
    values: dict[str, Any] = {
        "id": "d", "instance_data_dir": "d", "resolution": 1024, "resolution_type": "pixel", "crop": True, "maximum_image_size": 1536,
        "target_downsample_size": 1280,
    }  # fmt: skip
    sizes = {(4000, 2000): (2560, 1280), (2000, 2000): (1280, 1280), (1536, 1536): (1024, 1024), (1400, 1600): (1024, 1170)}
    for (width, height), resized in sizes.items():
        (one,) = placed(Item(Dataset(**values), Path("a"), width, height, "a", ()), 64)
        assert one.geometry.resized == resized
        assert one.bucket == (1024, 1024)
    area = Dataset(**{**values, "resolution_type": "area", "resolution": 1.0, "maximum_image_size": 2.0, "target_downsample_size": 1.5})
    (one,) = placed(Item(area, Path("a"), 2000, 2000, "a", ()), 64)
    assert one.geometry.resized == (1225, 1225), "sqrt(1.5 million)"


def test_random_cuts_follow_the_picture_and_the_variant() -> None:
    """Variant j is a function of (the picture's bytes, j); the variants differ, and lie all over the room there is."""
    dataset = Dataset(id="d", instance_data_dir="d", resolution=64, crop=True, crop_style="random", crop_variants=40)
    (one,) = placed(Item(dataset, Path("a"), 640, 64, "bytes", ()), 16)
    lefts = [p.geometry.left for p in one.variants]
    (again,) = placed(Item(dataset, Path("other name"), 640, 64, "bytes", ()), 16)
    assert [p.geometry.left for p in again.variants] == lefts
    (other,) = placed(Item(dataset, Path("a"), 640, 64, "other bytes", ()), 16)
    assert [p.geometry.left for p in other.variants] != lefts
    assert min(lefts) < 100
    assert max(lefts) > 476
    assert all(0 <= left <= 576 for left in lefts)


def test_shapes_for_closest_and_random() -> None:
    """Closest takes the nearest shape by ratio; random draws one for each (picture, copy) and reaches all."""
    values: dict[str, Any] = {"id": "d", "instance_data_dir": "d", "resolution": 1024, "crop": True, "crop_aspect_buckets": (0.5, 1.0, 2.0)}
    closest = Dataset(**values, crop_aspect="closest")
    found = [placed(Item(closest, Path("a"), w, h, "a", ()), 64)[0].bucket for w, h in ((1000, 1000), (2100, 1000), (1000, 1300))]
    assert found == [(1024, 1024), (1472, 704), (1024, 1024)]
    free = Dataset(**values, crop_aspect="random", repeats=30)
    drawn = [p.bucket for p in placed(Item(free, Path("a"), 900, 900, "a", ()), 64)]
    assert set(drawn) == {(704, 1472), (1024, 1024), (1472, 704)}
    assert drawn == [p.bucket for p in placed(Item(free, Path("z"), 900, 900, "a", ()), 64)]


def test_a_resolution_below_the_alignment_is_explained() -> None:
    """No bucket fits: the error names both settings."""
    with pytest.raises(DataError, match=r"resolution 48 px is below aspect_bucket_alignment \(64 px\)"):
        place(item(64, 64, resolution=48), 64)


@given(st.integers(0, 5))
def test_repeats_are_extra_passes(repeats: int) -> None:
    """``repeats`` gives one placement more than its number, alike but for the copy."""
    made = placed(item(80, 64, repeats=repeats), 16)
    assert [p.copy for p in made] == list(range(repeats + 1))
    assert len({p.geometry for p in made}) == 1


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_with(rows: list[Placement], *, batch: int, accumulation: int, steps: int) -> Plan:
    catalog = st3.Catalog((), tuple(p.item for p in rows), (), ())
    return Plan(tuple(rows), (), ("",), catalog, batch, accumulation, steps, "cache", 4, 16)


def test_the_sentence_says_what_happens() -> None:
    """72 images in batches of 2 x 2 are 18 updates; 1,000 updates show each image 1000 * 4 / 72 = 55.6 times."""
    rows = [Placement(item(64, 64, str(n)), Bucket(64, 64)) for n in range(72)]
    assert plan_with(rows, batch=2, accumulation=2, steps=1000).sentence() == (
        "72 images, batch 2 x 2: 18 updates per epoch, 1,000 updates = each image 55.6 times"
    )
    assert plan_with(rows, batch=1, accumulation=1, steps=720_000).sentence(0.5) == (
        "72 images, batch 1: 72 updates per epoch, 720,000 updates = each image 10,000 times, about 100 h"
    )
    assert plan_with(rows, batch=4, accumulation=8, steps=1).sentence().endswith("2.2 updates per epoch, 1 updates = each image 0.44 times")


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 3), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_arithmetic_of_an_epoch(squares: int, wide: int, repeats: int, batch: int, accumulation: int) -> None:
    """Batches are counted bucket by bucket, the last of each may be short."""
    rows = [p for n in range(squares) for p in place(item(64, 64, str(n), repeats=repeats), 16)]
    rows += [p for n in range(wide) for p in place(item(160, 80, f"w{n}"), 16)]
    plan = plan_with(rows, batch=batch, accumulation=accumulation, steps=10)
    assert sum(plan.buckets.values()) == len(rows) == squares * (repeats + 1) + wide
    assert plan.batches_per_epoch == -(-squares * (repeats + 1) // batch) + -(-wide // batch)
    assert plan.updates_per_epoch * accumulation == pytest.approx(plan.batches_per_epoch)


def test_texts_and_steps_of_a_plan(tmp_path: Path) -> None:
    """Every text is listed once: captions in use, prompts, negative and the empty one; epochs become updates, rounded up."""
    for n in range(3):
        picture(tmp_path / "pots" / f"{n}.png", color=(n, 0, 0), caption=f"pot {n % 2}")
        picture(tmp_path / "held" / f"{n}.png", color=(n, 9, 0), caption=f"held {n}")
    (tmp_path / "d.yaml").write_text(
        "- {id: pots, instance_data_dir: pots, resolution: 64}\n- {id: held, instance_data_dir: held, dataset_type: eval, resolution: 64}\n"
    )
    catalog = discover(tmp_path / "d.yaml")
    config = presets.playground(
        validation_prompt="pot 1", validation_negative_prompt="blurred", num_eval_images=2, max_train_steps=None, num_train_epochs=3,
        train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    plan = st3.plan(catalog, config)
    assert plan.texts == ("", "blurred", "held 0", "held 1", "pot 0", "pot 1")
    assert plan.steps == 2, "3 epochs of 2 batches are 6 forward passes, and an update takes 4"
    assert st3.plan(catalog, config.replace(eval_loss_disable=True)).evaluation == ()
    assert "held out: 3 images, 2 of them judged (num_eval_images); texts to encode: 6" in str(plan)


def test_a_tilde_is_ones_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a folder and for a file of data sets."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pots").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pots" / "a.png")
    (tmp_path / "sets.yaml").write_text("- {id: pots, instance_data_dir: pots}\n")
    for source in ("~/pots", Path("~/sets.yaml")):
        assert [item.path for item in discover(source).items] == [tmp_path / "pots" / "a.png"]
