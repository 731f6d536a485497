"""What drawing costs: our sampler beside the bare pipeline, prompts together beside one by one, previews beside none.

On the playground at 64 px, by process time, one thread, the arms in turn; each figure is a median of ratios to the pipeline's time for the
same pictures in the same round. Our own overhead is told apart from the machine's noise picture by picture: the same picture by both, one
right after the other. python benchmarks/validation.py [--rounds 8] [--prompts 8] [--steps 20] [--pairs 60]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

import sd3tune as st
from sd3tune import playground
from sd3tune.config.library import PLAYGROUND
from sd3tune.models.components import pick_device
from sd3tune.models.tiny import as_jpeg, load_tiny, previews
from sd3tune.sampling import texts_of
from sd3tune.validation.painter import Drawn
from sd3tune.validation.shots import shots_of
from sd3tune.validation.validator import painting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device()
    prompts = tuple(prompt.prompt for prompt in PLAYGROUND[: options.prompts])
    with tempfile.TemporaryDirectory() as name:
        config = st.presets.playground(
            validation_prompt=prompts, validation_num_inference_steps=options.steps, cache_dir=str(Path(name) / "cache")
        )
        arms, singles = arms_of(config, device, len(prompts))
        pairs(singles, options.pairs)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(options.rounds + 1):
            for arm, draw in arms.items():
                started = time.process_time()
                draw()
                if number:  # the first round warms up
                    seconds[arm].append(time.process_time() - started)
    pipeline = seconds["pipeline, one by one"]
    print(f"{len(prompts)} pictures of {options.steps} steps, {options.rounds} rounds")
    for arm, found in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(found, pipeline, strict=True)]
        print(f"{arm:32} {statistics.median(found):7.3f} s  {statistics.median(ratios):6.3f} of the pipeline")
    tiny = load_tiny(config, device)
    latent_BCHW = torch.randn(len(prompts), 16, 8, 8, device=device)
    decoding = least(lambda: [as_jpeg(picture) for picture in previews(tiny, latent_BCHW)])
    print(f"decoding {len(prompts)} previews {1000 * decoding:.1f} ms, {options.steps} times {options.steps * decoding:.3f} s")


def pairs(singles: list[tuple[Callable[[], Any], Callable[[], Any]]], count: int) -> None:
    """Our time for one picture as a share of the pipeline's, over pairs in alternating order; the first of each picture warms up."""
    ratios = []
    for number in range(count + len(singles)):
        theirs, ours = singles[number % len(singles)]
        seconds = {}
        for arm in (theirs, ours) if number // len(singles) % 2 else (ours, theirs):
            started = time.process_time()
            arm()
            seconds[arm is ours] = time.process_time() - started
        if number >= len(singles):
            ratios.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"one picture, ours / the pipeline's: median {middle:.4f} (quartiles {low:.3f} to {high:.3f}) over {count} pairs", flush=True)


def arms_of(
    config: st.RunConfig, device: torch.device, count: int
) -> tuple[dict[str, Callable[[], Any]], list[tuple[Callable[[], Any], Callable[[], Any]]]]:
    """Name -> what is timed; and for each picture the pipeline's drawing and ours."""
    stock = StableDiffusion3Pipeline.from_pretrained(playground.MODEL, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    texts, shots = texts_of(config), shots_of(config)
    plain = painting(config, stock.transformer, texts.text, device).__enter__()
    shown = painting(config.replace(validation_preview=True), stock.transformer, texts.text, device).__enter__()
    negative = texts.text("")

    def pipeline(rows: slice) -> None:
        given = [texts.text(shot.prompt) for shot in shots[rows]]
        stock(
            prompt_embeds=torch.stack([t.joint_LD for t in given]), pooled_prompt_embeds=torch.stack([t.pooled_P for t in given]),
            negative_prompt_embeds=torch.stack([negative.joint_LD] * len(given)),
            negative_pooled_prompt_embeds=torch.stack([negative.pooled_P] * len(given)),
            generator=[torch.Generator().manual_seed(shot.seed) for shot in shots[rows]], guidance_scale=shots[0].guidance.scale,
            num_inference_steps=shots[0].steps, width=64, height=64,
        )  # fmt: skip

    def ours(painter: Any, most: int) -> None:
        assert sum(isinstance(event, Drawn) for event in painter.draw(shots, most)) == count

    singles = [
        (lambda i=i: pipeline(slice(i, i + 1)), lambda i=i: list(plain.draw(shots[i : i + 1], 1)))  # type: ignore[misc]
        for i in range(count)
    ]
    arms = {
        "pipeline, one by one": lambda: [pipeline(slice(i, i + 1)) for i in range(count)],
        "ours, one by one": lambda: ours(plain, 1),
        "pipeline, together": lambda: pipeline(slice(None)),
        "ours, together": lambda: ours(plain, count),
        "ours, together, each step shown": lambda: ours(shown, count),
    }
    return arms, singles


def least(work: Callable[[], Any], tries: int = 20) -> float:
    """The least process time of some tries."""
    found = []
    for _ in range(tries):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    main()
