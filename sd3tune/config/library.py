"""Prompts that come in libraries: a user's file or mapping, and our own set."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANGES = {"seed": (0, 2**32 - 1), "guidance": (0, 30), "steps": (1, 1000), "strength": (0, 10)}
"""Numbers that a prompt may have of its own, with what is allowed."""

TEXTS = ("prompt", "negative", "size")
SYNONYMS = {"caption": "prompt", "negative_prompt": "negative", "resolution": "size", "adapter_strength": "strength"}
"""Other tools' names of the same."""


@dataclass(frozen=True)
class Prompt:
    """What to draw, and what is its own of how to draw it; ``None`` is what the validation settings say."""

    name: str
    prompt: str
    negative: str | None = None
    size: str | None = None
    """Such as ``"1280x768"``."""
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    strength: float | None = None
    """How much of the adapter's change."""


MEGAPIXELS = 16
"""Below this, a size without an x is in millions of pixels: no picture is so small."""


def parse_size(text: str) -> tuple[int, int]:
    """``"1280x768"``, ``"1024"`` or ``"0.5"`` (megapixels, a square of multiples of 64) as (width, height). Raises: ValueError."""
    match = re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", text)
    area = re.fullmatch(r"\s*(\d*\.?\d+)\s*", text)
    if area and 0 < float(area[1]) < MEGAPIXELS:
        side = 64 * max(1, round(math.sqrt(float(area[1]) * 1e6) / 64))
        return side, side
    if not match:
        raise ValueError(f'a size is written "1024", "1280x768" or "0.5" (megapixels), not {text.strip()!r}')
    return int(match[1]), int(match[2] or match[1])


def size_problems(text: str) -> list[str]:
    """What is wrong with a list of sizes."""
    try:
        sizes = [parse_size(part) for part in text.split(",")]
    except ValueError as error:
        return [str(error)]
    return [f"{w}x{h} is not a multiple of 16 px on both sides" for w, h in sizes if w % 16 or h % 16 or not w or not h]


