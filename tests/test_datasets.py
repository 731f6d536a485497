"""Every key of ``datasets.yaml``, where captions come from, and folders as people have them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import digest_of, picture

import sd3tune as st3
from sd3tune.config import presets
from sd3tune.data import discover
from sd3tune.data.captions import filtered, shuffled
from sd3tune.data.datasets import CaptionShuffle, Dataset
from sd3tune.data.entries import REFUSED, UNNECESSARY, read_datasets
from sd3tune.errors import ConfigError, DataError
from sd3tune.training.batches import Batches

GUIDE = [
    "id", "type", "dataset_type", "instance_data_dir", "disabled", "disable", "train_batch_size", "flip", "crop", "crop_aspect",
    "crop_aspect_buckets", "crop_style", "resolution", "resolution_type", "minimum_image_size", "maximum_image_size",
    "target_downsample_size", "minimum_aspect_ratio", "maximum_aspect_ratio", "max_upscale_threshold", "caption_strategy",
    "instance_prompt", "prepend_instance_prompt", "only_instance_prompt", "disable_multiline_split", "caption_shuffle",
    "caption_filter_list", "caption_dropout", "repeats", "probability", "max_num_samples", "start_step", "end_step", "start_epoch",
    "end_epoch", "timestep_sampling_offset", "is_regularisation_data", "is_regularization_data", "source_dataset_id", "parquet",
    "csv_file", "csv_caption_column", "dataset_name", "image_column", "caption_column", "split", "text_embeds", "image_embeds",
    "conditioning_type", "conditioning_data", "vae_cache_ondemand", "vae_cache_disable", "text_cache_ondemand", "text_cache_disable",
    "aspect_resolution_map", "cache_dir_vae", "cache_dir", "write_batch_size", "vae_batch_size", "text_encoder_batch_size",
    "skip_file_discovery", "metadata_backend", "preserve_data_backend_cache", "vae_cache_clear_each_epoch", "default",
    "delete_unwanted_images", "delete_problematic_images", "delete_nsfw_images", "video", "audio", "webshart", "grounding",
    "slider_strength", "hash_filenames",
]  # fmt: skip
"""Every key that people bring along."""


def entry(folder: Path, **values: Any) -> Path:
    """A ``datasets.yaml`` with one entry for ``folder / "in"``."""
    path = folder / "datasets.yaml"
    path.write_text(json.dumps([{"id": "a", "instance_data_dir": "in", **values}]))  # JSON is YAML
    return path


def captions_of(folder: Path, **values: Any) -> dict[str, tuple[str, ...]]:
    return {i.path.name: i.captions for i in discover(entry(folder, **values)).items}


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GUIDE)
def test_every_key_is_known(key: str) -> None:
    """Each is obeyed, or said to be unnecessary, or refused with a reason; none is both, and none is unknown."""
    fields = set(Dataset.__dataclass_fields__) | {"disable", "is_regularization_data"}
    assert [key in fields, key in UNNECESSARY, key in REFUSED].count(True) == 1


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path: Path, key: str) -> None:
    """Nobody trains on something else than the file says."""
    with pytest.raises(ConfigError) as caught:
        read_datasets(entry(tmp_path, **{key: True}))
    assert f"'a': {key}" in str(caught.value)
    assert "unknown" not in str(caught.value)


def test_a_switched_off_refusal_is_let_through(tmp_path: Path) -> None:
    """``delete_problematic_images: false`` is what happens anyway."""
    assert len(read_datasets(entry(tmp_path, delete_problematic_images=False))[0]) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"type": "aws"}, "aws_bucket_name is missing; or write instance_data_dir: s3://bucket/folder, without type"),
        ({"type": "huggingface", "instance_data_dir": "", "caption_strategy": "huggingface"}, "type huggingface needs dataset_name"),
        ({"type": "huggingface"}, "type huggingface has no files for caption_strategy textfile"),
        ({"caption_strategy": "huggingface"}, "caption_strategy huggingface needs type huggingface"),
        ({"type": "csv"}, "type csv needs csv_file"),
        ({"instance_data_dir": ""}, "instance_data_dir is missing: the folder of its pictures"),
        ({"start_step": 5, "end_step": 5}, "end_step is not above start_step"),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch is below start_epoch"),
        ({"aws_secret_access_key": "x"}, "secrets do not belong into this file"),
        ({"dataset_type": "video"}, "dataset_type video is out of scope"),
        ({"crop_stile": "center"}, "unknown key 'crop_stile'; did you mean 'crop_style'?"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect closest needs crop_aspect_buckets, for example [0.75, 1.0, 1.33]"),
        ({"maximum_image_size": 2000}, "maximum_image_size and target_downsample_size belong together"),
        ({"maximum_image_size": 2000, "target_downsample_size": 3000}, "target_downsample_size is larger than maximum_image_size"),
        ({"maximum_image_size": 2000, "target_downsample_size": 500}, "scaled down and up again"),
        ({"resolution": 1024, "resolution_type": "area"}, "is 1024 megapixels; did you mean pixel_area?"),
        ({"resolution": 1.0}, "resolution 1 is in px with resolution_type pixel_area; did you mean area (megapixels)?"),
        ({"crop_variants": 3}, "crop_variants needs crop: true and crop_style: random"),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio is above maximum_aspect_ratio"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt is missing"),
        ({"caption_strategy": "csv"}, "caption_strategy csv needs csv_file"),
        ({"caption_strategy": "parquet"}, "caption_strategy parquet needs parquet: {path: ...}"),
        ({"repeats": -1}, "repeats: greater than or equal to 0"),
        ({"repeats": True}, "repeats: a valid integer"),
        ({"caption_shuffle": {"count": "x"}}, "caption_shuffle.count: a valid integer"),
        ({"caption_shuffle": {"cuont": 2}}, "caption_shuffle.cuont: "),
        ({"disable": True, "disabled": True}, "disabled is set twice"),
    ],
)
def test_what_is_wrong_with_an_entry(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    """One sentence that names the entry and the key, and says what to do."""
    with pytest.raises(ConfigError) as caught:
        read_datasets(entry(tmp_path, **values))
    assert str(caught.value).splitlines()[0].endswith("datasets.yaml: 1 problem"), str(caught.value)
    assert "data set 'a': " in str(caught.value)
    assert says in str(caught.value)


SEED = """[
  {"id": "pseudo-camera-10k-sd3", "type": "local", "crop": true, "crop_aspect": "square", "crop_style": "center", "resolution": 1024,
   "minimum_image_size": 0, "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution_type": "pixel_area",
   "cache_dir_vae": "/cache/vae", "instance_data_dir": "in", "disabled": false, "skip_file_discovery": "",
   "caption_strategy": "filename", "metadata_backend": "discovery"},
  {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": true, "cache_dir": "cache/text", "disabled": false,
   "write_batch_size": 128}
]"""


def test_the_guides_two_entries(tmp_path: Path) -> None:
    """They work as they are; what the cache made unnecessary is said once."""
    picture(tmp_path / "in" / "a_red_pot.png", 1500, 1000)
    (tmp_path / "d.yaml").write_text(SEED)
    catalog = discover(tmp_path / "d.yaml")
    assert [i.captions for i in catalog.items] == [("a red pot",)]
    assert [note.split(" ")[0] for note in catalog.notes] == ["cache_dir_vae", "dataset_type", "metadata_backend", "skip_file_discovery"]
    plan = st3.plan(catalog, presets.playground(aspect_bucket_alignment=64))
    assert [(p.bucket, p.geometry.resized) for p in plan.train] == [((1024, 1024), (1536, 1024))]
    assert str(plan).count("cache_dir_vae is not needed") == 1


@given(
    st.dictionaries(
        st.sampled_from([*GUIDE, "x"]), st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats()), max_size=6
    )
)
@settings(deadline=None, max_examples=150)
def test_any_entry_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """No value of any key escapes as another exception."""
    with suppress(ConfigError):
        read_datasets(entry(tmp_path_factory.getbasetemp(), **values))


# --- captions --------------------------------------------------------------------------------------------------------


def test_lines_are_captions(tmp_path: Path) -> None:
    """Each line of a text file is a caption of its own, twice the same is one; an empty file is no caption."""
    picture(tmp_path / "in" / "a.png", caption="one\r\n\r\n  two \none\n")
    picture(tmp_path / "in" / "b.png", caption=" \n ")
    assert captions_of(tmp_path) == {"a.png": ("one", "two"), "b.png": ()}
    with pytest.raises(DataError, match=r"1 of 2 pictures have no caption, the first is .*b\.png"):
        st3.plan(discover(tmp_path / "datasets.yaml"), presets.playground())


def test_instance_prompts(tmp_path: Path) -> None:
    """Alone, before every caption, and instead of them."""
    picture(tmp_path / "in" / "a.png", caption="red\nblue")
    assert captions_of(tmp_path, caption_strategy="instanceprompt", instance_prompt="sks pot") == {"a.png": ("sks pot",)}
    assert captions_of(tmp_path, instance_prompt="sks", prepend_instance_prompt=True) == {"a.png": ("sks red", "sks blue")}
    assert captions_of(tmp_path, instance_prompt="sks", only_instance_prompt=True) == {"a.png": ("sks",)}
    assert captions_of(tmp_path, instance_prompt="sks") == {"a.png": ("red", "blue")}


@pytest.mark.parametrize("where", ["in/table.csv", "table.csv"])
def test_csv(tmp_path: Path, where: str) -> None:
    """Found inside the folder or beside it; names with and without the folders below; commas and quotes inside captions."""
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(tmp_path / "in" / name, caption=None)
    (tmp_path / where).write_bytes('﻿file_name,text\na.png,"a pot, ""red"""\nsub/b.png,two\n'.encode())
    found = captions_of(tmp_path, caption_strategy="csv", csv_file="table.csv", csv_caption_column="text")
    assert found == {"a.png": ('a pot, "red"',), "b.png": ("two",), "c.png": ()}


