"""Labels beside points, placed so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autopar.report.style import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0, 82.0, 110.0)
"""Points (1/72 inch) from a marker to its label, tried in order; beyond ``NEAR`` of them a thin line joins them."""
NEAR = 2

ANGLES = tuple(np.radians(angle) for angle in (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90))


def place_labels(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    labels: Sequence[str],
    *,
    strong: Sequence[bool],
    whiskers: tuple[NDArray[np.float64], NDArray[np.float64]],
    avoid: NDArray[np.float64],
) -> None:
    """Write a label beside every point of ``axes``. The axes' limits must be final.

    Args:
        axes: with the points.
        x, y: of the points, in data units.
        labels: one each.
        strong: set these bold.
        whiskers: x of the left and right ends of each point's whisker, which labels leave free as well.
        avoid: further places [places, 2] that labels leave free, in data units.

    Each label takes the nearest of some dozens of places that is free, those in the densest places first; where none
    is, the one that covers least.
    """
    figure = axes.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # type: ignore[union-attr]
    unit = figure.dpi / 72
    centres = axes.transData.transform(np.column_stack([x, y]))
    left, bottom, right, top = axes.get_window_extent().extents
    taken: list[Box] = [_around(centre, 6.5 * unit) for centre in centres]
    ends = [axes.transData.transform(np.column_stack([end, y]))[:, 0] for end in whiskers]
    taken += [(a, centre[1] - 2 * unit, b, centre[1] + 2 * unit) for a, b, centre in zip(*ends, centres, strict=True)]
    taken += [_around(place, 2 * unit) for place in axes.transData.transform(avoid)]
    taken += [_text_box(text) for text in axes.texts]
    crowd = np.hypot(*(centres[:, None] - centres[None, :]).transpose(2, 0, 1))
    order = np.argsort(np.sort(crowd, axis=1)[:, : min(4, len(x))].sum(axis=1), kind="stable")
    for index in order:
        weight = "bold" if strong[index] else "normal"
        text = axes.annotate(
            labels[index], centres[index] / unit, xycoords="figure points", fontsize=10.5, color=INK,
            fontweight=weight, ha="center", va="center", zorder=6,
        )  # fmt: skip
        extent = text.get_window_extent()
        offset, near = _best_offset(
            centres, int(index), (extent.width, extent.height), taken, (left, bottom, right, top), unit
        )
        place = centres[index] + offset
        text.set_position(tuple(place / unit))
        taken.append(_box(place, extent.width, extent.height))
        if not near:
            _line(axes, centres[index] / unit, place / unit, extent.width / unit, extent.height / unit)


def _best_offset(
    centres: NDArray[np.float64], index: int, size: tuple[float, float], taken: Sequence[Box], frame: Box, unit: float
) -> tuple[NDArray[np.float64], bool]:  # fmt: skip
    """Offset of the label's centre from its point, in pixels, and whether it is next to it."""
    width, height = size
    best: tuple[float, NDArray[np.float64], bool] | None = None
    for step, distance in enumerate(DISTANCES):
        for angle in ANGLES:
            direction = np.asarray([np.cos(angle), np.sin(angle)])
            # From the marker's edge to the label's edge along the direction.
            reach = min(
                width / 2 / max(abs(direction[0]), 1e-9),
                height / 2 / max(abs(direction[1]), 1e-9),
            )
            offset = direction * (distance * unit + reach)
            box = _box(centres[index] + offset, width, height)
            cost = 100.0 * sum(_overlap(box, other) for i, other in enumerate(taken) if i != index) / (width * height)
            cost += 100.0 * (1.0 - _overlap(box, frame) / (width * height))
            if step >= NEAR:
                cost += 0.5 * sum(
                    _distance(centres[i], centres[index], centres[index] + offset) < 8 * unit
                    for i in range(len(centres))
                    if i != index
                )
            cost += 0.25 * step
            if best is None or cost < best[0] - 1e-9:
                best = (cost, offset, step < NEAR)
    assert best is not None
    return best[1], best[2]


def _line(axes: Axes, point: NDArray[np.float64], label: NDArray[np.float64], width: float, height: float) -> None:
    """Join a point and the nearest place on the edge of its label, in points."""
    edge = np.asarray(
        [
            np.clip(point[0], label[0] - width / 2 - 1, label[0] + width / 2 + 1),
            np.clip(point[1], label[1] - height / 2, label[1] + height / 2),
        ]
    )
    axes.annotate(
        "", xy=tuple(point), xytext=tuple(edge), xycoords="figure points", textcoords="figure points", zorder=2,
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
    )  # fmt: skip


def _text_box(text: Text) -> Box:
    left, bottom, right, top = text.get_window_extent().extents
    return (left, bottom, right, top)


def _around(centre: NDArray[np.float64], radius: float) -> Box:
    return _box(centre, 2 * radius, 2 * radius)


def _box(centre: NDArray[np.float64], width: float, height: float) -> Box:
    return (centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _distance(point: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]) -> float:
    """From a point to a segment."""
    along = end - start
    share = float(np.clip(np.dot(point - start, along) / max(float(np.dot(along, along)), 1e-9), 0.0, 1.0))
    return float(np.hypot(*(point - start - share * along)))
