"""Robust least squares on relative errors, with every row also predicted by a fit that has not seen its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Law = Callable[[Mapping[str, float]], Array]

SOFT = 0.1
"""Relative error above which a row counts less than quadratically: tables hold rows that no smooth law describes."""
SHARES = ("peak_fraction", "unequal_share", "efficiency", "efficiency_of", "in_network", "tree")
"""Constants that are at most 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFit:
    """Constants fitted to a published table, and how well they predict it.

    Attributes:
        name: what was fitted, such as ``a100 products``.
        constants: fitted values, in the units of the specification files.
        table: where the rows are from.
        rows: that it was fitted on.
        error: mean |predicted / measured - 1| on those rows.
        left_out_error: the same where each part is predicted by a fit to the others.
        worst_error: the largest on those rows.
        left_out: what a part is.
        ships_in: (folder, specification, table) of the shipped file that holds the constants; empty where it does not.
    """

    name: str
    constants: Mapping[str, float]
    table: str
    rows: int
    error: float
    left_out_error: float
    worst_error: float
    left_out: str
    ships_in: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """One sentence for a reader of the specification."""
        return (
            f"fitted to {self.table}, {self.rows} rows: error {self.error:.1%}, "
            f"{self.left_out_error:.1%} where {self.left_out} is left out"
        )


def fit(
    name: str,
    law: Law,
    start: Mapping[str, float],
    measured: Array,
    parts: Sequence[object],
    *,
    table: str,
    left_out: str,
    ships_in: tuple[str, ...] = (),
) -> TableFit:
    """Fit constants (at or above zero, shares at most 1) of a law to measured seconds.

    Args:
        law: constants -> seconds of every row.
        start: a guess above zero for every constant.
        measured: seconds of every row.
        parts: label of every row; rows of one label are left out together.
    """
    everything = np.ones(len(measured), dtype=bool)
    constants = _solve(law, start, measured, everything)
    errors = _errors(law(constants), measured)
    left_out_errors = np.empty(len(measured))
    labels = np.array([str(part) for part in parts])
    for label in sorted(set(labels)):
        out = labels == label
        kept = constants if np.all(out) else _solve(law, constants, measured, ~out)
        left_out_errors[out] = _errors(law(kept), measured)[out]
    return TableFit(
        name=name,
        constants=constants,
        table=table,
        rows=len(measured),
        error=float(np.mean(errors)),
        left_out_error=float(np.mean(left_out_errors)),
        worst_error=float(np.max(errors)),
        left_out=left_out,
        ships_in=ships_in,
    )


def _errors(predicted: Array, measured: Array) -> Array:
    errors: Array = np.abs(predicted / measured - 1)
    return errors


def _solve(law: Law, start: Mapping[str, float], measured: Array, rows: NDArray[np.bool_]) -> dict[str, float]:
    from scipy.optimize import least_squares

    names, scale = list(start), np.array([max(abs(x), 1e-9) for x in start.values()])

    def residuals(x: Array) -> Array:
        found: Array = np.log(law(dict(zip(names, x * scale, strict=True))) / measured)[rows]
        return found

    most = np.array([1.0 if name.split(".")[0] in SHARES else np.inf for name in names]) / scale
    first = np.minimum(1.0, most * (1 - 1e-9))
    solution = least_squares(residuals, first, bounds=(1e-6, most), loss="soft_l1", f_scale=SOFT)
    return {name: float(value) for name, value in zip(names, solution.x * scale, strict=True)}
