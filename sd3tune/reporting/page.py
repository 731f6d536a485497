"""A run as one page: curves, pictures, what happened, settings, manifest, versions. One file, no scripts, no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune import charts
from sd3tune.config.schema import RunConfig
from sd3tune.config.sections import SECTION_CLASSES
from sd3tune.curves import curve_of
from sd3tune.files import write_text
from sd3tune.history import accepted
from sd3tune.keeping import best_of
from sd3tune.listing import at_its_end
from sd3tune.records import READING
from sd3tune.reporting.cleaning import without_tokens
from sd3tune.run_folder import RunFolder, step_of
from sd3tune.validation.standing import steps_drawn

SIDE, GRID = 512, 1600
"""Longest sides of a picture and of the grid on the page, in pixels; the files in the run folder are whole."""

MOST = 24
"""Steps whose pictures are shown; of more, the first, the last, and some evenly between."""

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "optimum-quanto", "bitsandbytes", "lycoris-lora", "sd3tune")

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--accent:#2563eb}
@media (prefers-color-scheme:dark){:root{--accent:#7ab0ff}}
body{font:15px/1.5 system-ui,sans-serif;margin:0;padding:16px}
main{max-width:1180px;margin:auto}
h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere} h2{font-size:1.1rem;margin:1.6em 0 .5em}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:20px}
.scroll{overflow-x:auto} img{max-width:100%;height:auto;border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:.87rem}
td,th{text-align:left;vertical-align:top;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
td:first-child{white-space:nowrap;width:1%} .set td{font-weight:600}
pre{font-size:.82rem;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:10px;border-radius:6px}
.steps>input{position:absolute;opacity:0} .steps>label{display:inline-block;padding:2px 9px;margin:0 4px 6px 0;border:1px solid var(--line);
border-radius:999px;cursor:pointer} .steps>input:checked+label{background:var(--accent);color:Canvas}
.steps>input:focus-visible+label{outline:2px solid var(--accent);outline-offset:2px}
.sheet{display:none;flex-wrap:wrap;gap:10px} figure{margin:0;width:min(270px,100%)} figcaption{font-size:.85rem}
"""


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` into a run folder, from what is there. Raises: ConfigError when its settings cannot be read; FileError."""
    write_text(folder.report, page(folder))
    return folder.report


def page(folder: RunFolder) -> str:
    """The whole page."""
    config, history = RunConfig.load(folder.config), folder.read_history()
    manifest: dict[str, Any] = json.loads(folder.manifest.read_text()) if folder.manifest.exists() else {}
    name = escape(folder.path.name)
    parts = [
        f"<h1>{name}</h1><p>{escape(summary(folder, config, history))}</p>",
        _curves(history),
        _section("Held-out pictures", _judged([row for row in history if row["type"] == "eval"])),
        _pictures(folder),
        _section("CLIP score", _scores([row for row in history if row["type"] == "clip"])),
        _section("What happened", _happened(history)),
        _section("Settings", _settings(config)),
        _section("Manifest", _facts(manifest)),
        _section("Versions", _versions(folder)),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
    body = f"<main>{''.join(parts)}</main>"
    return without_tokens(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def summary(folder: RunFolder, config: RunConfig, history: list[dict[str, Any]]) -> str:
    """The run in one sentence."""
    steps = [row for row in history if row["type"] == "step"]
    evals = [row for row in history if row["type"] == "eval"]
    done = steps[-1]["step"] if steps else 0
    said = [f"{'finished' if at_its_end(folder, history) else 'not finished'} after {done} updates"]
    if losses := [row["loss"] for row in steps if row["loss"] is not None]:
        said.append(f"loss {losses[-1]:.4f}")
    if evals:
        said.append(f"on held-out pictures {evals[-1]['loss']:.4f}, at the beginning {evals[0]['loss']:.4f}")
    if best := best_of(folder.checkpoint_folder):
        said.append(f"best checkpoint: step {best[0]} with {best[1]:.4f}")
    kind = "LoRA" if config.adapter.lora_type == "standard" else "LyCORIS adapter"
    base = config.model.model_flavour or config.model.pretrained_model_name_or_path
    return f"{kind} for {base}; " + "; ".join(said) + "."


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    steps = [(row["step"], row["loss"]) for row in history if row["type"] == "step" and row["loss"] is not None]
    stays = [(r["step"], r["regularisation_loss"]) for r in history if r["type"] == "step" and r.get("regularisation_loss") is not None]
    evals = [(row["step"], row["loss"]) for row in history if row["type"] == "eval"]
    marks = [row["step"] for row in history if accepted(row)]
    drawn = [charts.line(curve_of(steps), evals, marks=marks)]
    if stays:
        drawn.append(charts.line(curve_of(stays), name="regularisation loss"))
    if evals:
        drawn.append(charts.held_out(evals))
    return _section("Loss", f'<div class="two">{"".join(f"<div>{one}</div>" for one in drawn)}</div>')


def _judged(evals: Sequence[Mapping[str, Any]]) -> str:
    """The newest evaluation beside the base model, by data set and by noise level."""
    newest = evals[-1] if evals else {}
    if not newest.get("base_loss"):
        return ""
    rows = [(f"step {newest['step']}", _beside(newest["loss"], newest["base_loss"]))]
    if newest["ema_loss"] is not None:
        rows.append(("running average of the weights", _beside(newest["ema_loss"], newest["base_loss"])))
    rows += [(f"data set {escape(name)}", f"{loss:.4f}") for name, loss in newest["losses_by_dataset"].items()]
    bands = newest["losses_by_band"]
    for number, (loss, base) in enumerate(zip(bands, newest["base_losses_by_band"], strict=True)):
        if loss is not None:
            rows.append((f"noise {number / len(bands):g} to {(number + 1) / len(bands):g}", _beside(loss, base)))
    return _table(rows)


def _beside(loss: float, base: float) -> str:
    return f"{loss:.4f}, {loss / base:.1%} of the base model's {base:.4f}" if base else f"{loss:.4f}"


def _pictures(folder: RunFolder) -> str:
    """The grid, and the pictures of each step behind a row of steps that needs no script."""
    grid = f'<div class="scroll">{_image(folder.grid, GRID, "base, adapter and reference")}</div>' if folder.grid.exists() else ""
    steps = thinned([folder.images(step) for step in steps_drawn(folder)], MOST)
    rules, buttons, sheets = [], [], []
    for number, at in enumerate(steps):
        rules.append(f"#s{number}:checked~.f{number}{{display:flex}}")
        checked = " checked" if number == len(steps) - 1 else ""
        buttons.append(f'<input type="radio" name="step" id="s{number}"{checked}><label for="s{number}">{step_of(at)}</label>')
        sheets.append(f'<div class="sheet f{number}">{"".join(_figure(path) for path in sorted(at.glob("*.png")))}</div>')
    several = f"<style>{''.join(rules)}</style><p>Pictures after so many updates:</p>" if steps else ""
    return _section("Pictures", grid + several + f'<div class="steps">{"".join(buttons)}{"".join(sheets)}</div>' if grid or steps else "")


def thinned(found: Sequence[Path], most: int) -> list[Path]:
    """At most so many, with the first and the last, evenly taken."""
    if len(found) <= most:
        return list(found)
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _figure(path: Path) -> str:
    facts = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").exists() else {}
    text = f"{facts.get('prompt', path.name)}{' (average)' if facts.get('kind') == 'ema' else ''}"
    return f"<figure>{_image(path, SIDE, text)}<figcaption>{escape(text)}</figcaption></figure>"


def _image(path: Path, side: int, text: str) -> str:
    """A picture inside the page; large ones are made smaller."""
    held = io.BytesIO()
    with Image.open(path) as opened:
        small = opened.convert("RGB")
        small.thumbnail((side, 4 * side))
        small.save(held, "JPEG", quality=88)
    data = base64.b64encode(held.getvalue()).decode()
    return f'<img alt="{escape(text)}" width="{small.width}" height="{small.height}" src="data:image/jpeg;base64,{data}">'


def _table(rows: Sequence[tuple[str, str]], chosen: Sequence[str] = ()) -> str:
    """Rows of two cells, already HTML; those of ``chosen`` names stand out."""
    look = {True: ' class="set"', False: ""}
    body = "".join(f"<tr{look[name in chosen]}><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>" if rows else ""


def _scores(rows: Sequence[Mapping[str, Any]]) -> str:
    """How well pictures followed their prompts, step by step, and how to read it."""
    if not rows:
        return ""
    curves = []
    for kind, name in (("adapter", "CLIP score"), ("ema", "CLIP score of the average")):
        points = [(row["step"], row["mean"]) for row in rows if row["kind"] in (kind, "base")]
        curves += [f"<div>{charts.held_out(points, name)}</div>"] if kind in {row["kind"] for row in rows} else []
    last = rows[-1]
    beside = (("the base model's pictures", last["base"]), ("real held-out pictures with their captions", last["reference"]))
    said = "; ".join(f"{name} {value:.3f}" for name, value in beside if value is not None)
    table = _table([(escape(name), f"{score:.3f}") for name, score in zip(last["names"], last["scores"], strict=True)])
    text = f"<p>At step {last['step']}: mean {last['mean']:.3f}{'; ' * bool(said)}{said}. {escape(READING)}</p>"
    return f'{text}<div class="two">{"".join(curves)}<div></div></div><details><summary>each prompt</summary>{table}</details>'


def _happened(history: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in history:
        if row["type"] == "notice":
            text = row["text"]
        elif row["type"] == "command":
            value = "" if row["value"] is None else json.dumps(row["value"])
            text = f"{row['name']} {value}" + (f", refused: {row['refused']}" if row["refused"] else "")
        elif row["type"] == "segment":
            text = f"the run goes on from step {row['from_step']} ({row['why']})"
        else:
            continue
        rows.append((f"step {row['step']}", escape(text)))
    return _table(rows)


def _settings(config: RunConfig) -> str:
    """Every setting; those that are not the default stand out."""
    plain, parts = RunConfig().leaves(), []
    for section in SECTION_CLASSES:
        values = vars(getattr(config, section))
        rows = [(name, escape(_shown(value))) for name, value in values.items()]
        changed = [name for name, value in values.items() if value != plain[name]]
        parts.append(f"<details{' open' if changed else ''}><summary>{section}</summary>{_table(rows, changed)}</details>")
    return "<p>What was set stands out.</p>" + "".join(parts)


def _facts(manifest: Mapping[str, Any]) -> str:
    return _table([(name, escape(_shown(value))) for name, value in manifest.items() if value not in ("", [], None)])


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(_shown(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(one)}" for name, one in value.items() if one not in (None, "", [], False))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _versions(folder: RunFolder) -> str:
    if not folder.environment.exists():
        return ""
    first, *lines = folder.environment.read_text().splitlines()
    named = [line for line in lines if line.partition("==")[0].lower() in PACKAGES]
    everything = f"<details><summary>every package</summary><pre>{escape(chr(10).join(lines))}</pre></details>"
    return f"<p>{escape(', '.join([first.removeprefix('# '), *named]))}</p>{everything}"
