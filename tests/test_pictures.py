"""Pixels as the autoencoder sees them, from every kind of file; and a folder of hostile files."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import Workbench
from PIL import Image, ImageCms

import sd3tune as st3
from sd3tune.data.images import DRAFT, read_rgb, size


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def at(path: Path, x: int = 3, y: int = 3) -> tuple[int, int, int]:
    picture = read_rgb(path)
    assert picture.mode == "RGB"
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return value  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("mode", "color", "ending", "wanted"),
    [
        ("L", 90, "png", (90, 90, 90)), ("1", 1, "png", (255, 255, 255)), ("P", 0, "gif", (0, 0, 0)), ("RGB", (1, 2, 3), "bmp", (1, 2, 3)),
        ("I;16", 257 * 90, "png", (90, 90, 90)), ("I;16", 65535, "tiff", (255, 255, 255)), ("I", 257 * 200, "tiff", (200, 200, 200)),
        ("CMYK", (0, 0, 0, 0), "jpg", (255, 255, 255)), ("CMYK", (255, 0, 0, 0), "tiff", (0, 255, 255)),
        ("LAB", (128, 128, 128), "tiff", (119, 119, 119)),
        ("RGBA", (9, 8, 7, 255), "webp", (9, 8, 7)), ("YCbCr", (128, 128, 128), "jpg", (128, 128, 128)),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: object, ending: str, wanted: tuple[int, int, int]) -> None:
    """Grey, bilevel, palette, 16 bits, CMYK, LAB and transparent pictures have the colours that they mean."""
    path = tmp_path / f"a.{ending}"
    Image.new(mode, (16, 16), color).save(path, **({"lossless": True} if ending == "webp" else {}))  # type: ignore[arg-type]
    assert at(path) == pytest.approx(wanted, abs=2)


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    """They have no range that could be known."""
    Image.new("F", (16, 16), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="floating-point numbers have no range; save it with 8 or 16 bits"):
        read_rgb(tmp_path / "a.tiff")


def test_profiles_are_obeyed(tmp_path: Path) -> None:
    """Red and green swapped by a profile come out right; sRGB and damaged profiles change nothing; alpha is kept apart."""
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colour = (200, 100, 50)
    Image.new("RGB", (16, 16), colour).save(tmp_path / "srgb.png", icc_profile=srgb)
    Image.new("RGB", (16, 16), colour).save(tmp_path / "damaged.png", icc_profile=srgb[:200])
    Image.new("RGB", (16, 16), colour).save(tmp_path / "wrong.png", icc_profile=wide[:64] + b"GRAY" + wide[68:])
    assert {at(tmp_path / f"{name}.png") for name in ("srgb", "damaged")} == {colour}
    assert len(at(tmp_path / "wrong.png")) == 3
    lab = Image.new("RGB", (16, 16), colour)
    adobe = _gamma_profile()
    lab.save(tmp_path / "gamma.png", icc_profile=adobe)
    expected = ImageCms.profileToProfile(lab, ImageCms.ImageCmsProfile(io.BytesIO(adobe)), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert expected is not None
    assert at(tmp_path / "gamma.png") == expected.getpixel((3, 3)) != colour
    half = Image.new("RGBA", (16, 16), (*colour, 0))
    half.save(tmp_path / "clear.png", icc_profile=adobe)
    assert at(tmp_path / "clear.png") == (255, 255, 255)


def _gamma_profile() -> bytes:
    """An sRGB profile whose description and red primary are others, so that colours must move."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(data[128:132], "big")):
        tag = bytes(data[132 + 12 * i : 136 + 12 * i])
        offset = int.from_bytes(data[136 + 12 * i : 140 + 12 * i], "big")
        length = int.from_bytes(data[140 + 12 * i : 144 + 12 * i], "big")
        if tag == b"rXYZ":
            data[offset + 8 : offset + 12] = int(0.6 * 65536).to_bytes(4, "big")
        if tag == b"desc":
            data[offset + 12 : offset + length] = bytes(length - 12)
    return bytes(data)


