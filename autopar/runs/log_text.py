"""What the readers of training logs share."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
WARM_UP = 0.2


def without_colours(text: str) -> str:
    """The text without a terminal's escape sequences."""
    return _COLOURS.sub("", text)


def steady_median(values: Sequence[float]) -> float | None:
    """Median without the first fifth, at least one value, since first steps compile, allocate and connect.

    A single value counts as it is; None for no value.
    """
    if not values:
        return None
    skipped = max(1, round(WARM_UP * len(values))) if len(values) > 1 else 0
    return statistics.median(values[skipped:])


def number(text: str) -> float:
    """A number that may have commas between thousands."""
    return float(text.replace(",", ""))
