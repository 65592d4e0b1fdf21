"""Measured collectives to curves and links, and measured sharing of a machine to a slowdown.

Symbols: a seconds per message, B bytes/s per rank and direction; rounds and serial bytes as in ``collectives``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodels.collectives import curve_seconds, link_seconds, rounds, serial_bytes
from costmodels.fitting import nonnegative_fit, relative_errors, summarize, weighted_median
from costmodels.hardware import CollectiveCurve, Link
from costmodels.profiles import CollectivePoint, Fit, MachineProfile
from costmodels.stack import load_stack

Array = NDArray[np.float64]

LINK_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")
"""Kinds that a link is fitted on: those of a training step, which the formulas describe."""


def fit_sharing(profile: MachineProfile) -> tuple[float, ...]:
    """Slowdown for 1, 2, ... active ranks: measured points, straight lines between, never below the one before."""
    if not profile.sharing:
        return ()
    points = sorted(profile.sharing, key=lambda point: point.active)
    active = np.arange(1, points[-1].active + 1)
    between = np.interp(active, [point.active for point in points], [point.slowdown for point in points])
    return tuple(float(x) for x in np.maximum.accumulate(np.maximum(between, 1.0)))


def fit_curves(profile: MachineProfile) -> tuple[CollectiveCurve, ...]:
    """Measured seconds over size for each kind and group size, made monotone; none for an emulated cluster.

    A curve knows the size of its group and not its place: where groups may lie inside a node or across nodes, there
    are none.
    """
    if profile.link_rate is not None or (profile.num_nodes > 1 and profile.ranks_per_node > 1):
        return ()
    groups = sorted({(point.kind, point.group_size) for point in profile.collectives})
    return tuple(_curve(_group_points(profile, kind, size)) for kind, size in groups)


def fit_link(profile: MachineProfile, *, across_nodes: bool) -> Link:
    """The links inside a node or between nodes: t = rounds a + serial / B, over kinds and group sizes.

    Between the nodes of an emulated cluster B is the given rate times its payload share, divided among the ranks of a
    node, and only a is fitted: as a weighted median, so that a kind that the formula does not describe cannot pull
    it. Elsewhere a and B are both fitted. A link without points costs nothing and says so.
    """
    points = _link_points(profile, across_nodes)
    name = f"{profile.device_name} {'between nodes' if across_nodes else 'inside a node'}"
    rate = profile.link_rate if across_nodes else None
    if rate is not None:
        share, bandwidth = profile.link_efficiency, rate / profile.ranks_per_node
        latency = _fit_latency(points, profile, bandwidth * share)
    else:
        share = 1.0
        latency, bandwidth = _fit_latency_and_bandwidth(points, profile)
    link = Link(name=name, bandwidth=bandwidth, latency=latency, efficiency=share)
    fitted = _link_fit(link, points, profile).origin if points else "not measured: no group of this kind"
    origins = {
        "bandwidth": fitted if rate is None else "given: the rate of the emulated link",
        "efficiency": "1 by definition" if rate is None else "computed: headers and acknowledgements",
        "latency": fitted,
    }
    return Link(name=name, bandwidth=bandwidth, latency=latency, efficiency=share, origins=origins)


def fit_communication(profile: MachineProfile) -> tuple[Fit, ...]:
    """How well links predict collectives, by kind, and how well curves predict a point from its neighbours."""
    fits = []
    for across in (False, True):
        points = _link_points(profile, across)
        if not points:
            continue
        link = fit_link(profile, across_nodes=across)
        fits.append(_link_fit(link, points, profile))
        fits += [
            _link_fit(link, [p for p in points if p.kind == kind], profile, kind)
            for kind in LINK_KINDS
            if any(p.kind == kind for p in points)
        ]
    return tuple(fits + [_curve_fit(curve) for curve in fit_curves(profile) if len(curve.num_bytes) > 2])


def _group_points(profile: MachineProfile, kind: str, size: int) -> list[CollectivePoint]:
    found = [point for point in profile.collectives if (point.kind, point.group_size) == (kind, size)]
    return sorted(found, key=lambda point: point.num_bytes)


def _curve(points: Sequence[CollectivePoint]) -> CollectiveCurve:
    return CollectiveCurve(
        kind=points[0].kind,
        group_size=points[0].group_size,
        num_bytes=tuple(point.num_bytes for point in points),
        seconds=tuple(float(s) for s in np.maximum.accumulate([point.seconds for point in points])),
    )


def _link_points(profile: MachineProfile, across_nodes: bool) -> list[CollectivePoint]:
    return [p for p in profile.collectives if p.kind in LINK_KINDS and (p.num_nodes > 1) == across_nodes]


def _algorithms(profile: MachineProfile) -> dict[str, str]:
    return dict(load_stack(f"autopar-{profile.backend}").algorithms)


def _terms(points: Sequence[CollectivePoint], profile: MachineProfile) -> tuple[Array, Array, Array]:
    """(rounds, bytes in series, seconds) of each point."""
    algorithms = _algorithms(profile)
    messages = np.array([float(rounds(p.kind, p.group_size, algorithms)) for p in points])
    serial = np.array([float(serial_bytes(p.kind, p.group_size, p.num_bytes, algorithms)) for p in points])
    return messages, serial, np.array([p.seconds for p in points])


def _fit_latency(points: Sequence[CollectivePoint], profile: MachineProfile, speed: float) -> float:
    if not points:
        return 0.0
    messages, serial, seconds = _terms(points, profile)
    return max(0.0, weighted_median((seconds - serial / speed) / messages, messages / seconds))


def _fit_latency_and_bandwidth(points: Sequence[CollectivePoint], profile: MachineProfile) -> tuple[float, float]:
    if not points:
        return 0.0, float("inf")
    messages, serial, seconds = _terms(points, profile)
    per_byte, latency = nonnegative_fit(np.stack([serial, messages], axis=1), seconds, seconds)
    return float(latency), float(1 / per_byte)


def _link_fit(link: Link, points: Sequence[CollectivePoint], profile: MachineProfile, kind: str = "") -> Fit:
    algorithms = _algorithms(profile)
    predicted = [float(link_seconds(p.kind, p.group_size, p.num_bytes, link, algorithms)) for p in points]
    errors = relative_errors(np.array(predicted), np.array([p.seconds for p in points]))
    place = "network_link" if points[0].num_nodes > 1 else "node_link"
    constants = {"latency": link.latency, "bandwidth": link.bandwidth, "efficiency": link.efficiency}
    return summarize(f"{place}.{kind}" if kind else place, constants, errors)


def _curve_fit(curve: CollectiveCurve) -> Fit:
    """Each inner point from the curve without it."""
    errors = []
    for left_out in range(1, len(curve.num_bytes) - 1):
        kept = [i for i in range(len(curve.num_bytes)) if i != left_out]
        rest = CollectiveCurve(
            kind=curve.kind,
            group_size=curve.group_size,
            num_bytes=tuple(curve.num_bytes[i] for i in kept),
            seconds=tuple(curve.seconds[i] for i in kept),
        )
        predicted = float(curve_seconds(rest, curve.num_bytes[left_out]))
        errors.append(abs(predicted / curve.seconds[left_out] - 1))
    name = f"curve.{curve.kind}.{curve.group_size}"
    return summarize(name, {}, np.array(errors), "measured here, each point predicted by its neighbours")