def prompts_of(library: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """The prompts of a library without `problems`."""
    return tuple(Prompt(name, **_renamed(row)) for name, row in library.items())


def problems(library: Any) -> list[str]:
    """What is wrong with a library, one sentence each."""
    if not isinstance(library, Mapping) or not library:
        return ["is no mapping of names to prompts, such as {pot: a clay pot}"]
    return [f"{name!r}: {problem}" for name, row in library.items() for problem in _row_problems(name, row)]


def _renamed(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    return {SYNONYMS.get(key, key): str(value) if key in ("size", "resolution") else value for key, value in row.items()}


def _row_problems(name: Any, row: Any) -> list[str]:
    if not isinstance(name, str):
        return ["a name is a text; put it in quotes"]
    if not isinstance(row, str | Mapping) or not all(isinstance(key, str) for key in row):
        return ["is neither a prompt nor a mapping with prompt, negative, size, seed, guidance, steps, strength"]
    made, found = _renamed(row), []
    for key, value in made.items():
        if key in RANGES:
            low, high = RANGES[key]
            whole = key in ("seed", "steps")
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                found.append(f"{key} {value!r} is no {'whole ' * whole}number from {low} to {high}")
        elif key not in TEXTS:
            close = difflib.get_close_matches(key, [*RANGES, *TEXTS, *SYNONYMS], n=1)
            found.append(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        elif not isinstance(value, str):
            found.append(f"{key} {value!r} is no text")
        elif key == "size":
            found += [f"size: {problem}" for problem in size_problems(value)]
    return found if "prompt" in made else [*found, "has no prompt"]


OURS = (
    Prompt("portrait", "a close-up portrait of an old fisherman with a grey beard, soft window light"),
    Prompt("portrait-smile", "a portrait photograph of a laughing young woman with freckles, outdoors, shallow depth of field"),
    Prompt("child", "a child in a yellow raincoat jumping into a puddle"),
    Prompt("couple", "an elderly couple holding hands on a park bench in autumn, seen from behind"),
    Prompt("hands", "two hands kneading bread dough on a floured wooden table, close-up"),
    Prompt("crowd", "a crowded street market at dusk with hanging lanterns"),
    Prompt("dancer", "a ballet dancer in mid-leap on a dark stage, motion frozen"),
    Prompt("runner", "a runner crossing the finish line with arms raised"),
    Prompt("cat", "a tabby cat asleep on a stack of books"),
    Prompt("dog", "a wet border collie shaking off water, droplets in the air"),
    Prompt("horse", "three white horses galloping along a beach at sunrise"),
    Prompt("owl", "an owl with orange eyes on a mossy branch, macro photograph"),
    Prompt("octopus", "an octopus hiding in a coral reef, underwater photograph"),
    Prompt("bee", "a bee landing on a purple thistle, extreme close-up"),
    Prompt("elephant", "a mother elephant with her calf walking through tall grass"),
    Prompt("mountain", "a snow-covered mountain reflected in a still lake at first light"),
    Prompt("desert", "wind-shaped sand dunes under a starry sky, long exposure"),
    Prompt("forest", "a path through a foggy beech forest in spring"),
    Prompt("waterfall", "a waterfall dropping into a turquoise pool, surrounded by ferns"),
    Prompt("storm", "a lightning bolt over a wheat field, dramatic clouds"),
    Prompt("city-night", "a rainy city street at night with neon signs reflected in puddles"),
    Prompt("skyline", "a city skyline seen from across a river at blue hour"),
    Prompt("cathedral", "the interior of a gothic cathedral with coloured light from stained glass"),
    Prompt("cottage", "a thatched cottage with roses around its door, watercolour"),
    Prompt("bridge", "a red suspension bridge disappearing into fog"),
    Prompt("library", "an old library with spiral stairs and dust in the sunbeams"),
    Prompt("kitchen", "a small modern kitchen with green tiles and copper pans, interior photograph"),
    Prompt("breakfast", "a plate of pancakes with blueberries and maple syrup, seen from above"),
    Prompt("ramen", "a steaming bowl of ramen with a halved egg, chopsticks beside it"),
    Prompt("fruit", "a still life of pears and grapes in a silver bowl, oil painting"),
    Prompt("coffee", "latte art in the shape of a leaf in a blue ceramic cup"),
    Prompt("teapot", "a cast-iron teapot on a bamboo mat, product photograph on white"),
    Prompt("car", "a red vintage convertible parked in front of a diner"),
    Prompt("train", "a steam locomotive crossing a stone viaduct in winter"),
    Prompt("sailboat", "a sailboat heeling in strong wind, spray over the bow"),
    Prompt("astronaut", "an astronaut riding a bicycle on the moon, Earth above the horizon"),
    Prompt("robot", "a rusty robot watering flowers in a greenhouse"),
    Prompt("dragon", "a small green dragon curled around a stack of gold coins, fantasy illustration"),
    Prompt("knight", "a knight in dented armour resting under an oak tree"),
    Prompt("sign", 'a wooden sign that says "OPEN" hanging on a shop door'),
    Prompt("cake-text", 'a birthday cake with the words "HAPPY BIRTHDAY" in blue icing'),
    Prompt("poster", 'a minimalist travel poster with the title "NORWAY", flat colours'),
    Prompt("count-apples", "exactly five red apples in a row on a white table"),
    Prompt("colours", "a blue cube on top of a yellow sphere, beside a green cone, 3D render"),
    Prompt("left-right", "a black cat to the left of a white dog, both sitting, front view"),
    Prompt("inside", "a goldfish inside a wine glass on a windowsill"),
    Prompt("pixel-art", "a tavern interior with a fireplace, pixel art"),
    Prompt("line-drawing", "a bicycle, single continuous line drawing, black ink on white"),
    Prompt("anime", "a girl with short hair waiting at a level crossing in summer, anime style"),
    Prompt("abstract", "overlapping translucent circles in warm colours, abstract composition"),
    Prompt("macro", "frost crystals on a window pane, macro photograph, backlit"),
    Prompt("black-white", "a jazz trumpeter in a smoky club, black and white film photograph"),
)  # fmt: skip
"""``validation_prompt_library``: people, animals, places, things, words, numbers and relations, media."""

HELD_OUT = (
    "black spade suit", "camera with flash", "camera", "camping", "card file box", "cat face", "cherry blossom", "croissant", "dress",
    "egg", "first quarter moon symbol", "flying disc", "frog face", "glowing star", "lock", "low battery", "mate drink", "package",
    "pickup truck", "rooster", "softball", "tangerine", "water buffalo", "wood",
)  # fmt: skip
PLAYGROUND = tuple(Prompt(text, text) for text in HELD_OUT)
"""The same for the playground: the captions of the pictures that it never trains on."""
