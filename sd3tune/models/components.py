"""The parts of an SD3 pipeline, loaded one at a time from a folder in the diffusers layout.

Shapes: B pictures or texts, C latent channels, H x W latent pixels, L text tokens, D joint text width, P pooled width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd3tune import playground
from sd3tune.config.schema import RunConfig
from sd3tune.errors import FileError, ModelError
from sd3tune.files import digest, file_digest
from sd3tune.models import quantised_files, room, single_file
from sd3tune.models.hub import FLAVOURS, fetched, is_name
from sd3tune.models.loading import Change, Weights, fill
from sd3tune.models.quantize import expected_bytes, is_quantised, smaller

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = ("", "_2", "_3")
TEXT_NAMES = ("CLIP-L", "CLIP-G", "T5")
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


def model_folder(config: RunConfig) -> Path:
    """Folder of the base model, fetched from the hub if it is named there. Raises: ModelError when it is no pipeline of SD3."""
    named_as = config.model.pretrained_model_name_or_path or ""
    if config.model.model_flavour == "playground":
        folder = playground.MODEL
    elif config.model.model_flavour or (is_name(named_as) and not Path(named_as).exists()):
        without = () if config.model.use_t5 else ("text_encoder_3",)
        bare = ("transformer",) if single_path(config) else ()
        name = FLAVOURS.get(config.model.model_flavour or "", named_as)
        folder = fetched(name, revision=config.model.revision, without=without, bare=bare)
    else:
        folder = Path(named_as)
    if not folder.is_dir():
        raise ModelError(f"{folder.resolve()}: no such folder; set pretrained_model_name_or_path to a pipeline saved by diffusers")
    needed = [part for part in ("transformer", "vae", "scheduler", *TEXT_PARTS) if config.model.use_t5 or part != "text_encoder_3"]
    absent = [part for part in needed if not (folder / part).is_dir()]
    if absent:
        raise ModelError(f"{folder.resolve()}: not an SD3 pipeline in the diffusers layout; missing: {', '.join(absent)}")
    check_class(folder)
    return folder


def base_name(config: RunConfig) -> str:
    """The base model's name on the hub; of a folder or file here, the last part of its path."""
    name, flavour = config.model.pretrained_model_name_or_path or "", config.model.model_flavour or ""
    if not name:
        return FLAVOURS.get(flavour, flavour)
    return name if is_name(name) and not Path(name).exists() else PurePath(name).name


