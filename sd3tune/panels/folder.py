"""A folder of pictures, described in a ``datasets.yaml`` of its own: where captions come from, how large, how many are held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from sd3tune.configuring import outcome
from sd3tune.configuring.pictures import Pictures, look
from sd3tune.configuring.writing import datasets_text
from sd3tune.errors import Sd3TuneError
from sd3tune.files import free_name, write_text
from sd3tune.panels.looks import button, put, row, sentence, tip, visible

CAPTIONS = (("a .txt file beside each picture", "textfile"), ("each file's name", "filename"), ("one text for all", "instanceprompt"))
NARROW, WIDE = {"width": "170px"}, {"width": "min(340px, 98%)"}


class FolderForm:
    """Asks what a folder cannot say by itself, and writes it down; ``described(file)`` hears of the new file.

    The file is put where the kernel runs, never into the pictures' folder, and replaces none.
    """

    def __init__(self, described: Callable[[Path], None]) -> None:
        self._described = described
        self._found: Pictures | None = None
        self.captions: Any = tip(widgets.Dropdown(options=CAPTIONS, description="Captions", layout=WIDE), "where the words come from")
        self.words: Any = tip(
            widgets.Text(description="Text", placeholder="a photo in sks style", layout=WIDE), "for all pictures, or before each caption"
        )
        self.side: Any = tip(widgets.IntText(value=1024, description="Side in px", layout=NARROW), "of a square of the same area")
        self.share: Any = tip(
            widgets.FloatText(value=0.1, step=0.05, description="Held out", layout=NARROW),
            "share of the pictures, from 0 to 0.9, that is never trained on: it shows whether the adapter learns or remembers",
        )
        self.repeats: Any = tip(
            widgets.IntText(value=0, description="Repeats", layout=NARROW), "extra passes in each epoch: 1 shows every picture twice"
        )
        self.flip: Any = tip(
            widgets.Checkbox(value=False, indent=False, description="Also mirrored", layout=NARROW), "each picture is also seen mirrored"
        )
        self.said, self.note = widgets.HTML(), widgets.HTML()
        written = button("Write it down", self.write, "a datasets.yaml for this folder, where this notebook runs")
        self.widget: Any = widgets.VBox(
            [self.said, row(self.captions, self.words), row(self.side, self.share, self.repeats, self.flip, written), self.note],
            layout={"width": "100%"},
        )
        visible(self.widget, False)

    def show(self, source: str, *, most: int) -> None:
        """Appear for a folder with suggestions, sides up to ``most``; go away for everything else. Raises: Sd3TuneError."""
        folder = Path(source).expanduser()
        visible(self.widget, folder.is_dir())
        if not folder.is_dir() or (self._found and Path(self._found.place) == folder.absolute()):
            return
        found = self._found = look(source)
        put(self.note, "")
        put(self.said, sentence(f"{found}\nThe rest is for you to say; it goes into a file of its own, not into the folder."))
        self.captions.value = found.caption_strategy
        self.side.value = min(found.resolution, most)

    def write(self) -> None:
        """Write the file, and tell who wants to know."""
        assert self._found is not None, "the form is shown for a folder"
        answers = {
            "caption_strategy": self.captions.value, "instance_prompt": self.words.value.strip(), "resolution": self.side.value,
            "eval_share": self.share.value, "repeats": self.repeats.value, "flip": "horizontal" if self.flip.value else "",
        }  # fmt: skip
        try:
            dataset = outcome.dataset_from(answers, self._found)
            path = free_name(Path(f"{dataset.id}.yaml").absolute())
            write_text(path, datasets_text(dataset, str(self._found).splitlines()[0], path.parent))
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        put(self.note, "")
        self._described(path)
