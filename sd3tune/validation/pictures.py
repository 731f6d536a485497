"""Pictures on the disk: each with all that it was drawn from inside it, and together in one grid."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.cache.reading import Cache
from sd3tune.config.schema import RunConfig
from sd3tune.errors import FileError
from sd3tune.files import digest, make_folder, write_text, write_with
from sd3tune.models import components
from sd3tune.records import ImageRecord
from sd3tune.run_folder import RunFolder
from sd3tune.validation.comfyui import unmatched, workflow
from sd3tune.validation.grids import KEY
from sd3tune.validation.shots import Shot
from sd3tune.validation.snippet import sample_code

Kind = Literal["base", "adapter", "ema"]
"""Of the model without the adapter, with it, or with its running average."""

FILES: dict[str, str | None] = {"base": None, "adapter": "lora.safetensors", "ema": "lora-ema.safetensors"}
"""Whose picture it is -> the file of a finished run that draws it elsewhere."""


@dataclass(frozen=True)
class Source:
    """Where a picture comes from besides its shot."""

    config: RunConfig
    device: str
    kind: Kind
    step: int
    adapter: str = ""
    """Digest of the adapter's file in the run's ``adapters``; empty for the base model."""
    model: str = ""
    """Digest of all that the base model's pictures depend on: weights, encoders and the formats they are computed in."""
    versions: Mapping[str, str] = field(default_factory=dict)


def source_of(config: RunConfig, cache: Cache, device: str, kind: Kind, step: int, adapter: str = "") -> Source:
    """The source of pictures that are drawn now; the cache knows its encoders already, and finding that out reads every byte of them."""
    from importlib.metadata import version

    weights = components.transformer_weights(config).stamp
    m = config.model
    settings = (m.base_model_precision, m.modulation_precision, m.base_model_default_dtype, m.mixed_precision, m.vae_dtype)
    model = digest(
        weights, *cache.fingerprints, str(cache.conditioning), *settings, m.attention_mechanism,
        str(m.vae_enable_tiling),
    )  # fmt: skip
    return Source(config, device, kind, step, adapter, model, {name: version(name) for name in ("torch", "diffusers")})


def model_settings(config: RunConfig) -> dict[str, Any]:
    """How the model is computed: settings that a resumed run may have changed. Without the place of a model on this machine."""
    return {name: value for name, value in dataclasses.asdict(config.model).items() if name != "pretrained_model_name_or_path"}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings of validation."""
    return {name: value for name, value in config.leaves().items() if name.startswith("validation_")}


def record_of(shot: Shot, source: Source, path: Path | None, problem: str = "") -> ImageRecord:
    """The record of a picture, or of one that could not be drawn."""
    return ImageRecord(
        step=source.step, prompt=shot.prompt, path="" if path is None else str(path), seed=shot.seed, width=shot.width, height=shot.height,
        guidance=shot.guidance.scale, skip_layers=shot.guidance.skip_layers, name=shot.name, kind=source.kind, problem=problem,
    )  # fmt: skip


def write_problem(path: Path, shot: Shot, source: Source, why: str) -> ImageRecord:
    """Write what should have been drawn and why it could not be, where the picture would lie. Raises: FileError."""
    record = record_of(shot, source, None, why)
    make_folder(path.parent)
    for stale in (path, comfyui_file(path)):
        stale.unlink(missing_ok=True)
    write_text(path.with_suffix(".json"), json.dumps({**record.as_dict(), "shot": shot.as_dict()}, indent=1) + "\n")
    return record


def write_picture(path: Path, picture: Image.Image, shot: Shot, batch: Sequence[Shot], source: Source) -> ImageRecord:
    """Write a picture with what it was drawn from inside, and the same beside it as JSON. Raises: FileError.

    A workflow that draws the same in ComfyUI, as nearly as it can, is inside too and in a file beside it: drop either on ComfyUI's
    window. What it cannot match is listed with the settings.
    """
    record, adapter, beside = record_of(shot, source, path), FILES[source.kind], comfyui_file(path)
    place = path.parts[-3:] if path.parts[-3:-2] == ("images",) else path.parts[-1:]  # nothing of where a person keeps it
    about = {
        **record.as_dict(), "path": "/".join(place), "shot": shot.as_dict(), "batch": [one.as_dict() for one in batch],
        "place": list(batch).index(shot), "adapter": source.adapter, "model": source.model, "device": source.device,
        "versions": dict(source.versions), "code": sample_code(source.config, shot, adapter=adapter),
        "settings": settings_of(source.config),
        "model_settings": model_settings(source.config),
        "comfyui": {"workflow": beside.name, "unmatched": unmatched(source.config, shot, adapter)},
    }  # fmt: skip
    described, info = json.dumps(about, indent=1, default=str), PngInfo()
    info.add_text(KEY, described)
    nodes = workflow(source.config, shot, adapter)
    info.add_text("prompt", json.dumps(nodes))
    make_folder(path.parent)
    write_with(path, lambda draft: picture.save(draft, "PNG", pnginfo=info))
    write_text(beside, json.dumps(nodes, indent=1) + "\n")
    write_text(path.with_suffix(".json"), described + "\n")
    return record


def comfyui_file(picture: Path) -> Path:
    """The file with a picture's ComfyUI workflow, beside the picture."""
    return picture.with_suffix(".comfyui.json")


