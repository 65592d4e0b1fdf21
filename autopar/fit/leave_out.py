"""What the fit would have said of runs that it had not seen.

A part of the runs is left out and the constants are fitted anew, from the full solution by chord steps: the Jacobian
stays, so that a refit costs a few pricings of the runs that it leaves out. That is exact to first order in the step; a
refit that goes far is the less exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.fit.fitting import FitResult, Residuals, values_at
from autopar.fit.fork import fork_map
from autopar.fit.problem import Case
from autopar.fit.solve import linear_minimum

Floats = NDArray[np.float64]

Key = Hashable

CHORDS = 3
"""Steps of a refit at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Predictions of observations by fits that had not seen their part.

    Attributes:
        keys: the part of each observation.
        residuals: log(predicted / measured) of each, [observations].
        values: constants by part, by name.
    """

    keys: tuple[Key, ...]
    residuals: Floats
    values: Mapping[Key, Mapping[str, float]]


def architecture(case: Case) -> Key:
    """What makes two models the same, whatever they are called: the sizes of the transformer."""
    spec = case.spec
    experts = getattr(spec, "num_experts", 0)
    return (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.ffn_size, experts)


def variant(case: Case) -> Key:
    """How a model was laid out, for sources that ran a single model."""
    layout = case.plan.layout
    return ("variant", case.source, case.plan.zero_stage, layout.tp, layout.pp, layout.dp_shard, case.plan.recompute)


def model_keys(cases: Sequence[Case]) -> tuple[Key, ...]:
    """The part of each case when one model is left out at a time.

    Runs of the same architecture leave together, from all sources. Where a source has a single architecture, that
    would leave nothing of it, so one of its layouts leaves at a time. What counts are runs with a step time, for
    sources that have any.
    """
    models: dict[str, set[Key]] = {}
    timed = {case.source for case in cases if case.measured_s}
    for case in cases:
        if case.measured_s or case.source not in timed:
            models.setdefault(case.source, set()).add(architecture(case))
    return tuple(variant(case) if len(models[case.source]) == 1 else architecture(case) for case in cases)


def leave_out(result: FitResult, keys: Sequence[Key], *, far: float = 0.05, processes: int = 2) -> LeftOut:
    """Refit without each part in turn and predict it.

    Args:
        result: the fit on everything.
        keys: the part of each case of the problem.
        far: step in a logarithm up to which the fit's linearisation is trusted for the runs that stay; beyond it they
            are priced anew and the refit takes a second chord step.
        processes: that share the parts.
    """
    of_observation = tuple(keys[o.case] for o in result.observations)
    model = Residuals(problem=result.problem, constants=result.constants, observations=result.observations, processes=1)
    parts = list(dict.fromkeys(of_observation))
    start, fitted, jacobian = result.solution.x, result.solution.residuals, result.solution.jacobian

    def refit(part: Key) -> tuple[Floats, Floats]:
        inside = np.asarray([key == part for key in of_observation])
        terms = dataclasses.replace(result.terms, weights=np.where(inside, 0.0, result.terms.weights))
        x, residuals = start, fitted
        for _ in range(CHORDS):
            moved = linear_minimum(terms, x, residuals, jacobian)
            near = float(np.max(np.abs(moved - x))) < far
            if near:
                left = frozenset(o.case for o, is_left in zip(result.observations, inside, strict=True) if is_left)
                return moved, model.update(residuals, x, moved, only=left)
            x, residuals = moved, model.update(residuals, x, moved)
        return x, residuals

    found = fork_map(refit, parts, processes)
    residuals = fitted.copy()
    for part, (_, priced) in zip(parts, found, strict=True):
        inside = np.asarray([key == part for key in of_observation])
        residuals[inside] = priced[inside]
    return LeftOut(
        keys=of_observation,
        residuals=residuals,
        values={part: values_at(result.constants, x) for part, (x, _) in zip(parts, found, strict=True)},
    )
