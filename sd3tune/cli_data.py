"""The verbs of ``sd3tune data``: fetch pictures, caption them, mask them, or draw them with the base model."""

from __future__ import annotations

import argparse
from pathlib import Path

import sd3tune as st
from sd3tune.errors import ConfigError


def add_arguments(data: argparse.ArgumentParser) -> None:
    """What may be written after ``sd3tune data``."""
    data.add_argument("what", choices=("download", "caption", "masks", "class-pictures"))
    data.add_argument("name", nargs="?", help="download: owner/name on the hub (that of SimpleTuner's guide); the others: the folder")
    data.add_argument("masks", nargs="?", metavar="OUT", help="masks: the folder to write them into")
    data.add_argument("--from", dest="source", nargs="+", metavar=("KIND", "MODEL"), help="masks: alpha, box, or model NAME (of the hub)")
    data.add_argument("--box", help="masks from box: LEFT,TOP,RIGHT,BOTTOM in shares (0.15,0.15,0.85,0.85)")
    data.add_argument("--label", action="append", default=[], help="masks from model: a label that counts (all but background)")
    data.add_argument("--count", type=int, default=100, help="class-pictures: how many (%(default)s)")
    data.add_argument("--config", help="class-pictures: the YAML file of the run; the playground's preset when left out")
    data.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="class-pictures: change one setting")
    data.add_argument("--to", metavar="DIR", help="download: where to (datasets/NAME)")
    data.add_argument("--model", help="caption: an image-to-text model of the hub, or its folder")
    data.add_argument("--prompt", default="", help="class-pictures: what to draw; caption: what to ask the model")
    data.add_argument("--out", metavar="FILE", help="caption: the file to write (FOLDER.captions.jsonl beside the folder)")


def config_of(options: argparse.Namespace) -> st.RunConfig:
    """The configuration of --config and --set. Raises: ConfigError."""
    from sd3tune.config.reading import parse_setting

    base = st.RunConfig.load(options.config) if options.config else st.presets.playground()
    return base.replace(**dict(map(parse_setting, options.set)))


def run(options: argparse.Namespace) -> None:
    """Do one of them. Raises: Sd3TuneError."""
    from sd3tune.data.download import GUIDE

    if options.what == "download":
        folder = st.download_dataset(options.name or GUIDE, options.to)
        print(f"fetched into {folder.absolute()}; name it as instance_data_dir in datasets.yaml")
    elif options.what == "masks":
        _masks(options)
    elif options.what == "class-pictures":
        _class_pictures(options)
    else:
        _caption(options)


def _masks(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sd3tune.models import masking

    kind, *rest = options.source or [""]
    if not options.name or not options.masks or kind not in ("alpha", "box", "model") or len(rest) != (kind == "model"):
        raise ConfigError(["masks needs IN OUT and --from alpha, --from box or --from model NAME"], "sd3tune data")
    try:
        sides = [float(side) for side in options.box.split(",")] if options.box else masking.CENTRE
    except ValueError:
        raise ConfigError([f"--box {options.box}: four numbers with commas, such as 0.25,0,0.75,1"], "sd3tune data") from None
    make = masking.alpha if kind == "alpha" else masking.box(sides) if kind == "box" else masking.model(rest[0], options.label)
    rows = list(tqdm(masking.masks_of(options.name, options.masks, make), desc="masking", unit="picture"))
    made = [row for row in rows if not row.problem]
    print("\n".join(f"left out: {row.name}: {row.problem}" for row in rows if row.problem) or "every picture has its mask")
    share = sum(row.share for row in made) / max(1, len(made))
    print(f"{len(made)} masks in {options.masks}, in which {share:.1%} of a picture counts on average; look at them, then write")
    print(f"  - {{id: masks, dataset_type: conditioning, conditioning_type: mask, instance_data_dir: {options.masks}}}")
    print("in datasets.yaml, and conditioning_data: masks on the data set of the pictures")


def _class_pictures(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sd3tune.validation.class_pictures import draw

    if not options.name or not options.prompt or options.count < 1:
        raise ConfigError(["class-pictures needs a new folder, --prompt and --count from 1"], "sd3tune data")
    drawn = list(tqdm(draw(config_of(options), [options.prompt], options.name, options.count), desc="drawing", unit="picture"))
    print(f"{options.name}: {sum(not there for _, there in drawn)} pictures drawn, {sum(there for _, there in drawn)} were there")
    print("in datasets.yaml, beside the pictures to learn from:")
    print(f"  - {{id: class, instance_data_dir: {options.name}, is_regularisation_data: true, resolution: ...}}")


def _caption(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sd3tune.models.captioning import captions_of, save

    if not options.name or not options.model:
        raise ConfigError(["caption needs a folder and --model, for example --model Salesforce/blip-image-captioning-base"], "sd3tune data")
    folder = Path(options.name)
    out = Path(options.out) if options.out else folder.absolute().with_name(f"{folder.absolute().name}.captions.jsonl")
    rows = list(tqdm(captions_of(folder, options.model, prompt=options.prompt), desc="captioning", unit="picture"))
    save(rows, out)
    for row in rows:
        if row.problem:
            print(f"left out: {row.file_name}: {row.problem}")
    print(f"{out}: read and correct it, then write in datasets.yaml\n  caption_strategy: jsonl\n  parquet: {{path: {out}}}")
