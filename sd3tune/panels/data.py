"""The data panel: what is in the folders, how it is cut, which words go with it; captions are edited beside the data, never in it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import traitlets

from sd3tune.data import discover, overlay, plan
from sd3tune.data.captions import clean
from sd3tune.data.sheet import framed, histogram, sheet, table
from sd3tune.errors import Sd3TuneError
from sd3tune.files import write_text
from sd3tune.models.tokens import Counter
from sd3tune.panels.base import Panel
from sd3tune.panels.draft import Draft
from sd3tune.panels.folder import FolderForm
from sd3tune.panels.looks import button, offer, put, row, sentence, small, tabs, tip
from sd3tune.panels.pictures import jpeg

if TYPE_CHECKING:
    from sd3tune.config import RunConfig
    from sd3tune.data import Plan
    from sd3tune.data.buckets import Placement
    from sd3tune.data.catalog import Catalog

SHOWN = 24
"""Pictures of the contact sheet on one page."""


class Saved(traitlets.HasTraits):
    """How often captions were saved, to be observed: what was encoded before is of other words."""

    times = traitlets.Int(0)


class DataPanel(Panel):
    """Looks at a file of data sets (or a folder) with the draft's settings; ``plan`` is what a run would train on, with captions for all.

    Edited captions go to a file beside the data sets' file, and as ``.txt`` only into a new folder.
    """

    def __init__(self, config: RunConfig | Draft, data: str | Path = "datasets.yaml") -> None:
        super().__init__(config)
        self.plan: Plan | None = None
        self.source: Any = tip(
            widgets.Text(value=str(data), description="Data", continuous_update=False, layout={"width": "min(560px, 98%)"}),
            "a folder of your pictures, or a datasets.yaml",
        )
        self.folder_form = FolderForm(self._described)
        self.found, self.sizes, self.problems, self.pages = (widgets.HTML() for _ in range(4))
        self.page: Any = tip(widgets.IntText(value=1, description="Page", layout={"width": "150px"}), "of the contact sheet")
        self.picture: Any = widgets.Dropdown(options=[("none", -1)], description="Picture", layout={"width": "min(560px, 98%)"})
        self.shown: Any = widgets.Image(format="jpeg", layout=widgets.Layout(max_width="240px", height="auto", align_self="flex-start"))
        self.caption: Any = widgets.Textarea(description="Caption", continuous_update=True, rows=4, layout={"width": "min(560px, 98%)"})
        self.counted, self.kept, self.counter = widgets.HTML(), widgets.HTML(), Counter()
        self.folder: Any = widgets.Text(value="captions", description="New folder", layout={"width": "min(360px, 98%)"})
        self.edits: dict[tuple[str, str], str] = {}
        """(data set, picture) -> its captions, one a line, that were edited and are not saved yet."""
        self.saved = Saved()
        self.widget = self._layout()
        self.say("Name a folder of your pictures, or a datasets.yaml, and press Look. Nothing is written into the folder.")
        self.source.observe(lambda _: self.look(), "value")
        self.page.observe(lambda _: self._show_page(), "value")
        self.picture.observe(lambda _: self._choose(), "value")
        self.caption.observe(lambda _: self._edited(), "value")

    def look(self) -> None:
        """Read the folders (headers alone, no model) and show what a run would do with them."""
        before = next((p.item.path for k, p in enumerate(self.cuts) if k == self.picture.value), None)
        try:
            self.folder_form.show(self.source.value, most=max(map(max, self.config.validation_sizes)))
            catalog = discover(self.source.value)
            self.plan = plan(catalog, self.config.replace(allow_missing_captions=True))
        except Sd3TuneError as error:
            self.plan = None
            self.say(str(error), bad=True)
            return
        made = self.plan
        self.say("" if self.config.data.allow_missing_captions else self._missing(catalog), bad=True)
        put(
            self.found,
            sentence(made.sentence())
            + small(made.advice())
            + f"<details><summary>the whole plan</summary><pre>{escape(str(made))}</pre></details>",
        )
        put(self.sizes, histogram(made))
        rows = [*((p, "left out") for p in made.problems), *((p, "look at") for p in made.warnings or ())]
        put(self.problems, table(rows) or sentence("Nothing is left out."))
        self._show_page()
        names = [f"{k + 1}. {p.item.path.name}{'' if p.item.captions else ' (no caption)'}" for k, p in enumerate(self.cuts)]
        options = [(name, k) for k, name in enumerate(names)] or [("none", -1)]
        offer(self.picture, options, chosen=next((k for k, p in enumerate(self.cuts) if p.item.path == before), options[0][1]))
        self._choose()

    @staticmethod
    def _missing(catalog: Catalog) -> str:
        gone = catalog.missing_captions
        if not gone:
            return ""
        return (
            f"{len(gone)} of {len(catalog.items)} pictures have no caption, the first is {gone[0].name}, and no run starts like that. "
            "Write them under Captions and save, take the files' names (caption_strategy: filename), or set allow_missing_captions: true."
        )

    def _described(self, file: Path) -> None:
        """A folder has a file now."""
        self.source.value = str(file)
        if self.plan is not None and not self.plan.catalog.missing_captions:
            self.say(f"Written to {file}; a run takes the pictures from there.")

    @property
    def _place(self) -> Path:
        return Path(self.source.value).expanduser()

    @property
    def cuts(self) -> list[Placement]:
        """The pictures of the plan, each once, in the plan's order."""
        made = self.plan
        return [] if made is None else list({p.item.path: p for p in (*made.train, *made.evaluation)}.values())

    def save(self) -> None:
        """Keep the edited captions in the file beside the data sets' file; the next run reads them."""
        if not self.edits:
            self.say("No caption was edited, so there is nothing to keep.")
            return
        if self._place.is_dir():  # edits lie beside a file, never in the folder
            edited = {name: text for (_, name), text in self.edits.items()}
            self.folder_form.write()
            if self._place.is_dir() or self.plan is None:
                return  # what is wrong is said already
            self.edits = {(self.plan.catalog.datasets[0].id, name): text for name, text in edited.items()}
        edits: dict[str, dict[str, tuple[str, ...]]] = {}
        for (dataset, picture), text in self.edits.items():
            edits.setdefault(dataset, {})[picture] = self._lines(dataset, text)
        try:
            path = overlay.save(self._place, edits)
        except Sd3TuneError as error:
            self.say(str(error), bad=True)
            return
        count = len(self.edits)
        self.edits.clear()
        self.saved.times += 1
        self.look()
        missing = self.plan.catalog.missing_captions if self.plan else ()
        more = f" {len(missing)} pictures still have none, the first is {missing[0].name}." if missing else ""
        self.say(f"The captions of {count} pictures are kept in {path}; only they are encoded again.{more}", bad=bool(missing))

    def undo(self) -> None:
        """Forget what was edited and not saved."""
        self.edits.clear()
        self._show_page()
        self._choose()
        self.say("The captions are as they are on the disk.")

    def export(self) -> None:
        """Write every caption as a ``.txt`` file into a new folder; an existing one is refused."""
        folder = Path(self.folder.value).expanduser()
        if folder.exists():
            self.say(f"{folder.absolute()} is there already; name a new folder, so that nothing is overwritten", bad=True)
            return
        try:
            for cut in self.cuts:
                captions = self._lines(cut.item.dataset.id, self._words(cut))
                write_text(folder / cut.item.dataset.id / Path(self._name(cut)).with_suffix(".txt"), "\n".join(captions) + "\n")
        except Sd3TuneError as error:
            self.say(str(error), bad=True)
            return
        self.say(f"The captions of {len(self.cuts)} pictures are written into {folder.absolute()}.")

    def count(self) -> None:
        """How many tokens each text encoder counts in each caption, and what it does not see of it; from then on as one types."""
        try:
            found = [self.counter.count(self.config, line) for line in self.caption.value.splitlines() if line.strip()]
        except Sd3TuneError as error:
            put(self.counted, sentence(str(error), bad=True))
            return
        put(self.counted, sentence("\n".join("; ".join(map(str, line)) for line in found)))

    @staticmethod
    def _name(cut: Placement) -> str:
        return cut.item.found.name if cut.item.found else cut.item.path.name

    def _words(self, cut: Placement) -> str:
        """The picture's captions, one a line, as they are edited or found."""
        return self.edits.get((cut.item.dataset.id, self._name(cut)), "\n".join(cut.item.captions))

    def _lines(self, dataset: str, text: str) -> tuple[str, ...]:
        """What was typed as captions: one a line, unless the data set reads text files as one."""
        one = self.plan is not None and any(d.id == dataset and d.disable_multiline_split for d in self.plan.catalog.datasets)
        return tuple(caption for line in ([text] if one else text.splitlines()) if (caption := clean(line)))

    def _choose(self) -> None:
        place = self.picture.value
        if place is None or not 0 <= place < len(self.cuts):
            return
        cut = self.cuts[place]
        picture = framed(cut)
        put(self.shown, jpeg(picture.convert("RGB")) if picture else b"")
        put(self.counted, "")
        put(self.caption, self._words(cut))
        self._tell()

    def _edited(self) -> None:
        place = self.picture.value
        if place is None or not 0 <= place < len(self.cuts):
            return
        cut = self.cuts[place]
        key = (cut.item.dataset.id, self._name(cut))
        if self._lines(cut.item.dataset.id, self.caption.value) == cut.item.captions:
            self.edits.pop(key, None)
        else:
            self.edits[key] = self.caption.value
        self._tell()

    def _tell(self) -> None:
        if self.counter.ready:
            self.count()
        edited = f"{len(self.edits)} captions are edited and not saved yet." if self.edits else "All captions are as they are on the disk."
        count = len(self._lines(self.cuts[self.picture.value].item.dataset.id, self.caption.value))
        several = f"{count} captions, one a line: each time the picture is seen, one of them is drawn. " if count > 1 else ""
        put(self.kept, sentence(several + edited))

    def _show_page(self) -> None:
        start = SHOWN * (max(1, self.page.value) - 1)
        cuts = self.cuts[start : start + SHOWN]
        pages = -(-len(self.cuts) // SHOWN)
        said = f"Page {self.page.value} of {pages}: the frame is what training sees of each picture."
        cells = sheet([(framed(cut), f"{cut.item.path.name}: {' / '.join(self._words(cut).splitlines())} ({cut.bucket})") for cut in cuts])
        put(self.pages, (sentence(said) if pages else "") + cells)

    def _layout(self) -> Any:
        look = button("Look", self.look, "read the folders and show what a run would do with them; nothing is written")
        captions = widgets.VBox(
            [
                self.picture, row(self.shown, widgets.VBox([self.caption, row(
                    button("Count tokens", self.count, "what each text encoder sees of this caption; from then on, as you type"),
                    button("Save edits", self.save, "into a file beside the data sets' file; pictures' folders are never written to"),
                    button("Undo edits", self.undo, "forget what was edited and not saved"),
                ), self.counted, self.kept])),
                row(self.folder, button("Export as .txt", self.export, "every caption as a file, into a new folder")),
            ]
        )  # fmt: skip
        parts = {
            "Pictures": widgets.VBox([self.page, self.pages]), "Captions": captions, "Sizes": self.sizes, "Problems": self.problems,
        }  # fmt: skip
        return widgets.VBox(
            [row(self.source, look), self.note, self.folder_form.widget, self.found, tabs(parts)],
            layout=widgets.Layout(width="100%", max_width="1100px"),
        )
