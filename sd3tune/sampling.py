"""Draw with an adapter that is trained: a run's, or any LoRA file, in a fresh process."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sd3tune.assembly import spec_of
from sd3tune.cache import CacheBuilder
from sd3tune.cache.reading import Cache
from sd3tune.config.advice import advice
from sd3tune.config.schema import RunConfig
from sd3tune.data.catalog import Catalog
from sd3tune.data.planning import Plan
from sd3tune.errors import CheckpointError, ConfigError, TrainingError
from sd3tune.files import file_digest
from sd3tune.models import adapters, components, lora_layouts, lycoris_adapters, merging, starting
from sd3tune.models.encoders import encoders
from sd3tune.records import ImageRecord, NoticeRecord, Record
from sd3tune.run_folder import RunFolder
from sd3tune.validation.grids import Grid
from sd3tune.validation.pictures import opened, source_of
from sd3tune.validation.shots import Shot, by_strength, in_words, shots_of
from sd3tune.validation.validator import at_strength, check, draw, painting

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Samples:
    """Pictures that were drawn, with their files. Displays itself in a notebook."""

    pictures: tuple[Image, ...]
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]

    def grid(self) -> Grid:
        """The pictures side by side."""
        return Grid((("", self.pictures),), self.prompts)

    def _repr_png_(self) -> bytes:
        if len(self.pictures) > 1:
            return self.grid().png()
        with io.BytesIO() as stream:
            self.pictures[0].save(stream, "PNG")
            return stream.getvalue()


def sample(
    file: str | Path, prompt: str | Sequence[str], *, out: str | Path = "samples", config: RunConfig | None = None, **settings: Any
) -> Samples:
    """Draw prompts with an adapter: a run folder, one of its checkpoints or pictures' adapters, or a LoRA file of any layout.

    ``settings`` are those of validation, such as ``validation_guidance=4.0`` or ``validation_adapter_strength=0.8``; the others are the
    run's, or those of ``config``, which must name the model for a file that lies in no run folder. Pictures are new files in ``out``.
    What is drawn, and in which steps skip-layer guidance is active, is printed first.
    Raises: CheckpointError, ConfigError, ModelError, FileError; TrainingError when a picture could not be drawn.
    """
    found = []
    for record in drawing(file, prompt, out=out, config=config, **settings):
        if isinstance(record, NoticeRecord):
            print(record.text)  # noqa: T201 (what is drawn, before it takes its time)
        elif isinstance(record, ImageRecord):
            found.append(record)
    if failed := next((record for record in found if record.problem), None):
        raise TrainingError(f"{failed.prompt!r} could not be drawn: {failed.problem}")
    return Samples(
        tuple(opened(Path(record.path)) for record in found),
        tuple(Path(record.path) for record in found), tuple(record.prompt for record in found),
    )  # fmt: skip


def drawing(
    file: str | Path, prompt: str | Sequence[str], *, out: str | Path = "samples", config: RunConfig | None = None, **settings: Any
) -> Iterator[Record]:
    """The same step by step: what is drawn, with the steps of skip-layer guidance and advice about it, then one record per step of the
    sampler and per picture."""
    adapter = weights_file(Path(file))
    chosen = config or config_of(adapter, settings)
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    own: dict[str, Any] = {"validation_prompt": prompts, "validation_prompt_library": False, "user_prompt_library": None}
    chosen = chosen.replace(**{**own, "validation_disable": False, "validation_disable_unconditional": True, **settings})
    device = components.pick_device()
    check(chosen, components.skeleton(chosen), device)
    said = [in_words(chosen), *(str(one) for one in advice(chosen, {"validation_guidance_skip_layers"}))]
    yield NoticeRecord(step=0, text="\n".join(said))
    texts = texts_of(chosen)
    with loaded(chosen, adapter, device) as (transformer, network), painting(chosen, transformer, texts.text, device) as painter:
        source = source_of(chosen, texts, str(device), "adapter", 0, file_digest(adapter))
        for strength, alike in by_strength(shots_of(chosen)):
            with at_strength(transformer, network, strength):
                yield from draw(painter, alike, source, lambda shot: new_file(Path(out).absolute(), shot))


def new_file(folder: Path, shot: Shot) -> Path:
    """A file for a picture that is not there yet: number, and the beginning of its prompt."""
    numbers = [int(p.name[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*.json")]
    words = re.sub(r"[^a-z0-9]+", "-", shot.prompt.lower()).strip("-")[:40].strip("-")
    return folder / f"{max(numbers, default=-1) + 1:04d}-{words or 'picture'}.png"


def weights_file(path: Path) -> Path:
    """The adapter that a path means: a file, a run folder's final one, or a checkpoint's. Raises: CheckpointError."""
    if path.is_file():
        return path.absolute()
    for name in ("lora.safetensors", "adapter.safetensors"):
        if (path / name).is_file():
            return (path / name).absolute()
    if path.is_dir() and (newest := RunFolder(path.absolute()).checkpoints()):
        return newest[-1] / "adapter.safetensors"
    what = "holds no adapter (lora.safetensors, or checkpoints)" if path.is_dir() else "there is no such file"
    raise CheckpointError(f"{path.absolute()}: {what}; name a .safetensors file, a run folder, or one of its checkpoints")


def run_of(path: Path) -> RunFolder | None:
    """The run folder that a file lies in, if it does."""
    return next((RunFolder(at) for at in path.parents[:3] if (at / "config.yaml").exists() and (at / "history.jsonl").exists()), None)


def config_of(adapter: Path, settings: dict[str, Any]) -> RunConfig:
    """The settings of the run that an adapter lies in, or those given, which must name the model. Raises: ConfigError."""
    folder = run_of(adapter)
    if folder is not None:
        return RunConfig.load(folder.config)
    if not settings.get("model_flavour") and not settings.get("pretrained_model_name_or_path"):
        raise ConfigError(
            [f"{adapter}: lies in no run folder, so the base model must be named: model_flavour (such as sd35-medium), or a configuration"],
            "sample",
        )
    return RunConfig.make(**settings)


def texts_of(config: RunConfig) -> Cache:
    """A cache with the texts that a configuration's pictures need; those that are not there yet are encoded. Raises: ModelError."""
    made = Plan(
        train=(), evaluation=(), texts=tuple(sorted({*config.validation_texts, ""})), catalog=Catalog((), (), (), ()), batch_size=1,
        accumulation=1, steps=0, cache_dir=config.run.cache_dir, vae_batch_size=1, text_batch_size=config.data.text_encoder_batch_size,
    )  # fmt: skip
    return CacheBuilder(made, encoders(config)).build()


