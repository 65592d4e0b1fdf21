"""Measured runs priced under trial values of constants: graphs are built once, only what a value touches is repriced.

Runs that share model, workload, cluster and stack are priced as one array of plans.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError
from autopar.estimate import Costs, PlanArrays, Setting, estimate_many, to_arrays
from autopar.graph import OpGraph
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, check_plan
from autopar.workload import Precision, Workload
from costmodels.hardware import Cluster, Link, fabric_names, load_cluster, load_fabric
from costmodels.shipped import SpecPath, replaced
from costmodels.stack import Stack, load_stack

Floats = NDArray[np.float64]
Item = TypeVar("Item")


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
    """Runs that differ in their plans only; ``indices`` are those of the cases."""

    graph: OpGraph
    workload: Workload
    cluster: Cluster
    stack: str
    plans: PlanArrays
    indices: tuple[int, ...]


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
class Components:
    """Specifications as records: a device with its usual links (as a cluster of one), stacks, networks; by name."""

    devices: Mapping[str, Cluster]
    stacks: Mapping[str, Stack]
    fabrics: Mapping[str, Link]


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
        kept.setdefault((model, case.workload, repr(case.cluster), case.stack), []).append(index)
    groups = []
    for (model, workload, _, stack), indices in kept.items():
        first = cases[indices[0]]
        arrays = to_arrays([cases[i].plan for i in indices])
        setting = Setting(graph=graphs[model], workload=workload, cluster=first.cluster, stack=load_stack(stack))
        good = _priceable(setting, arrays, indices, failures)
        if good:
            groups.append(
                Group(
                    graph=setting.graph, workload=workload, cluster=first.cluster, stack=stack,
                    plans=to_arrays([cases[i].plan for i in good]), indices=tuple(good),
                )
            )  # fmt: skip
    return Problem(cases=tuple(cases), groups=tuple(groups), failures=failures, components=_load_components(groups, {}))


def _priceable(setting: Setting, plans: PlanArrays, indices: list[int], failures: dict[int, str]) -> list[int]:
    """Indices whose plans can be priced; the others are added to ``failures``.

    Any exception counts: one run of a file that nobody has seen must not end the rest.
    """
    try:
        if np.all(np.isfinite(estimate_many(setting, plans).step_s)):
            return indices
    except Exception:
        pass
    good = []
    for position, index in enumerate(indices):
        try:
            found = estimate_many(setting, to_arrays([plans.plan(position)]))
        except Exception as error:
            failures[index] = f"cannot be priced: {type(error).__name__}: {error}"
            continue
        if np.isfinite(found.step_s[0]):
            good.append(index)
        else:
            failures[index] = f"cannot be priced: the estimate is {found.step_s[0]}"
    return good


def predict(problem: Problem, values: Mapping[SpecPath, float] | None = None) -> Predictions:
    """Price every case, with ``values`` in place of the numbers at their paths."""
    components = load_components(problem, values or {})
    step, memory = np.full(len(problem.cases), np.nan), np.full(len(problem.cases), np.nan)
    terms: dict[str, Floats] = {}
    items: dict[str, Floats] = {}
    for group in problem.groups:
        costs = evaluate(problem, group, components)
        indices = list(group.indices)
        step[indices], memory[indices] = costs.step_s, costs.memory_bytes
        for parts, found in ((terms, costs.terms), (items, costs.memory)):
            for name, part in found.items():
                parts.setdefault(name, np.full(len(problem.cases), np.nan))[indices] = part
    return Predictions(step_s=step, memory_bytes=memory, terms=terms, items=items)


def evaluate(problem: Problem, group: Group, components: Components) -> Costs:
    """Price one group under ``components``."""
    return estimate_many(_setting(problem, group, components), group.plans)


def _setting(problem: Problem, group: Group, components: Components) -> Setting:
    cluster, base = group.cluster, problem.components
    name = cluster.device.name
    if name in components.devices:
        old, new = base.devices[name], components.devices[name]
        fabric = cluster.network_link.name
        known = fabric in components.fabrics
        old_network = base.fabrics[fabric] if known else old.network_link
        new_network = components.fabrics[fabric] if known else new.network_link
        cluster = dataclasses.replace(
            cluster,
            device=_patched(cluster.device, old.device, new.device),
            node_link=_patched(cluster.node_link, old.node_link, new.node_link),
            network_link=_patched(cluster.network_link, old_network, new_network),
        )
    return Setting(graph=group.graph, workload=group.workload, cluster=cluster, stack=components.stacks[group.stack])


def _patched(record: Item, old: Any, new: Any) -> Item:
    """``record`` with the differences between ``old`` and ``new``, keeping what it states otherwise."""
    if old == new:
        return record
    if dataclasses.is_dataclass(new) and not isinstance(new, type) and type(record) is type(old) is type(new):
        changes = {
            field.name: _patched(getattr(record, field.name), getattr(old, field.name), getattr(new, field.name))
            for field in dataclasses.fields(new)
            if getattr(old, field.name) != getattr(new, field.name)
        }
        return cast(Item, dataclasses.replace(cast(Any, record), **changes))
    if isinstance(record, Mapping) and isinstance(old, Mapping) and isinstance(new, Mapping):
        merged = dict(record)
        for key, value in new.items():
            if key not in old or old[key] != value:
                merged[key] = _patched(merged[key], old[key], value) if key in old and key in merged else value
        return cast(Item, merged)
    return cast(Item, new)


def load_components(problem: Problem, values: Mapping[SpecPath, float]) -> Components:
    """Read the specifications that the cases use with ``values`` in place."""
    return _load_components(problem.groups, values) if values else problem.components


def _load_components(groups: Sequence[Group], values: Mapping[SpecPath, float]) -> Components:
    devices = {group.cluster.device.name for group in groups}
    stacks = {group.stack for group in groups}
    with replaced(values):
        by_name = {load_fabric(name, 0.0).name: load_fabric(name, 0.0) for name in fabric_names()}
        return Components(
            devices={name: load_cluster(f"{name}:1") for name in devices if _is_shipped(name)},
            stacks={name: inspect.unwrap(load_stack)(name) for name in stacks},
            fabrics=by_name,
        )


def _is_shipped(name: str) -> bool:
    from costmodels.hardware import device_names

    return name in device_names()


def touched(problem: Problem, old: Components, new: Components) -> tuple[Group, ...]:
    """Groups that are priced otherwise under ``new`` than under ``old``."""

    def differs(group: Group) -> bool:
        name, fabric = group.cluster.device.name, group.cluster.network_link.name
        return (
            old.stacks[group.stack] != new.stacks[group.stack]
            or old.devices.get(name) != new.devices.get(name)
            or old.fabrics.get(fabric) != new.fabrics.get(fabric)
        )

    return tuple(group for group in problem.groups if differs(group))