def test_the_background_shows_through(tmp_path: Path) -> None:
    """Transparent pictures stand on the colour that the data set names, and on another latent."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", background="#102030").getpixel((3, 3)) == (16, 32, 48)
    assert read_rgb(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_the_first_frame_counts(tmp_path: Path) -> None:
    """Of an animation the first picture is used."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert at(tmp_path / "a.gif") == (255, 0, 0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_smaller_decoding_is_exact_enough(tmp_path: Path, orientation: int) -> None:
    """A JPEG is decoded smaller only where three times the target is left; the mean error then is below 1/255."""
    exif = Image.Exif()
    exif[274] = orientation
    rng = np.random.default_rng(0)
    frequency = np.hypot(768 * np.fft.fftfreq(768)[:, None], np.arange(513))
    spectrum = np.fft.rfft2(rng.normal(size=(4, 768, 1024))) / np.maximum(frequency, 1)
    grain = np.fft.irfft2(spectrum)
    grain /= grain.std(axis=(1, 2), keepdims=True)
    colours = 50 * grain[:1] + 10 * grain[1:]  # as in photographs, most of it is light and little of it colour
    whole = Image.fromarray(np.uint8(np.clip(128 + colours, 0, 255)).transpose(1, 2, 0))
    whole.save(tmp_path / "a.jpg", quality=90, exif=exif)
    upright = read_rgb(tmp_path / "a.jpg")
    for divisor in (2, 4, 8):
        wanted = (int(upright.width / divisor / DRAFT), int(upright.height / divisor / DRAFT))
        smaller = read_rgb(tmp_path / "a.jpg", wanted=wanted)
        assert smaller.size == (upright.width // divisor, upright.height // divisor)
        one, other = (np.asarray(p.resize(wanted, Image.Resampling.LANCZOS), dtype=float) for p in (upright, smaller))
        assert np.abs(one - other).mean() <= 1.0
    assert read_rgb(tmp_path / "a.jpg", wanted=(upright.width // 2 + 1, upright.height // 2 + 1)).size == upright.size


def hostile(folder: Path) -> None:
    """More than sixty files that are not what they seem, and three good pictures."""
    folder.mkdir()
    for n in range(3):
        noise(96, 96, n).save(folder / f"good{n}.png")
    for kind, options in (("png", {}), ("jpg", {"quality": 90}), ("webp", {}), ("tiff", {}), ("gif", {})):
        stream = io.BytesIO()
        noise(80, 80, 9).save(stream, "JPEG" if kind == "jpg" else kind.upper(), **options)
        data = stream.getvalue()
        for tenth in range(10):
            (folder / f"cut{tenth}.{kind}").write_bytes(data[: len(data) * tenth // 10])
        (folder / f"zeros.{kind}").write_bytes(data[:40] + bytes(len(data) - 40))
        (folder / f"text.{kind}").write_text("not a picture")
        (folder / f"suffix.{kind}").write_bytes(folder.joinpath("good0.png").read_bytes())
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        noise(100, 60, 20 + orientation).save(folder / f"exif{orientation}.jpg", exif=exif)
    Image.new("CMYK", (64, 64), (9, 9, 9, 9)).save(folder / "cmyk.jpg")
    Image.new("I;16", (64, 64), 9000).save(folder / "wide.png")
    Image.new("F", (64, 64), 0.1).save(folder / "float.tiff")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("RGB", (4000, 20)).save(folder / "line.png")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere")
    for path in folder.iterdir():
        path.with_suffix(".txt").write_text(path.stem)
    (folder / "good1.txt").write_bytes(b"\xff\xfe\x00")


def test_a_folder_of_hostile_files(bench: Workbench, tmp_path: Path) -> None:
    """A table of what is left out, no warning, no crash; what is good is encoded and trains."""
    folder = tmp_path / "in"
    hostile(folder)
    files = [p for p in folder.iterdir() if p.suffix != ".txt" and p.is_file()]
    assert len(files) >= 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catalog = st3.discover(folder)
    config = bench.config(cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"), small_bucket="short", max_train_steps=5)
    plan = st3.plan(catalog, config.replace(aspect_bucket_alignment=16))
    small = st3.plan(st3.discover(_at_64(tmp_path)), config)
    cache = st3.CacheBuilder(small, st3.encoders(config)).build()
    used = {p.item.path.name for p in cache.plan.train}
    left = {p.path.name: p.reason for p in cache.plan.problems}
    assert used.isdisjoint(left)
    assert {"good0.png", "good2.png", "cmyk.jpg", "wide.png", *(f"exif{n}.jpg" for n in range(1, 9))} <= used
    assert {"bomb.png", "float.tiff", "gone.png", "good1.png", "text.png", "cut0.jpg", "cut5.png", "zeros.jpg"} <= set(left)
    assert "good1.txt is not UTF-8 text" in left["good1.png"]
    assert used | set(left) == {p.name for p in folder.iterdir() if p.suffix.lower() != ".txt" and not p.is_dir()}
    assert all(reason and "\n" not in reason for reason in left.values())
    assert len(plan.problems) + len(plan.train) == len(small.problems) + len(small.train)
    trainer = st3.Trainer(config, cache)
    assert [record.step for record in trainer.run() if record.type == "step"] == [1, 2, 3, 4, 5]


def _at_64(folder: Path) -> Path:
    path = folder / "d.yaml"
    path.write_text("[{id: a, instance_data_dir: in, resolution: 64}]")
    return path


def test_size_is_of_the_picture_as_shown(tmp_path: Path) -> None:
    """Header sizes agree with what is decoded, for every orientation."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        noise(48, 32).save(tmp_path / "a.jpg", exif=exif)
        assert size(tmp_path / "a.jpg") == read_rgb(tmp_path / "a.jpg").size
