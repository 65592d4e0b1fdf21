"""What the fitted constants are worth: errors on runs that a fit had not seen, beside a rival and the bars.

Every constant is fitted anew on all runs, then without each model, then without each source. Predictions "as shipped"
are those of the specifications as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.fit.constants import Constant, Quantity, read_constants
from autopar.fit.errors import Errors, errors_of, sources_of
from autopar.fit.fitting import FitResult, fit
from autopar.fit.leave_out import LeftOut, leave_out, model_keys
from autopar.fit.problem import Case, Problem
from autopar.validate.bands import coverage, fit_bands, widening
from autopar.validate.bars import BARS, Bar
from autopar.validate.calibrate import calibrated_error, width_cell
from autopar.validate.choices import MemoryPair, Sweep, after_one_run, memory_pairs, sweeps
from autopar.validate.memory_bands import MemoryRow, fit_memory_bands, memory_coverage
from autopar.validate.plans import kendall_tau
from autopar.validate.rival import constant_efficiency, ideal_seconds
from autopar.validate.runs import RunsValidation
from costmodels.memory_bands import MemoryBands
from costmodels.step_bands import Bands
from costmodels.units import GIB

Floats = NDArray[np.float64]
OnMessage = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Errors of some runs of one quantity, in percent, and agreement of the order.

    Attributes:
        shipped: specifications as they stand.
        model_out, source_out: fits that had not seen the model, or the source; None without constants to fit.
        rival: constant efficiency (step times only).
        tau, tau_model_out: Kendall's tau-b of predicted and measured.
        coverage: share of left-out runs inside their band.
    """

    rows: int
    shipped: Errors
    model_out: Errors | None = None
    source_out: Errors | None = None
    rival: Errors | None = None
    tau: float | None = None
    tau_model_out: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedConstant:
    """A constant after the fit; ``low_left_out``, ``high_left_out`` are its extremes over the fits without a model."""

    constant: Constant
    value: float
    low_left_out: float
    high_left_out: float
    rows: int
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that the report says.

    Attributes:
        validation: rows as shipped.
        time, memory: judged by source.
        bars: each bar with what it judges.
        left_out_s, left_out_gib: predictions by fits that had not seen the model, by index of the case.
        constants: after the fit on everything.
        bands: fitted on left-out errors; ``coverage`` is the share of left-out runs inside bands of others.
        memory_bands, memory_coverage: the same of memory.
        sweeps: choices among layouts by predictions of fits without the model, ``shipped`` specifications, and with
            ``one run`` of the same width, tp and microbatch measured in another sweep.
        calibrated: error with one run of each cell measured, and number of pairs, by source; shares.
        pairs: differences of memory.
        source_out_mean: mean over sources of the error with the source left out, percent.
    """

    validation: RunsValidation
    time: Mapping[str, Judged]
    memory: Mapping[str, Judged]
    bars: tuple[tuple[Bar, float | None], ...]
    left_out_s: Mapping[int, float]
    left_out_gib: Mapping[int, float]
    constants: tuple[FittedConstant, ...]
    bands: Bands | None
    coverage: float
    memory_bands: MemoryBands | None
    memory_coverage: float
    sweeps: Mapping[str, tuple[Sweep, ...]]
    calibrated: Mapping[str, tuple[float, int]]
    pairs: tuple[MemoryPair, ...]
    source_out_mean: float | None


def study(
    validation: RunsValidation, *, constants: Sequence[Constant] | None = None, on_message: OnMessage | None = None
) -> Study:
    """Refit, leave out, judge. ``constants`` are those that ship unless given."""
    tell = on_message or (lambda message: None)
    problem = validation.problem
    free = tuple(read_constants() if constants is None else constants)
    tell({"study": "fit on all runs", "done": 0, "of": 4})
    result = fit(problem, free) if free else None
    models = sources = None
    if result is not None:
        tell({"study": "fits without each model", "done": 1, "of": 4})
        models = leave_out(result, model_keys(problem.cases))
        tell({"study": "fits without each source", "done": 2, "of": 4})
        sources = leave_out(result, [case.source for case in problem.cases])
    tell({"study": "summaries", "done": 3, "of": 4})
    time = _judge(validation, Quantity.TIME, result, models, sources)
    memory = _judge(validation, Quantity.MEMORY, result, models, sources)
    left_s = _left_out(problem, result, models, Quantity.TIME)
    left_gib = {i: size / GIB for i, size in _left_out(problem, result, models, Quantity.MEMORY).items()}
    bands, covered = _bands(result, models, sources)
    rows = memory_rows(validation, result, models, sources)
    calibrated = _calibrated(validation)
    pairs = _pairs(validation)
    outs = [judged.source_out.mape for judged in time.values() if judged.source_out]
    return Study(
        validation=validation, time=time, memory=memory,
        bars=tuple((bar, _reached(bar, time, memory, calibrated, pairs, outs)) for bar in BARS),
        left_out_s=left_s, left_out_gib=left_gib, constants=_constants(result, models, sources),
        bands=bands, coverage=covered, memory_bands=fit_memory_bands(rows) if rows else None,
        memory_coverage=memory_coverage(rows), sweeps=_sweeps(validation, left_s), calibrated=calibrated, pairs=pairs,
        source_out_mean=float(np.mean(outs)) if outs else None,
    )  # fmt: skip


def measured_arrays(problem: Problem) -> tuple[Floats, Floats]:
    """Measured seconds and GiB, [cases], NaN where not measured."""
    seconds = np.asarray([case.measured_s or np.nan for case in problem.cases], dtype=float)
    gib = np.asarray([case.measured_memory_gib or np.nan for case in problem.cases], dtype=float)
    return seconds, gib


def _judge(
    validation: RunsValidation,
    quantity: Quantity,
    result: FitResult | None,
    models: LeftOut | None,
    sources: LeftOut | None,
) -> dict[str, Judged]:
    problem = validation.problem
    seconds, gib = measured_arrays(problem)
    is_time = quantity is Quantity.TIME
    measured = seconds if is_time else gib
    shipped = validation.predictions.step_s if is_time else validation.predictions.memory_bytes / GIB
    of = [case.source for case in problem.cases]
    rival = constant_efficiency(ideal_seconds(problem), measured, of) if is_time else None
    model_out = _by_case(result, models, quantity, len(of))
    source_out = _by_case(result, sources, quantity, len(of))
    found = {}
    for source in dict.fromkeys(of):
        chosen = np.asarray([s == source for s in of]) & np.isfinite(measured) & np.isfinite(shipped)
        if not chosen.any():
            continue
        truth, guess = measured[chosen], shipped[chosen]
        unseen = model_out[chosen]
        has_unseen = bool(np.isfinite(unseen).any())
        found[source] = Judged(
            rows=int(chosen.sum()),
            shipped=errors_of(np.log(guess / truth)),
            model_out=errors_of(unseen) if has_unseen else None,
            source_out=errors_of(source_out[chosen]) if np.isfinite(source_out[chosen]).any() else None,
            rival=errors_of(np.log(rival[chosen] / truth)) if rival is not None else None,
            tau=kendall_tau(guess.tolist(), truth.tolist()),
            tau_model_out=kendall_tau((truth * np.exp(unseen)).tolist(), truth.tolist()) if has_unseen else None,
        )
    return found


def _by_case(result: FitResult | None, left: LeftOut | None, quantity: Quantity, count: int) -> Floats:
    found = np.full(count, np.nan)
    if result is not None and left is not None:
        for observation, residual in zip(result.observations, left.residuals.tolist(), strict=True):
            if observation.quantity is quantity:
                found[observation.case] = residual
    return found


def _left_out(problem: Problem, result: FitResult | None, left: LeftOut | None, quantity: Quantity) -> dict[int, float]:
    if result is None or left is None:
        return {}
    return {
        o.case: o.measured * float(np.exp(r))
        for o, r in zip(result.observations, left.residuals.tolist(), strict=True)
        if o.quantity is quantity
    }


def _bands(result: FitResult | None, models: LeftOut | None, sources: LeftOut | None) -> tuple[Bands | None, float]:
    if result is None or models is None or sources is None:
        return None, float("nan")
    rows = [i for i, o in enumerate(result.observations) if o.quantity is Quantity.TIME]
    cases: list[Case] = [result.problem.cases[result.observations[i].case] for i in rows]
    if not cases:
        return None, float("nan")
    residuals, keys = models.residuals[rows], [models.keys[i] for i in rows]
    widen = widening(cases, residuals, keys)
    return fit_bands(cases, residuals, sources.residuals[rows], widen=widen), coverage(
        cases, residuals, keys, widen=widen
    )


def memory_rows(
    validation: RunsValidation, result: FitResult | None, models: LeftOut | None, sources: LeftOut | None
) -> tuple[MemoryRow, ...]:
    """Measured memory with its items and what fits without the model, and without the source, predict."""
    problem, predictions = validation.problem, validation.predictions
    model_out = _left_out(problem, result, models, Quantity.MEMORY)
    source_out = _left_out(problem, result, sources, Quantity.MEMORY)
    keys = model_keys(problem.cases)
    return tuple(
        MemoryRow(
            stack=problem.cases[i].stack, items={name: float(part[i]) for name, part in predictions.items.items()},
            measured=(problem.cases[i].measured_memory_gib or 0.0) * GIB, model_out=size, source_out=source_out[i],
            model=str(keys[i]), source=problem.cases[i].source,
        )
        for i, size in model_out.items()
    )  # fmt: skip


def _constants(result: FitResult | None, models: LeftOut | None, sources: LeftOut | None) -> tuple[FittedConstant, ...]:
    if result is None or models is None:
        return ()
    found = []
    for constant in result.constants:
        left = [values[constant.name] for values in models.values.values()]
        found.append(
            FittedConstant(
                constant=constant, value=result.values[constant.name], low_left_out=min(left), high_left_out=max(left),
                rows=len(result.rows_of(constant)), sources=tuple(sources_of(result, constant)),
            )
        )  # fmt: skip
    return tuple(found)


def _sweeps(validation: RunsValidation, left_out: Mapping[int, float]) -> dict[str, tuple[Sweep, ...]]:
    cases, shipped = validation.problem.cases, validation.predictions.step_s
    measured = measured_arrays(validation.problem)[0]
    predicted = shipped.copy()
    for index, seconds in left_out.items():
        predicted[index] = seconds
    known = after_one_run(cases, shipped, measured, [width_cell(case) for case in cases])
    guesses = {"model left out": predicted, "shipped": shipped, "one run": known}
    return {name: sweeps(cases, guess, measured) for name, guess in guesses.items()}


def _calibrated(validation: RunsValidation) -> dict[str, tuple[float, int]]:
    problem = validation.problem
    seconds, _ = measured_arrays(problem)
    found = {}
    for source in dict.fromkeys(case.source for case in problem.cases):
        alone = np.where([case.source == source for case in problem.cases], seconds, np.nan)
        error, pairs = calibrated_error(validation.predictions, alone, [width_cell(case) for case in problem.cases])
        if pairs:
            found[source] = (error, pairs)
    return found


def _pairs(validation: RunsValidation) -> tuple[MemoryPair, ...]:
    problem = validation.problem
    return memory_pairs(problem.cases, validation.predictions.memory_bytes / GIB, measured_arrays(problem)[1])


def _reached(
    bar: Bar,
    time: Mapping[str, Judged],
    memory: Mapping[str, Judged],
    calibrated: Mapping[str, tuple[float, int]],
    pairs: Sequence[MemoryPair],
    source_out: Sequence[float],
) -> float | None:
    if bar.what == "calibrated":
        return 100 * calibrated[bar.source][0] if bar.source in calibrated else None
    if bar.what == "source left out":
        return float(np.mean(source_out)) if source_out else None
    if bar.what == "memory difference":
        errors = [abs(pair.error) for pair in pairs if pair.source == bar.source]
        return 100 * float(np.mean(errors)) if errors else None
    judged = (time if bar.what == "time" else memory).get(bar.source)
    if judged is None:
        return None
    return (judged.model_out or judged.shipped).mape
