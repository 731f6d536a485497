"""What all panels share: named widgets that ipywidgets 7 and 8 both have, sentences, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

SENTENCE = "line-height:1.5;font-size:14px;white-space:pre-wrap;overflow-wrap:anywhere"
ALERT = f"{SENTENCE};font-weight:600;color:#d32f2f"
SMALL = "line-height:1.35;font-size:12px"


def tip(widget: Any, text: str) -> Any:
    """Give a widget its explanation, under the name that this version of ipywidgets has for it."""
    setattr(widget, "tooltip" if "tooltip" in widget.traits() else "description_tooltip", text)
    return widget


def sentence(text: str, *, bad: bool = False, role: str = "") -> str:
    """A sentence as HTML that screen readers announce; empty text gives nothing."""
    role = role or ("alert" if bad else "status")
    return f'<div role="{role}" style="{ALERT if bad else SENTENCE}">{escape(text)}</div>' if text else ""


def small(lines: Sequence[object]) -> str:
    """Lines in small print."""
    return f'<div style="{SMALL}">{"<br>".join(escape(str(line)) for line in lines)}</div>' if lines else ""


def folded(name: str, text: str) -> str:
    """Text that a click shows; empty text gives nothing."""
    style = f"white-space:pre-wrap;overflow-wrap:anywhere;{SMALL}"
    return f'<details><summary>{escape(name)}</summary><pre style="{style}">{escape(text)}</pre></details>' if text else ""


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as an HTML table that scrolls by itself when the page is narrow."""
    top = "".join(f'<th scope="col" style="text-align:left;padding:1px 10px 1px 0">{escape(one)}</th>' for one in head)
    cell = '<td style="text-align:left;padding:1px 10px 1px 0;vertical-align:top;overflow-wrap:anywhere">{}</td>'
    body = "".join(f"<tr>{''.join(cell.format(escape(str(one))) for one in row)}</tr>" for row in rows)
    return f'<div style="overflow-x:auto;{SMALL}"><table style="border-collapse:collapse"><tr>{top}</tr>{body}</table></div>'


def button(text: str, press: Callable[[], object], about: str = "") -> Any:
    """A button that says in words what it does."""
    made = widgets.Button(description=text, layout=widgets.Layout(width="auto", min_width="90px"))
    made.on_click(lambda _: press())
    return tip(made, about or text)


def row(*children: Any) -> Any:
    """Widgets beside each other, below each other where the page is narrow."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", width="100%", overflow="visible"))


def column(*children: Any, grow: int = 1, least: int = 280) -> Any:
    """Widgets below each other; ``least`` is the width in px from which columns stand beside each other."""
    width = f"{grow} 1 {least}px"
    return widgets.VBox(children, layout=widgets.Layout(flex=width, min_width=f"min({least}px, 100%)", overflow="visible"))


WRAPPED = "".join(
    f".sd3tune-tabs>.{kind}-TabBar>.{kind}-TabBar-content{{flex-wrap:wrap}}"
    f".sd3tune-tabs>.{kind}-TabBar .{kind}-TabBar-tab{{flex:0 0 auto!important}}"
    for kind in ("lm", "p")
)
"""Names of tabs in full, in several rows where the page is narrow; the front ends of ipywidgets 8 and 7 call their parts differently."""


def tabs(parts: dict[str, Any]) -> Any:
    """Widgets behind named tabs."""
    made = widgets.Tab(children=list(parts.values()), layout=widgets.Layout(width="100%"))
    for place, name in enumerate(parts):
        made.set_title(place, name)
    made.add_class("sd3tune-tabs")
    return widgets.VBox([widgets.HTML(f"<style>{WRAPPED}</style>"), made], layout=widgets.Layout(width="100%", overflow="visible"))


def visible(widget: Any, shown: bool) -> None:
    """Show or hide a widget."""
    wanted = "" if shown else "none"
    if widget.layout.display != wanted:
        widget.layout.display = wanted


def offer(dropdown: Any, options: Sequence[tuple[str, Any]], *, chosen: Any = None, otherwise: int = 0) -> None:
    """Give a dropdown its options. What was chosen (or ``chosen``) is so if it is among them; if not, the one at ``otherwise`` is."""
    values = [value for _, value in options]
    wanted = dropdown.value if chosen is None else chosen
    if wanted not in values:
        wanted = values[otherwise]
    with dropdown.hold_sync():
        if list(dropdown.options) != list(options):
            dropdown.options = options  # which chooses the first
        put(dropdown, wanted)


def put(widget: Any, value: Any) -> bool:
    """Set a widget's value if it is another; whether it was."""
    if widget.value == value:
        return False
    widget.value = value
    return True
