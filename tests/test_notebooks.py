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
APART = ("quickstart", "04_the_panel")
"""Those that `make test` runs, and `make notebooks` does not."""

STARTED = {".serve_forever": ".shutdown()", "threading.Timer(": "except KeyboardInterrupt"}
"""What goes on beside the cells, and what ends it; runs and processes are followed by name, in `unfinished`."""
MAKERS, STARTERS = ("launch", "Popen", "Runner"), ("start", "resume", "click")
"""Calls whose result goes on beside the cells, and methods by which something begins to; so do ``press("start")`` and ``"go_on"``."""

TRAINERS = ("trainer", "panel", "studio", "runner", "run", "launched")
"""Names of which the last assertion of a notebook says something."""
OTHERWISE = {
    "00_setup_and_doctor": ("report",),  # trains nothing: what the doctor found
    "02_your_pictures": ("seen",),  # trains nothing: what a model would see, with its captions
    "03_cache_precision_memory": ("steps",),  # frees each trainer at once: the records of its updates
    "08_when_it_goes_wrong": ("gone",),  # a weak reference: the trainer left the memory
}
"""Those without a trainer at their end, and what the last assertion is about instead."""


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def hidden(cell: Any) -> str:
    """What nbmake runs after a cell."""
    return "\n".join(cell.metadata.get("nbmake", {}).get("post_cell_execute", []))


def python(source: str) -> str:
    """A cell without magics."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def in_order(tree: ast.AST, *kinds: type[ast.AST]) -> list[Any]:
    """The parts of some code that are of these kinds, as they are read."""
    return sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda node: (node.lineno, node.col_offset))  # type: ignore[attr-defined]


def root(node: ast.AST) -> str:
    """The name that ``name.of[something].or(other)`` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def begins(call: ast.Call) -> bool:
    """Whether a method lets something go on beside the cells; a trainer is resumed in its own cell, and a thread has rules of its own."""
    if not isinstance(call.func, ast.Attribute) or root(call) in ("st", "threading"):
        return False
    pressed = [one.value for one in call.args if isinstance(one, ast.Constant)]
    return call.func.attr in STARTERS or (call.func.attr == "press" and pressed in (["start"], ["go_on"]))


def unfinished(notebook: Any) -> Iterator[str]:
    """Names of what was begun and is not waited for to its end afterwards; a wait for a step or a state is not the end."""
    going: dict[str, str] = {}
    for cell in code_cells(notebook):
        for text in (python(cell.source), hidden(cell)):
            tree = ast.parse(text)
            named = {id(node.value): root(node.targets[0]) for node in in_order(tree, ast.Assign)}
            for call in in_order(tree, ast.Call):
                called = call.func.attr if isinstance(call.func, ast.Attribute) else root(call.func)
                if called in MAKERS:
                    going[named.get(id(call), "")] = ast.unparse(call.func)
                elif begins(call):
                    going[root(call)] = ast.unparse(call)
                elif called == "wait" and len(call.args) < 2 and not any(one.arg == "until" for one in call.keywords):
                    going.pop(root(call), None)
    yield from going.values()


def asserted(cell: Any) -> list[set[str]]:
    """The names that each assertion of a cell speaks of."""
    found = []
    for text in (python(cell.source), hidden(cell)):
        found += [{one.id for one in in_order(said.test, ast.Name)} for said in in_order(ast.parse(text), ast.Assert)]
    return found


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
    if not any(names for cell in cells for names in asserted(cell)):
        yield "asserts nothing"
    if re.search(r"\binput\(", every):
        yield "asks for input"
    if re.search(r"hf_\w", every):
        yield "holds a token"
    for begun, end in STARTED.items():
        if begun in every and end not in every:
            yield f"starts something ({begun}) and does not end it ({end})"
    for begun in unfinished(notebook):
        yield f"starts something ({begun}) and does not wait for its end afterwards"
    for name in re.findall(r"`(\w+)\.ipynb`", every):
        if not (ROOT / "notebooks" / f"{name}.ipynb").exists():
            yield f"names {name}.ipynb, which is not there"


