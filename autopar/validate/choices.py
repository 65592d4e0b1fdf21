"""Would the prediction have picked the right plan? Sweeps of one model on equally many devices, by time and memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from autopar.fit.leave_out import architecture
from autopar.fit.problem import Case
from autopar.validate.plans import kendall_tau

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Layouts of one question.

    Attributes:
        source, name: whose, and of what.
        rows: layouts measured.
        regret: measured time of the layout predicted fastest over that of the fastest, minus 1.
        tau: Kendall's tau-b of predicted and measured times.
        first, fastest: slugs of the layout predicted fastest and of the fastest.
    """

    source: str
    name: str
    rows: int
    regret: float
    tau: float | None
    first: str = ""
    fastest: str = ""


def question(case: Case) -> Hashable:
    """What a layout answers: model, sequence, batch, precision, devices."""
    workload = case.workload
    return (
        case.source, architecture(case), workload.seq_len, workload.global_batch, workload.precision,
        case.cluster.device.name, case.cluster.world_size,
    )  # fmt: skip


def sweeps(cases: Sequence[Case], predicted: Floats, measured: Floats, *, fewest: int = 3) -> tuple[Sweep, ...]:
    """Sweeps of at least ``fewest`` different plans. ``predicted`` and ``measured`` are [cases], NaN where unknown.

    A plan that was measured several times counts with the median of its measurements.
    """
    groups: dict[Hashable, dict[object, list[int]]] = {}
    for index, case in enumerate(cases):
        if np.isfinite(predicted[index]) and np.isfinite(measured[index]):
            groups.setdefault(question(case), {}).setdefault((case.plan, case.stack), []).append(index)
    found = []
    for plans in groups.values():
        if len(plans) < fewest:
            continue
        guess = np.asarray([float(np.median(predicted[members])) for members in plans.values()])
        truth = np.asarray([float(np.median(measured[members])) for members in plans.values()])
        first = cases[next(iter(plans.values()))[0]]
        slugs = [cases[members[0]].plan.slug for members in plans.values()]
        found.append(
            Sweep(
                source=first.source,
                name=f"{first.spec.name}, {first.cluster.world_size} devices, batch {first.workload.global_batch}",
                rows=len(plans), regret=float(truth[int(np.argmin(guess))] / truth.min() - 1),
                tau=kendall_tau(guess.tolist(), truth.tolist()),
                first=slugs[int(np.argmin(guess))], fastest=slugs[int(np.argmin(truth))],
            )
        )  # fmt: skip
    return tuple(found)


def after_one_run(cases: Sequence[Case], predicted: Floats, measured: Floats, cells: Sequence[Hashable]) -> Floats:
    """Predictions times the median of measured / predicted of the runs of the same cell in other sweeps, [cases].

    What a planner knows that has measured one layout of each cell; unchanged where no other sweep has the cell.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, cell in enumerate(cells):
        if np.isfinite(predicted[index]) and np.isfinite(measured[index]):
            groups.setdefault(cell, []).append(index)
    asked = [question(case) for case in cases]
    found = predicted.copy()
    for members in groups.values():
        for index in members:
            others = [i for i in members if asked[i] != asked[index]]
            if others:
                found[index] *= float(np.median([measured[i] / predicted[i] for i in others]))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPair:
    """Two runs of one model that differ in their plan, and by how much memory: GiB, second minus first."""

    source: str
    first: str
    second: str
    predicted_gib: float
    measured_gib: float

    @property
    def error(self) -> float:
        """Of the difference, as a share of the measured one."""
        return self.predicted_gib / self.measured_gib - 1


def memory_pairs(
    cases: Sequence[Case], predicted: Floats, measured: Floats, *, least_gib: float = 0.5
) -> tuple[MemoryPair, ...]:
    """Pairs of one question whose measured memory differs by ``least_gib`` or more. Memory is [cases] in GiB."""
    groups: dict[Hashable, list[int]] = {}
    for index, case in enumerate(cases):
        if np.isfinite(predicted[index]) and np.isfinite(measured[index]):
            groups.setdefault(question(case), []).append(index)
    return tuple(
        MemoryPair(
            source=cases[a].source, first=cases[a].id, second=cases[b].id,
            predicted_gib=float(predicted[b] - predicted[a]), measured_gib=float(measured[b] - measured[a]),
        )
        for members in groups.values()
        for a, b in combinations(members, 2)
        if abs(measured[b] - measured[a]) >= least_gib and cases[a].plan != cases[b].plan
    )  # fmt: skip
