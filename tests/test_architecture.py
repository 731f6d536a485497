"""Promises about the shape of the package, kept by machine."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import sd3tune as st

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sd3tune"
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if "recipe" not in p.parts]

PUBLIC = {
    "doctor", "download_dataset", "free",
    "RunConfig", "presets", "check", "discover", "Catalog", "plan", "Plan", "encoders", "CacheBuilder", "Cache", "Batches", "Trainer",
    "StepRecord", "runs", "Sd3TuneError", "ConfigError", "DataError", "CacheError", "ModelError", "FileError", "CheckpointError",
    "TrainingError", "from_simpletuner", "launch", "lr_probe", "open_run", "replay", "sample", "slg_grid",
}  # fmt: skip


def test_the_public_names_are_these_and_importable() -> None:
    """``__all__``, the decided list and what can be had agree."""
    assert set(st.__all__) == PUBLIC
    assert all(getattr(st, name) is not None for name in PUBLIC)
    assert sorted(st.__all__) == list(st.__all__)


def test_import_is_quick_and_light() -> None:
    """``import sd3tune`` imports neither torch nor diffusers; the least of five tries is under 0.3 s."""
    code = (
        "import time; t = time.perf_counter(); import sd3tune; s = time.perf_counter() - t; import sys, json;"
        "print(json.dumps([s, [m for m in ('torch', 'diffusers', 'transformers', 'ipywidgets', 'matplotlib') if m in sys.modules]]))"
    )
    seconds = []
    for _ in range(5):
        took, heavy = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        assert heavy == []
        seconds.append(took)
    assert min(seconds) < 0.3


def test_modules_and_functions_stay_small() -> None:
    """No module above 300 lines, no function above 60, none nested more than 4 deep in blocks."""
    for path in MODULES:
        text = path.read_text()
        if path.name not in ("schema.py", "trainer.py"):
            assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_no_module_level_mutable_state() -> None:
    """Module-level names are constants and types; the runner's weak registry is the only exception."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and path.name != "live.py":
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name)]
                assert all(n.startswith("__") or n.lstrip("_")[0].isupper() for n in names), f"{path}: {names}"
    assert not [p for p in MODULES if re.search(r"^\s*global ", p.read_text(), re.M)]


def test_imports_go_one_way() -> None:
    """The import contracts of pyproject.toml hold."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(linter)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelog_begins_with_this_version() -> None:
    """The newest entry of the changelog is the package's version."""
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == st.__version__


def test_the_package_is_small_enough_to_ship() -> None:
    """Weights, tokenizers and pictures together are at most 40 MB."""
    shipped = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".py"]
    assert sum(p.stat().st_size for p in shipped) <= 40_000_000


def test_readme_commands_exist() -> None:
    """Every ``make`` target, verb and file that the README names is there, and its notebook example is Python."""
    from sd3tune.cli import _parser

    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.S)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = [shlex.split(line, comments=True) for kind, block in blocks if kind == "bash" for line in block.splitlines() if line.strip()]
    for words in commands:
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "sd3tune":
            _parser().parse_args(words[1:])
    assert {w[1] for w in commands if w[0] == "make"} >= {"demo", "test"}
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
    (example,) = [block for kind, block in blocks if kind == "python"]
    compile(example, "README.md", "exec")
