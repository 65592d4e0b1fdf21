"""Small numerical tools of the calibration: least squares on relative errors, medians, errors of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from costmodels.profiles import Fit

Array = NDArray[np.float64]


def nonnegative_fit(columns: Array, target: Array, scale: Array, *, required: int = 0) -> Array:
    """Minimise sum(((columns @ x - target) / scale)^2) over x >= 0, with x[required] > 0.

    The best of all subsets of the terms that hold the required one and whose unconstrained solution has the right
    signs: exact wherever the optimum has x[required] > 0, and for the few terms of our formulas quicker than an
    iteration. Where no subset has them (points that the formula cannot describe) the required term alone is set to
    the ratio of sums, at least a tiny positive number.

    Args:
        columns: [points, terms].
        target: [points].
        scale: [points], what an error is measured against; the measured values for relative errors.
        required: the term that must be above zero.

    Returns:
        x: [terms].
    """
    rows, goal = columns / scale[:, None], target / scale
    others = [index for index in range(columns.shape[1]) if index != required]
    best, least = np.zeros(columns.shape[1]), np.inf
    for number in range(len(others) + 1):
        for chosen in combinations(others, number):
            active = [required, *chosen]
            solution = np.linalg.lstsq(rows[:, active], goal, rcond=None)[0]
            error = float(np.sum((rows[:, active] @ solution - goal) ** 2))
            if solution[0] > 0 and np.all(solution >= 0) and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[active] = solution
    if not np.isfinite(least):
        best[required] = max(float(goal.sum() / rows[:, required].sum()), 1e-3 * float(np.min(1 / rows[:, required])))
    return best


def weighted_median(values: Array, weights: Array) -> float:
    """Value x that minimises sum(weights |values - x|); the lower one where two do."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def relative_errors(predicted: Array, measured: Array) -> Array:
    """|predicted / measured - 1|, point by point."""
    errors: Array = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    return errors


def summarize(name: str, constants: Mapping[str, float], errors: Array, how: str = "measured here") -> Fit:
    """A Fit with its median and worst error, and the sentence that says so."""
    median, worst = (float(np.median(errors)), float(np.max(errors))) if errors.size else (0.0, 0.0)
    return Fit(
        name=name,
        constants=constants,
        num_points=int(errors.size),
        median_error=median,
        worst_error=worst,
        origin=f"{how}, {errors.size} points, residual {median:.1%} (worst {worst:.1%})",
    )
