"""Answers as tables and figures: what they say is what was found."""

from __future__ import annotations

import dataclasses
import re

import pytest

from autopar.estimate import Setting, estimate
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import Recompute, parse_slug
from autopar.report.answer_tables import bar, front_columns, waterfall_columns, why_not_verdict
from autopar.report.binding_tables import binding_verdict, change_columns, share_columns, trial_columns
from autopar.report.columns import check_columns
from autopar.report.plots.binding import OUTCOMES, sensitivity_bars, what_binds
from autopar.report.plots.front import pareto_plot
from autopar.report.plots.strategies import degree_map, scaling_curves, strategy_bars
from autopar.report.plots.waterfall import step_waterfall
from autopar.report.strategy_tables import grid, map_columns, scaling_columns, strategy_columns
from autopar.search.exhaustive import SearchResult, search
from autopar.search.explain import Explanation, explain
from autopar.search.pareto import Front, pareto_front, spread
from autopar.search.space import Space
from autopar.search.strategies import StrategyComparison, compare_strategies
from autopar.search.why_not import waterfall, why_not
from autopar.validate.sensitivity import Sensitivity, sensitivity
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SMALL = Space(max_vp=2, max_cp=2, offload=False, partial_recompute=False, recompute=(Recompute.NONE, Recompute.FULL))


@pytest.fixture(scope="module")
def setting() -> Setting:
    graph = build_graph(load_preset("llama2-13b"), seq_len=4096)
    return Setting(
        graph=graph, workload=Workload(global_batch=32, seq_len=4096), cluster=load_cluster("a100-80g:2x8"),
        stack=load_stack("megatron-core"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(setting: Setting) -> SearchResult:
    return search(setting, top=30, space=SMALL)


@pytest.fixture(scope="module")
def front(setting: Setting) -> Front:
    return pareto_front(setting, space=SMALL)


@pytest.fixture(scope="module")
def comparison(setting: Setting) -> StrategyComparison:
    return compare_strategies(setting, space=SMALL)


@pytest.fixture(scope="module")
def explained(setting: Setting, found: SearchResult) -> Explanation:
    return explain(setting, found.best[0].plan, space=SMALL)


@pytest.fixture(scope="module")
def judged(setting: Setting) -> Sensitivity:
    return sensitivity(setting, space=SMALL)


def test_bars_are_as_long_as_their_values() -> None:
    assert [bar(value, 8.0, 4) for value in (8, 4, 0, -2)] == ["████", "██", "", "█"]
    assert len(bar(1, 64, 8)) == 1 and bar(1, 0) == ""


def test_a_waterfall_goes_from_the_best_step_to_the_other(found: SearchResult) -> None:
    best, other = found.best[0], found.best[-1]
    columns = waterfall_columns(other, best)
    check_columns(columns)
    assert columns[0].cells[-1] == "step" and columns[3].cells[-1].startswith("+")
    [axes] = step_waterfall(other, best).axes
    bars = axes.patches
    steps = waterfall(other, best, smallest=2e-3)
    assert len(bars) == len(steps) + 2
    assert bars[0].get_x() + bars[0].get_width() == pytest.approx(best.step_s)
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(other.step_s)
    ends = [b.get_x() + b.get_width() for b in bars]
    for before, after in zip(ends[:-2], bars[1:-1], strict=True):
        assert after.get_x() == pytest.approx(before)
    assert ends[-2] == pytest.approx(ends[-1])


def test_verdicts_name_the_limit_or_the_loss(setting: Setting, found: SearchResult) -> None:
    assert "is the best plan" in why_not_verdict(why_not(setting, found.best[0].plan, found))
    third = why_not_verdict(why_not(setting, found.best[2].plan, found))
    assert re.search(r"\(rank [23]\)", third) and "slower than the best" in third
    assert "cannot be used: batch" in why_not_verdict(why_not(setting, parse_slug("tp8.dp2.mb3"), found))


def test_the_front_is_drawn_whole(front: Front) -> None:
    axes, _ = pareto_plot(front, "a model").axes
    [points] = axes.collections
    assert len(points.get_offsets()) == len(front.points)
    shown = spread(front.points, 4)
    columns = front_columns(shown)
    assert check_columns(columns) == len(shown)
    assert [int(cell) for cell in columns[0].cells] == sorted((p.world_size for p in shown), reverse=True)


def test_what_binds_adds_up(explained: Explanation) -> None:
    columns = share_columns(explained)
    check_columns(columns)
    percents = next(column for column in columns if column.header == "%")
    assert round(sum(float(cell) for cell in percents.cells if cell), 1) == 100.0
    assert "binds" in binding_verdict(explained)
    left, right = what_binds(explained).axes
    assert left.patches[0].get_width() == pytest.approx(max(explained.shares.values()))
    widest = max(patch.get_width() for patch in right.patches)
    gains = [value for i in explained.improvements for value in (i.gain, i.replanned_gain) if value is not None]
    assert widest == pytest.approx(max(gains))
    full = dataclasses.replace(explained.estimate, memory_per_rank=(2 * explained.estimate.memory_limit,))
    assert "more memory than a device has" in binding_verdict(dataclasses.replace(explained, estimate=full))


def test_every_trial_is_drawn_once(judged: Sensitivity) -> None:
    columns = trial_columns(judged)
    assert check_columns(columns) == len({t.doubt.name for t in judged.trials})
    assert check_columns(change_columns(judged)) == len(judged.changes)
    [axes] = sensitivity_bars(judged).axes
    assert len(axes.patches) == len(judged.trials)
    assert len(OUTCOMES) == len(set(OUTCOMES.values()))


def test_strategies_scale_and_map_say_what_was_found(comparison: StrategyComparison) -> None:
    for columns, rows in (
        (strategy_columns(comparison), len(comparison.strategies)),
        (scaling_columns(comparison), len(comparison.scaling)),
    ):
        assert check_columns(columns) == rows
    tps, pps, cells = grid(comparison)
    columns = map_columns(comparison)
    assert [column.header for column in columns[1:]] == [f"pp{pp}" for pp in pps]
    assert columns[0].cells == tuple(f"tp{tp}" for tp in tps)
    [bars] = strategy_bars(comparison, "a model").axes
    assert [label.get_text().split("\n")[0] for label in bars.get_yticklabels()] == [
        strategy.name for strategy in comparison.strategies
    ]
    left, right = scaling_curves(comparison, "a model").axes
    sizes = [p.world_size for p in comparison.scaling if p.best is not None]
    assert list(left.lines[0].get_xdata()) == sizes and list(right.lines[0].get_xdata()) == sizes
    drawn = degree_map(comparison, "a model").axes[0]
    texts = [text.get_text() for text in drawn.texts]
    assert len(texts) == len(cells)
    best = min(cell.step_s for cell in cells.values() if cell.step_s is not None)
    bold = [text for text in drawn.texts if text.get_fontweight() == "bold"]
    assert len(bold) == 1 and float(bold[0].get_text()) == pytest.approx(best, rel=0.01)


def test_a_plan_that_is_faster_than_the_best_of_the_space(setting: Setting, found: SearchResult) -> None:
    slow = dataclasses.replace(found, best=found.best[5:])
    answer = why_not(setting, found.best[0].plan, slow)
    assert "faster than the best of the space" in why_not_verdict(answer)
    title = step_waterfall(found.best[0], found.best[5]).axes[0].get_title(loc="left")
    assert "faster than the best plan" in title
    assert estimate(setting, found.best[0].plan) == found.best[0]
