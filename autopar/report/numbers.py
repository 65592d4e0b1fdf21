"""Numbers as readers see them: three significant digits, signed percents, parts that add up to their whole."""

from __future__ import annotations

import math
from collections.abc import Sequence


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent: ``815``, ``56.7``, ``0.0317``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{round(value, decimals):.{decimals}f}" if decimals else f"{value:.0f}"


def percent(share: float, decimals: int = 1) -> str:
    """A share as percent: ``12.3%``."""
    return f"{100 * share:.{decimals}f}%"


def signed_percent(share: float, decimals: int = 1) -> str:
    """An error as percent with its sign: ``+2.1%``; what rounds to nothing has none."""
    text = f"{100 * share:+.{decimals}f}"
    return f"{text.lstrip('+-') if float(text) == 0 else text}%".replace("-", "\u2212")


def parts_of(values: Sequence[float], whole: float, decimals: int) -> list[str]:
    """Parts rounded so that what is printed adds up to the rounded whole (largest remainders are rounded up).

    Args:
        values: parts that add up to ``whole``.
        whole: their sum, as it is printed elsewhere.
        decimals: digits after the point.
    """
    unit = 10**decimals
    scaled = [value * unit for value in values]
    floors = [math.floor(value) for value in scaled]
    missing = round(whole * unit) - sum(floors)
    order = sorted(range(len(values)), key=lambda i: floors[i] - scaled[i])
    assert math.isclose(sum(values), whole, rel_tol=1e-6, abs_tol=1e-9), "the parts add up to the whole"
    for i in order[:missing] if missing > 0 else []:
        floors[i] += 1
    return [f"{part / unit:.{decimals}f}" for part in floors]