def faults_of_book(notebook: Any, subjects: tuple[str, ...] = TRAINERS) -> Iterator[str]:
    """What is wrong with a tutorial besides, which ends with an assertion on one of its subjects."""
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
    if not {*subjects} & {*([set(), *asserted(cells[-1])][-1])}:
        yield f"does not end with an assertion on {' or '.join(subjects)}"
    mocked = [cell for cell in cells if "mock" in cell.metadata.get("nbmake", {})]
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1 or any(cell not in tagged for cell in mocked):
        yield "changes names under test elsewhere than in the one cell of parameters"
    for cell in mocked:
        known = {target.id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
        if strange := sorted({*cell.metadata.nbmake.mock} - known):
            yield f"{cell.id}: changes {strange[0]} under test, which is no parameter"
    for place in re.findall(r'(?:output_dir|cache_dir)["\']?[=:]\s*"([^"]+)"', "\n".join(cell.source for cell in cells)):
        if not re.match(r"(\.\./)?(runs/|cache$)", place):
            yield f"writes into {place}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert [*faults(notebook), *faults_of_book(notebook, OTHERWISE.get(path.stem, TRAINERS))] == []


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


def _last(text: str) -> Callable[[Any], None]:
    def add(notebook: Any) -> None:
        last_code(notebook).metadata.setdefault("nbmake", {})["post_cell_execute"] = [text]

    return add


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
        (_last("assert True"), "does not end with an assertion"), (_last("assert tensors > 0"), "an assertion on trainer"),
        (_last("assert trainer.done\nassert out.exists()"), "does not end with an assertion"),
        (_added("token = 'hf_abc'"), "holds a token"), (_added("run = st.launch('run.yaml')"), "starts something (st.launch)"),
        (_added("run.wait()\nrun = st.launch('run.yaml')"), "starts something (st.launch)"),
        (_added("st.launch('run.yaml')\nother.wait()"), "starts something (st.launch)"),
        (_added("child = subprocess.Popen('x')\nrun.wait()"), "starts something (subprocess.Popen)"),
        (_added("panel.press('start')\npanel.wait(60, until='paused')"), "starts something (panel.press('start'))"),
        (_added("panel.press('start')\npanel.wait(60, 4)"), "starts something (panel.press('start'))"),
        (_added("panel.wait(9)\npanel.press('go_on')"), "starts something (panel.press('go_on'))"),
        (_added("panel.start()"), "starts something (panel.start())"), (_added("panel.resume()"), "starts something (panel.resume())"),
        (_added("panel.buttons['start'].click()"), "starts something (panel.buttons['start'].click())"),
        (_added("threading.Timer(1, f).start()"), "starts something (threading.Timer()"),
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


@pytest.mark.parametrize(
    "text",
    [
        "run = st.launch('run.yaml')\nrun.wait(120)",
        "panel.press('start')\npanel.wait(9, until=4)\nassert panel.wait(9).state == 'finished'",
        "child = subprocess.Popen('x')\nprint(child.wait())", "panel.buttons['start'].click()\npanel.wait()",
        "trainer = st.Trainer.resume(run)", "panel.press('pause')",
    ],
)  # fmt: skip
def test_what_is_waited_for_is_no_fault(text: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "01_first_lora.ipynb", as_version=4)
    _added(text)(notebook)
    assert [*unfinished(notebook)] == []


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


def test_quickstart_is_the_demo_and_make_runs_the_others_and_every_panel_under_both_ipywidgets() -> None:
    demo = (ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8")
    assert 'st.presets.playground(output_dir=\\"../runs/quickstart\\", cache_dir=\\"../cache\\")' in demo
    make = (ROOT / "Makefile").read_text()
    assert "notebooks/run_quickstart.py" in make.partition("demo: ")[2].partition("\n\n")[0]
    recipe = make.partition("\nnotebooks: ")[2].partition("\n\n")[0]
    assert "--nbmake" in recipe
    assert all(f"--ignore=notebooks/{name}.ipynb" in recipe for name in APART)
    assert all(f"notebooks/{name}.ipynb" in make.partition("\ntest: ")[2].partition("\n\n")[0] for name in APART)
    compat = make.partition("\ntest-compat: ")[2].partition("\n\n")[0]
    assert all(f"tests/test_{name}.py" in compat for name in ("forms", "panel", "red", "studio"))
    assert len(NOTEBOOKS) == 15
    assert {*OTHERWISE} < {path.stem for path in NOTEBOOKS}
