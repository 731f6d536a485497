"""Make the playground: ``python -m sd3tune.playground.recipe --npm NPM --work WORK`` and, when it is good, ``--ship FOLDER``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.models import components
from sd3tune.playground.recipe import autoencoder, base, pictures, scorer, texts

STAGES = ("vae", "base", "tiny", "scorer")


class Workshop:
    """The pictures and captions that all stages share."""

    def __init__(self, npm: Path, work: Path) -> None:
        self.work = work
        self.emoji = pictures.read(npm)
        self.train, self.heldout = pictures.tuning_set(self.emoji)
        self.ours = {e.code for e in self.train + self.heldout}
        self.others = [e for e in self.emoji if e.code not in self.ours]
        self.noto = components.pixels([pictures.on_white(e.noto) for e in self.emoji])
        self.fluent = components.pixels([pictures.on_white(e.fluent) for e in self.others])

    @property
    def captions(self) -> list[str]:
        """Names in the order of `noto`."""
        return [e.name for e in self.emoji]

    def oblong(self, size: tuple[int, int], *, fluent: bool) -> tuple[Tensor, list[str]]:
        """Pictures cut to what is drawn, at ``size``, with their names."""
        found = [(e.noto, e.name) for e in self.emoji if pictures.oblong(e.noto) == size]
        if fluent:
            found += [(e.fluent, e.name) for e in self.others if pictures.oblong(e.fluent) == size]
        return components.pixels([pictures.on_white(p, size, crop=True) for p, _ in found]), [n for _, n in found]

    def load_vae(self) -> Any:
        """The trained autoencoder of this workshop."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.work / "vae").eval()


def make_vae(shop: Workshop, steps: int) -> None:
    sets = [torch.cat([shop.noto, shop.fluent])]
    sets += [shop.oblong(size, fluent=True)[0] for size in (pictures.WIDE, pictures.TALL)]
    vae = autoencoder.train_vae(sets, steps=steps)
    autoencoder.set_scale(vae, *autoencoder.moments(vae, shop.noto))
    print(f"vae: {autoencoder.psnr(vae, shop.noto):.2f} dB on Noto, {autoencoder.psnr(vae, shop.fluent[:300]):.2f} dB on Fluent")
    vae.save_pretrained(shop.work / "vae")


def make_base(shop: Workshop, steps: int) -> None:
    vae = shop.load_vae()

    def shape(pixels: Tensor, captions: list[str]) -> base.Shape:
        mean, std = autoencoder.moments(vae, pixels)
        factor = vae.config.scaling_factor
        return base.Shape((mean - vae.config.shift_factor) * factor, std * factor, tuple(captions))

    shapes = [shape(shop.noto, shop.captions)]
    shapes += [shape(*shop.oblong(size, fluent=False)) for size in (pictures.WIDE, pictures.TALL)]
    vocabulary = [f"{name}{tail}" for name in shop.captions for tail in ("", *(f", {s}" for s in scorer.STYLES))]
    torch.manual_seed(3)
    encoders = texts.new_encoders(vocabulary)
    base.train(shapes, encoders, shop.work, steps=steps)


def make_tiny(shop: Workshop, steps: int) -> None:
    tiny = autoencoder.train_tiny(shop.load_vae(), torch.cat([shop.noto, shop.fluent]), steps=steps)
    tiny.save_pretrained(shop.work / "taesd")


def make_scorer(shop: Workshop, steps: int) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(shop.work / "tokenizer")
    captions = [f"{e.name}, {scorer.STYLES[0]}" for e in shop.emoji] + [f"{e.name}, {scorer.STYLES[1]}" for e in shop.others]
    model = scorer.train(torch.cat([shop.noto, shop.fluent]), captions, tokenizer, steps=steps)
    model.save_pretrained(shop.work / "scorer")
    tokenizer.save_pretrained(shop.work / "scorer")
    (shop.work / "scorer" / "preprocessor_config.json").write_text(json.dumps(scorer.PREPROCESSING, indent=2) + "\n")


def ship(shop: Workshop, folder: Path) -> None:
    """Write the finished playground: weights in half precision, the scheduler, the index, and the pictures."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import load_file, save_file

    model = folder / "model"
    shutil.copytree(shop.work, folder / "draft")
    for file in (folder / "draft").rglob("*.safetensors"):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    for part in ("taesd", "scorer"):
        (folder / "draft" / part).rename(folder / part)
    (folder / "draft").rename(model)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }  # fmt: skip
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1", **classes}
    (model / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    pictures.write_tuning_set(shop.train, folder / "pictures" / "train")
    pictures.write_tuning_set(shop.heldout, folder / "pictures" / "heldout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--npm", type=Path, required=True, help="folder with both npm packages unpacked, see README.md")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is being made")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run, of " + ", ".join(STAGES))
    parser.add_argument("--vae-steps", type=int, default=4800)
    parser.add_argument("--base-steps", type=int, default=8000)
    parser.add_argument("--ship", type=Path, help="then write the finished playground here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    shop = Workshop(options.npm, options.work)
    steps = {"vae": options.vae_steps, "base": options.base_steps, "tiny": 800, "scorer": 700}
    makers = {"vae": make_vae, "base": make_base, "tiny": make_tiny, "scorer": make_scorer}
    for stage in filter(None, options.stages.split(",")):
        makers[stage](shop, steps[stage])
    if options.ship:
        ship(shop, options.ship)


if __name__ == "__main__":
    main()
