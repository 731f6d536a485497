"""The panel in a real JupyterLab: pressed, steered, reloaded, run twice, watched, interrupted, finished, and left without a kernel.

``SD3TUNE_SHOTS`` names a folder for screenshots.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="pip install playwright (make test-browser does)")

from lab import CHROMIUM, PATIENCE, Lab, browser, controls, cut_off, server, too_wide, unnamed, write_notebook
from playwright.sync_api import BrowserContext

ROOT = Path(__file__).parents[2]
CELLS = (
    f"""import sd3tune as st
from sd3tune import panels

config = st.presets.playground(
    max_train_steps=20000, lr_warmup_steps=5, train_batch_size=2, validation_prompt=("croissant", "lock"), validation_num_inference_steps=4,
    eval_timesteps=2, num_eval_images=4, output_dir="runs/browser", cache_dir="cache",
)
data = {str(ROOT / "datasets.yaml")!r}""",
    "panel = panels.TrainingPanel(config, data=data)\npanel",
    "print(6 * 7)",
    "import threading\nprint('threads', sum(t.name == 'sd3tune-trainer' for t in threading.enumerate()))",
    "seen = panel.watch()\nprint('watched', seen.state)",
    "studio = panels.Studio(config, data=data)\nstudio.data.look()\nstudio",
)

TABS = ("Machine", "Model", "Data", "Training", "Validation", "Grid lab", "Compare", "Export")

FAULTS = """<div class="jp-OutputArea-output" style="width:300px;overflow:hidden">
<select id="bare"><option>step 4</option><option>step 8</option></select>
<label for="told">Checkpoint</label><select id="told"><option>step 4</option></select>
<button></button><button>Start</button><svg role="img"></svg><img alt="lock" src="data:,"><input type="radio" aria-label="step 4">
<div style="overflow:auto"><div id="wide" style="width:400px">hidden by its box</div></div>
<div style="overflow:auto"><table><tr><td><div style="width:400px">scrolls</div></td></tr></table></div>
<div class="lm-TabBar-tabLabel">Data</div><div class="lm-TabBar-tabLabel" style="width:20px;overflow:hidden">Machine</div>
</div>"""
"""A page with a choice that nobody named, although it has words inside, something too wide that a box hides, and half a name."""

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium")


@pytest.fixture(scope="module")
def chromium() -> Iterator[BrowserContext]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: BrowserContext) -> Iterator[Lab]:
    """The notebook, opened, with its first two cells run."""
    folder = tmp_path_factory.mktemp("browser")
    notebook = write_notebook(folder / "panel.ipynb", *CELLS)
    with server(folder) as address:
        one = Lab(chromium.new_page(), address, notebook)
        one.open()
        one.run(0)
        one.run(1)
        yield one


def shoot(lab: Lab, name: str) -> None:
    """Keep a picture of the page, if somebody wants one."""
    if folder := os.environ.get("SD3TUNE_SHOTS"):
        lab.page.screenshot(path=f"{folder}/{name}.png")


def told(lab: Lab) -> list[dict[str, object]]:
    """Settings that were changed, as the run's history has them."""
    folder = max(lab.notebook.parent.glob("runs/browser*"), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["type"] == "command" and row["name"] == "set" and not row["refused"]]


def test_what_the_looks_at_a_page_find(chromium: BrowserContext) -> None:
    page = chromium.new_page()
    page.set_content(FAULTS)
    assert [html[:12] for _, _, html in unnamed(page)] == ['<select id="', "<button></bu", '<svg role="i']
    assert [one[:2] for one in controls(page) if one[1]] == [
        ("combobox", "Checkpoint"), ("button", "Start"), ("image", "lock"), ("radio", "step 4"),
    ]  # fmt: skip
    assert [html.partition(" style")[0] for html in too_wide(page)] == ['<div id="wide"']
    assert cut_off(page) == ["Machine"]
    page.close()


