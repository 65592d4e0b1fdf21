"""One measured run corrects the predictions of those like it.

Within a cell (one model width, tp and microbatch on one machine, say) runs share kernels and launch times that no
published constant knows. The run that was measured says by how much this cell is slower than predicted; everything
that a microbatch costs is scaled by that, what a step costs once stays.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.fit.problem import Case, Predictions

Floats = NDArray[np.float64]

ONCE = ("data_parallel", "optimizer", "step_overhead")
"""Terms that do not scale with the work of a microbatch."""


def width_cell(case: Case) -> Hashable:
    """The cell of a run: model width, tp, microbatch, recomputation, stack, device."""
    plan = case.plan
    return (
        case.spec.hidden_size, case.workload.seq_len, case.workload.precision, plan.layout.tp, plan.microbatch_size,
        plan.recompute, plan.sequence_parallel, case.stack, case.cluster.device.name,
    )  # fmt: skip


def calibrate(predictions: Predictions, measured: Floats, keys: Sequence[Hashable], chosen: Sequence[int]) -> Floats:
    """Predictions after calibration, [cases]; those of cells without a chosen run stay.

    Args:
        predictions: of all cases.
        measured: seconds, NaN where not measured.
        keys: the cell of each case.
        chosen: cases whose measurement is used, at most one of a cell.
    """
    once = sum((predictions.terms[name] for name in ONCE if name in predictions.terms), np.zeros(len(measured)))
    scaled = predictions.step_s - once
    result = predictions.step_s.copy()
    for index in chosen:
        factor = max(measured[index] - once[index], 0.1 * measured[index]) / scaled[index]
        alike = np.asarray([key == keys[index] for key in keys])
        result[alike] = once[alike] + factor * scaled[alike]
    return result


def calibrated_error(predictions: Predictions, measured: Floats, keys: Sequence[Hashable]) -> tuple[float, int]:
    """Mean absolute relative error of runs predicted with one other run of their cell measured, and how many pairs.

    Every run of a cell is the measured one once; cells of a single run are left out. A share, not percent.
    """
    cells: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        if np.isfinite(measured[index]) and np.isfinite(predictions.step_s[index]):
            cells.setdefault(key, []).append(index)
    once = sum((predictions.terms[name] for name in ONCE if name in predictions.terms), np.zeros(len(measured)))
    errors: list[float] = []
    for members in cells.values():
        if len(members) < 2:
            continue
        inside = np.asarray(members)
        fixed, scaled, truth = once[inside], (predictions.step_s - once)[inside], measured[inside]
        factor = np.maximum(truth - fixed, 0.1 * truth) / scaled
        found = fixed[None, :] + factor[:, None] * scaled[None, :]
        wrong = np.abs(found / truth[None, :] - 1)
        errors += wrong[~np.eye(len(members), dtype=bool)].tolist()
    return (float(np.mean(errors)), len(errors)) if errors else (float("nan"), 0)
