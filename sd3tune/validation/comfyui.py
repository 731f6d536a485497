"""A workflow that draws a picture of ours in ComfyUI, as nearly as it can, in the form that its window reads."""

from __future__ import annotations

from typing import Any

from sd3tune.config.schema import RunConfig
from sd3tune.validation.shots import Shot

CHECKPOINTS = {
    "sd3-medium": "sd3_medium.safetensors", "sd35-medium": "sd3.5_medium.safetensors", "sd35-large": "sd3.5_large.safetensors",
}  # fmt: skip
"""Files of the released models, as their repositories call them."""

ENCODERS = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
SAMPLERS = {
    "euler": ("euler", "normal"), "heun": ("heun", "normal"), "dpm": ("dpmpp_2m", "sgm_uniform"), "unipc": ("uni_pc", "sgm_uniform"),
}  # fmt: skip
"""Its sampler, and the scheduler whose noise levels are those of diffusers: the very same for Euler and Heun."""

UNIFORM = ("euler", "heun")
"""Solvers whose noise levels are the very same there."""


def lora_name(adapter: str) -> str:
    """What the adapter's file is called in ComfyUI's layout: ``lora.safetensors`` becomes ``lora-comfyui.safetensors``."""
    return f"{adapter.removesuffix('.safetensors')}-comfyui.safetensors"


def unmatched(config: RunConfig, shot: Shot, adapter: str | None) -> list[str]:
    """What of a shot ComfyUI cannot match, and what the nearest is; and what its workflow expects to find there."""
    m, said = config.model, []
    if m.use_t5:
        said.append(
            f"T5's length: ComfyUI pads a text to 77 tokens and lets longer ones grow; ours is always {m.tokenizer_max_length}, "
            "as in training."
        )
    if shot.guidance.skip_layers and shot.guidance.scale > 1:
        said.append(
            "Skip-layer guidance: ComfyUI begins and ends it at shares of the noise levels, not of the steps: its first and last step "
            "may differ."
        )
    if m.mixed_precision != "no":
        said.append(f"Noise: ComfyUI draws it in fp32; ours is drawn in {m.mixed_precision}, as diffusers does.")
    if shot.solver not in UNIFORM:
        said.append(
            "UniPC and DPM-Solver++: noise levels differ by up to about 0.01, and ComfyUI treats the first and last steps in its own way."
        )
    if not m.use_t5 or "zero" in (m.sd3_clip_uncond_behaviour, m.sd3_t5_uncond_behaviour):
        said.append("Zeros for no text (sd3_clip_uncond_behaviour, sd3_t5_uncond_behaviour, use_t5: false) have no node here.")
    if m.base_model_precision != "no_change":
        said.append(f"A quantised base ({m.base_model_precision}): the workflow loads the released checkpoint.")
    if m.model_flavour not in CHECKPOINTS:
        said.append("The base model: it is none of the released ones, so the workflow's model.safetensors stands for its single file.")
    if adapter is not None:
        said.append(f"The adapter's file: sd3tune lora convert {adapter} --to comfyui --out {lora_name(adapter)}, among ComfyUI's loras.")
    return said


def workflow(config: RunConfig, shot: Shot, adapter: str | None) -> dict[str, Any]:
    """The workflow of a shot with an adapter's file (or without one) in ComfyUI's API form; other file names are those of the released
    models."""
    guidance = shot.guidance
    nodes: dict[str, Any] = {
        "1": _node("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS.get(config.model.model_flavour or "", "model.safetensors")),
        "2": _node("TripleCLIPLoader", clip_name1=ENCODERS[0], clip_name2=ENCODERS[1], clip_name3=ENCODERS[2]),
    }
    model: list[Any] = ["1", 0]
    if adapter is not None:
        nodes["3"] = _node("LoraLoaderModelOnly", model=model, lora_name=lora_name(adapter), strength_model=shot.strength)
        model = ["3", 0]
    nodes["4"] = _node("ModelSamplingSD3", model=model, shift=shot.shift)
    model = ["4", 0]
    if guidance.skip_layers and guidance.scale > 1:
        nodes["5"] = _node(
            "SkipLayerGuidanceSD3", model=model, layers=", ".join(map(str, guidance.skip_layers)), scale=guidance.skip_scale,
            start_percent=guidance.skip_start, end_percent=guidance.skip_stop,
        )  # fmt: skip
        model = ["5", 0]
    nodes["6"] = _node("CLIPTextEncode", clip=["2", 0], text=shot.prompt)
    nodes["7"] = _node("CLIPTextEncode", clip=["2", 0], text=shot.negative)
    nodes["8"] = _node("EmptySD3LatentImage", width=shot.width, height=shot.height, batch_size=1)
    sampler, levels = SAMPLERS[shot.solver]
    nodes["9"] = _node(
        "KSampler", model=model, positive=["6", 0], negative=["7", 0], latent_image=["8", 0], seed=shot.seed, steps=shot.steps,
        cfg=guidance.scale, sampler_name=sampler, scheduler=levels, denoise=1.0,
    )  # fmt: skip
    nodes["10"] = _node("VAEDecode", samples=["9", 0], vae=["1", 2])
    nodes["11"] = _node("SaveImage", images=["10", 0], filename_prefix="sd3tune")
    return nodes


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
