"""Measured runs priced under trial values of constants: graphs are built once, only what a value touches is repriced.

Runs that share model, workload, cluster and stack are priced as one array of plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError
from autopar.estimate import Costs, PlanArrays, Setting, estimate, estimate_many, to_arrays
from autopar.fit.components import Components, patched_cluster, read_components
from autopar.graph import OpGraph
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, check_plan
from autopar.workload import Precision, Workload
from costmodels.hardware import Cluster
from costmodels.shipped import SpecPath
from costmodels.stack import load_stack

Floats = NDArray[np.float64]


class Case(Protocol):
    """A measured run as a question to the estimate. ``stack`` is a name; what was not measured is None."""

    @property
    def id(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def workload(self) -> Workload: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def stack(self) -> str: ...
    @property
    def measured_s(self) -> float | None: ...
    @property
    def measured_memory_gib(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs of one source that differ in their plans only.

    Attributes:
        indices: of the cases.
        costs: without trial values.
    """

    graph: OpGraph
    workload: Workload
    cluster: Cluster
    stack: str
    plans: PlanArrays
    indices: tuple[int, ...]
    costs: Costs


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Cases made ready for pricing.

    Attributes:
        cases: in the order given.
        groups: of the cases that can be priced.
        failures: why others cannot, by index.
        components: what their specifications say without trial values.
    """

    cases: tuple[Case, ...]
    groups: tuple[Group, ...]
    failures: Mapping[int, str]
    components: Components


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Arrays [cases]; NaN where a case cannot be priced.

    Attributes:
        step_s, memory_bytes: as in Costs.
        terms, items: their parts.
    """

    step_s: Floats
    memory_bytes: Floats
    terms: Mapping[str, Floats]
    items: Mapping[str, Floats]


def prepare(cases: Sequence[Case]) -> Problem:
    """Build graphs, check plans, group. A case that cannot be priced becomes a failure with its reason."""
    graphs: dict[tuple[ModelSpec, int, Precision], OpGraph] = {}
    kept: dict[tuple[Any, ...], list[int]] = {}
    failures: dict[int, str] = {}
    for index, case in enumerate(cases):
        model = (case.spec, case.workload.seq_len, case.workload.precision)
        try:
            if model not in graphs:
                graphs[model] = build_graph(case.spec, seq_len=model[1], precision=model[2])
            check_plan(case.plan, graphs[model], case.workload, case.cluster.world_size)
            load_stack(case.stack)
            case.cluster.device.peak(case.workload.precision.value)
        except InputError as error:
            failures[index] = str(error)
            continue
        kept.setdefault((model, case.workload, repr(case.cluster), case.stack, case.source), []).append(index)
    groups = []
    for (_, workload, _, stack, _), indices in kept.items():
        first = cases[indices[0]]
        arrays = to_arrays([cases[i].plan for i in indices])
        model = (first.spec, workload.seq_len, workload.precision)
        setting = Setting(graph=graphs[model], workload=workload, cluster=first.cluster, stack=load_stack(stack))
        good, costs = _priceable(setting, arrays, indices, failures)
        if good:
            arrays = to_arrays([cases[i].plan for i in good])
            costs = _as_measured(setting, [cases[i] for i in good], costs)
            groups.append(
                Group(
                    graph=setting.graph, workload=workload, cluster=first.cluster, stack=stack, plans=arrays,
                    indices=tuple(good), costs=costs,
                )
            )  # fmt: skip
    return Problem(cases=tuple(cases), groups=tuple(groups), failures=failures, components=_load_components(groups, {}))


def _priceable(
    setting: Setting, plans: PlanArrays, indices: list[int], failures: dict[int, str]
) -> tuple[list[int], Costs]:
    """Indices whose plans can be priced, with their costs; the others are added to ``failures``.

    Any exception counts: one run of a file that nobody has seen must not end the rest.
    """
    try:
        costs = estimate_many(setting, plans)
        if np.all(np.isfinite(costs.step_s)):
            return indices, costs
    except Exception:
        pass
    good, found = [], []
    for position, index in enumerate(indices):
        try:
            costs = estimate_many(setting, to_arrays([plans.plan(position)]))
        except Exception as error:
            failures[index] = f"cannot be priced: {type(error).__name__}: {error}"
            continue
        if np.isfinite(costs.step_s[0]):
            good.append(index)
            found.append(costs)
        else:
            failures[index] = f"cannot be priced: the estimate is {costs.step_s[0]}"
    return good, _joined(found)


