"""What a run leaves in the notebook: a report that needs no kernel, with pictures to scrub through by plain CSS."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from sd3tune.certificate import PACKAGES
from sd3tune.files import digest
from sd3tune.panels import showing
from sd3tune.panels.looks import SMALL, folded, sentence
from sd3tune.panels.pictures import alt, grid_at, jpeg
from sd3tune.run_folder import RunFolder
from sd3tune.snapshot import Snapshot
from sd3tune.validation.standing import steps_drawn

MOST_BYTES, MOST_STEPS = 150_000, 8
"""Of all pictures in a report, and steps to scrub through."""


def report(now: Snapshot, code: str = "", changed: str = "") -> str:
    """A run that ended, as HTML: its last line, curves, pictures, what differed from the preset, the code that does it again, its log."""
    parts = [
        sentence(showing.status(now), bad=now.state == "failed"),
        f'<div style="max-width:760px">{showing.main_curve(now)}{showing.other_curves(now)}</div>' if now.count else "",
        showing.spoken(now), showing.changes(now), scrubber(Path(now.folder)) if now.folder else "",
        folded("What differs from where it began", changed), folded("The code that does this again", code),
        folded("Seed and versions", certified(now)), showing.log(now),
    ]  # fmt: skip
    return f'<div style="max-width:1100px">{"".join(parts)}</div>'


def certified(now: Snapshot) -> str:
    """What the same bits need beside settings and data."""
    environment = RunFolder(Path(now.folder)).environment
    if not now.folder or now.config is None or not environment.exists():
        return ""
    first, *rows = environment.read_text().splitlines()
    return "\n".join(
        [f"seed {now.config.schedule.seed}", first.removeprefix("# "), *(row for row in rows if row.partition("==")[0] in PACKAGES)]
    )


def scrubber(path: Path) -> str:
    """The grids of a run folder behind radio buttons, without a kernel and without scripts.

    Arrow keys go through them, but in JupyterLab, which takes these keys for its cells; there they are clicked.
    """
    folder = RunFolder(path)
    steps = chosen(steps_drawn(folder))
    if not steps:
        return ""
    pictures = _fitting(folder, steps)
    own = f"s{digest(str(path), *map(str, steps))[:8]}"
    radios, frames, rules = "", "", ""
    for step, data in pictures:
        name, checked = f"{own}-{step}", " checked" if step == pictures[-1][0] else ""
        radios += f'<input type="radio" name="{own}" id="{name}"{checked} aria-label="pictures of step {step}" style="margin:0 4px 0 12px">'
        radios += f'<label for="{name}" style="{SMALL}">step {step} </label>'
        source = f"data:image/jpeg;base64,{b64encode(data).decode()}"
        frames += f'<img class="{name}" style="display:none;max-width:100%" alt="{alt(folder, step)}" src="{source}">'
        rules += f"#{name}:checked~div img.{name}{{display:block!important}}"
    return f'<div role="radiogroup" aria-label="step"><style>{rules}</style>{radios}<div>{frames}</div></div>'


def chosen(steps: Sequence[int]) -> list[int]:
    """At most so many steps, always the first and the last."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(k * last / (MOST_STEPS - 1))] for k in range(MOST_STEPS)]


def _fitting(folder: RunFolder, steps: Sequence[int]) -> list[tuple[int, bytes]]:
    """The steps' grids, as large as all of them may be together."""
    for side in (192, 128, 96, 64, 48):
        found = [(step, jpeg(grid_at(folder, step, side).image(), 75)) for step in steps]
        if sum(len(data) for _, data in found) <= MOST_BYTES:
            return found
    return found[-1:]
