"""The wizard as a panel: one question after another, two files and a cell at the end. `sd3tune configure` asks the same."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from sd3tune.configuring import Machine, Question, Wizard, look
from sd3tune.configuring.writing import Files
from sd3tune.errors import ConfigError, Sd3TuneError
from sd3tune.panels.base import Displayed, insert
from sd3tune.panels.looks import SMALL, button, put, row, sentence, small, table, visible

WIDE = {"width": "min(640px, 98%)"}


class ConfigurePanel(Displayed):
    """Asks what a run needs to know, each question with why; ``wizard`` is how far it is. Nothing is written before the last button."""

    def __init__(self, folder: str | Path = ".", machine: Machine | None = None) -> None:
        self.folder = Path(folder)
        self.wizard = Wizard(machine or look())
        self.written: Files | None = None
        """What `save` wrote of these answers."""
        self.asks, self.note, self.found, self.answers, self.files = (widgets.HTML() for _ in range(5))
        self.place = widgets.VBox([])
        self.field: Any = None
        self.next = button("Next", self.answer, "take this answer")
        self.skip = button("Take the default", self.default, "what is recommended here")
        self.back = button("Back", self.go_back, "the last question again")
        self.write = button("Write both files", self.save, "run.yaml and datasets.yaml, under names that are free")
        self.widget: Any = widgets.VBox(
            [self.asks, self.place, row(self.next, self.skip, self.back, self.write), self.note, self.found, self.answers, self.files],
            layout=widgets.Layout(width="100%", max_width="1100px"),
        )
        self.show()

    def answer(self, value: Any = None) -> None:
        """Answer the question with what stands in the field, or with a value; a wrong one is refused with the reason."""
        given = self.field.value if value is None else value
        try:
            self.wizard = self.wizard.answer(given.splitlines() if self._question.kind == "texts" and isinstance(given, str) else given)
        except Sd3TuneError as error:
            put(self.note, sentence("; ".join(error.problems) if isinstance(error, ConfigError) else str(error), bad=True))
            return
        self.show()

    def default(self) -> None:
        """Answer with the default; a question without one says so."""
        try:
            self.wizard = self.wizard.answer(None)
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        self.show()

    def go_back(self) -> None:
        """The last question again."""
        self.wizard = self.wizard.back()
        self.show()

    def save(self) -> None:
        """Write both files; never over one that is there."""
        try:
            made = self.wizard.files(self.folder)
            made.write()
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        self.written = made
        put(self.asks, sentence("This is written:"))
        self._preview(made)
        said = "The cell that runs them stands below, to be copied; to_cell() of this panel puts it under the cell that calls it."
        put(self.note, sentence(f"Written: {made.run} and {made.datasets}. {said} In a terminal: {made.commands[-1]}"))

    def to_cell(self) -> None:
        """Put the cell that runs the files that were written into a new cell below. Call it in a cell: front ends ignore it from a button.

        Raises: ConfigError while the answers are not written.
        """
        if self.written is None:
            raise ConfigError(["these answers are not written yet; press Write both files first, or call save()"], "configure")
        insert(self.written.cell)

    @property
    def _question(self) -> Question:
        question = self.wizard.question
        assert question is not None
        return question

    def show(self) -> None:
        """Show the question, what the last answer means, and the answers so far; at the end the files."""
        question, self.written = self.wizard.question, None
        put(self.note, "")
        put(self.found, small(self.wizard.notes) if self.wizard.answers else "")
        put(self.answers, table(self.wizard.summary, ("asked", "answer")) if self.wizard.answers else "")
        for one in (self.next, self.skip):
            visible(one, question is not None)
        visible(self.write, question is None)
        self.back.disabled = not self.wizard.answers
        if question is None:
            self._finish()
            return
        put(self.files, "")
        self.skip.disabled = question.default is None
        head = f"<b>{len(self.wizard.answers) + 1}. {escape(question.asks)}</b>"
        put(self.asks, f'<div role="status">{head}<div style="{SMALL}">{escape(question.why)} ({escape(question.name)})</div></div>')
        self.field = field(question)
        self.place.children = (self.field, widgets.HTML(meanings(question)))

    def _finish(self) -> None:
        put(self.asks, sentence("That is all. This will be written:"))
        self.place.children = ()
        put(self.found, small(self.wizard.cautions))
        self._preview(self.wizard.files(self.folder))

    def _preview(self, made: Files) -> None:
        shown = ((str(made.run), made.run_text), (str(made.datasets), made.datasets_text), ("the cell that runs them", made.cell))
        look = f'style="white-space:pre-wrap;overflow-wrap:anywhere;{SMALL}"'
        put(self.files, "".join(f"<b>{escape(name)}</b><pre {look}>{escape(text)}</pre>" for name, text in shown))


def configure(folder: str | Path = ".", machine: Machine | None = None) -> ConfigurePanel:
    """The wizard that ends in ``run.yaml``, ``datasets.yaml`` and the cell that runs them, written into a folder."""
    return ConfigurePanel(folder, machine)


def field(question: Question) -> Any:
    """The widget that a question is answered in, with its default."""
    name = "Answer"
    if question.kind == "choice":
        values = [choice.value for choice in question.choices]
        return widgets.Dropdown(
            options=values, value=question.default if question.default in values else values[0], description=name, layout=WIDE
        )
    if question.kind == "yes/no":
        return widgets.Dropdown(options=[("yes", True), ("no", False)], value=bool(question.default), description=name, layout=WIDE)
    if question.kind == "texts":
        lines = "\n".join(question.default) if isinstance(question.default, (list, tuple)) else question.shown_default
        return widgets.Textarea(value=lines, description=name, placeholder="one a line", rows=4, layout=WIDE)
    return widgets.Text(value=question.shown_default, description=name, layout=WIDE)


def meanings(question: Question) -> str:
    """What each choice means."""
    return table([(choice.value, choice.meaning) for choice in question.choices]) if question.choices else ""
