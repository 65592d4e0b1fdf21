"""Errors of a fit by source: mean absolute and mean signed relative errors in percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.fit.constants import Constant, Quantity
from autopar.fit.fitting import FitResult

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Of predicted / measured - 1, percent; ``rows`` counts them."""

    rows: int
    mape: float
    bias: float


def errors_of(residuals: Floats) -> Errors:
    """Errors from log(predicted / measured)."""
    relative = 100 * np.expm1(residuals)
    return Errors(rows=len(relative), mape=float(np.mean(np.abs(relative))), bias=float(np.mean(relative)))


def errors_by_source(result: FitResult, residuals: Floats) -> dict[tuple[str, Quantity], Errors]:
    """Errors by source and quantity, in the order in which sources appear."""
    rows: dict[tuple[str, Quantity], list[float]] = {}
    for observation, residual in zip(result.observations, residuals.tolist(), strict=True):
        source = result.problem.cases[observation.case].source
        rows.setdefault((source, observation.quantity), []).append(residual)
    return {key: errors_of(np.asarray(found)) for key, found in rows.items()}


def sources_of(result: FitResult, constant: Constant) -> Sequence[str]:
    """Sources whose runs moved a constant, in order."""
    return tuple(dict.fromkeys(result.problem.cases[o.case].source for o in result.rows_of(constant)))


def error_of_constant(result: FitResult, constant: Constant, residuals: Floats) -> Errors:
    """Errors of the runs that moved a constant."""
    moved = {(o.case, o.quantity) for o in result.rows_of(constant)}
    chosen = [(o.case, o.quantity) in moved for o in result.observations]
    return errors_of(residuals[np.asarray(chosen)])
