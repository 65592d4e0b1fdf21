"""Strategies, cells and sizes say what brute force over the space says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from autopar.estimate import Setting
from autopar.search.exhaustive import search
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import search
from autopar.search.strategies import (
    StrategyComparison,
    cells,
    compare_strategies,
    rule_of_thumb,
    scaling_sizes,
    strategies,
)
from autopar.search.whole import Priced, price_space
from costmodels.hardware import load_cluster


@pytest.fixture(scope="module")
def setting(setting_of: Callable[..., Setting]) -> Setting:
    return setting_of("llama2-13b", "a100-80g:2x8", 64, 4096)


@pytest.fixture(scope="module")
def priced(setting: Setting) -> Priced:
    return price_space(setting)


def test_each_strategy_is_the_best_of_its_kind(setting: Setting, priced: Priced) -> None:
    found = {strategy.name: strategy for strategy in strategies(setting, priced)}
    best = search(setting, top=1).best[0]
    assert found["best plan"].estimate == best
    assert all(s.estimate is None or s.estimate.step_s >= best.step_s for s in found.values())
    for index in np.flatnonzero(priced.feasible).tolist():
        layout = priced.plans.plan(index).layout
        names = ["tensor + data"] * (layout.pp * layout.cp == 1) + ["pipeline + data"] * (layout.tp * layout.cp == 1)
        names += ["data"] * (layout.tp * layout.pp * layout.cp == 1)
        for name in names:
            assert found[name].estimate is not None and found[name].estimate.step_s <= priced.step_s[index]


def test_a_strategy_that_cannot_work_says_why(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama3-70b", "h100:2x8", 64, 8192)
    found = {strategy.name: strategy for strategy in strategies(setting, price_space(setting))}
    assert found["data"].estimate is None
    assert found["data"].why_not.startswith("memory: needs") and found["data"].why_not.endswith("of 80.0 GiB")


def test_the_rule_of_thumb(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama3-70b", "h100:4x8", 64, 8192)
    priced = price_space(setting)
    chosen = rule_of_thumb(setting, priced)
    plans = priced.plans
    assert set(plans.tp[chosen].tolist()) == {8} and set(plans.cp[chosen].tolist()) == {1}
    [pp] = set(plans.pp[chosen].tolist())
    fewer = (plans.tp == 8) & (plans.cp == 1) & (plans.pp < pp)
    keeps = plans.recompute != 2
    assert priced.fastest(chosen & keeps) is not None and priced.fastest(fewer & keeps) is None
    assert set(plans.microbatch[chosen].tolist()) > {1} and set(plans.recompute[chosen].tolist()) == {0, 1, 2}


def test_cells_cover_the_space(priced: Priced) -> None:
    found = cells(priced)
    best = priced.fastest()
    assert best is not None
    assert min(c.step_s for c in found if c.step_s is not None) == priced.step_s[best]
    assert {(c.tp, c.pp) for c in found} == {
        (tp, pp) for tp in (1, 2, 4, 8, 16) for pp in (1, 2, 4, 8, 16) if tp * pp <= 16
    }
    for cell in found:
        among = (priced.plans.tp == cell.tp) & (priced.plans.pp == cell.pp)
        steps = priced.step_s[among & priced.feasible]
        assert cell.step_s == (steps.min() if len(steps) else None)
        assert (cell.reason == "") is (cell.step_s is not None) is (cell.slug != "")
    reasons = {(c.tp, c.pp): c.reason for c in found}
    assert reasons[16, 1] == "query heads" and reasons[1, 1] == "memory"
    assert next(c for c in found if (c.tp, c.pp) == (1, 1)).memory_ratio > 1


def test_sizes_grow_to_the_whole_cluster(setting: Setting) -> None:
    assert scaling_sizes(load_cluster("h100:12x8")) == (8, 16, 32, 64, 96)
    assert scaling_sizes(load_cluster("h100:1x6")) == (1, 2, 4, 6)
    found: StrategyComparison = compare_strategies(setting)
    assert [p.world_size for p in found.scaling] == [8, 16]
    best = [p.best for p in found.scaling]
    assert best[-1] == found.strategies[-1].estimate and found.scaling[-1].thumb == found.strategies[-2].estimate
    assert best[0] is not None and best[1] is not None and best[0].step_s > best[1].step_s > best[0].step_s / 2.2
    assert 0 < found.feasible < found.considered


def test_top_answers_really_differ(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("gpt2-small", "a100-80g:1x4", 4, 1024)
    raw = search(setting, top=5)
    answers = search(setting, top=5, distinct=True).best
    keys = [distinct_key(e.plan) for e in answers]
    assert len(set(keys)) == len(keys) == 5 and answers[0] == raw.best[0]
    every = search(setting, top=raw.feasible).best
    expected = list(dict.fromkeys(distinct_key(e.plan) for e in every))
    assert keys == expected[:5]
    assert len(search(setting, top=1000, distinct=True).best) == len(expected)
