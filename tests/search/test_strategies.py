"""Strategies, cells and sizes say what brute force over the space says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from autopar.estimate import Estimate, Setting, estimate
from autopar.plan import Recompute, violations
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import search
from autopar.search.obstacle import Obstacle, best_or_obstacle, with_degrees
from autopar.search.space import Space, enumerate_plans
from autopar.search.strategies import cells, compare_strategies, scaling_sizes, strategies, thumb
from costmodels.hardware import load_cluster

SMALL = Space(max_vp=2, max_cp=2, max_microbatch=2, offload=False, partial_recompute=False, uneven_ends=False,
              recompute=(Recompute.NONE, Recompute.FULL))  # fmt: skip


@pytest.fixture(scope="module")
def setting(setting_of: Callable[..., Setting]) -> Setting:
    return setting_of("llama2-7b", "a100-80g:2x4", 16, 2048)


@pytest.fixture(scope="module")
def prices(setting: Setting) -> list[Estimate]:
    """Every plan of the small space that fits."""
    plans = enumerate_plans(setting, SMALL)
    found = [plans.plan(i) for i in range(len(plans))]
    priced = [estimate(setting, p) for p in found if not violations(p, setting.graph, setting.workload, 8)]
    return [price for price in priced if price.fits]


def test_each_strategy_is_the_best_of_its_kind(setting: Setting, prices: list[Estimate]) -> None:
    found = {strategy.name: strategy.estimate for strategy in strategies(setting, SMALL)}
    kinds = {
        "data": lambda layout: layout.tp * layout.pp * layout.cp == 1,
        "tensor + data": lambda layout: layout.pp * layout.cp == 1,
        "pipeline + data": lambda layout: layout.tp * layout.cp == 1,
        "best plan": lambda layout: True,
    }
    assert set(found) == {*kinds, "rule of thumb"}
    for name, belongs in kinds.items():
        steps = [price.step_s for price in prices if belongs(price.plan.layout)]
        assert (found[name].step_s if found[name] else None) == min(steps, default=None)


def test_a_strategy_that_cannot_work_says_why(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama3-70b", "h100:2x8", 64, 8192)
    found = {strategy.name: strategy for strategy in strategies(setting)}
    assert found["data"].estimate is None
    assert found["data"].why_not.startswith("memory: needs") and found["data"].why_not.endswith("of 80.0 GiB")
    heads = best_or_obstacle(setting, with_degrees(None, {"tp": (16,)}))
    assert isinstance(heads, Obstacle) and (heads.reason, heads.words) == ("key-value heads", "key-value heads")


def test_the_rule_of_thumb(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama3-70b", "h100:4x8", 64, 8192)
    found = thumb(setting)
    assert isinstance(found, Estimate)
    layout = found.plan.layout
    assert (layout.tp, layout.cp) == (8, 1) and found.plan.recompute is not Recompute.FULL
    keeps = Space(recompute=(Recompute.NONE, Recompute.SELECTIVE), offload=False)
    for pp in (1, 2, 4):
        part = best_or_obstacle(setting, with_degrees(keeps, {"tp": (8,), "cp": (1,), "pp": (pp,)}))
        assert isinstance(part, Obstacle) is (pp < layout.pp)
        assert pp != layout.pp or part == found
    # Where nothing fits without it, full recomputation is taken.
    small = dataclasses.replace(setting.cluster.device, memory_bytes=0.55 * setting.cluster.device.memory_bytes)
    tight = dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, device=small))
    squeezed = thumb(tight)
    assert isinstance(squeezed, Estimate) and squeezed.plan.layout.tp == 8


def test_cells_cover_the_space(setting: Setting, prices: list[Estimate]) -> None:
    found = cells(setting, SMALL)
    degrees = (1, 2, 4, 8)
    assert {(c.tp, c.pp) for c in found} == {(tp, pp) for tp in degrees for pp in degrees if tp * pp <= 8}
    for cell in found:
        steps = [p.step_s for p in prices if (p.plan.layout.tp, p.plan.layout.pp) == (cell.tp, cell.pp)]
        assert cell.step_s == min(steps, default=None)
        assert (cell.reason == "") is (cell.step_s is not None) is (cell.slug != "")
        assert cell.reason != "memory" or (cell.memory_ratio is not None and cell.memory_ratio > 1)


def test_sizes_grow_to_the_whole_cluster(setting: Setting) -> None:
    assert scaling_sizes(load_cluster("h100:12x8")) == (8, 16, 32, 64, 96)
    assert scaling_sizes(load_cluster("h100:1x6")) == (1, 2, 4, 6)
    found = compare_strategies(setting, space=SMALL)
    assert [p.world_size for p in found.scaling] == [4, 8]
    best = [p.best for p in found.scaling]
    assert best[-1] == found.strategies[-1].estimate and found.scaling[-1].thumb == found.strategies[-2].estimate
    assert best[0] is not None and best[1] is not None and best[0].step_s > best[1].step_s > best[0].step_s / 2.2
    assert found.considered == len(enumerate_plans(setting, SMALL))


def test_top_answers_really_differ(setting: Setting, prices: list[Estimate]) -> None:
    raw = search(setting, top=5, space=SMALL)
    answers = search(setting, top=5, space=SMALL, distinct=True).best
    keys = [distinct_key(e.plan) for e in answers]
    assert len(set(keys)) == len(keys) == 5 and answers[0] == raw.best[0]
    ranked = sorted(prices, key=lambda e: (e.step_s, e.memory_bytes, e.plan.slug))
    expected = list(dict.fromkeys(distinct_key(e.plan) for e in ranked))
    assert keys == expected[:5]
    assert len(search(setting, top=1000, space=SMALL, distinct=True).best) == len(expected)