def test_csv_that_does_not_fit(tmp_path: Path) -> None:
    """A missing file, a missing column of names or of captions: each says which."""
    picture(tmp_path / "in" / "a.png")
    with pytest.raises(DataError, match=r"table\.csv: no such table of captions"):
        captions_of(tmp_path, caption_strategy="csv", csv_file="table.csv")
    (tmp_path / "table.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(DataError, match=r"no column 'caption' \(csv_caption_column\); its first line has \['file_name', 'text'\]"):
        captions_of(tmp_path, caption_strategy="csv", csv_file="table.csv")
    (tmp_path / "table.csv").write_text("who,caption\na.png,x\n")
    with pytest.raises(DataError, match="no column one of file_name, filename, image, path, name"):
        captions_of(tmp_path, caption_strategy="csv", csv_file="table.csv")


def test_jsonl(tmp_path: Path) -> None:
    """Columns by name, the fallback where a caption is empty, names without their ending."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name, caption=None)
    rows = [{"key": "a", "text": "one", "alt": "x"}, {"key": "b", "text": None, "alt": "two"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = {"path": "t.jsonl", "filename_column": "key", "caption_column": "text", "identifier_includes_extension": False}
    assert captions_of(tmp_path, caption_strategy="jsonl", parquet=table) == {"a.png": ("one",), "b.png": ()}
    table["fallback_caption_column"] = "alt"
    assert captions_of(tmp_path, caption_strategy="jsonl", parquet=table) == {"a.png": ("one",), "b.png": ("two",)}
    with pytest.raises(DataError, match=r"no column 'caption'; there are \['alt', 'key', 'text'\]"):
        captions_of(tmp_path, caption_strategy="jsonl", parquet={"path": "t.jsonl", "filename_column": "key"})
    for bad, says in (("{", "line 1 is not JSON"), ("[1]", "line 1 is not an object"), ('{"key": "a"}\n7', "line 2 is not an object")):
        (tmp_path / "t.jsonl").write_text(bad)
        with pytest.raises(DataError, match=says):
            captions_of(tmp_path, caption_strategy="jsonl", parquet=table)


def test_parquet(tmp_path: Path) -> None:
    """The same from a parquet file, where pyarrow is there; without it, the message names what to install."""
    picture(tmp_path / "in" / "a.png", caption=None)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        (tmp_path / "t.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"reading parquet needs pyarrow; pip install 'sd3tune\[datasets\]'"):
            captions_of(tmp_path, caption_strategy="parquet", parquet={"path": "t.parquet"})
        return
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a.png"], "caption": ["one"]}), tmp_path / "t.parquet")
    assert captions_of(tmp_path, caption_strategy="parquet", parquet={"path": "t.parquet"}) == {"a.png": ("one",)}
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        captions_of(tmp_path, caption_strategy="parquet", parquet={"path": "t.parquet"})


@pytest.mark.parametrize(
    ("caption", "rules", "result"),
    [
        ("a photo of a pot", ("photo of a ",), "a pot"), ("pot (red)", ("(red)",), "pot "), ("pot 1234", (r"\d+",), "pot "),
        ("a red pot", ("s/red/blue/",), "a blue pot"), ("a red pot", ("s/r(e)d/\\1/",), "a e pot"), ("a/b", (r"s/a\/b/c\/d/",), "c/d"),
        ("a red pot", ("s/red//",), "a  pot"), ("x", (), "x"), ("red red", ("s/red/blue/", "blue "), "blue"), ("pots", ("^pots$",), ""),
    ],
)  # fmt: skip
def test_filter_rules(caption: str, rules: tuple[str, ...], result: str) -> None:
    """A text is taken out, else it is a regular expression; ``s/this/that/`` replaces; in the order of the list."""
    assert filtered(caption, rules) == result


def test_filter_lists_in_files(tmp_path: Path) -> None:
    """A text file has a rule on each line, a JSON file a list; a bad rule or file is an error that names it."""
    picture(tmp_path / "in" / "a.png", caption="a photo of a red  pot")
    (tmp_path / "f.txt").write_text("photo of a\n\ns/red/blue/\n")
    (tmp_path / "f.json").write_text('["photo of a", "s/red/blue/"]')
    for value in ("f.txt", "f.json", ["photo of a", "s/red/blue/"]):
        assert captions_of(tmp_path, caption_filter_list=value) == {"a.png": ("a blue pot",)}
    with pytest.raises(DataError, match=r"caption_filter_list: '\(' is not a rule"):
        captions_of(tmp_path, caption_filter_list=["("])
    (tmp_path / "f.json").write_text("{}")
    with pytest.raises(DataError, match=r"f\.json: a filter list is a JSON list of texts"):
        captions_of(tmp_path, caption_filter_list="f.json")
    with pytest.raises(DataError, match=r"none\.txt: no such table"):
        captions_of(tmp_path, caption_filter_list="none.txt")


TAGS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8)


@given(TAGS, st.integers(0, 9), st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_laws_of_shuffling(tags: list[str], start: int, count: int, seed: int, original: bool) -> None:
    """The same tags in another order, the first ones in place; a function of caption, seed and number."""
    how = CaptionShuffle(count=count, seed=seed, position_start=start, include_original=original)
    made = shuffled(", ".join(tags), how)
    assert len(made) == count + original
    assert made == shuffled(", ".join(tags), how)
    for caption in made:
        assert sorted(caption.split(", ")) == sorted(tags)
        assert caption.split(", ")[:start] == tags[:start]
    assert shuffled("x", None) == shuffled("x", CaptionShuffle(enable=False)) == ["x"]


def test_several_captions_are_drawn_evenly_and_repeatably(tmp_path: Path) -> None:
    """Each caption of a picture comes about equally often, as a function of (seed, k)."""
    for n in range(8):
        picture(tmp_path / "in" / f"{n}.png", color=(n, 0, 0), caption="one\ntwo\nthree\nfour")
    plan = st3.plan(discover(entry(tmp_path, resolution=64)), presets.playground())
    assert {"one", "two", "three", "four"} <= set(plan.texts)
    cache: Any = type("Only", (), {"plan": plan})()
    seen = [c for k in range(400) for c in Batches(cache, seed=1, caption_dropout=0.2).captions(k)]
    counts = {text: seen.count(text) / len(seen) for text in ("", "one", "two", "three", "four")}
    assert all(abs(share - 0.2) < 0.04 for share in counts.values()), counts
    again = Batches(cache, seed=1, caption_dropout=0.2)
    assert [c for k in reversed(range(400)) for c in reversed(again.captions(k))] == seen[::-1]
    assert [c for k in range(400) for c in Batches(cache, seed=2, caption_dropout=0.2).captions(k)] != seen


# --- folders ---------------------------------------------------------------------------------------------------------


def test_odd_names_and_litter(tmp_path: Path) -> None:
    """Blanks, emoji, line ends, long names, other cases of one name, files without a picture's ending: found or passed over."""
    folder = tmp_path / "in"
    good = ["a b.png", "🏺.png", "line\nend.png", "x" * 240 + ".png", "A.PNG", "a.jpeg", "sub dir/c.png"]
    for n, name in enumerate(good):
        picture(folder / name, color=(n, 1, 1))
    for name in (".hidden.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/b.png", "@eaDir/c.png", "sub dir/.x/d.png"):
        picture(folder / name)
    (folder / "Thumbs.db").write_bytes(b"x")
    before = digest_of(tmp_path / "in")
    assert {i.path.relative_to(folder).as_posix() for i in discover(entry(tmp_path)).items} == set(good)
    assert digest_of(tmp_path / "in") == before


def test_links(tmp_path: Path) -> None:
    """Linked folders are read, a loop ends, a link to nothing is a row."""
    picture(tmp_path / "elsewhere" / "b.png", color=(9, 9, 9))
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nothing.png")
    catalog = discover(entry(tmp_path))
    assert sorted(i.path.name for i in catalog.items) == ["a.png", "b.png"]
    assert [p.path.name for p in catalog.problems] == ["gone.png"]


def test_files_that_vanish_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that goes away between listing and reading costs itself alone."""
    picture(tmp_path / "in" / "a.png")
    gone = picture(tmp_path / "in" / "b.png", color=(1, 2, 3))
    from sd3tune.data import images

    whole = images.size

    def size(path: Path) -> tuple[int, int]:
        if path == gone and path.exists():
            path.unlink()
        return whole(path)

    monkeypatch.setattr(images, "size", size)
    catalog = discover(entry(tmp_path))
    assert [i.path.name for i in catalog.items] == ["a.png"]
    assert [p.path.name for p in catalog.problems] == ["b.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_files_are_rows(tmp_path: Path) -> None:
    """No permission: a row with the reason."""
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", color=(1, 2, 3)).chmod(0)
    catalog = discover(entry(tmp_path))
    assert [p.path.name for p in catalog.problems] == ["b.png"]


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"minimum_image_size": 100}, {"big", "tall", "wide"}), ({"minimum_image_size": 0}, {"big", "small", "tall", "wide"}),
        ({"minimum_image_size": 0.02, "resolution_type": "area", "resolution": 1.0}, {"big", "tall", "wide"}),
        ({"minimum_image_size": 110, "resolution_type": "pixel"}, {"big"}),
        ({"minimum_aspect_ratio": 0.5}, {"big", "small", "wide"}), ({"maximum_aspect_ratio": 2.0}, {"big", "small", "tall"}),
    ],
)  # fmt: skip
def test_sizes_and_shapes_that_are_left_out(tmp_path: Path, values: dict[str, Any], left: set[str]) -> None:
    """Each limit leaves out exactly what is beyond it, with a reason."""
    for name, size in {"big": (400, 400), "small": (90, 90), "tall": (100, 400), "wide": (400, 100)}.items():
        picture(tmp_path / "in" / f"{name}.png", *size)
    catalog = discover(entry(tmp_path, **{"resolution": 64, **values}))
    assert {i.path.stem for i in catalog.items} == left
    limits = ("minimum_image_size", "minimum_aspect_ratio", "maximum_aspect_ratio")
    assert all(any(limit in p.reason for limit in limits) for p in catalog.problems)


def test_a_sample_does_not_depend_on_order(tmp_path: Path) -> None:
    """``max_num_samples`` takes the same pictures again, others for another id, and adding one changes at most one."""
    for n in range(12):
        picture(tmp_path / "in" / f"{n}.png", color=(n, 0, 0))
    names = {i.path.name for i in discover(entry(tmp_path, max_num_samples=5)).items}
    assert len(names) == 5
    assert names == {i.path.name for i in discover(entry(tmp_path, max_num_samples=5)).items}
    assert names != {i.path.name for i in discover(entry(tmp_path, max_num_samples=5, id="b")).items}
    picture(tmp_path / "in" / "new.png", color=(99, 0, 0))
    assert len(names - {i.path.name for i in discover(entry(tmp_path, max_num_samples=5)).items}) <= 1


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    """By content: the same bytes under another name in another data set are a row, and not in the plan."""
    for n in range(3):
        picture(tmp_path / "in" / f"{n}.png", color=(n, 0, 0), caption="x")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "other.png").write_bytes((tmp_path / "in" / "1.png").read_bytes())
    (tmp_path / "held" / "other.txt").write_text("another caption")
    (tmp_path / "d.yaml").write_text(
        "- {id: a, instance_data_dir: in, resolution: 64, repeats: 1}\n- {id: b, instance_data_dir: in, resolution: 64}\n"
        "- {id: h, instance_data_dir: held, resolution: 64, dataset_type: eval}\n"
    )
    catalog = discover(tmp_path / "d.yaml")
    plan = st3.plan(catalog, presets.playground())
    assert sorted(p.item.path.name for p in plan.train) == ["0.png", "0.png", "0.png", "2.png", "2.png", "2.png"]
    assert [p.item.path.name for p in plan.evaluation] == ["other.png"]
    assert [p.reason for p in catalog.problems] == ["is also held out, in data set 'h' as other.png; not trained on"] * 2


def test_doubles_are_said(tmp_path: Path) -> None:
    """The same bytes twice in one data set: both count, and a note says so."""
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes())
    (tmp_path / "in" / "b.txt").write_text("again")
    catalog = discover(entry(tmp_path))
    assert len(catalog.items) == 2
    assert len(catalog.notes) == 1
    assert "b.png is the same picture as a.png" in catalog.notes[0]


# --- the plan --------------------------------------------------------------------------------------------------------


def small(tmp_path: Path, what: str, **values: Any) -> Any:
    """Nine squares and two wide pictures in batches of four."""
    for n in range(9):
        picture(tmp_path / "in" / f"s{n}.png", 64, 64, color=(n, 0, 0))
    for n in range(2):
        picture(tmp_path / "in" / f"w{n}.png", 100, 60, color=(n, 9, 0))
    return st3.plan(discover(entry(tmp_path, resolution=64, **values)), presets.playground(small_bucket=what, train_batch_size=4))


def test_small_buckets(tmp_path: Path) -> None:
    """Short by default, with the ways out as lines to paste; merged, dropped with a reason, or an error."""
    plan = small(tmp_path, "short")
    assert [(str(g.bucket), len(rows)) for g, rows in plan.groups.items()] == [("64x64", 9), ("80x48", 2)]
    assert plan.batches_per_epoch == 3 + 1
    assert "a 80x48: 2 of a batch of 4, trained as one short batch; to change that: `repeats: 1`, or `train_batch_size: 2`" in str(plan)
    assert [len(rows) for rows in small(tmp_path, "merge").groups.values()] == [11]
    dropped = small(tmp_path, "drop")
    assert len(dropped.train) == 9
    assert [p.reason for p in dropped.left_out] == ["alone in the small bucket 80x48 (small_bucket: drop)"] * 2
    with pytest.raises(DataError, match=r"small_bucket: error\):\n  a 80x48: 2 of a batch of 4"):
        small(tmp_path, "error")
    assert small(tmp_path, "error", repeats=1).batches_per_epoch == 5 + 1


def test_pictures_that_are_too_small_to_enlarge(tmp_path: Path) -> None:
    """They are left out with a reason; when none is left the plan stops and says why."""
    picture(tmp_path / "in" / "big.png", 64, 64)
    picture(tmp_path / "in" / "small.png", 40, 40)
    plan = st3.plan(discover(entry(tmp_path, resolution=64, max_upscale_threshold=0.2)), presets.playground())
    assert [p.item.path.name for p in plan.train] == ["big.png"]
    assert "small.png: 40x40 px would be enlarged by more than max_upscale_threshold (20%) for 64 px" in str(plan)
    with pytest.raises(DataError, match=r"no picture is left to train on:\n .*would be enlarged"):
        st3.plan(discover(entry(tmp_path, resolution=256, max_upscale_threshold=0.2)), presets.playground())


def test_probability_moves_batches_forward(tmp_path: Path) -> None:
    """The epoch holds the same batches; those of the heavier data set stand earlier on the average."""
    for name in ("a", "b"):
        for n in range(20):
            picture(tmp_path / name / f"{n}.png", color=(n, len(name), ord(name)))
    (tmp_path / "d.yaml").write_text(
        "- {id: a, instance_data_dir: a, resolution: 64, train_batch_size: 2}\n"
        "- {id: b, instance_data_dir: b, resolution: 64, probability: 8}\n"
    )
    plan = st3.plan(discover(tmp_path / "d.yaml"), presets.playground(train_batch_size=4))
    assert plan.batches_per_epoch == 10 + 5
    cache: Any = type("Only", (), {"plan": plan})()
    places: dict[str, list[int]] = {"a": [], "b": []}
    for k in range(15 * 40):
        batch = Batches(cache, seed=3, caption_dropout=0).placements(k)
        (name,) = {p.item.dataset.id for p in batch}
        assert len(batch) == {"a": 2, "b": 4}[name]
        places[name].append(k % 15)
    mean = {name: sum(at) / len(at) for name, at in places.items()}
    assert (len(places["a"]), len(places["b"])) == (400, 200)
    assert mean["b"] < 3.5 < 7 < mean["a"], mean
