"""Constants of a profile corrected by what training runs showed, with their provenance.

A profile times operations one by one; in a training step they meet other caches, other threads and other ranks. A
correction scales the measured seconds of one named part of a profile, so that everything fitted to them follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from costmodels.errors import InputError, nearest
from costmodels.fitting import nonnegative_fit
from costmodels.profiles import PHASES, CollectivePoint, ComputePoint, Correction, MachineProfile

Array = NDArray[np.float64]

OPTIMIZER = "optimizer"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
CORRECTED = (*PHASES, OPTIMIZER, *COLLECTIVES)
"""What can be corrected: passes' compute, the optimizer, collectives by kind."""
TRUST = 0.05
"""Share of a step by which a part may miss before it outweighs the profile: the weight of the prior, factor 1."""
LEAST = 0.1
"""No factor is smaller: a part that seems to cost nothing ran beside another one."""


def fit_corrections(columns: Array, measured: Array, steps: Array) -> Array:
    """Factors of parts, [parts], from measured items of runs, each a sum of parts.

    Minimises sum_i ((columns_i f - measured_i) / step_i)^2 + TRUST^2 sum_p (f_p - 1)^2 over f >= 0: items count by
    their share of the step, and a part that little was seen of stays as the profile has it.

    Args:
        columns: [items, parts] predicted seconds of each part in each item.
        measured: [items] seconds.
        steps: [items] seconds of the step that an item is of.
    """
    parts = columns.shape[1]
    rows = np.concatenate([columns / steps[:, None], TRUST * np.eye(parts)])
    goal = np.concatenate([measured / steps, np.full(parts, TRUST)])
    fitted = nonnegative_fit(rows, goal, np.ones(len(goal)))
    return np.maximum(fitted, LEAST)


def corrected(profile: MachineProfile, corrections: Sequence[Correction]) -> MachineProfile:
    """The profile with its points scaled; earlier corrections stay on record, and multiply.

    Raises:
        InputError: an unknown name, or one that is corrected twice.
    """
    factors = {correction.name: correction.factor for correction in corrections}
    for name in factors:
        if name not in CORRECTED:
            raise InputError(f"unknown part of a profile '{name}'{nearest(name, CORRECTED)}")
    if len(factors) != len(corrections):
        raise InputError("a part of a profile is corrected twice at once")
    calls = [factors[kind] for kind in COLLECTIVES if kind in factors]
    between = sum(calls) / len(calls) if calls else 1.0
    efficiency = profile.link_efficiency
    if profile.link_rate is not None and calls:
        # The rate is given: what is slower has less of it as payload.
        efficiency = min(1.0, efficiency / between)
    return dataclasses.replace(
        profile,
        compute=tuple(_scaled(point, factors) for point in profile.compute),
        collectives=tuple(_scaled_call(point, factors) for point in profile.collectives),
        host_overheads=_overheads(profile.host_overheads, factors, between),
        link_efficiency=efficiency,
        corrections=(*profile.corrections, *corrections),
        fits=(),
    )


def _scaled(point: ComputePoint, factors: Mapping[str, float]) -> ComputePoint:
    name = OPTIMIZER if point.kind == OPTIMIZER else point.phase
    return dataclasses.replace(point, seconds=point.seconds * factors.get(name, 1.0))


def _scaled_call(point: CollectivePoint, factors: Mapping[str, float]) -> CollectivePoint:
    return dataclasses.replace(point, seconds=point.seconds * factors.get(point.kind, 1.0))


def _overheads(overheads: Mapping[str, float], factors: Mapping[str, float], between: float) -> dict[str, float]:
    """Wrappers of a pass with its factor; waiting for a collective with that of collectives."""

    def factor(name: str) -> float:
        phase = name.rpartition(".")[2]
        return between if name == "collective.wait" else factors.get(phase, 1.0) if phase in PHASES else 1.0

    return {name: seconds * factor(name) for name, seconds in overheads.items()}