def about(path: Path) -> dict[str, Any]:
    """What a picture of ours was drawn from. Raises: FileError when it is none, or lost its texts."""
    try:
        with Image.open(path) as opened:
            opened.load()
            found = dict(json.loads(opened.info[KEY]))
        for row in (found["shot"], *found["batch"]):
            Shot.of(row)
        how = dict(found.get("model_settings", {}))
        needed = {name: found[name] for name in ("adapter", "kind", "step", "versions", "device")}
        return {"model": "", **found, **needed, "model_settings": how}
    except FileNotFoundError:
        raise FileError(f"{path}: there is no such picture") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise FileError(
            f"{path}: holds no settings of sd3tune that can be read ({type(error).__name__}: {error}); some programs and sites leave "
            "them out: use the original from the run folder"
        ) from None


# --- what a run has drawn ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A picture of a run folder."""

    path: Path
    shot: Shot
    kind: Kind
    problem: str = ""
    adapter: str = ""
    """Digest of the adapter that it was drawn with."""
    model: str = ""
    """Digest of the model that drew it, see `Source.model`."""
    model_settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


def drawn(folder: RunFolder, step: int) -> list[Found]:
    """The pictures of a step, in the order they were drawn; those that cannot be read are not among them."""
    return [found for path in sorted(folder.images(step).glob("*.json")) if (found := found_at(path)) is not None]


def found_at(path: Path) -> Found | None:
    """The picture that a JSON file beside it describes; nothing when that cannot be read."""
    try:
        row = json.loads(path.read_text())
        about, how = (row.get("adapter", ""), row.get("model", "")), row.get("model_settings", {})
        return Found(path.with_suffix(".png"), Shot.of(row["shot"]), row["kind"], row["problem"], *about, how)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def of_shots(folder: RunFolder, step: int, kind: Kind, shots: Sequence[Shot]) -> list[Found]:
    """The pictures of some shots that were drawn at a step."""
    there = {found.shot: found for found in drawn(folder, step) if found.kind == kind and found.path.exists() and not found.problem}
    return [there[shot] for shot in shots if shot in there]


class Places:
    """Files for the pictures of a step: ``00.png``, for the running average ``00-ema.png``; the base's are those of step 0.

    A shot that was drawn at this step has its file already; of the base model every setting counts, so that rows stay comparable.
    """

    def __init__(self, folder: RunFolder, step: int, kind: Kind) -> None:
        self._folder, self._kind = folder.images(step), kind
        self._ending = {"base": "", "adapter": "" if step else "-start", "ema": "-ema"}[kind]
        self._taken = {self._key(found.shot): found.path for found in drawn(folder, step) if found.kind == kind}

    def __call__(self, shot: Shot) -> Path:
        """The file of a shot."""
        return self._taken.setdefault(self._key(shot), self._folder / f"{len(self._taken):02d}{self._ending}.png")

    def _key(self, shot: Shot) -> Any:
        return shot if self._kind == "base" else shot.place


def title(shot: Shot, among: Sequence[Shot]) -> str:
    """What tells a shot from others with the same prompt."""
    same = [other for other in among if other.prompt == shot.prompt]
    parts = [shot.name if len({other.name for other in same}) > 1 else shot.prompt or "no prompt"]
    if len({(other.width, other.height) for other in same}) > 1:
        parts.append(f"{shot.width}x{shot.height}")
    if len({other.seed for other in same}) > 1:
        parts.append(f"seed {shot.seed}")
    return " ".join(parts)


def cell_of(found: Found | None, most: float | None = None) -> Image.Image | str | None:
    """A picture (of at most so many pixels), or why there is none."""
    if found is None or found.problem:
        return None if found is None else found.problem
    if not found.path.exists():
        return None
    picture = opened(found.path)
    share = 1.0 if most is None else (most / (picture.width * picture.height)) ** 0.5
    if share < 1:
        picture.thumbnail((max(1, round(share * picture.width)), max(1, round(share * picture.height))))
    return picture


def opened(path: Path) -> Image.Image:
    """A picture's pixels."""
    with Image.open(path) as file:
        return file.convert("RGB")
