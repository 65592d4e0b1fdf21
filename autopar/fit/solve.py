"""Robust least squares with priors and bounds, on residuals that are costly and nearly linear in the unknowns.

Symbols: x unknowns (logarithms of constants over their prior's centre), r residuals (log of predicted over measured),
J = dr/dx, w weights of rows, s noise of a row, t prior's standard deviations. The objective is
sum w rho((r/s)^2) + sum (x/t)^2 with rho(z) = 2 (sqrt(1 + z) - 1) (soft L1: quadratic within the noise, linear far
outside), minimised by reweighting: rho'(z) = 1/sqrt(1 + z).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What an objective is made of, beside residuals.

    Attributes:
        weights: [rows], 0 leaves a row out.
        noise: of a row's residual.
        sigma: [unknowns] of the prior.
        low, high: [unknowns] bounds.
    """

    weights: Floats
    noise: float
    sigma: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A minimum, with the residuals and the Jacobian at it."""

    x: Floats
    residuals: Floats
    jacobian: Floats
    objective: float
    iterations: int


def objective(terms: Terms, x: Floats, residuals: Floats) -> float:
    """The objective, see the module."""
    z = (residuals / terms.noise) ** 2
    return float(np.sum(terms.weights * 2 * (np.sqrt(1 + z) - 1)) + np.sum((x / terms.sigma) ** 2))


def linear_minimum(terms: Terms, x: Floats, residuals: Floats, jacobian: Floats, *, rounds: int = 30) -> Floats:
    """Minimise the objective of r + J (y - x) over y within bounds, by reweighted bounded least squares."""
    from scipy.optimize import lsq_linear  # half a second that planning does not need

    y = x.copy()
    free = terms.high > terms.low
    if not np.any(free):
        return y
    for _ in range(rounds):
        now = residuals + jacobian @ (y - x)
        row = np.sqrt(terms.weights / np.sqrt(1 + (now / terms.noise) ** 2)) / terms.noise
        matrix = row[:, None] * jacobian[:, free]
        normal = matrix.T @ matrix + np.diag(1 / terms.sigma[free] ** 2)
        target = -(matrix.T @ (row * now) + y[free] / terms.sigma[free] ** 2)
        # A square root of the normal matrix: as many rows as unknowns, however many runs there are.
        root = np.linalg.cholesky(normal).T
        bounds = ((terms.low - y)[free] - 1e-12, (terms.high - y)[free] + 1e-12)
        step = np.zeros_like(y)
        step[free] = lsq_linear(root, np.linalg.solve(root.T, target), bounds=bounds).x
        y = np.clip(y + step, terms.low, terms.high)
        if np.max(np.abs(step)) < 1e-5:
            break
    return y


def minimise(
    terms: Terms,
    residuals_at: Callable[[Floats], Floats],
    jacobian_at: Callable[[Floats, Floats], Floats],
    *,
    iterations: int = 12,
    tolerance: float = 1e-3,
) -> Solution:
    """Gauss-Newton with chord steps from x = 0: the Jacobian stays while it helps, since it costs most.

    Args:
        terms: weights, noise, prior, bounds.
        residuals_at: x -> [rows].
        jacobian_at: x and the residuals there -> [rows, unknowns].
        iterations: at most.
        tolerance: share of the objective by which a step must lower it.
    """
    x = np.clip(np.zeros_like(terms.sigma), terms.low, terms.high)
    residuals = residuals_at(x)
    jacobian = jacobian_at(x, residuals)
    best, fresh, done = objective(terms, x, residuals), True, 0
    while done < iterations:
        done += 1
        goal = linear_minimum(terms, x, residuals, jacobian)
        gain = 0.0
        for share in (1.0, 0.5, 0.2):
            trial = x + share * (goal - x)
            found = residuals_at(trial)
            value = objective(terms, trial, found)
            if value < best:
                gain = best - value
                x, residuals, best = trial, found, value
                break
        if gain < tolerance * max(best, 1e-12):
            if fresh:
                break
            jacobian, fresh = jacobian_at(x, residuals), True
        else:
            fresh = False
    if not fresh:
        jacobian = jacobian_at(x, residuals)
    return Solution(x=x, residuals=residuals, jacobian=jacobian, objective=best, iterations=done)
