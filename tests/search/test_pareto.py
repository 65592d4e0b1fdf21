from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autopar.estimate import Setting, estimate
from autopar.plan import violations
from autopar.search.pareto import pareto, pareto_front, part_of, sizes, spread, time_memory_front
from autopar.search.whole import price_space
from costmodels.hardware import load_cluster


def brute_force(points: np.ndarray) -> list[bool]:
    return [not np.any(np.all(points <= point, axis=1) & np.any(points < point, axis=1)) for point in points]


@settings(max_examples=200)
@given(arrays.arrays(np.int64, st.tuples(st.integers(0, 30), st.just(3)), elements=st.integers(0, 6)))
def test_the_front_is_that_of_brute_force(points: np.ndarray) -> None:
    assert pareto(points).tolist() == brute_force(points)


def test_many_points_of_random_height() -> None:
    points = np.random.default_rng(0).random((800, 3))
    assert pareto(points).tolist() == brute_force(points)
    assert pareto(np.zeros((0, 3))).tolist() == []


def test_parts_of_a_cluster() -> None:
    cluster = load_cluster("h100:12x8")
    assert sizes(cluster) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)
    assert [part_of(cluster, size).world_size for size in sizes(cluster)] == list(sizes(cluster))
    assert part_of(cluster, 4).num_nodes == 1 and part_of(cluster, 24).num_nodes == 3
    assert sizes(load_cluster("h100:1x6")) == (1, 2, 3, 4, 6)


def test_no_plan_of_any_size_beats_a_point_of_the_front(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:2x2", 8, 2048)
    front = pareto_front(setting)
    rows = []
    for size in sizes(setting.cluster):
        part = dataclasses.replace(setting, cluster=part_of(setting.cluster, size))
        priced = price_space(part)
        assert front.considered[size] == len(priced.plans) == front.feasible[size] + sum(priced.counts().values())
        rows += [(size, priced.step_s[i], priced.memory_bytes[i]) for i in np.flatnonzero(priced.feasible)]
        assert (size in front.unfit) is (not priced.feasible.any())
    expected = {row for row, free in zip(rows, brute_force(np.asarray(rows)), strict=True) if free}
    found = [(p.world_size, p.estimate.step_s, p.estimate.memory_bytes) for p in front.points]
    assert len(found) == len(set(found)) and set(found) == expected


def test_the_front_of_one_size_begins_with_the_fastest(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:1x8", 16, 2048)
    priced = price_space(setting)
    front = time_memory_front(priced)
    assert front[0] == priced.fastest()
    step, memory = priced.step_s[list(front)], priced.memory_bytes[list(front)]
    assert np.all(np.diff(step) > 0) and np.all(np.diff(memory) < 0)
    assert front[-1] == priced.smallest(priced.feasible) or memory[-1] == priced.memory_bytes[priced.feasible].min()


def test_prices_of_the_whole_space_are_those_of_single_plans(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:1x4", 8, 2048)
    priced = price_space(setting)
    for index in np.random.default_rng(1).choice(len(priced.plans), 40, replace=False).tolist():
        plan = priced.plans.plan(index)
        found = violations(plan, setting.graph, setting.workload, 4)
        if found:
            assert priced.reasons[priced.reason[index]] == found[0].reason and np.isinf(priced.step_s[index])
        else:
            single = estimate(setting, plan)
            assert (priced.step_s[index], priced.memory_bytes[index]) == (single.step_s, single.memory_bytes)
            assert bool(priced.feasible[index]) is (single.memory_bytes <= single.memory_limit)
    best = priced.fastest()
    assert best is not None and priced.faster_than(priced.step_s[best]) == 0


@pytest.mark.parametrize("per_size", [2, 3])
def test_a_thinned_front_keeps_its_ends(setting_of: Callable[..., Setting], per_size: int) -> None:
    front = pareto_front(setting_of("llama2-7b", "a100-80g:1x8", 16, 2048))
    thin = spread(front.points, per_size)
    for size in {point.world_size for point in front.points}:
        whole = [p for p in front.points if p.world_size == size]
        kept = [p for p in thin if p.world_size == size]
        assert len(kept) <= per_size
        assert min(whole, key=lambda p: p.estimate.step_s) in kept and max(whole, key=lambda p: p.headroom) in kept
