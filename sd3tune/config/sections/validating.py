"""Settings of the pictures that are drawn on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sd3tune.config.declaring import MANY, STRICT, about

Solver = Literal["euler", "heun", "dpm", "unipc"]
"""How the sampler steps: flow-match Euler, flow-match Heun, DPM-Solver++(2M), UniPC, each as diffusers has it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Validation:
    """The pictures drawn on the way. Nothing here touches training."""

    validation_prompt: Annotated[str | tuple[str, ...], about("What to draw: one prompt or a list.", live=True)] = ()
    validation_prompt_library: Annotated[bool, about("Also draw our own set of 52 prompts (24 for the playground).", live=True)] = False
    user_prompt_library: Annotated[
        str | dict[str, Any] | None,
        about(
            "Also draw these: a JSON or YAML file, or a mapping, of names to prompts; a prompt may be a mapping with prompt, negative, "
            "size, seed, guidance, steps and strength of its own.",
            live=True,
        ),
    ] = None
    validation_negative_prompt: Annotated[str, about("What the guidance moves away from.", live=True)] = ""
    validation_disable_unconditional: Annotated[
        bool, about("Leave out the picture of no prompt; false draws one with each size.", live=True)
    ] = True
    validation_resolution: Annotated[
        str, about('Sizes of the pictures: "1280x768", "1024" (px), or below 16 megapixels ("0.5"); several with commas.', live=True)
    ] = "1024x1024"
    validation_guidance: Annotated[float, about("Classifier-free guidance scale; 1 is none.", low=0, high=30, live=True)] = 3.0
    validation_num_inference_steps: Annotated[int, about("Steps of the sampler.", low=1, high=1000, live=True)] = 28
    validation_noise_scheduler: Annotated[
        Solver, about("Sampler: flow-match Euler or Heun (two forwards a step), DPM-Solver++(2M), or UniPC.", live=True)
    ] = "euler"
    validation_seed: Annotated[
        int | None, about("Seed of the pictures' noise; the run's when left out.", low=0, high=2**32 - 1, live=True)
    ] = None
    num_validation_images: Annotated[
        int, about("Pictures of each prompt and size; the second has the next seed, and so on.", low=1, high=64, live=True)
    ] = 1
    validation_steps: Annotated[
        int, about("Updates between pictures; 0 draws only at the start and the end.", low=0, high=MANY, unit="updates", live=True)
    ] = 100
    validation_epoch_interval: Annotated[
        float | None, about("Epochs between pictures, besides validation_steps; may be a fraction.", above=0, high=MANY, live=True)
    ] = None
    validation_on_startup: Annotated[bool, about("Draw the base model's pictures before the first update, not only beside later ones.")] = (
        True
    )
    validation_disable: Annotated[bool, about("Draw nothing, whatever the prompts are.", live=True)] = False
    validation_shift: Annotated[float, about("Shift of the sampler's noise levels.", above=0, high=20, live=True)] = 3.0
    validation_guidance_skip_layers: Annotated[
        tuple[Annotated[int, Field(ge=0, le=999)], ...] | None,
        about("Blocks left out in skip-layer guidance; none switches it off.", live=True),
    ] = None
    validation_guidance_skip_layers_start: Annotated[
        float, about("Share of the steps after which skip-layer guidance begins.", low=0, high=1, live=True)
    ] = 0.01
    validation_guidance_skip_layers_stop: Annotated[
        float, about("Share of the steps at which skip-layer guidance ends.", low=0, high=1, live=True)
    ] = 0.2
    validation_guidance_skip_scale: Annotated[float, about("Strength of skip-layer guidance.", low=0, high=30, live=True)] = 2.8
    validation_adapter_strength: Annotated[
        float, about("How much of the adapter's change the pictures are drawn with.", low=0, high=10, live=True)
    ] = 1.0
    validation_lycoris_strength: Annotated[
        float, about("The same for LyCORIS adapters; both are multiplied.", low=0, high=10, live=True)
    ] = 1.0
    ema_validation: Annotated[
        Literal["none", "ema_only", "comparison"],
        about("With use_ema: pictures of the adapter, of its running average, or of both side by side.", live=True),
    ] = "comparison"
    validation_batch_size: Annotated[
        int | None,
        about(
            "Pictures drawn together; as many as have the pixels of one of 1024x1024, at most 16, when left out.", low=1, high=64, live=True
        ),
    ] = None
    validation_preview: Annotated[bool, about("Show each picture while it is drawn, through a tiny decoder.", live=True)] = False
    validation_preview_steps: Annotated[int, about("Sampler steps between two previews.", low=1, high=1000, live=True)] = 1
