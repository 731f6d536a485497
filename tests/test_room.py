"""A component that does not fit into what is free is refused before it is loaded, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workbench
from PIL import Image

import sd3tune as st
from sd3tune import playground
from sd3tune.errors import ModelError
from sd3tune.models import components, room
from sd3tune.models.quantize import bytes_of, expected_bytes

GB = 10**9
CPU = torch.device("cpu")


def machine(root: Path, files: dict[str, str]) -> Path:
    """A made-up /proc and /sys."""
    for name, text in {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_mem_available(tmp_path: Path) -> None:
    """Without a cgroup that limits, it is the kernel's own estimate."""
    assert room.available(machine(tmp_path, {})) == 8000000 * 1024
    unlimited = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.current": "1"}
    assert room.available(machine(tmp_path, unlimited)) == 8000000 * 1024


@pytest.mark.parametrize("limited", ["", "user/", "user/job/"])
def test_cgroup_v2(tmp_path: Path, limited: str) -> None:
    """The limit of the process's own group or of one above it, less what is used, pages of files apart."""
    top = f"sys/fs/cgroup/{limited}"
    files = {
        "proc/self/cgroup": "0::/user/job\n", f"{top}memory.max": "4000000000\n", f"{top}memory.current": "3000000000\n",
        f"{top}memory.stat": "anon 1\ninactive_file 500000000\nactive_file 20000000\nfile 9\n",
    }  # fmt: skip
    assert room.available(machine(tmp_path, files)) == 1_520_000_000


def test_cgroup_v1(tmp_path: Path) -> None:
    """Its own names of files; other controllers' groups do not count."""
    top = "sys/fs/cgroup/memory/job/"
    files = {
        "proc/self/cgroup": "7:cpu,cpuacct:/\n3:memory:/job\n1:name=systemd:/x\n", f"{top}memory.limit_in_bytes": "2000000000",
        f"{top}memory.usage_in_bytes": "1500000000", f"{top}memory.stat": "inactive_file 7\ntotal_inactive_file 100000000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712", "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
    }  # fmt: skip
    assert room.available(machine(tmp_path, files)) == 600_000_000


def test_this_machine() -> None:
    """Its reading is a plausible number."""
    assert 1e8 < room.available() < 1e14


@pytest.mark.parametrize(
    ("part", "precision", "says"),
    [
        ("text_encoder_3", "no_change", "use_t5: false, text_encoder_3_precision: int8-quanto, or build the cache on another machine"),
        ("text_encoder_3", "int8-quanto", "use_t5: false, text_encoder_3_precision: nf4-bnb, or build the cache on another machine"),
        ("text_encoder_3", "nf4-bnb", "use_t5: false, or build the cache on another machine"),
        ("text_encoder", "no_change", "text_encoder_1_precision: int8-quanto, or build the cache on another machine"),
        ("text_encoder_2", "nf4-bnb", "or build the cache on another machine"),
        ("transformer", "no_change", "base_model_precision: int8-quanto, or close what else uses this memory"),
        ("transformer", "nf4-bnb", "close what else uses this memory"),
        ("vae", "", "close what else uses this memory, or build the cache on another machine"),
    ],
)  # fmt: skip
def test_the_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch, part: str, precision: str, says: str) -> None:
    """Both figures and what is left to try."""
    monkeypatch.setattr(room, "available", lambda: 7.1 * GB)
    room.require(part, 7.1 * GB, precision=precision, device=CPU)
    with pytest.raises(ModelError) as caught:
        room.require(part, 9.6 * GB, precision=precision, device=CPU)
    assert str(caught.value) == f"{part}: needs 9.6 GB of memory, 7.1 GB free: {says}"


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps for itself but does not use counts as free."""
    for name, value in (("memory_reserved", 3 * GB), ("memory_allocated", 1 * GB), ("mem_get_info", (4 * GB, 8 * GB))):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert room.free_on(torch.device("cuda")) == (6 * GB, "GPU memory")


def test_a_build_stops_before_anything_is_loaded(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first part that does not fit, without a traceback of anybody else's; what has room is not asked about again."""
    config = bench.config(cache_dir=str(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(room, "available", lambda: asked.append(1) or (1e12 if len(asked) < 3 else 1000.0))
    with pytest.raises(ModelError, match=r"^text_encoder_3: needs 0\.\d+ GB of memory, 1e-06 GB free: use_t5: false, text_encoder_3_prec"):
        bench.cache(config)
    assert len(asked) == 3
    monkeypatch.setattr(room, "available", lambda: 1000.0)
    with pytest.raises(ModelError, match=r"^transformer: needs"):
        components.load_transformer(config, CPU)


@pytest.mark.parametrize("precision", ["no_change", pytest.param("int8-quanto", marks=pytest.mark.full), "nf4-bnb"])
def test_each_part_is_measured_before_it_is_loaded(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What is asked for is what is then held, for every encoder and for the transformer, plain and in fewer bits."""
    asked: dict[str, float] = {}
    monkeypatch.setattr(room, "require", lambda part, need, **_: asked.update({part: need}))
    config = bench.config(cache_dir=str(tmp_path / precision), base_model_precision=precision, text_encoder_3_precision=precision)
    held = bytes_of(components.load_transformer(config, CPU))
    assert asked["transformer"] == pytest.approx(held, rel=0.01)
    with st.encoders(config).load() as loaded:
        for number, part in enumerate(loaded.text_parts):
            loaded.encode_part(part, ["lock"])
            name = "text_encoder" + ("", "_2", "_3")[number]
            assert asked[name] == pytest.approx(bytes_of(loaded._held[1]), rel=0.01), name
        loaded.encode_images([Image.new("RGB", (64, 64))])
        assert asked["vae"] == pytest.approx(bytes_of(loaded._held), rel=0.01)


def test_tied_tensors_count_once() -> None:
    """T5's table of tokens stands under two names."""
    from transformers import T5EncoderModel

    whole: Any = T5EncoderModel.from_pretrained(playground.MODEL / "text_encoder_3")
    assert expected_bytes(whole, "no_change", rest=4, without=set(whole._tied_weights_keys)) == bytes_of(whole)


def test_tiles_after_out_of_memory_are_smaller_than_the_picture(bench: Workbench) -> None:
    """A picture of the models' own size is really encoded in parts, and looks alike but for their edges."""
    pictures = [Image.effect_mandelbrot((640, 384), (-2, -1, 1, 1), 50).convert("RGB")]
    with st.encoders(bench.config()).load() as loaded:
        whole = loaded.encode_images(pictures).mean_BCHW
        loaded._held.tile_sample_min_size, loaded._held.tile_latent_min_size = 1024, 128
        sizes: list[int] = []
        loaded._held.encoder.register_forward_pre_hook(lambda _, given: sizes.append(max(given[0].shape)))
        tiled = loaded.encode_images(pictures, tiled=True).mean_BCHW
    assert max(sizes) == 512
    assert tiled.shape == whole.shape
    assert float((tiled - whole).square().mean().sqrt() / whole.std()) < 0.2
