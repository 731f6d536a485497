"""The same objects with no notebook. Exit codes: 0 done, 1 what a person can fix, 2 wrong usage, 130 interrupted after saving."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sd3tune as st
from sd3tune import cli_configure, cli_data, cli_runs, cli_settings, cli_train
from sd3tune.cli_data import config_of
from sd3tune.cli_train import DATA, encoded_with_a_bar
from sd3tune.errors import ConfigError, Sd3TuneError

if TYPE_CHECKING:
    from sd3tune.data import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return int(options.verb(options) or 0)
    except Sd3TuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was being trained", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sd3tune", description="Fine-tune Stable Diffusion 3 and 3.5 with LoRA.")
    parser.add_argument("--version", action="version", version=f"sd3tune {st.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(verb=run)
        return made

    for name, run, text in (
        ("plan", _plan, "show what would be trained on, and write nothing"),
        ("train", cli_train.run, "encode what is missing, train, validate, save"),
    ):
        made = verb(name, run, text)
        made.add_argument("config", nargs="?", help="a YAML file of settings; the playground's preset when left out")
        made.add_argument("--data", default=DATA, help="a datasets.yaml or a folder of pictures (%(default)s)")
        made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; may be repeated")
        if name == "train":
            cli_train.add_arguments(made)
    shown = verb("attach", cli_train.attach, "show a run that goes on in another process, such as a notebook's, until it ends")
    shown.add_argument("run", help="a run folder")
    cli_configure.add_arguments(verb("configure", cli_configure.run, "ask step by step, and write run.yaml and datasets.yaml"))
    looked = verb("doctor", _doctor, "what this machine has and what a run needs, before anything is downloaded")
    looked.add_argument("config", nargs="?", help="a YAML file of settings; without one, the machine alone")
    imported = verb("import-simpletuner", _import, "turn SimpleTuner's two files into run.yaml and datasets.yaml, with a report")
    imported.add_argument("config", help="config.json, a TOML file or config.env")
    imported.add_argument("datasets", nargs="?", help="multidatabackend.json; looked for where the first file says when left out")
    imported.add_argument("--to", default=".", metavar="FOLDER", help="where to write (%(default)s); nothing is overwritten")
    kept = verb("cache", _cache, "build, verify, count, prune or explain what is encoded")
    kept.add_argument("what", choices=("build", "verify", "stats", "prune", "explain"))
    kept.add_argument("picture", nargs="?", help="explain: a picture's path")
    kept.add_argument("--config", help="the run's YAML file; the playground's preset when left out")
    kept.add_argument("--data", default="datasets.yaml", help="what is needed (%(default)s); for prune, everything else is unused")
    kept.add_argument("--cache", metavar="FOLDER", help="the cache folder; that of the run's settings when left out")
    kept.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; may be repeated")
    kept.add_argument("--yes", action="store_true", help="prune: really delete what was shown")
    cli_data.add_arguments(verb("data", cli_data.run, "download a data set of the hub, caption or mask pictures, or draw class pictures"))
    lora = verb("lora", _lora, "look at a LoRA file of any tool, verify it against a model, convert it, or merge it into a model")
    lora.add_argument("what", choices=("inspect", "verify", "convert", "merge"))
    lora.add_argument("file", help="a .safetensors file")
    lora.add_argument("--to", choices=("diffusers", "comfyui"), default="diffusers", help="convert: the layout (%(default)s)")
    lora.add_argument("--rank", type=int, help="convert: the nearest LoRA of this rank, of LoKr, LoHa, full, or a LoRA of a higher rank")
    lora.add_argument("--out", metavar="PATH", help="convert: the file to write; merge: the folder of the merged transformer")
    lora.add_argument("--strength", type=float, default=1.0, help="merge: how much of the change (%(default)s)")
    lora.add_argument("--config", help="verify, merge: the YAML file that names the model; the playground's preset when left out")
    lora.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; may be repeated")
    cli_runs.add_verbs(verb)
    cli_settings.add_arguments(verb("settings", cli_settings.run, "what each setting is, may be, and does; the presets; the settings page"))
    return parser


def _quiet_libraries() -> None:
    """Keep the libraries' own progress bars off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _made_plan(options: argparse.Namespace) -> tuple[st.RunConfig, Plan]:
    config = config_of(options)
    return config, st.plan(st.discover(options.data), config)


