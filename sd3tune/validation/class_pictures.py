"""Pictures of a class by the base model, to keep it as it is while it learns: drawn into a folder with captions."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3tune.cache.states import Text, joined
from sd3tune.config.schema import RunConfig
from sd3tune.errors import DataError
from sd3tune.files import make_folder, write_text, write_with
from sd3tune.models import components
from sd3tune.models.encoders import encoders
from sd3tune.validation.sampler import decode, sample, start_noise
from sd3tune.validation.shots import guidance_of

ABOUT = "class-pictures.json"
"""The file that says how a folder's pictures were drawn."""


def draw(config: RunConfig, prompts: Sequence[str], folder: str | Path, count: int) -> Iterator[tuple[Path, bool]]:
    """Draw up to ``count`` pictures, the prompts in turn, each with its caption beside it; yields each with whether it was there.

    Picture i is a function of the model, the validation settings, prompt and ``validation_seed`` + i. A folder that was begun with
    the same ones is gone on with. Raises: DataError for another folder that is not empty; ModelError, FileError.
    """
    goal = Path(folder)
    _claim(goal, _about(config, prompts))
    files = [goal / f"{number:06d}.png" for number in range(count)]
    device, dtype = components.pick_device(), components.compute_dtype(config)
    if missing := [number for number, file in enumerate(files) if not file.exists()]:
        handle, wanted = encoders(config), [config.validation.validation_negative_prompt, *prompts]
        with handle.load() as loaded:
            given = dict(zip(wanted, loaded.encode_texts(wanted), strict=True))
        texts = [handle.conditioning.states(text, given.__getitem__) for text in wanted]
        negative, *positives = [Text(*(states[0] for states in joined([text]))) for text in texts]
        transformer, vae = components.load_transformer(config, device).eval(), components.load_vae(config, device)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        width, height = config.validation_sizes[0]
        shape = (transformer.config.in_channels, height // factor, width // factor)
    v = config.validation
    for number, file in enumerate(files):
        if number not in missing:
            yield file, True
            continue
        walk = sample(
            transformer, components.load_scheduler(config, v.validation_noise_scheduler, v.validation_shift),
            positives=[positives[number % len(prompts)]], negatives=[negative],
            noise_BCHW=start_noise(shape, [config.validation_seed + number], dtype).to(device),
            steps=v.validation_num_inference_steps, guidance=guidance_of(config),
        )  # fmt: skip
        picture = decode(vae, deque(walk, maxlen=1)[0][1])[0]
        write_text(file.with_suffix(".txt"), prompts[number % len(prompts)] + "\n")  # first, so that no picture is without one
        write_with(file, lambda draft, picture=picture: picture.save(draft, "PNG"))  # type: ignore[misc]
        yield file, False


def _about(config: RunConfig, prompts: Sequence[str]) -> str:
    names = (
        "pretrained_model_name_or_path", "model_flavour", "revision", "base_model_precision", "mixed_precision", "use_t5",
        "tokenizer_max_length", "t5_padding", "sd3_clip_uncond_behaviour", "sd3_t5_uncond_behaviour", "text_encoder_1_precision",
        "text_encoder_2_precision", "text_encoder_3_precision", "validation_negative_prompt", "validation_resolution",
        "validation_num_inference_steps", "validation_shift", "validation_noise_scheduler",
    )  # fmt: skip
    leaves = config.leaves()
    settings = {name: leaves[name] for name in names if name in leaves}
    about = {"prompts": list(prompts), "seed": config.validation_seed, "guidance": repr(guidance_of(config)), **settings}
    return json.dumps(about, indent=1, default=str) + "\n"


def _claim(folder: Path, about: str) -> None:
    """Take a new folder, or one that was begun alike. Raises: DataError."""
    note = folder / ABOUT
    if note.exists():
        if note.read_text() != about:
            raise DataError(f"{folder}: its pictures were drawn with other settings ({ABOUT}); choose a new folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: is not empty, and its pictures are not from this command; choose a new folder")
    make_folder(folder)
    write_text(note, about)