def _joined(costs: Sequence[Costs]) -> Costs:
    def together(parts: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}

    return Costs(
        step_s=np.concatenate([np.zeros(0), *(c.step_s for c in costs)]),
        memory_bytes=np.concatenate([np.zeros(0), *(c.memory_bytes for c in costs)]),
        terms=together([c.terms for c in costs]),
        memory=together([c.memory for c in costs]),
        host_bytes=np.concatenate([np.zeros(0), *(c.host_bytes for c in costs)]),
    )


def _as_measured(setting: Setting, cases: Sequence[Case], costs: Costs) -> Costs:
    """Memory and items of the pipeline rank that was measured, where that is not the fullest, as they were counted.

    Allocated memory is without what the allocator cannot use and without what lies outside it, reserved memory without
    the latter (u of u (1 + f) + r, and u (1 + f)).
    """
    habits = setting.stack.memory
    of_rank: dict[str, Callable[[Sequence[float]], int]] = {
        "first": lambda held: 0,
        "last": lambda held: -1,
        "ends": lambda held: 0 if held[0] >= held[-1] else -1,
    }
    memory, items = costs.memory_bytes.copy(), {name: part.copy() for name, part in costs.memory.items()}
    for position, case in enumerate(cases):
        rank = getattr(case, "memory_rank", "max")
        if rank in of_rank and case.measured_memory_gib and case.plan.layout.pp > 1:
            found = estimate(setting, case.plan)
            place = of_rank[rank](found.memory_per_rank)
            memory[position] = found.memory_per_rank[place]
            for name, size in found.memory_items_per_rank[place].items():
                items[name][position] = size
        basis = getattr(case, "memory_basis", "")
        if basis in ("allocated", "reserved"):
            reserved = memory[position] - habits.reserve_bytes
            memory[position] = reserved / (1 + habits.fragmentation if basis == "allocated" else 1.0)
            items["reserve"][position] = 0.0
            if basis == "allocated":
                items["fragmentation"][position] = 0.0
    return dataclasses.replace(costs, memory_bytes=memory, memory=items)


def predict(problem: Problem, values: Mapping[SpecPath, float] | None = None) -> Predictions:
    """Price every case, with ``values`` in place of the numbers at their paths."""
    components = load_components(problem, values or {})
    again = {id(group) for group in touched(problem, problem.components, components)}
    step, memory = np.full(len(problem.cases), np.nan), np.full(len(problem.cases), np.nan)
    terms: dict[str, Floats] = {}
    items: dict[str, Floats] = {}
    for group in problem.groups:
        costs = evaluate(problem, group, components) if id(group) in again else group.costs
        indices = list(group.indices)
        step[indices], memory[indices] = costs.step_s, costs.memory_bytes
        for parts, found in ((terms, costs.terms), (items, costs.memory)):
            for name, part in found.items():
                parts.setdefault(name, np.full(len(problem.cases), np.nan))[indices] = part
    return Predictions(step_s=step, memory_bytes=memory, terms=terms, items=items)


def evaluate(problem: Problem, group: Group, components: Components, *, memory: bool = True) -> Costs:
    """Price one group under ``components``; without ``memory`` that of the fullest rank is given for every case."""
    setting = _setting(problem, group, components)
    costs = estimate_many(setting, group.plans)
    return _as_measured(setting, [problem.cases[i] for i in group.indices], costs) if memory else costs


def _setting(problem: Problem, group: Group, components: Components) -> Setting:
    cluster = patched_cluster(group.cluster, problem.components, components)
    return Setting(graph=group.graph, workload=group.workload, cluster=cluster, stack=components.stacks[group.stack])


def load_components(problem: Problem, values: Mapping[SpecPath, float]) -> Components:
    """Read the specifications that the cases use with ``values`` in place."""
    return _load_components(problem.groups, values) if values else problem.components


def _load_components(groups: Sequence[Group], values: Mapping[SpecPath, float]) -> Components:
    devices = {group.cluster.device.name for group in groups}
    return read_components(devices, {group.stack for group in groups}, values)


def touched(problem: Problem, old: Components, new: Components) -> tuple[Group, ...]:
    """Groups that are priced otherwise under ``new`` than under ``old``."""

    def differs(group: Group) -> bool:
        cluster = group.cluster
        here, there = old.devices.get(cluster.device.name), new.devices.get(cluster.device.name)
        machines = [(m.device, m.node_link) if m else None for m in (here, there)]
        if old.stacks[group.stack] != new.stacks[group.stack] or machines[0] != machines[1]:
            return True
        fabric = cluster.network_link.name
        networks = [
            components.fabrics.get(fabric, machine.network_link if machine else None)
            for components, machine in ((old, here), (new, there))
        ]
        return cluster.world_size > cluster.domain and networks[0] != networks[1]

    return tuple(group for group in problem.groups if differs(group))
