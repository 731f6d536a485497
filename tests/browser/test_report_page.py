"""A finished run's report.html in Chromium: no network, no error, nothing wider than the page, light and dark, narrow and wide."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="pip install playwright (make test-browser does)")

from lab import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import sd3tune as st
from sd3tune import playground

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium")

WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLOUR = "() => getComputedStyle(document.body).color"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the playground."""
    folder = tmp_path_factory.mktemp("report")
    config = st.presets.playground(
        max_train_steps=6, lr_warmup_steps=0, validation_steps=3, eval_steps_interval=3, evaluation_type="clip",
        validation_prompt=("lock", "croissant"), validation_num_inference_steps=3,
        output_dir=str(folder / "run"), cache_dir=str(folder / "cache"),
    )  # fmt: skip
    trainer = st.Trainer(config, st.CacheBuilder(st.plan(st.discover(playground.DATASETS), config), st.encoders(config)).build())
    list(trainer.run())
    return trainer.folder.report


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [520, 1400])
def test_the_report_is_one_page(report: Path, chromium: Browser, scheme: str, width: int) -> None:
    """Everything is in the file; curves, grid and pictures are there, and words are legible on their ground."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    asked, said = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert said == []
    assert page.evaluate(WIDER) <= 0
    assert page.locator("svg").count() >= 1
    assert page.evaluate("() => [...document.images].every(one => one.naturalWidth > 0) && document.images.length > 2")
    ink = sum(map(int, re.findall(r"\d+", page.evaluate(COLOUR))[:3]))
    ground = sum(Image.open(io.BytesIO(page.screenshot())).convert("RGB").getpixel((3, 3)))  # type: ignore[arg-type]
    assert (ink > ground) == (scheme == "dark")
    assert abs(ink - ground) > 380
    page.close()