def test_a_run_from_start_to_the_report_that_outlives_its_kernel(lab: Lab) -> None:
    page = lab.page
    lab.press("Start")
    lab.until(r"^training · step [1-9]")
    before = page.locator("svg[aria-label^='loss']").last.get_attribute("aria-label", timeout=PATIENCE)
    page.wait_for_function(
        "before => [...document.querySelectorAll(\"svg[aria-label^='loss']\")].at(-1)?.getAttribute('aria-label') !== before",
        arg=before, timeout=PATIENCE,
    )  # fmt: skip

    lab.type("Learning rate", "0.0005")
    lab.type("SLG layers", "1, 2")
    page.locator("text=changed by you").last.wait_for(timeout=PATIENCE)
    lab.press("Pause")
    lab.until("^paused")
    assert {"learning_rate": 0.0005} in told(lab)
    assert {"validation_guidance_skip_layers": [1, 2]} in told(lab)

    lab.run(2)
    lab.output(2).get_by_text("42").wait_for(timeout=PATIENCE)
    lab.press("Sample now")
    page.locator("div[role=status]", has_text=re.compile("pictures of the LoRA: croissant, lock")).last.wait_for(timeout=PATIENCE)
    steps = page.get_by_label("Drawing no.", exact=True).last
    newest = steps.input_value()
    lab.select(1)
    steps.click()
    steps.press("ArrowDown")
    page.locator("div[role=status]", has_text=re.compile(r"^Step 0: [24] pictures of the base model alone")).last.wait_for(timeout=PATIENCE)
    assert steps.input_value() != newest
    steps.press("ArrowUp")
    part = page.get_by_role("button", name=re.compile(r"^croissant, LoRA, step \d+: full size$")).last
    part.wait_for(timeout=PATIENCE)
    image = page.locator(".sd3tune-clicks img").last
    shown, over = image.bounding_box(), part.bounding_box()
    assert shown is not None
    assert over is not None
    assert shown["x"] < over["x"] < over["x"] + over["width"] < shown["x"] + shown["width"]
    assert shown["y"] < over["y"] < over["y"] + over["height"] < shown["y"] + shown["height"]
    page.mouse.click(over["x"] + over["width"] / 2, over["y"] + over["height"] / 2)
    back = page.get_by_role("button", name="all pictures again", exact=True).last
    back.wait_for(timeout=PATIENCE)
    page.wait_for_function("one => one.naturalWidth === 64", arg=image.element_handle(), timeout=PATIENCE)  # the picture's own size
    back.focus()
    back.press("Enter")
    part.wait_for(timeout=PATIENCE)
    part.hover()
    shoot(lab, "clicks")
    lab.press("Go on")
    stood = int(re.search(r"step (\d+)", lab.until(r"^training · step"))[1])  # type: ignore[index]

    lab.save()
    page.reload(timeout=PATIENCE)
    page.wait_for_selector(".widget-button", timeout=PATIENCE)
    moved = page.wait_for_function(
        "stood => [...document.querySelectorAll('div[role=status]')].some(one => Number(/step (\\d+)/.exec(one.innerText)?.[1]) > stood)",
        arg=stood, timeout=PATIENCE,
    )  # fmt: skip
    assert moved

    lab.run(1)
    page.get_by_text("Attached to the run that is going on").wait_for(timeout=PATIENCE)
    lab.run(3)
    lab.output(3).get_by_text("threads 1").wait_for(timeout=PATIENCE)

    lab.run(4)
    page.get_by_text("Watched from this cell").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(1500)
    lab.do("notebook:interrupt-kernel")
    lab.output(4).get_by_text(re.compile("watched (training|validating)")).wait_for(timeout=PATIENCE)
    page.get_by_text("Not watched any more; the run goes on").wait_for(timeout=PATIENCE)

    lab.select(1)
    lab.button("Pause").evaluate("one => one.scrollIntoView({block: 'center'})")
    found = controls(page)
    assert len(found) > 20
    assert ("combobox", "Checkpoint") in [one[:2] for one in found]
    assert not unnamed(page)
    shoot(lab, "light")
    lab.do("apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_timeout(2000)
    shoot(lab, "dark")
    lab.do("apputils:change-theme", theme="JupyterLab Light")
    lab.do("application:toggle-left-area")
    page.set_viewport_size({"width": 520, "height": 1400})
    page.wait_for_timeout(1500)
    shoot(lab, "narrow")
    assert not too_wide(page)
    page.set_viewport_size({"width": 1280, "height": 1400})
    lab.do("application:toggle-left-area")

    lab.press("Stop and save")
    lab.output(1).get_by_text("The code that does this again").wait_for(timeout=PATIENCE)
    lab.save()
    assert lab.notebook.stat().st_size < 400_000
    lab.do("notebook:shutdown-kernel")
    page.wait_for_timeout(2000)
    page.reload(timeout=PATIENCE)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
    report = lab.output(1)
    report.locator("summary", has_text="The code that does this again").wait_for(timeout=PATIENCE)
    assert report.locator("svg[aria-label^='loss']").count() >= 1
    radios = report.locator("input[type=radio]")
    assert radios.count() >= 2
    radios.first.check()
    assert report.locator("img:visible").count() == 1
    shoot(lab, "report")
    assert not lab.own_errors, lab.own_errors


def test_every_control_of_the_studio_has_a_name_in_each_tab_and_520_px_are_enough(lab: Lab) -> None:
    """In a notebook with a page and a kernel of its own; each tab is opened."""
    other = Lab(lab.page.context.new_page(), lab.address, write_notebook(lab.notebook.parent / "studio.ipynb", CELLS[0], CELLS[5]))
    other.open()
    other.run(0)
    other.run(1)
    page = other.page
    other.do("application:toggle-left-area")
    for name in TABS:
        page.get_by_role("tab", name=name, exact=True).last.click(timeout=PATIENCE)
        page.wait_for_timeout(700)
        found = controls(page)
        assert [one[1] for one in found if one[0] == "tab"][:8] == list(TABS)
        assert not unnamed(page), name
        shoot(other, f"studio-{name.lower().replace(' ', '-')}")
        page.set_viewport_size({"width": 520, "height": 1400})
        page.wait_for_timeout(700)
        assert not too_wide(page), name
        assert not cut_off(page)
        shoot(other, f"narrow-{name.lower().replace(' ', '-')}")
        page.set_viewport_size({"width": 1280, "height": 1400})
    assert not other.own_errors, other.own_errors
