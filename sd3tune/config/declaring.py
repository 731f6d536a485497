"""How a setting is declared: once, with its meaning, unit, range, and whether it may change while training."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""``true`` is not a number of steps, and ``"8"`` is not 8."""

MANY = 10_000_000
"""Upper end of counts that nothing else limits."""


def about(
    meaning: str, *, low: float | None = None, high: float | None = None, above: float | None = None, unit: str = "", live: bool = False
) -> Any:
    """What a person should know of a setting; ``live`` ones may change between two updates."""
    return Field(description=meaning, ge=low, le=high, gt=above, json_schema_extra={"unit": unit, "live": live})