@contextmanager
def loaded(config: RunConfig, adapter: Path | None, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The base model with an adapter's file in it (or alone), and its LyCORIS network if it is one; in evaluation mode.

    A run's own file is put in as it was while training, so pictures have the same bits. Raises: CheckpointError, ModelError.
    """
    transformer = components.load_transformer(config, device)
    network = None if adapter is None else put_in(transformer, config, adapter)
    for model in (transformer, *([network] if network is not None else [])):
        model.eval()
    yield transformer, network


def put_in(transformer: Any, config: RunConfig, adapter: Path) -> Any:
    """Add an adapter's file to a transformer; its LyCORIS network, if it is one. Raises: CheckpointError."""
    held, metadata = lora_layouts.read_tensors(adapter, f"{adapter}:")
    if "lycoris_config" in metadata or (run_of(adapter) is not None and config.adapter.lora_type == "lycoris"):
        described = json.loads(metadata["lycoris_config"]) if "lycoris_config" in metadata else None
        network, weights = lycoris_adapters.add_lycoris(
            transformer, described or lycoris_adapters.read_config(config.adapter.lycoris_config), seed=0
        )
        starting.begin_lycoris(adapter, weights)
        return network
    if held and all(name.startswith("transformer_blocks.") for name in held):  # the names of a checkpoint
        starting.exchange(str(adapter), adapters.add_lora(transformer, spec_of(config), seed=0), held)
        return None
    lora = lora_layouts.parse(held, metadata, str(adapter))
    merging.check_fit(lora, config, str(adapter))
    spec = spec_of_file(lora)
    starting.begin_with(adapter, adapters.add_lora(transformer, spec, seed=0), spec)
    return None


def exchange(transformer: Any, network: Any, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Give the adapter in a transformer the weights of another checkpoint (``where``); the bits are those of a fresh load.

    Raises: CheckpointError when they are of another adapter.
    """
    own = adapters.weights_in(transformer) if network is None else dict(network.named_parameters())
    starting.exchange(where, own, weights)


def spec_of_file(lora: lora_layouts.LoraFile) -> adapters.Spec:
    """An adapter with the layers and ranks of a file."""
    most = max(layer.rank for layer in lora.layers.values())
    ranks = {re.escape(name): layer.rank for name, layer in lora.layers.items() if layer.rank != most}
    dora = any(layer.magnitude is not None for layer in lora.layers.values())
    return adapters.Spec(tuple(lora.layers), most, float(most), dora=dora, ranks=ranks)
