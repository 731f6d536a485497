"""Run notebooks/panel.ipynb in JupyterLab with Chromium, press Start, and take a picture: ``panel_screenshot.py OUT.png``."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
PORT = 8897
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SERVE = (
    f"{sys.executable} -m jupyterlab --no-browser --allow-root --IdentityProvider.token= --ServerApp.port={PORT} "
    "--LabApp.expose_app_in_browser=True --LabApp.news_url=None"
).split()


def run_cells(page: Page, count: int) -> None:
    """Run the first cells of the open notebook, as a person does with Shift+Enter."""
    page.locator(".jp-Notebook .jp-Cell").first.click()
    for _ in range(count):
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
        page.wait_for_timeout(500)


def press(page: Page, name: str, then: str) -> None:
    """Press a button of the panel and wait until the status line says what follows."""
    button = page.locator(".widget-button:enabled", has_text=re.compile(f"^{name}$")).first
    button.wait_for(timeout=150_000)
    button.click()
    page.locator("div[role=status]", has_text=re.compile(then)).first.wait_for(timeout=150_000)


def shoot(page: Page, out: Path) -> None:
    """Start, pause, reload the page, take the picture, and go on: the panel must still follow the run."""
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"http://127.0.0.1:{PORT}/lab/tree/panel.ipynb", timeout=180_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=180_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=150_000)
    run_cells(page, 8)
    press(page, "Start", r"step [1-9]")
    press(page, "Pause", "paused")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.reload(timeout=150_000)
    page.locator(".widget-button", has_text=re.compile("^Go on$")).first.evaluate("b => b.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(1000)
    page.screenshot(path=out)
    press(page, "Go on", "training|validating|finished")


def wait_for_server() -> None:
    """Until JupyterLab answers; a minute and more on a busy machine."""
    for _ in range(180):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                return
        time.sleep(1)
    raise SystemExit("JupyterLab does not answer")


def copy_of_project(folder: Path) -> Path:
    """A folder with a copy of the notebook: JupyterLab saves what it runs, outputs and all."""
    (folder / "notebooks").mkdir()
    for name in ("datasets.yaml", "sd3tune"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "notebooks" / "panel.ipynb", folder / "notebooks")
    return folder / "notebooks"


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    with ExitStack() as stack:
        work = copy_of_project(Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))))
        server = stack.enter_context(
            subprocess.Popen(SERVE, cwd=work, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        )
        stack.callback(server.terminate)
        wait_for_server()
        play = stack.enter_context(sync_playwright())
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1150})
        shoot(page, out)
        browser.close()


if __name__ == "__main__":
    main()
