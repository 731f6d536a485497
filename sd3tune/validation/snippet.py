"""Python that draws a picture of ours with stock diffusers."""

from __future__ import annotations

from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.models.components import SOLVERS, base_name
from sd3tune.validation.shots import Shot

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def sample_code(config: RunConfig, shot: Shot, repository: str | None = None, *, adapter: str | None = "lora.safetensors") -> str:
    """Code that draws a shot with an adapter's file in a repository on the hub or in the working folder, or without one."""
    m, lycoris = config.model, adapter is not None and config.adapter.lora_type == "lycoris"
    playground = m.model_flavour == "playground"
    scheduler, shift, options = SOLVERS[shot.solver]
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    loaded = "MODEL" if playground else repr(base_name(config))
    without = "" if m.use_t5 else ", text_encoder_3=None, tokenizer_3=None"
    code = [
        "import torch",
        f"from diffusers import {scheduler}, StableDiffusion3Pipeline",
        *(["from huggingface_hub import hf_hub_download"] if lycoris and repository else []),
        *(["from lycoris import create_lycoris_from_weights"] if lycoris else []),
        *(["from sd3tune.playground import MODEL"] if playground else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"pipeline = StableDiffusion3Pipeline.from_pretrained({loaded}, torch_dtype=torch.{DTYPES[m.mixed_precision]}{without})",
        f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config, {shift}={shot.shift:g}{arguments})",
        *(_adapter(shot, repository, adapter, lycoris=lycoris) if adapter is not None else []),
        "pipeline.to(device)",
        "picture = pipeline(",
        *_call(shot, m.tokenizer_max_length),
        ").images[0]",
        'picture.save("picture.png")',
    ]
    return "\n".join(code) + "\n"


def _adapter(shot: Shot, repository: str | None, name: str, *, lycoris: bool) -> list[str]:
    if lycoris:
        file = f'"{name}"' if repository is None else f'hf_hub_download({repository!r}, "{name}")'
        return [f"network, _ = create_lycoris_from_weights({shot.strength:g}, {file}, pipeline.transformer)", "network.merge_to()"]
    place: Any = "." if repository is None else repository
    lines = [f'pipeline.load_lora_weights({place!r}, weight_name="{name}", adapter_name="lora")']
    return lines if shot.strength == 1 else [*lines, f'pipeline.set_adapters("lora", {shot.strength:g})']


def _call(shot: Shot, length: int) -> list[str]:
    g = shot.guidance
    lines = [
        f"prompt={shot.prompt!r}, negative_prompt={shot.negative!r},",
        f"guidance_scale={g.scale:g}, num_inference_steps={shot.steps},",
        f"width={shot.width}, height={shot.height}, max_sequence_length={length},",
    ]
    if g.skip_layers and g.scale > 1:
        lines.append(f"skip_guidance_layers={list(g.skip_layers)}, skip_layer_guidance_scale={g.skip_scale:g},")
        lines.append(f"skip_layer_guidance_start={g.skip_start:g}, skip_layer_guidance_stop={g.skip_stop:g},")
    return ["    " + line for line in [*lines, f"generator=torch.Generator().manual_seed({shot.seed}),"]]
