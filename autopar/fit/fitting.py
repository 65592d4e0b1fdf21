"""Fit constants on measured runs: residuals are logarithms of predicted over measured step time (and memory)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError
from autopar.fit.components import Components
from autopar.fit.constants import Constant, Quantity, spec_values
from autopar.fit.fork import fork_map
from autopar.fit.problem import Case, Group, Problem, evaluate, load_components, prepare, touched
from autopar.fit.solve import Solution, Terms, minimise
from costmodels.units import GIB

Floats = NDArray[np.float64]

NOISE = 0.05
"""Standard deviation of log(predicted / measured) within which a row is fitted quadratically."""

SOURCE_CAP = 100.0
"""Rows that one source counts as at most, so that a large table does not decide constants that others share."""

STEP = 1e-3
"""Difference of log(value) in numeric derivatives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One measured number: of which case, which quantity, in seconds or bytes, and the weight of its residual."""

    case: int
    quantity: Quantity
    measured: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """A fit.

    Attributes:
        constants: that were free.
        values: fitted, by the constant's name.
        problem: the cases.
        observations: rows of residuals and Jacobian; ``terms`` weighs them.
        solution: in log(value / start).
    """

    constants: tuple[Constant, ...]
    values: Mapping[str, float]
    problem: Problem
    observations: tuple[Observation, ...]
    terms: Terms
    solution: Solution

    def rows_of(self, constant: Constant) -> tuple[Observation, ...]:
        """Observations that moved a constant."""
        column = self.solution.jacobian[:, self.constants.index(constant)]
        return tuple(o for o, slope in zip(self.observations, column, strict=True) if abs(slope) > 1e-4)


def fit(
    cases: Sequence[Case] | Problem,
    constants: Sequence[Constant],
    *,
    iterations: int = 10,
    noise: float = NOISE,
    source_cap: float = SOURCE_CAP,
    processes: int = 2,
    skip: frozenset[str] = frozenset(),
) -> FitResult:
    """Fit ``constants`` on every measured number of ``cases``.

    Args:
        cases: runs, or runs made ready by ``prepare`` (so that several fits share their graphs).
        constants: what is free.
        iterations: steps at most; a few of them cost one pricing of a run per constant that it depends on.
        noise, source_cap: see the module's constants.
        processes: that share the pricing.
        skip: ids of runs that are priced but do not move anything (distrusted ones).

    Raises:
        InputError: no constants, or none of the cases can be priced and has a measurement.
    """
    problem = cases if isinstance(cases, Problem) else prepare(cases)
    chosen = tuple(constants)
    if not chosen:
        raise InputError("nothing to fit: no constants are free")
    observations = _observations(problem, {c.quantity for c in chosen}, source_cap, skip)
    if not observations:
        raise InputError("nothing to fit on: no run can be priced and has a measurement")
    bounds = np.asarray([c.bounds for c in chosen])
    terms = Terms(
        weights=np.asarray([o.weight for o in observations]), noise=noise,
        sigma=np.asarray([c.prior_sigma for c in chosen]), low=bounds[:, 0], high=bounds[:, 1],
    )  # fmt: skip
    model = Residuals(problem=problem, constants=chosen, observations=observations, processes=processes)
    solution = minimise(terms, model.at, model.jacobian, iterations=iterations)
    return FitResult(
        constants=chosen, values=values_at(chosen, solution.x), problem=problem, observations=observations,
        terms=terms, solution=solution,
    )  # fmt: skip


def values_at(constants: Sequence[Constant], x: Floats) -> dict[str, float]:
    """Values by name from log(value / start)."""
    return {c.name: float(c.start * np.exp(step)) for c, step in zip(constants, x, strict=True)}


def _observations(
    problem: Problem, quantities: set[Quantity], source_cap: float, skip: frozenset[str]
) -> tuple[Observation, ...]:
    found: list[tuple[int, Quantity, float]] = []
    for index, case in enumerate(problem.cases):
        if index in problem.failures or case.id in skip:
            continue
        if Quantity.TIME in quantities and case.measured_s:
            found.append((index, Quantity.TIME, case.measured_s))
        if Quantity.MEMORY in quantities and case.measured_memory_gib:
            found.append((index, Quantity.MEMORY, case.measured_memory_gib * GIB))
    alike = Counter((_configuration(problem.cases[i]), quantity) for i, quantity, _ in found)
    share = [1 / alike[_configuration(problem.cases[i]), quantity] for i, quantity, _ in found]
    of_source: Counter[tuple[str, Quantity]] = Counter()
    for (index, quantity, _), weight in zip(found, share, strict=True):
        of_source[problem.cases[index].source, quantity] += weight  # type: ignore[assignment]
    return tuple(
        Observation(
            case=index, quantity=quantity, measured=measured,
            weight=weight * min(1.0, source_cap / of_source[problem.cases[index].source, quantity]),
        )
        for (index, quantity, measured), weight in zip(found, share, strict=True)
    )  # fmt: skip


def _configuration(case: Case) -> tuple[object, ...]:
    return (case.spec, case.workload, repr(case.cluster), case.plan, case.stack)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residuals:
    """log(predicted / measured) as a function of log(value / start)."""

    problem: Problem
    constants: tuple[Constant, ...]
    observations: tuple[Observation, ...]
    processes: int = 2

    @property
    def _of_memory(self) -> bool:
        return any(o.quantity is Quantity.MEMORY for o in self.observations)

    def components(self, x: Floats) -> Components:
        """Specifications with the values at ``x``."""
        return load_components(self.problem, spec_values(self.constants, values_at(self.constants, x)))

    def at(self, x: Floats) -> Floats:
        """Residuals, [observations]."""
        return self._log_errors(self._priced(self.components(x)))

    def update(self, residuals: Floats, old: Floats, new: Floats, only: frozenset[int] | None = None) -> Floats:
        """Residuals at ``new`` from those at ``old``; only runs that the difference touches are priced.

        ``only`` names cases: groups without any of them keep their residuals as well.
        """
        here, there = self.components(old), self.components(new)
        groups = [g for g in touched(self.problem, here, there) if only is None or not only.isdisjoint(g.indices)]
        found = self._log_errors(self._price(groups, there))
        return np.where(np.isnan(found), residuals, found)

    def jacobian(self, x: Floats, residuals: Floats) -> Floats:
        """Numeric derivatives, [observations, constants]; only runs that a constant touches are priced again."""
        here = self.components(x)
        low, high = (np.asarray(side) for side in zip(*(c.bounds for c in self.constants), strict=True))

        def column(index: int) -> Floats:
            constant = self.constants[index]
            step = STEP if x[index] + STEP <= high[index] else -STEP
            if x[index] + step < low[index]:
                return np.zeros(len(residuals))
            moved = x.copy()
            moved[index] += step
            there = self.components(moved)
            groups = [group for group in touched(self.problem, here, there) if self._moves(constant, group)]
            memory = constant.quantity is Quantity.MEMORY
            found = self._log_errors(self._price(groups, there, memory=memory))
            slope = np.where(np.isnan(found), 0.0, (found - residuals) / step)
            return slope * self._mask(constant)

        columns = fork_map(column, range(len(self.constants)), self.processes)
        return np.stack(columns, axis=1)

    def _moves(self, constant: Constant, group: Group) -> bool:
        return constant.applies_to(self.problem.cases[group.indices[0]].source)

    def _mask(self, constant: Constant) -> Floats:
        return np.asarray(
            [
                float(o.quantity is constant.quantity and constant.applies_to(self.problem.cases[o.case].source))
                for o in self.observations
            ]
        )

    def _priced(self, components: Components) -> dict[int, tuple[float, float]]:
        parts = [self.problem.groups[part :: self.processes] for part in range(self.processes)]
        found: dict[int, tuple[float, float]] = {}
        for priced in fork_map(lambda groups: self._price(groups, components), parts, self.processes):
            found.update(priced)
        return found

    def _price(
        self, groups: Sequence[Group], components: Components, *, memory: bool = True
    ) -> dict[int, tuple[float, float]]:
        found: dict[int, tuple[float, float]] = {}
        for group in groups:
            costs = evaluate(self.problem, group, components, memory=memory and self._of_memory)
            pairs = zip(costs.step_s.tolist(), costs.memory_bytes.tolist(), strict=True)
            found.update(zip(group.indices, pairs, strict=True))
        return found

    def _log_errors(self, priced: Mapping[int, tuple[float, float]]) -> Floats:
        errors = np.full(len(self.observations), np.nan)
        for row, observation in enumerate(self.observations):
            if observation.case in priced:
                seconds, num_bytes = priced[observation.case]
                value = seconds if observation.quantity is Quantity.TIME else num_bytes
                errors[row] = np.log(value / observation.measured)
        return errors
