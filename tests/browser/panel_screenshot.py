"""Run notebooks/panel.ipynb in JupyterLab with Chromium, press Start, and take a picture: ``panel_screenshot.py OUT.png``."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
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


def shoot(page: Page, out: Path) -> None:
    page.goto(f"http://127.0.0.1:{PORT}/lab/tree/panel.ipynb", timeout=180_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=180_000)
    page.wait_for_selector(".jp-mod-idle, [data-status=idle]", timeout=120_000, state="attached")
    print("the notebook is open", flush=True)
    run_cells(page, 8)
    start = page.locator(".widget-button", has_text=re.compile("^Start$"))
    start.wait_for(timeout=150_000)
    start.click()
    print("pressed Start", flush=True)
    status = page.locator("div[role=status]", has_text=re.compile(r"step [1-9]"))
    status.first.wait_for(timeout=150_000)
    page.locator(".widget-image").first.wait_for(timeout=150_000)
    status.first.scroll_into_view_if_needed()
    start.first.evaluate("b => b.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(1000)


def wait_for_server() -> None:
    """Until JupyterLab answers; a minute and more on a busy machine."""
    for _ in range(180):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                return
        time.sleep(1)
    raise SystemExit("JupyterLab does not answer")


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    with subprocess.Popen(SERVE, cwd=NOTEBOOKS, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_server()
            with sync_playwright() as play:
                browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
                page = browser.new_page(viewport={"width": 1280, "height": 1150})
                try:
                    shoot(page, out)
                finally:
                    page.screenshot(path=out)
                browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