def check_class(folder: Path) -> None:
    """Raises: ModelError when the transformer in a folder is that of another family."""
    try:
        found = json.loads((folder / "transformer" / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'transformer' / 'config.json'}: cannot be read ({error}); download or copy the model again") from None
    if found != "SD3Transformer2DModel":
        raise ModelError(f"{folder.resolve()}: a model of another family ({found}); sd3tune trains SD3 and SD3.5")


def pick_device() -> torch.device:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Number format of the frozen weights and of the forward pass."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.model.mixed_precision]


def single_path(config: RunConfig) -> Path | None:
    """The single file that holds the transformer, if one is named."""
    named_as = config.model.pretrained_model_name_or_path
    return Path(named_as) if named_as and named_as.endswith(".safetensors") else None


def transformer_weights(config: RunConfig) -> Weights:
    """The transformer's tensors, of a folder or of a single file. Raises: ModelError."""
    path = single_path(config)
    if path is None:
        return Weights.of_folder(model_folder(config) / "transformer", config.model.variant)
    model = skeleton(config)
    return single_file.open_single(path, model.state_dict(), model.config.num_layers)


def load_transformer(config: RunConfig, device: torch.device) -> Any:
    """The frozen transformer, read and quantised layer by layer; what was quantised once is read from the cache. Raises: ModelError."""
    weights, dtype = transformer_weights(config), rest_dtype(config)
    precision, modulation = config.model.base_model_precision, config.model.modulation_precision
    transformer = skeleton(config)
    need = expected_bytes(transformer, precision, modulation=modulation, rest=dtype.itemsize)
    room.require("transformer", need, precision=precision, device=device)
    if precision == "no_change":
        fill(transformer, weights, dtype=dtype, device=device, change=_smaller(config))
        return transformer.requires_grad_(False).train()
    kept = Path(config.run.cache_dir).absolute() / "models" / f"{quantised_files.key(weights, precision, modulation, dtype)}.safetensors"
    if not quantised_files.read(kept, transformer, precision=precision, modulation=modulation, dtype=dtype, device=device):
        transformer = skeleton(config)
        fill(transformer, weights, dtype=dtype, device=device, change=_smaller(config))
        with suppress(FileError, OSError):  # then it is quantised again the next time
            quantised_files.write(kept, transformer)
    return transformer.requires_grad_(False).train()


def _smaller(config: RunConfig) -> Change:
    precision, modulation = config.model.base_model_precision, config.model.modulation_precision

    def change(name: str, module: nn.Module) -> nn.Module:
        if precision == "no_change" or not is_quantised(name, module, modulation):
            return module
        assert isinstance(module, nn.Linear)
        return smaller(module, precision)

    return change


def rest_dtype(config: RunConfig) -> torch.dtype:
    """Number format of the frozen weights that are not quantised."""
    if config.model.base_model_default_dtype == "fp32":
        return torch.float32
    return compute_dtype(config)


SHAPES: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192},
    "sd35-medium": {
        "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "sd35-large": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}  # fmt: skip
"""What differs between the released transformers. Source: their config.json files."""


def random(flavour: str, *, layers: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformer of a released architecture with random weights, whole or with its first ``layers`` blocks; nothing is downloaded."""
    from diffusers import SD3Transformer2DModel

    shape = dict(SHAPES[flavour])
    heads = shape["num_attention_heads"]
    if layers is not None:
        shape["num_layers"] = layers
        shape["dual_attention_layers"] = tuple(n for n in shape.get("dual_attention_layers", ()) if n < layers)
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
            caption_projection_dim=64 * heads, pooled_projection_dim=2048, **shape,
        )  # fmt: skip
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.normal_(0, 0.02)
    return model.requires_grad_(False)


def vae_dtype(config: RunConfig) -> torch.dtype:
    """Number format of the autoencoder."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.model.vae_dtype]


def load_vae(config: RunConfig, device: torch.device) -> Any:
    """The autoencoder. Raises: ModelError."""
    from diffusers import AutoencoderKL

    folder = model_folder(config) / "vae"
    with named(folder):
        with torch.device("meta"):
            empty = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        room.require("vae", expected_bytes(empty, "no_change", rest=vae_dtype(config).itemsize), precision="", device=device)
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=vae_dtype(config))
    if config.model.vae_enable_tiling:
        vae.enable_tiling()
    if config.model.vae_enable_slicing:
        vae.enable_slicing()
    return vae.requires_grad_(False).eval().to(device)


SOLVERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", "shift", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", "shift", {}),
    "dpm": ("DPMSolverMultistepScheduler", "flow_shift", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", "flow_shift", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}
"""Solver -> diffusers' class, what it calls the shift of noise levels, and what makes it one for SD3."""


def load_scheduler(config: RunConfig, solver: str, shift: float) -> Any:
    """A sampler's scheduler with the settings of the model's own."""
    import diffusers

    name, shifted, options = SOLVERS[solver]
    kind, folder = getattr(diffusers, name), model_folder(config) / "scheduler"
    if solver == "euler":
        return kind.from_pretrained(folder, shift=shift)
    return kind(**options, **{shifted: shift})


def skeleton(config: RunConfig) -> Any:
    """The transformer's structure without any values (on the meta device)."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(model_folder(config) / "transformer"))


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Name the folder when loading from it fails for want of a good file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({error}); download or copy the model again") from error


def folder_digest(folder: Path) -> str:
    """Digest of every file's bytes in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest(*(part for p in files for part in (p.relative_to(folder).as_posix(), file_digest(p))))


def pixels(pictures: Sequence[Image]) -> Tensor:
    """Pictures of one size as a float tensor B 3 H W in [-1, 1]."""
    rows = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in pictures]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1