def _plan(options: argparse.Namespace) -> None:
    config, plan = _made_plan(options)
    print(plan)
    encoders = st.encoders(config)
    print(st.CacheBuilder(plan, encoders).coverage())
    from sd3tune.data.wording import considered
    from sd3tune.models import memory

    largest = max(cut.bucket.width * cut.bucket.height for cut in plan.train)
    print(memory.predict(config, side=round(largest**0.5)))
    for one in considered(config, plan):
        print(f"advice: {one}")
    print(f"the cache of this plan: about {encoders.bytes_of(plan) / 1e6:,.1f} MB in {Path(plan.cache_dir).absolute()}")


def _cache(options: argparse.Namespace) -> int:
    from sd3tune.cache import upkeep

    root = options.cache or config_of(options).run.cache_dir
    if options.what == "stats":
        print(upkeep.stats(root))
    elif options.what == "verify":
        found = list(upkeep.verify(root))
        damaged = [said for _, said in found if said]
        print("\n".join([*damaged, f"{len(found):,} entries, {len(damaged):,} damaged"]))
        return 1 if damaged else 0
    elif options.what == "build":
        cache = encoded_with_a_bar(*_made_plan(options))
        print(f"{cache.hits:,} entries reused, {cache.misses:,} encoded\n{cache.plan}")
    elif options.what == "explain":
        config, plan = _made_plan(options)
        print(upkeep.explain(st.CacheBuilder(plan, st.encoders(config)), options.picture or ""))
    else:
        config, plan = _made_plan(options)
        extra = upkeep.unused(root, [st.CacheBuilder(plan, st.encoders(config))])
        sizes = {f"{kind} {key}": size for kind, rows in extra.items() for key, size in rows.items()}
        print("\n".join([*sizes, f"{len(sizes):,} entries, {sum(sizes.values()) / 1e6:,.1f} MB, are not needed by {options.data}"]))
        if options.yes:
            print(f"deleted: {upkeep.remove(root, {kind: set(rows) for kind, rows in extra.items()}) / 1e6:,.1f} MB")
        elif sizes:
            print("nothing was deleted; the same command with --yes deletes them")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    report = st.doctor(st.RunConfig.load(options.config) if options.config else None)
    print(report)
    return 0 if report.well else 1


def _lora(options: argparse.Namespace) -> None:
    from sd3tune.models import decomposing, lora_files, lora_layouts, merging

    file = Path(options.file)
    if options.what == "convert" and options.rank is not None:
        if options.rank < 1:
            raise ConfigError(["--rank is a number from 1"], "sd3tune lora")
        made = decomposing.as_lora(file, options.rank)
        lora = made.lora
        print(f"rank {options.rank}: {made}")
    else:
        lora = lora_layouts.read(file)
    if options.what == "inspect":
        print(lora)
        return
    if options.what == "verify":
        print(merging.check_fit(lora, config_of(options), str(file)))
        return
    if not options.out:
        raise ConfigError([f"{options.what} needs --out"], "sd3tune lora")
    out = Path(options.out)
    if out.exists():
        raise ConfigError([f"{out} is already there; give another name"], "sd3tune lora")
    if options.what == "convert":
        print(f"{out}: {lora_files.write(out, lora, options.to)}")
    else:
        print(merging.merge(lora, config_of(options), out, strength=options.strength))


def _import(options: argparse.Namespace) -> None:
    made = st.from_simpletuner(options.config, options.datasets)
    run, datasets = made.save(options.to)
    print(f"{made}\nwritten: {run} and {datasets}\nlook at it with: sd3tune plan {run} --data {datasets}")


if __name__ == "__main__":
    sys.exit(main())
