"""``sd3tune configure``: the wizard in a terminal, or answered from a file. What is asked, and what follows, is `sd3tune.configuring`."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from sd3tune.config.explaining import settings
from sd3tune.config.reading import parse_setting, read_yaml
from sd3tune.configuring import Question, Wizard, look
from sd3tune.configuring.script import STEPS
from sd3tune.configuring.writing import Files
from sd3tune.errors import ConfigError, Sd3TuneError

KEYS = "Enter takes the value in brackets, ? explains, < goes back, Ctrl-C leaves and writes nothing."


def add_arguments(made: argparse.ArgumentParser) -> None:
    """What may be written after ``sd3tune configure``."""
    made.add_argument("folder", nargs="?", default=".", help="where run.yaml and datasets.yaml go (%(default)s); nothing is overwritten")
    made.add_argument("--answers", metavar="FILE", help="a YAML file of answers by the names of the questions; what it holds is not asked")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one answer; may be repeated")
    made.add_argument("--yes", action="store_true", help="take the default of every question that has no answer")


def run(options: argparse.Namespace) -> int:
    """Ask, or take the answers, and write the two files. Raises: ConfigError, FileError, DataError."""
    answers = given(options)
    asks = sys.stdin.isatty() and not options.yes
    if not answers and not asks and not options.yes:
        print("sd3tune configure asks in a terminal, and this is none; give --answers FILE, --set NAME=VALUE, or --yes", file=sys.stderr)
        return 2
    wizard = Wizard(look())
    try:
        wizard = asked(wizard, answers) if asks else answered(wizard, answers, rest=options.yes)
        for name in answers:
            if name not in wizard.answers:
                raise ConfigError([f"{name} has an answer, and with the other answers it is not asked; remove it"], "configure")
        files = wizard.files(options.folder)
        _show(wizard, files)
        if asks and _typed("Write them? [yes] ").lower() not in ("", "y", "yes"):
            print("nothing was written")
            return 1
    except (KeyboardInterrupt, EOFError):
        print("\nleft; nothing was written", file=sys.stderr)
        return 130
    files.write()
    print(f"written: {files.run} and {files.datasets}\n\nnext:\n" + "\n".join(f"  {line}" for line in files.commands))
    print("\nor in a notebook:\n\n" + files.cell)
    return 0


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The answers of --answers and --set, by name. Raises: ConfigError for a name that no question has."""
    found: dict[str, Any] = {}
    if options.answers:
        content = read_yaml(Path(options.answers))
        if not isinstance(content, dict):
            raise ConfigError(["the file is not a mapping of answers"], options.answers)
        found = {str(name): value for name, value in content.items()}
    found |= dict(map(parse_setting, options.set))
    names = [step.name for step in STEPS]
    problems = []
    for name in found:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            problems.append(
                f"no question is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}")
            )
    if problems:
        raise ConfigError(problems, options.answers or "--set")
    return found


def answered(wizard: Wizard, answers: dict[str, Any], *, rest: bool) -> Wizard:
    """Every question answered without asking; those without an answer take their default if ``rest``. Raises: ConfigError."""
    while (question := wizard.question) is not None:
        if question.name not in answers and not rest:
            raise ConfigError(
                [f"{question.name} has no answer ({question.asks}); add one, or --yes for the defaults of the rest"], "configure"
            )
        wizard = wizard.answer(answers.get(question.name))
    return wizard


def asked(wizard: Wizard, answers: dict[str, Any]) -> Wizard:
    """Every question that has no answer asked in the terminal."""
    print(KEYS)
    while (question := wizard.question) is not None:
        if question.name in answers:
            wizard = wizard.answer(answers[question.name])
            continue
        for note in wizard.notes:
            print(_wrapped(f"  note: {note}"))
        typed = _typed(f"\n{asking(question)}\n> ")
        if typed == "?":
            print(explanation(question))
        elif typed == "<":
            wizard = wizard.back()
            while wizard.answers and wizard.question is not None and wizard.question.name in answers:
                wizard = wizard.back()
        else:
            try:
                wizard = wizard.answer(typed)
            except Sd3TuneError as error:
                print(_wrapped("  " + "; ".join(getattr(error, "problems", (str(error),)))))
    return wizard


def _typed(prompt: str) -> str:
    return input(prompt).strip()


def asking(question: Question) -> str:
    """A question with its choices and its default."""
    lines = [_wrapped(question.asks)]
    lines += [_wrapped(f"  {number:2} {one.value}: {one.meaning}".rstrip(": ")) for number, one in enumerate(question.choices, start=1)]
    default = question.shown_default
    return "\n".join([*lines, f"[{default}]"]) if default else "\n".join(lines)


def explanation(question: Question) -> str:
    """Why it is asked, and what its declaration says."""
    known = [one.paragraph(_width()) for one in settings() if one.name == question.name]
    return "\n".join([_wrapped(question.why), *known])


def _show(wizard: Wizard, files: Files) -> None:
    print("\n".join(f"{name}: {value}" for name, value in wizard.summary))
    print(_wrapped(wizard.sentence))
    for text in wizard.cautions:
        print(_wrapped(f"look at: {text}"))
    if files.taken:
        print(
            _wrapped(
                f"{', '.join(map(str, files.taken))}: already there, and left alone; the new files are {files.run} and {files.datasets}"
            )
        )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _width(), subsequent_indent="     ", break_on_hyphens=False, break_long_words=False)


def _width() -> int:
    return max(40, min(120, shutil.get_terminal_size().columns))
