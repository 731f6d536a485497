"""What must hold of every notebook, without running one; `make notebooks` runs them."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import sd3tune as st

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
APART = ("quickstart",)
"""The demo, which `make demo` runs where everything is installed."""
BOOKS = [path for path in NOTEBOOKS if path.stem not in APART]

STARTED = {
    "st.launch(": ".wait(", "Popen(": ".wait(", 'press("start")': ".wait(", "Runner(": ".wait(", ".serve_forever": ".shutdown()",
    "threading.Timer(": "except KeyboardInterrupt",
}  # fmt: skip
"""What goes on beside the cells, and what ends it: without that a notebook is green whatever happens."""


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def hidden(cell: Any) -> str:
    """What nbmake runs after a cell."""
    return "\n".join(cell.metadata.get("nbmake", {}).get("post_cell_execute", []))


def python(source: str) -> str:
    """A cell without magics."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def faults(notebook: Any) -> Iterator[str]:
    """What is wrong with any notebook."""
    cells = code_cells(notebook)
    every = "\n".join([cell.source for cell in notebook.cells] + [hidden(cell) for cell in cells])
    for cell in cells:
        if cell.outputs or cell.execution_count is not None:
            yield f"{cell.id}: has outputs or a number"
        for text in (python(cell.source), hidden(cell)):
            for node in ast.walk(ast.parse(text)):
                defined = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if defined and (node.end_lineno or 0) - node.lineno >= 5:  # type: ignore[attr-defined]
                    yield f"{cell.id}: defines {node.name} in more than five lines"  # type: ignore[attr-defined]
    if not any("assert " in cell.source + hidden(cell) for cell in cells):
        yield "asserts nothing"
    if re.search(r"\binput\(", every):
        yield "asks for input"
    if re.search(r"hf_\w", every):
        yield "holds a token"
    for begun, end in STARTED.items():
        if begun in every and end not in every:
            yield f"starts something ({begun}) and does not end it ({end})"
    for name in re.findall(r"`(\w+)\.ipynb`", every):
        if not (ROOT / "notebooks" / f"{name}.ipynb").exists():
            yield f"names {name}.ipynb, which is not there"


def faults_of_book(notebook: Any) -> Iterator[str]:
    """What is wrong with a tutorial besides."""
    cells = code_cells(notebook)
    first, *rest = cells
    if not notebook.cells[0].source.startswith("# ") or notebook.cells[0].source.count(".") < 2:
        yield "opens with no title and two sentences"
    if 'find_spec("sd3tune") is None' not in first.source or "installing.complete(" not in first.source:
        yield "opens without the cell that installs"
    if "pip install" in "".join(cell.source for cell in rest):
        yield "installs in a second place"
    said = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if re.findall(r"belongs to sd3tune ([\d.]+\d)", said) != [st.__version__]:
        yield "does not say which version it belongs to"
    if "assert " not in cells[-1].source + hidden(cells[-1]):
        yield "does not end with an assertion"
    mocked = [cell for cell in cells if "mock" in cell.metadata.get("nbmake", {})]
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1 or any(cell not in tagged for cell in mocked):
        yield "changes names under test elsewhere than in the one cell of parameters"
    for cell in mocked:
        known = {target.id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
        if strange := sorted({*cell.metadata.nbmake.mock} - known):
            yield f"{cell.id}: changes {strange[0]} under test, which is no parameter"
    for place in re.findall(r'(?:output_dir|cache_dir)["\']?[=:]\s*"([^"]+)"', "\n".join(cell.source for cell in cells)):
        if not re.match(r"runs/|cache$", place):
            yield f"writes into {place}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert [*faults(notebook), *(faults_of_book(notebook) if path in BOOKS else [])] == []


def last_code(notebook: Any) -> Any:
    return code_cells(notebook)[-1]


def _output(notebook: Any) -> None:
    last_code(notebook).outputs = [nbformat.v4.new_output("stream", text="1")]


def _number(notebook: Any) -> None:
    last_code(notebook).execution_count = 3


def _long_definition(notebook: Any) -> None:
    last_code(notebook).source += "\ndef f():\n" + "    x = 1\n" * 5


def _no_assertion(notebook: Any) -> None:
    for cell in code_cells(notebook):
        cell.metadata.pop("nbmake", None)


def _last_without(notebook: Any) -> None:
    last_code(notebook).metadata.pop("nbmake", None)


def _added(text: str) -> Callable[[Any], None]:
    def add(notebook: Any) -> None:
        code_cells(notebook)[1].source += f"\n{text}"

    return add


def _without_title(notebook: Any) -> None:
    notebook.cells[0].source = notebook.cells[0].source.removeprefix("# ")


def _without_install(notebook: Any) -> None:
    notebook.cells.remove(code_cells(notebook)[0])


def _other_version(notebook: Any) -> None:
    for cell in notebook.cells:
        cell.source = cell.source.replace("belongs to sd3tune 0.1.0", "belongs to sd3tune 0.0.9")


def _mock(notebook: Any) -> None:
    last_code(notebook).metadata.setdefault("nbmake", {})["mock"] = {"steps": 1}


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_output, "has outputs"), (_number, "has outputs or a number"), (_long_definition, "defines f in more than five"),
        (_no_assertion, "asserts nothing"), (_last_without, "does not end with an assertion"), (_added("input('?')"), "asks for input"),
        (_added("token = 'hf_abc'"), "holds a token"), (_added("run = st.launch('run.yaml')"), "starts something"),
        (_added("# see `13_missing.ipynb`"), "which is not there"), (_without_title, "no title"), (_without_install, "cell that installs"),
        (_added("# pip install x"), "second place"), (_other_version, "which version"), (_mock, "elsewhere than in the one cell"),
        (_added('c = c.replace(output_dir="/home/me")'), "writes into /home/me"),
    ],
)  # fmt: skip
def test_each_rule_sees_its_fault(plant: Callable[[Any], None], said: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "01_first_lora.ipynb", as_version=4)
    broken = copy.deepcopy(notebook)
    plant(broken)
    found = [*faults(broken), *faults_of_book(broken)]
    assert any(said in text for text in found), found


def test_the_users_own_job_changes_nothing_under_test_but_its_parameters() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "train_sd35.ipynb", as_version=4)
    (parameters,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.metadata.nbmake.mock.preset == "playground"
    wanted: dict[str, Any] = {}
    exec(parameters.source, wanted)  # the cell as it is read: plain values
    config = st.presets.load(wanted["preset"], **wanted["settings"])
    assert config.model.model_flavour == "sd35-medium"
    assert config.reporting.push_to_hub
    text = "".join(cell.source for cell in notebook.cells)
    assert {*re.findall(r"`((?:sd35|colab)-[\w-]+)`", text)} <= {*st.presets.names()}


def test_quickstart_is_the_demo_and_make_runs_the_others() -> None:
    demo = (ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8")
    assert 'st.presets.playground(output_dir=\\"../runs/quickstart\\", cache_dir=\\"../cache\\")' in demo
    make = (ROOT / "Makefile").read_text()
    assert "notebooks/run_quickstart.py" in make.partition("demo: ")[2].partition("\n\n")[0]
    recipe = make.partition("\nnotebooks: ")[2].partition("\n\n")[0]
    assert "--nbmake" in recipe
    assert all(f"--ignore=notebooks/{name}.ipynb" in recipe for name in APART)
    assert len(BOOKS) == 14
