"""What becomes of an adapter: for which program it is written, whether it reads back, and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from sd3tune.config.schema import RunConfig
from sd3tune.errors import CheckpointError, FileError, Sd3TuneError
from sd3tune.opening import open_run
from sd3tune.panels.base import Displayed
from sd3tune.panels.looks import button, offer, put, row, sentence, tip
from sd3tune.run_folder import RunFolder

LAYOUTS = (("diffusers", "diffusers"), ("ComfyUI", "comfyui"))


class ExportPanel(Displayed):
    """Writes the adapter of a run (or any LoRA file) for another program, verified, and the run's report. It overwrites no adapter."""

    def __init__(self, source: str | Path = "runs/my-run") -> None:
        wide = {"width": "min(520px, 98%)"}
        self.source: Any = tip(
            widgets.Text(value=str(source), description="From", continuous_update=False, layout=wide), "a run folder or a LoRA file"
        )
        self.step: Any = tip(
            widgets.Dropdown(options=[("final adapter", -1)], description="Which", layout=wide), "the final adapter, or a checkpoint's"
        )
        self.layout: Any = tip(widgets.Dropdown(options=LAYOUTS, description="For", layout=wide), "whose names of layers the file has")
        self.target: Any = tip(
            widgets.Text(value="my-lora.safetensors", description="To", continuous_update=False, layout=wide), "the file to write"
        )
        self.note, self.said = widgets.HTML(), widgets.HTML()
        self.widget: Any = widgets.VBox(
            [
                self.source, self.step, self.layout, self.target,
                row(
                    button("Look", self.look, "what is in the file"), button("Write", self.write, "convert, write, read back, compare"),
                    button("Report", self.report, "the whole run as one page, report.html"),
                    button("Model card", self.card, "README.md as the hub wants it"),
                ),
                self.note, self.said,
            ],
            layout=widgets.Layout(width="100%", max_width="1100px"),
        )  # fmt: skip
        self.source.observe(lambda _: self.offer_steps(), "value")
        self.offer_steps()

    def offer_steps(self) -> None:
        """Offer the checkpoints that the run has now, besides its final adapter."""
        try:
            found = open_run(self.source.value).checkpoints
        except CheckpointError:
            found = ()
        offer(self.step, [("final adapter", -1), *((str(one), one.step) for one in found if one.step)])

    @property
    def file(self) -> Path:
        """The LoRA file that is meant. Raises: CheckpointError when there is none."""
        path = Path(self.source.value).expanduser()
        found = RunFolder.of(path).lora if path.is_dir() else path
        if not found.exists():
            raise CheckpointError(
                f"{found.absolute()}: there is no adapter; a run writes it when it finishes; choose one of its checkpoints, or another file"
            )
        return found

    def look(self) -> None:
        """Show what is in the file."""
        from sd3tune.models import lora_layouts

        self.offer_steps()
        if self.step.value > 0:
            put(self.said, sentence(f"The adapter of step {self.step.value}, as it drew then; Write makes a file of it."))
        else:
            self._do(lambda: str(lora_layouts.read(self.file)))

    def write(self) -> None:
        """Write the adapter in the chosen layout, and say what was compared."""
        from sd3tune.candidates import promote
        from sd3tune.models import lora_files, lora_layouts
        from sd3tune.validation.votes import Candidate

        def act() -> str:
            out = Path(self.target.value).expanduser()
            if out.exists():
                raise FileError(f"{out.absolute()} is there already; give another name")
            if self.step.value > 0:
                return str(promote(RunFolder.of(self.source.value), Candidate(self.step.value), out, layout=self.layout.value))
            return f"{out.absolute()}: {lora_files.write(out, lora_layouts.read(self.file), self.layout.value)}"

        self._do(act)

    def report(self) -> None:
        """Write the run's report."""
        from sd3tune.reporting.page import write_report

        def act() -> str:
            folder = RunFolder.of(Path(self.source.value).expanduser())
            write_report(folder)
            return f"{folder.report}: one page, needs no network"

        self._do(act)

    def card(self) -> None:
        """Write the run's model card."""
        from sd3tune.files import write_text
        from sd3tune.reporting.card import card

        def act() -> str:
            folder = RunFolder.of(Path(self.source.value).expanduser())
            write_text(folder.card, card(folder, RunConfig.load(folder.config), folder.path.name))
            return f"{folder.card}: look at it before you share it"

        self._do(act)

    def _do(self, act: Any) -> None:
        """Do something with files, and say how it went."""
        try:
            said = act()
        except Sd3TuneError as error:
            put(self.note, sentence(str(error), bad=True))
            return
        put(self.note, "")
        put(self.said, sentence(said))
