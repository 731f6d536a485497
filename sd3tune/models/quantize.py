"""Frozen weights in fewer bits, through optimum-quanto."""

from __future__ import annotations

from typing import Any

EXCLUDED = (
    "*norm_out*",
    "*norm_q*",
    "*norm_k*",
    "*norm_added_q*",
    "*norm_added_k*",
    "pos_embed*",
    "time_text_embed*",
    "context_embedder*",
    "proj_out*",
)
"""Left in the model's own format: norms, embedders and the last projection. The AdaLN linears are quantised."""


def quantize(model: Any, precision: str) -> None:
    """Quantise the linear layers of ``model`` in place to ``precision`` ("int8-quanto") and freeze them."""
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto

    kinds = {"int8-quanto": qint8}
    quanto(model, weights=kinds[precision], exclude=list(EXCLUDED))
    freeze(model)
