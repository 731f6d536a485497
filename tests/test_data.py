"""What is found in folders, where captions come from, how pictures are cut."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sd3tune as st3
from sd3tune.config import presets
from sd3tune.data.buckets import Bucket, Placement, Plan, buckets, nearest_bucket, place
from sd3tune.data.catalog import Dataset, Item, discover
from sd3tune.data.images import read_rgb, size
from sd3tune.errors import ConfigError, DataError


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
    return Item(name, dataset, Path(name), width, height, name, f"caption {name}")


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
    with pytest.raises(DataError, match=r"empty: it holds no picture \(\.bmp"):
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
    assert discover(tmp_path).items[0].caption == caption


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
    a, c, b = discover(tmp_path).items
    assert a.id == b.id
    assert a.pixels == b.pixels == c.pixels
    assert c.id != a.id


# --- datasets.yaml ---------------------------------------------------------------------------------------------------


def test_relative_folders_are_beside_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder does not depend on where the program is started; entries that are disabled are left out."""
    picture(tmp_path / "a" / "pots" / "1.png")
    picture(tmp_path / "a" / "held" / "2.png")
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
        "'local'",
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

SIDES = st.tuples(st.integers(16, 2048), st.sampled_from([16, 32, 64, 128])).filter(lambda pair: pair[0] >= pair[1])
LENGTHS = st.integers(16, 4000)


def test_buckets_of_the_playground() -> None:
    """The sizes at 64 px in steps of 16, and at 1024 px in steps of 64, are these."""
    assert buckets(64, 16) == ((48, 80), (64, 64), (80, 48))
    wide = ((1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704))
    assert set(buckets(1024, 64)) == {(1024, 1024), *wide, *((height, width) for width, height in wide)}


@given(SIDES)
@settings(deadline=None)
def test_laws_of_buckets(sides: tuple[int, int]) -> None:
    """Sides are multiples, the area is within the resolution's, 2:1 at most, every bucket has its transpose, a square is among them."""
    resolution, alignment = sides
    found = buckets(resolution, alignment)
    square = resolution // alignment * alignment
    assert Bucket(square, square) in found
    for bucket in found:
        assert bucket.width % alignment == bucket.height % alignment == 0
        assert 0 < bucket.width * bucket.height <= resolution**2
        assert max(bucket) <= 2 * min(bucket)
        assert Bucket(bucket.height, bucket.width) in found


@given(LENGTHS, LENGTHS, st.sampled_from([(64, 16), (512, 64), (1024, 64), (1000, 64)]))
@settings(deadline=None)
def test_the_nearest_bucket_is_nearest_and_symmetric(width: int, height: int, sides: tuple[int, int]) -> None:
    """No other bucket is nearer in log aspect, and a turned picture gets the turned bucket."""
    choices = buckets(*sides)
    found = nearest_bucket(width, height, choices)

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    assert distance(found) == min(map(distance, choices))
    assert nearest_bucket(height, width, choices) == Bucket(found.height, found.width)


@pytest.mark.parametrize(("resolution", "alignment"), [(64, 16), (1024, 64), (1000, 64), (512, 64)])
def test_a_square_stays_square(resolution: int, alignment: int) -> None:
    """A square picture lands in the largest square and loses nothing."""
    (placement,) = place(item(300, 300, resolution=resolution), alignment)
    side = resolution // alignment * alignment
    assert placement.bucket == (side, side)
    assert placement.cropped == 0


@given(LENGTHS, LENGTHS, SIDES, st.booleans())
@settings(deadline=None, max_examples=200)
def test_geometry_covers_the_bucket(width: int, height: int, sides: tuple[int, int], crop: bool) -> None:
    """The resized picture covers the bucket with no slack on one side, the cut lies inside it and in its middle."""
    (placement,) = place(item(width, height, resolution=sides[0], crop=crop), sides[1])
    resized, left, top, bucket = placement.geometry
    assert resized[0] >= bucket.width
    assert resized[1] >= bucket.height
    assert resized[0] == bucket.width or resized[1] == bucket.height
    assert 0 <= left <= resized[0] - bucket.width
    assert 0 <= top <= resized[1] - bucket.height
    assert abs(resized[0] - bucket.width - 2 * left) <= 1
    assert abs(resized[1] - bucket.height - 2 * top) <= 1
    assert 0 <= placement.cropped < 1
    scale = max(bucket.width / width, bucket.height / height)
    assert abs(resized[0] - width * scale) <= 1
    assert abs(resized[1] - height * scale) <= 1
    assert not crop or bucket.width == bucket.height


def test_a_resolution_below_the_alignment_is_explained() -> None:
    """No bucket fits: the error names both settings."""
    with pytest.raises(DataError, match=r"resolution 48 px is below aspect_bucket_alignment \(64 px\)"):
        place(item(64, 64, resolution=48), 64)


@given(st.integers(0, 5))
def test_repeats_are_extra_passes(repeats: int) -> None:
    """``repeats`` gives one placement more than its number, alike but for the copy."""
    made = place(item(80, 64, repeats=repeats), 16)
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
    assert "held out: 2 images; texts to encode: 6" in str(plan)
