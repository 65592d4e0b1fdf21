"""Figures: the data that they draw, and labels that stay clear of each other."""

from __future__ import annotations

import dataclasses
import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting
from autopar.measurement import Measurement
from autopar.report import DemoReport, plots
from autopar.report.gallery import draw
from autopar.report.style import TERM_COLORS, new_figure, save_png, styled, to_svg
from autopar.validate import Comparison, compare, summarise
from costmodels.profiles import MachineProfile


def boxes_overlap(a: Any, b: Any) -> bool:
    return bool(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


@pytest.mark.parametrize("spread", [1.02, 1.5, 30.0])
def test_scatter_labels_never_overlap(spread: float) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for i, measured in enumerate(np.geomspace(1, spread, 12)):
        predicted = measured * rng.uniform(0.97, 1.05)
        rows.append(
            Comparison(
                slug=f"plan {i}", predicted_step_s=predicted, measured_step_s=measured, error=predicted / measured - 1,
                measured_low_s=measured * 0.995, measured_high_s=measured * 1.005, noise=0.01,
                predicted_memory_bytes=1, measured_memory_bytes=1, memory_error=0,
            )
        )  # fmt: skip
    figure = plots.predicted_measured(summarise(rows), {row.slug: f"tp2 dp2 {i}" for i, row in enumerate(rows)})
    [axes] = figure.axes
    figure.canvas.draw()
    labels = [text for text in axes.texts if text.get_text().startswith("tp2")]
    assert len(labels) == 12
    for a, b in itertools.combinations(labels, 2):
        assert not boxes_overlap(a.get_window_extent(), b.get_window_extent()), (a.get_text(), b.get_text())
    frame = figure.bbox
    assert all(label.get_window_extent().x1 <= frame.x1 for label in labels)
    assert axes.get_xscale() == ("log" if spread > 4 else "linear")


def test_scatter_draws_each_plan_once(sample_report: DemoReport) -> None:
    validation = sample_report.validation
    [axes] = plots.predicted_measured(validation, sample_report.run_names()).axes
    points = np.concatenate([c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)])
    expected = sorted((c.measured_step_s, c.predicted_step_s) for c in validation.comparisons)
    scale = 1.0 if validation.comparisons[0].measured_step_s >= 1 else 1e-3
    assert np.allclose(sorted(map(tuple, points * scale)), expected)


def test_bars_are_the_prediction_and_lines_the_measurement(sample_report: DemoReport) -> None:
    [axes] = plots.step_breakdown(sample_report.estimates, sample_report.run_names(), sample_report.validation).axes
    ranked = sorted(sample_report.estimates, key=lambda e: e.step_s)
    scale = 1.0 if ranked[0].step_s >= 1 else 1e-3
    for row, found in enumerate(ranked):
        bars = [patch for patch in axes.patches if abs(patch.get_y() + patch.get_height() / 2 - row) < 0.1]
        ends = [patch.get_x() + patch.get_width() for patch in bars]
        assert max(ends) == pytest.approx(found.step_s / scale, rel=5e-3)
        widths = {matplotlib.colors.to_hex(patch.get_facecolor()): patch.get_width() for patch in bars}
        assert widths[TERM_COLORS["backward"]] == pytest.approx(found.breakdown["backward"] / scale)
    lines = [c for c in axes.collections if isinstance(c, LineCollection) and len(c.get_segments()) == len(ranked)]
    medians = [segment[0][0] for segment in lines[0].get_segments()]
    assert medians == pytest.approx([sample_report.validation.of(e.plan.slug).measured_step_s / scale for e in ranked])


def test_losses_need_a_run_with_losses(sample_report: DemoReport) -> None:
    names = sample_report.run_names()
    silent = [dataclasses.replace(m, losses=()) for m in sample_report.measurements]
    with pytest.raises(InputError, match="no run has losses"):
        plots.loss_curves(silent, names)
    top, below = plots.loss_curves(sample_report.measurements, names).axes
    assert len(top.lines) == len(sample_report.measurements)
    losses = np.asarray([m.losses for m in sample_report.measurements])
    assert np.allclose(below.lines[0].get_ydata(), losses.max(axis=0) - losses.min(axis=0))
    first = dataclasses.replace(sample_report.measurements[0], losses=tuple(losses[0] - 0.5))
    _, below = plots.loss_curves(sample_report.measurements, names, first).axes
    assert np.allclose(below.lines[0].get_ydata(), np.abs(losses - losses[0] + 0.5).max(axis=0))
    one = plots.loss_curves([dataclasses.replace(sample_report.measurements[0], losses=(2.0, 1.0))], names)
    assert list(one.axes[0].lines[0].get_ydata()) == [2.0, 1.0]


def test_machine_figures_draw_every_point(sample_setting: Setting, sample_profile: MachineProfile) -> None:
    cluster, algorithms = sample_setting.cluster, sample_setting.stack.algorithms
    figure = plots.collective_curves(sample_profile, cluster, algorithms)
    points = sum(len(c.get_offsets()) for a in figure.axes for c in a.collections if isinstance(c, PathCollection))
    assert points == len(sample_profile.collectives)
    [axes] = plots.matmul_efficiency(sample_profile, cluster).axes
    points = sum(len(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection))
    assert points == sum(point.kind == "matmul" for point in sample_profile.compute)
    with pytest.raises(InputError, match="no collectives"):
        plots.collective_curves(dataclasses.replace(sample_profile, collectives=()), cluster, algorithms)
    with pytest.raises(InputError, match="no matrix products"):
        plots.matmul_efficiency(dataclasses.replace(sample_profile, compute=()), cluster)


def test_svg_is_well_formed_themed_and_has_ids_of_its_own(sample_report: DemoReport) -> None:
    figure = plots.memory_items(sample_report.estimates, sample_report.run_names(), None)
    one, two = (to_svg(figure, name, 'a "quoted" <description>') for name in ("one", "two"))
    ids = []
    for text in (one, two):
        root = ElementTree.fromstring(text.replace("xlink:href", "href"))
        assert root.attrib["aria-label"] == 'a "quoted" <description>' and "width" not in root.attrib
        ids.append({element.attrib["id"] for element in root.iter() if "id" in element.attrib})
        assert "var(--ink)" in text and "#1d2430" not in text and "var(--figure-font)" in text
    assert ids[0] and not ids[0] & ids[1]


def test_drawing_leaves_matplotlib_as_it_was(sample_report: DemoReport, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with styled():
        save_png(new_figure(2.0), tmp_path / "new" / "figure.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_gallery_leaves_out_what_there_is_no_data_for(sample_report: DemoReport) -> None:
    assert set(draw(sample_report)) == {
        "predicted-measured", "step-breakdown", "memory", "timeline", "losses", "collectives", "matmul",
    }  # fmt: skip
    silent = tuple(dataclasses.replace(m, losses=()) for m in sample_report.measurements)
    bare = dataclasses.replace(sample_report, profile=None, measurements=silent, reference=None)
    assert set(draw(bare)) == {"predicted-measured", "step-breakdown", "memory", "timeline"}


def test_one_plan_alone_can_be_drawn(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Callable[..., Measurement]
) -> None:
    found = compare(sample_estimates[:1], [measure(sample_setting, sample_estimates[0])])
    names = {sample_estimates[0].plan.slug: "dp4"}
    plots.predicted_measured(found, names)
    plots.step_breakdown(sample_estimates[:1], names, found)
