"""What stock diffusers makes of an adapter file: here, or in a fresh process that does not know sd3tune."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fresh
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open


def load(base: str, lora: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline with the file in it, and the names that it misses, does not expect, and their number."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with safe_open(lora, "pt") as opened:
        wanted = {name.removeprefix("transformer.") for name in opened.keys()}  # noqa: SIM118 (a file, not a mapping)
    pipeline.load_lora_weights(lora)
    loaded = {n.replace(".default_0.", ".") for n, _ in pipeline.transformer.named_parameters() if "lora_" in n}
    return pipeline, {"missing": sorted(loaded - wanted), "unexpected": sorted(wanted - loaded), "count": len(loaded)}


def draw(base: str, lora: str, out: str, prompt: str, seed: str) -> dict[str, Any]:
    """A picture of 64 x 64 in three steps, as the tests' validation draws it."""
    pipeline, names = load(base, lora)
    pipeline(
        prompt, num_inference_steps=3, guidance_scale=3.0, width=64, height=64, max_sequence_length=16,
        generator=torch.Generator().manual_seed(int(seed)),
    ).images[0].save(out)  # fmt: skip
    return names


def predict(base: str, lora: str, out: str) -> dict[str, Any]:
    """The transformer's answer to random inputs."""
    pipeline, names = load(base, lora)
    torch.save(predicted(pipeline.transformer), out)
    return names


def predicted(model: Any) -> torch.Tensor:
    """What a transformer says of the same random inputs."""
    g, c = torch.Generator().manual_seed(0), model.config
    shapes = ((1, 16, 8, 8), (1, 32, c.joint_attention_dim), (1, c.pooled_projection_dim))
    x, t, p = (torch.randn(shape, generator=g) for shape in shapes)
    with torch.no_grad():
        found: torch.Tensor = model(hidden_states=x, encoder_hidden_states=t, pooled_projections=p, timestep=torch.tensor([400.0])).sample
    return found


def elsewhere(what: str, *arguments: str) -> dict[str, Any]:
    """``draw`` or ``predict`` by a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        said = fresh.run([__file__, what, *arguments], Path(folder) / "said.txt")
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    said = {"draw": draw, "predict": predict}[what](*arguments)
    assert not any(m.startswith("sd3tune") for m in sys.modules), "this process must not know sd3tune"
    sys.stdout.write(json.dumps(said))
