"""JupyterLab in Chromium, driven as a person would: open a notebook, run cells, press, type, reload."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import BrowserContext, Locator, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
PATIENCE = 180_000
"""Milliseconds; a busy machine loads a model slowly."""

BENIGN = ("favicon", "ResizeObserver", "source map", "Failed to load resource", "api/collaboration", "net::ERR")
"""What JupyterLab's own pages write to the console."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder; gives its address."""
    port = free_port()
    command = (
        f"{sys.executable} -m jupyterlab --no-browser --allow-root --IdentityProvider.token= --ServerApp.port={port} "
        "--LabApp.expose_app_in_browser=True --LabApp.news_url=None --ServerApp.open_browser=False"
    ).split()
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".lab"),
    }
    shown = folder / ".lab" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    shown.parent.mkdir(parents=True)
    shown.write_text('{"windowingMode": "none"}')  # every cell is on the page, wherever it is scrolled to
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL) as running:
        try:
            for _ in range(240):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            else:
                raise AssertionError("JupyterLab does not answer")
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """Debian's Chromium."""
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened.new_context(viewport={"width": 1280, "height": 1400})
        opened.close()


READY = """name => {
  const shown = window.jupyterapp?.shell.currentWidget;
  return shown?.context?.path === name && shown.sessionContext.session?.kernel?.status === 'idle';
}"""
"""Whether the notebook is the one that commands mean, and its kernel waits for work."""

PROMPT = "cell => document.querySelectorAll('.jp-Notebook .jp-Cell')[cell].querySelector('.jp-InputPrompt').innerText"


class Lab:
    """One notebook in JupyterLab."""

    def __init__(self, page: Page, address: str, notebook: Path) -> None:
        self.page, self.address, self.notebook = page, address, notebook
        self.errors: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())

    @property
    def own_errors(self) -> list[str]:
        """Errors of the console that are not JupyterLab's usual ones."""
        return [text for text in self.errors if not any(known in text for known in BENIGN)]

    def open(self) -> None:
        """Open the notebook, alone in a workspace of its own, and wait for its kernel."""
        self.page.goto(f"{self.address}/lab/workspaces/{self.notebook.stem}/tree/{self.notebook.name}", timeout=PATIENCE)
        self.page.wait_for_function(READY, arg=self.notebook.name, timeout=PATIENCE)

    def do(self, command: str, **given: object) -> None:
        """Begin one of JupyterLab's commands; running a cell would last as long as the cell."""
        self.page.evaluate("([name, given]) => { window.jupyterapp.commands.execute(name, given); }", [command, given])

    def select(self, cell: int) -> None:
        """Make a cell the active one."""
        self.page.evaluate("k => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = k; }", cell)

    def run(self, cell: int) -> None:
        """Run a cell; waits until it has begun, not for its end."""
        self.select(cell)
        before = self.page.evaluate(PROMPT, cell)
        self.do("notebook:run-cell")
        self.page.wait_for_function(f"([cell, before]) => ({PROMPT})(cell) !== before", arg=[cell, before], timeout=PATIENCE)

    def output(self, cell: int) -> Locator:
        """What stands below a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-OutputArea")

    def status(self) -> Locator:
        """The status line of the newest panel."""
        return self.page.locator(
            "div[role=status]", has_text=re.compile(r"^(idle|preparing|training|paused|validating|stopp|finished|failed)")
        ).last

    def until(self, words: str) -> str:
        """Wait until the status line says something; what it says."""
        found = self.page.locator("div[role=status]", has_text=re.compile(words)).last
        found.wait_for(timeout=PATIENCE)
        return found.inner_text()

    def button(self, name: str) -> Locator:
        """A button of the panel by what it says."""
        return self.page.locator(".widget-button", has_text=re.compile(f"^{name}$")).last

    def press(self, name: str) -> None:
        """Press a button of the panel as soon as it can be pressed."""
        found = self.page.locator(".widget-button:enabled", has_text=re.compile(f"^{name}$")).last
        found.wait_for(timeout=PATIENCE)
        found.click()

    def type(self, label: str, text: str) -> None:
        """Type into a field by its label, and leave it."""
        field = self.page.get_by_label(label, exact=True).last
        field.fill(text)
        field.press("Tab")

    def save(self) -> Path:
        """Save the notebook."""
        self.do("docmanager:save")
        self.page.wait_for_timeout(1500)
        return self.notebook


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(made, path)
    return path


CONTROLS = {
    "button", "checkbox", "combobox", "DisclosureTriangle", "image", "link", "listbox", "menuitem", "progressbar", "radio",
    "searchbox", "slider", "spinbutton", "switch", "tab", "textbox",
}  # fmt: skip
"""Roles that mean nothing to those who hear them without a name."""


def controls(page: Page) -> list[tuple[str, str, str]]:
    """(role, name, HTML) of each control that the outputs show, as the browser tells them to screen readers."""
    session = page.context.new_cdp_session(page)
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    outputs = session.send("DOM.querySelectorAll", {"nodeId": root, "selector": ".jp-OutputArea-output"})["nodeIds"]
    found = []
    for output in outputs:
        for node in session.send("Accessibility.queryAXTree", {"nodeId": output})["nodes"]:
            if not node["ignored"] and node["role"]["value"] in CONTROLS:
                html = session.send("DOM.getOuterHTML", {"backendNodeId": node["backendDOMNodeId"]})["outerHTML"]
                found.append((node["role"]["value"], node.get("name", {}).get("value", "").strip(), html[:160]))
    session.detach()
    return found


def unnamed(page: Page) -> list[tuple[str, str, str]]:
    """The controls that screen readers have no name for.

    The picture of ``widgets.Image`` cannot have one (a tooltip breaks its view): the sentence beside it says what it shows.
    """
    return [one for one in controls(page) if not one[1] and "widget-image" not in one[2]]


TOO_WIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output')].flatMap(out => {
  const inside = [...out.querySelectorAll('*')].filter(one => one.clientWidth && !one.closest('table, pre'));
  const beyond = inside.filter(one => one.getBoundingClientRect().right > out.getBoundingClientRect().right + 2);
  return [...(out.scrollWidth > out.clientWidth + 2 ? [out] : []), ...beyond].map(one => one.outerHTML.slice(0, 160));
})"""
"""What sticks out of its output to the right, also where a box hides it; tables and logs scroll by themselves."""


def too_wide(page: Page) -> list[str]:
    """What a person would have to scroll to the right for."""
    found: list[str] = page.evaluate(TOO_WIDE)
    return found


CUT_OFF = """() => [...document.querySelectorAll('.jp-OutputArea-output [class*=TabBar-tabLabel]')]
  .filter(one => one.clientWidth && one.scrollWidth > one.clientWidth).map(one => one.innerText)"""


def cut_off(page: Page) -> list[str]:
    """Names of tabs that are not seen whole."""
    found: list[str] = page.evaluate(CUT_OFF)
    return found
