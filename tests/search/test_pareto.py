from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autopar.estimate import Setting, estimate
from autopar.plan import Recompute, violations
from autopar.search.exhaustive import search
from autopar.search.pareto import pareto, pareto_front, part_of, sizes, spread, time_memory_front
from autopar.search.space import Space, enumerate_plans
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


SMALL = Space(max_vp=2, max_cp=2, max_microbatch=2, recompute=(Recompute.NONE, Recompute.FULL), offload=False,
              partial_recompute=False, uneven_ends=False)  # fmt: skip


def test_no_plan_of_any_size_beats_a_point_of_the_front(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:2x2", 8, 2048)
    front = pareto_front(setting, space=SMALL)
    rows = []
    for size in sizes(setting.cluster):
        part = dataclasses.replace(setting, cluster=part_of(setting.cluster, size))
        plans = enumerate_plans(part, SMALL)
        assert front.considered[size] == len(plans)
        found = [plans.plan(i) for i in range(len(plans))]
        prices = [estimate(part, p) for p in found if not violations(p, part.graph, part.workload, size)]
        rows += [(size, e.step_s, e.memory_bytes) for e in prices if e.fits]
        assert (size in front.unfit) is (not any(e.fits for e in prices))
    every = np.asarray(rows)
    points = [(p.world_size, p.estimate.step_s, p.estimate.memory_bytes) for p in front.points]
    assert len(points) == len(set(points)) > 3
    for point in np.asarray(points):
        same = every[every[:, 0] == point[0]]
        assert not np.any(np.all(same <= point, axis=1) & np.any(same < point, axis=1))
    assert all(pareto(points))


def test_the_fastest_under_falling_limits(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:1x8", 16, 2048)
    found = time_memory_front(setting, levels=8).estimates
    assert found[0] == search(setting, top=1).best[0]
    step, memory = [e.step_s for e in found], [e.memory_bytes for e in found]
    assert np.all(np.diff(step) > 0) and np.all(np.diff(memory) < 0)
    limits = setting.cluster.device.memory_bytes * np.arange(1, 9) / 8
    # Each level is kept by a plan that was found, or by none.
    assert [np.searchsorted(limits, size) for size in memory] == sorted(
        {int(np.searchsorted(limits, size)) for size in memory}, reverse=True
    )


@pytest.mark.parametrize("per_size", [2, 3])
def test_a_thinned_front_keeps_its_ends(setting_of: Callable[..., Setting], per_size: int) -> None:
    front = pareto_front(setting_of("llama2-7b", "a100-80g:1x8", 16, 2048))
    thin = spread(front.points, per_size)
    for size in {point.world_size for point in front.points}:
        whole = [p for p in front.points if p.world_size == size]
        kept = [p for p in thin if p.world_size == size]
        assert len(kept) <= per_size
        assert min(whole, key=lambda p: p.estimate.step_s) in kept and max(whole, key=lambda p: p.headroom) in kept
