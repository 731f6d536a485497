"""What goes wrong behind a panel turns its notebook red: in the worker, in a handler, and in pictures that are drawn on the way."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

HERE = Path(__file__).parent
BEGIN = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from test_runner import FakeTrainer
from sd3tune.config import presets
from sd3tune.panels import TrainingPanel

fake = FakeTrainer(Path("run"))
panel = TrainingPanel(presets.playground(output_dir="run"), None, make=lambda config, cache: fake)
panel
"""
CASES = {
    "fine": ("", "panel.buttons['start'].click()\nassert panel.wait(30).state == 'finished'"),
    "in the worker": ("fake.fails_at, fake.error = 2, ValueError('on purpose')", "panel.buttons['start'].click()\npanel.wait(30)"),
    "in a handler": (
        "def broken(*given):\n    raise ValueError('on purpose')\npanel.runner.send = broken",
        "panel.buttons['pause'].click()",
    ),
    "while drawing": (
        "def broken():\n    raise ValueError('on purpose')\n    yield\nfake.validation, fake.draws_at = broken, 2",
        "panel.buttons['start'].click()\npanel.wait(30)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_notebook_is_red_exactly_when_something_went_wrong(case: str, tmp_path: Path) -> None:
    cells = [BEGIN, *CASES[case]]
    path = tmp_path / "case.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells]), path)
    error = NotebookRun(path, 120).execute().error
    assert (error is None) == (case == "fine"), error
    assert error is None or "on purpose" in error.trace
