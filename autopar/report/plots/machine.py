"""What was measured on the machine and what was fitted to it: collectives and matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from autopar.errors import InputError
from autopar.report.style import GRID, MUTED, PAPER, SERIES, new_figure, styled
from costmodels.collectives import collective_seconds
from costmodels.compute import matmul_seconds
from costmodels.hardware import Cluster
from costmodels.profiles import CollectivePoint, MachineProfile
from costmodels.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v")


def collective_curves(profile: MachineProfile, cluster: Cluster, algorithms: Mapping[str, str]) -> Figure:
    """Measured collectives over the payload as points, and what the planner takes them for as lines; log-log.

    Args:
        profile: with the points.
        cluster: that the planner uses, with the profile's curves or fitted links.
        algorithms: of the stack, by kind.

    Raises:
        InputError: the profile has no collectives (a single device).
    """
    kinds = list(dict.fromkeys(point.kind for point in profile.collectives))
    if not kinds:
        raise InputError(f"the profile of {profile.device_name} has no collectives to draw")
    columns = min(3, len(kinds)) if len(kinds) != 4 else 2
    rows = -(-len(kinds) // columns)
    groups = sorted({(point.group_size, point.num_nodes) for point in profile.collectives})
    with styled():
        figure = new_figure(1.1 + 2.5 * rows)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, kind in zip(panels.flat, kinds, strict=False):
            for i, (size, nodes) in enumerate(groups):
                points = sorted(
                    (p for p in profile.collectives if (p.kind, p.group_size, p.num_nodes) == (kind, size, nodes)),
                    key=lambda p: p.num_bytes,
                )
                if points:
                    _collective(axes, points, cluster, algorithms, i)
            axes.set(xscale="log", yscale="log")
            axes.set_title(kind.replace("_", "-"), fontsize=12, fontweight="normal", pad=5)
            axes.grid(which="major")
        for axes in list(panels.flat)[len(kinds) :]:
            axes.set_visible(False)
            panels[rows - 2, columns - 1].xaxis.set_tick_params(labelbottom=True)
        _byte_axis(panels[0, 0])
        _seconds_axis(panels[0, 0])
        figure.supxlabel("payload (whole tensor)", fontsize=11.5)
        figure.suptitle("Collectives: measured (points) and used by the planner (lines)", x=0.01, ha="left",
                        fontsize=13.5, fontweight="bold")  # fmt: skip
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=SERIES[i], marker=MARKERS[i % len(MARKERS)], markersize=5.5, linewidth=1.8,
                   label=f"{size} ranks" + (f" on {nodes} nodes" if nodes > 1 else ""))
            for i, (size, nodes) in enumerate(groups)
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.8)
    return figure


def _collective(
    axes: Axes, points: list[CollectivePoint], cluster: Cluster, algorithms: Mapping[str, str], index: int
) -> None:
    size, nodes = points[0].group_size, points[0].num_nodes
    stride = max(1, cluster.devices_per_node * nodes // size) if nodes > 1 else 1
    x = np.geomspace(points[0].num_bytes, points[-1].num_bytes, 60)
    y = collective_seconds(cluster, points[0].kind, size, stride, x, algorithms)
    axes.plot(x, y, color=SERIES[index], linewidth=1.8, zorder=2)
    axes.scatter(
        [p.num_bytes for p in points], [p.seconds for p in points], s=30, color=SERIES[index], edgecolors=PAPER,
        linewidths=0.7, marker=MARKERS[index % len(MARKERS)], zorder=3,
    )  # fmt: skip


def _byte_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def name(num_bytes: float, _: int | None = None) -> str:
        for scale, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if num_bytes >= scale:
                return f"{num_bytes / scale:g} {unit}"
        return f"{num_bytes:g} B"

    axes.xaxis.set_major_locator(LogLocator(base=16, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(name))


def _seconds_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    def name(seconds: float, _: int | None = None) -> str:
        for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if seconds >= 0.999 * scale:
                return f"{seconds / scale:.3g} {unit}"
        return f"{seconds * 1e9:.3g} ns"

    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(name))


def matmul_efficiency(profile: MachineProfile, cluster: Cluster) -> Figure:
    """Share of the peak that matrix products reach: fitted against measured, overhead included.

    Raises:
        InputError: the profile has no matrix products.
    """
    points = [point for point in profile.compute if point.kind == "matmul"]
    if not points:
        raise InputError(f"the profile of {profile.device_name} has no matrix products to draw")
    peak = cluster.device.peak(profile.precision)
    with styled():
        figure = new_figure(5.6, width=6.2)
        axes = figure.add_subplot()
        ends = np.asarray([0.0, 2.0])
        for band, alpha in ((0.2, 0.45), (0.1, 0.8)):
            axes.fill_between(ends, ends / (1 + band), ends * (1 + band), color=GRID, alpha=alpha, linewidth=0)
        axes.plot(ends, ends, color=MUTED, linewidth=1.2, zorder=1)
        largest, errors = 0.0, []
        for i, phase in enumerate(("forward", "backward")):
            chosen = [point for point in points if point.phase == phase]
            if not chosen:
                continue
            m, n, k = (np.asarray([point.dims[dim] for point in chosen], dtype=float) for dim in "mnk")
            flops = np.asarray([point.flops for point in chosen])
            measured = flops / np.asarray([point.seconds for point in chosen]) / peak
            seconds = matmul_seconds(cluster.device, profile.precision, m, n, k, backward=phase == "backward")
            fitted = flops / seconds / peak
            errors.append(np.abs(measured / fitted - 1))
            largest = max(largest, measured.max(), fitted.max())
            axes.scatter(
                measured, fitted, s=34, color=SERIES[i], edgecolors=PAPER, linewidths=0.7, zorder=3,
                marker=MARKERS[i], label=f"{phase}, {len(chosen)} products",
            )  # fmt: skip
        limit = 1.08 * largest
        axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="measured share of peak", ylabel="fitted share of peak")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_aspect("equal")
        axes.set_title("Matrix products: fitted against measured")
        axes.legend(loc="upper left")
        median = float(np.median(np.concatenate(errors)))
        axes.annotate(
            f"median error {median:.1%}", (0.98, 0.03), xycoords="axes fraction", ha="right", fontsize=10.5, color=MUTED
        )
    return figure
