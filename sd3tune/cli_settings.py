"""``sd3tune settings``: the manual of every setting, from its declaration."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sd3tune.config import explaining
from sd3tune.errors import ConfigError
from sd3tune.files import write_text

BOLD, PLAIN = "\033[1m", "\033[0m"


def add_arguments(known: argparse.ArgumentParser) -> None:
    """What may be written after ``sd3tune settings``."""
    known.add_argument("word", nargs="*", help="show only settings with these words in name, section, meaning or choices")
    known.add_argument("--presets", action="store_true", help="list the presets instead; preset:NAME stands wherever a YAML file does")
    known.add_argument("--page", nargs="?", const=explaining.PAGE, metavar="FILE", help="write all of them as one page (%(const)s)")


def run(options: argparse.Namespace) -> None:
    """Print what was asked for: wrapped in a terminal, one line for each where the output goes elsewhere. Raises: ConfigError."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if options.page:
        write_text(Path(options.page), explaining.page())
        print(f"written: {Path(options.page).absolute()}")
        return
    if options.presets:
        print("\n".join(explaining.preset_lines(width)))
        return
    found = explaining.search(options.word)
    if not found:
        close = explaining.similar(options.word)
        words = " ".join(options.word)
        hint = f"; did you mean {', '.join(close)}?" if close else "; `sd3tune settings` lists all"
        raise ConfigError([f"no setting has {words!r} in its name or meaning{hint}"], "sd3tune settings")
    if width is None:
        print("\n".join(one.line() for one in found))
        return
    for one in found:
        first, _, rest = one.paragraph(width).partition("\n")
        print(f"{BOLD}{first}{PLAIN}\n{rest}")
