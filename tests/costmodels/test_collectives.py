from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.collectives import collective_seconds, curve_seconds, link_seconds, rounds, sent_bytes
from costmodels.errors import InputError
from costmodels.hardware import CollectiveCurve, Link, load_cluster

LINK = Link(name="test", bandwidth=1e9, latency=1e-5)
RANKS = st.integers(2, 1024)
SIZES = st.floats(1.0, 1e12)


def simulate_ring_all_reduce(num_ranks: int, num_bytes: float, link: Link) -> tuple[float, float]:
    """Step through a ring: N-1 rounds of reduce-scatter and N-1 of all-gather, each moving one chunk per rank."""
    chunk = num_bytes / num_ranks
    clock, sent = 0.0, 0.0
    for _ in range(2 * (num_ranks - 1)):
        clock += link.latency + chunk / link.speed
        sent += chunk
    return clock, sent


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 16])
def test_ring_equals_its_rounds(num_ranks: int) -> None:
    seconds, sent = simulate_ring_all_reduce(num_ranks, 1e7, LINK)
    assert link_seconds("all_reduce", num_ranks, 1e7, LINK) == pytest.approx(seconds, rel=1e-12)
    assert sent_bytes("all_reduce", num_ranks, 1e7, {}) == pytest.approx(sent, rel=1e-12)
    assert rounds("all_reduce", num_ranks, {}) == 2 * (num_ranks - 1)


@given(RANKS, SIZES)
def test_all_reduce_is_reduce_scatter_plus_all_gather(num_ranks: int, num_bytes: float) -> None:
    parts = sum(float(link_seconds(kind, num_ranks, num_bytes, LINK)) for kind in ("reduce_scatter", "all_gather"))
    assert float(link_seconds("all_reduce", num_ranks, num_bytes, LINK)) == pytest.approx(parts, rel=1e-9)


@given(
    RANKS, SIZES, st.floats(1.0, 100.0), st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
)
def test_more_bandwidth_is_never_slower(num_ranks: int, num_bytes: float, factor: float, kind: str) -> None:
    cluster = load_cluster("h100:8x8")
    faster = dataclasses.replace(
        cluster,
        network_link=dataclasses.replace(cluster.network_link, bandwidth=cluster.network_link.bandwidth * factor),
    )
    slow, fast = (float(collective_seconds(c, kind, num_ranks, 1, num_bytes)) for c in (cluster, faster))
    assert fast <= slow


def test_one_rank_costs_nothing_and_kinds_are_known() -> None:
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"):
        assert float(collective_seconds(load_cluster("h100:8x8"), kind, 1, 1, 1e9)) == 0.0
    with pytest.raises(InputError, match="unknown collective"):
        sent_bytes("gather_all", 2, 1, {})


def test_gloo_reduce_scatter_moves_what_an_all_reduce_moves() -> None:
    gloo = {"reduce_scatter": "all_reduce"}
    assert sent_bytes("reduce_scatter", 4, 1e6, gloo) == sent_bytes("all_reduce", 4, 1e6, {})
    assert sent_bytes("reduce_scatter", 4, 1e6, {}) == sent_bytes("all_reduce", 4, 1e6, {}) / 2


def test_two_levels_cross_the_network_once() -> None:
    cluster = load_cluster("h100:2x8")
    inner, outer = cluster.node_link, cluster.network_link
    size = 1e9
    expected = 14 * inner.latency + 2 * 7 / 8 * size / inner.speed + 2 * outer.latency + size / 8 / outer.speed
    assert float(collective_seconds(cluster, "all_reduce", 16, 1, size)) == pytest.approx(expected)
    # The same ranks one per node use the network alone.
    spread = 2 * outer.latency + size / outer.speed
    assert float(collective_seconds(cluster, "all_reduce", 2, 8, size)) == pytest.approx(spread)


def test_measured_curves_replace_the_formula_for_their_size_only() -> None:
    curve = CollectiveCurve(kind="all_reduce", group_size=4, num_bytes=(1e3, 1e6), seconds=(1e-3, 1e-1))
    cluster = dataclasses.replace(load_cluster("cpu:1x8"), curves=(curve,))
    assert float(collective_seconds(cluster, "all_reduce", 4, 1, 1e6)) == pytest.approx(0.1)
    assert float(collective_seconds(cluster, "all_reduce", 4, 1, 10.0)) == pytest.approx(1e-3)
    assert float(collective_seconds(cluster, "all_reduce", 4, 1, 1e7)) == pytest.approx(1.0)
    formula = float(link_seconds("all_reduce", 8, 1e6, cluster.node_link))
    assert float(collective_seconds(cluster, "all_reduce", 8, 1, 1e6)) == pytest.approx(formula)


@given(st.floats(1.0, 1e9), st.floats(1.0, 1e9))
def test_curves_are_monotone(first: float, second: float) -> None:
    curve = CollectiveCurve(kind="send", group_size=2, num_bytes=(1e3, 1e5, 1e6), seconds=(1e-3, 0.9e-3, 1e-1))
    low, high = sorted((first, second))
    assert float(curve_seconds(curve, low)) <= float(curve_seconds(curve, high)) * (1 + 1e-12)


def test_arrays_broadcast_to_single_values() -> None:
    cluster = load_cluster("h100:8x8")
    ranks, strides, sizes = np.array([2, 8, 16, 4]), np.array([1, 1, 1, 16]), np.array([1e6, 1e8, 1e9, 5e7])
    together = collective_seconds(cluster, "all_gather", ranks, strides, sizes)
    single = [float(collective_seconds(cluster, "all_gather", *row)) for row in zip(ranks, strides, sizes, strict=True)]
    assert together.tolist() == single
