"""How objects and times are put into words."""

from __future__ import annotations

from html import escape


class Shown:
    """Shows itself as the text of its ``__str__``, in a terminal and in a notebook."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``41 s``, ``18 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.1g} s" if seconds < 1 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f}".removesuffix(".0") + " h"


def size_in_words(count: float) -> str:
    """Bytes as a person says them: ``812 bytes``, ``1.6 MB``, ``13.9 GB``."""
    if count < 1e4:
        return f"{count:.0f} bytes"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
