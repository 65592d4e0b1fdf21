from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.collectives import collective_seconds, curve_seconds, link_seconds, rounds, sent_bytes
from costmodels.errors import InputError
from costmodels.hardware import Cluster, CollectiveCurve, Link, load_cluster

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


def two_levels(**network: object) -> Cluster:
    """Nodes of 8 with round numbers."""
    outer = Link(**{"name": "outer", "bandwidth": 1e8, "latency": 1e-4, **network})  # type: ignore[arg-type]
    return dataclasses.replace(load_cluster("h100:16x8"), node_link=LINK, network_link=outer)


def test_two_levels_cross_the_network_once() -> None:
    cluster, size = two_levels(), 1e9
    inner, outer = cluster.node_link, cluster.network_link
    expected = 14 * inner.latency + 2 * 7 / 8 * size / inner.speed + 2 * outer.latency + size / 8 / outer.speed
    assert float(collective_seconds(cluster, "all_reduce", 16, 1, size)) == pytest.approx(expected)
    # The same ranks one per node use the network alone.
    spread = 2 * outer.latency + size / outer.speed
    assert float(collective_seconds(cluster, "all_reduce", 2, 8, size)) == pytest.approx(spread)


def test_a_pipelined_ring_takes_the_slower_level_and_passes_every_rank() -> None:
    size = 1e9
    waits = 14 * LINK.latency + 6 * 1e-4
    slow = float(collective_seconds(two_levels(pipelined=True), "all_reduce", 32, 1, size))
    assert slow == pytest.approx(waits + 2 * 31 / 32 * size / 8 / 1e8)
    fast = float(collective_seconds(two_levels(pipelined=True, bandwidth=1e12), "all_reduce", 32, 1, size))
    assert fast == pytest.approx(waits + 2 * 7 / 8 * size / LINK.speed)
    gather = float(collective_seconds(two_levels(pipelined=True), "all_gather", 32, 1, size))
    assert gather == pytest.approx((7 * LINK.latency + 3e-4) + 31 / 32 * size / 8 / 1e8)


def test_a_tree_over_nodes_is_taken_where_it_is_faster() -> None:
    size = 1e9
    ring = float(collective_seconds(two_levels(pipelined=True), "all_reduce", 16, 1, size))
    # Two nodes: the ring carries 15/8 of M/8, the tree M/8 at 0.6 of the speed.
    tree = float(collective_seconds(two_levels(pipelined=True, tree=0.6), "all_reduce", 16, 1, size))
    assert tree == pytest.approx(14 * LINK.latency + 2e-4 + size / 8 / 0.6e8)
    assert tree < ring
    # Large messages over many nodes: the ring again; small ones save its rounds.
    many = two_levels(pipelined=True, tree=0.6), two_levels(pipelined=True)
    large, small = ([float(collective_seconds(c, "all_reduce", 128, 1, s)) for c in many] for s in (1e10, 1e3))
    assert large[0] == large[1]
    assert small[0] < small[1] / 2


def test_a_switch_that_reduces_takes_all_data_once() -> None:
    link = dataclasses.replace(LINK, efficiency=0.8, in_network=0.7)
    size, n = 1e8, np.array([2, 4, 8, 72])
    found = link_seconds("all_reduce", n, size, link) - 2 * (n - 1) * link.latency
    ring, switch = 2 * (n - 1) / n * size / 0.8e9, (n + 1) / n * size / 0.7e9
    assert found == pytest.approx(np.minimum(ring, switch))
    assert found[0] == pytest.approx(ring[0])
    assert found[2] == pytest.approx(switch[2])
    assert link_seconds("all_gather", 8, size, link) == link_seconds("all_gather", 8, size, LINK) * 1.0 + (
        7 / 8 * size / 0.8e9 - 7 / 8 * size / 1e9
    )


def test_links_ramp_and_slow_down_beside_work() -> None:
    ramped = dataclasses.replace(LINK, ramp_bytes=1e6, base_latency=1e-3, slowdown=1.25)
    expected = 1e-3 + 2e-5 + 1.25 * 1e6 / 1e9 * 2
    assert float(link_seconds("all_reduce", 2, 1e6, ramped)) == pytest.approx(expected)
    assert float(link_seconds("all_reduce", 1, 1e6, ramped)) == 0.0
    large = float(link_seconds("all_reduce", 2, 1e14, ramped))
    assert large == pytest.approx(1.25 * 1e14 / 1e9, rel=1e-3)


def test_a_mesh_has_an_efficiency_per_number_of_ranks() -> None:
    mesh = dataclasses.replace(LINK, latency=0.0, efficiency_of={"2": 0.25})
    two, four = (float(link_seconds("all_reduce", n, 1e6, mesh)) for n in (2, 4))
    assert (two, four) == (pytest.approx(4e-3), pytest.approx(1.5e-3))
    with pytest.raises(InputError, match="efficiency_of takes numbers of ranks"):
        dataclasses.replace(LINK, efficiency_of={"two": 0.5})


def test_a_rack_is_one_domain() -> None:
    """GB200: nodes of 4, 72 joined by NVLink."""
    cluster = load_cluster("gb200:36x4")
    assert (cluster.devices_per_node, cluster.domain) == (4, 72)
    inside = float(collective_seconds(cluster, "all_gather", 72, 1, 1e9))
    assert inside == pytest.approx(float(link_seconds("all_gather", 72, 1e9, cluster.node_link)))
    assert float(collective_seconds(cluster, "all_gather", 144, 1, 1e9)) > inside
    small = dataclasses.replace(cluster, domain_size=4)
    assert float(collective_seconds(small, "all_gather", 72, 1, 1e9)) > inside
    near, far = (float(collective_seconds(cluster, "send", 2, stride, 1e9)) for stride in (36, 72))
    assert near < far


def test_all_to_all_splits_its_bytes_by_level() -> None:
    cluster, size = two_levels(all_to_all=0.5), 1e9
    within, across = size * 7 / 32 / 1e9, size * 24 / 32 / 0.5e8
    waits = 7 * LINK.latency + 24 * 1e-4
    assert float(collective_seconds(cluster, "all_to_all", 32, 1, size)) == pytest.approx(waits + within + across)
    both = dataclasses.replace(cluster, network_link=dataclasses.replace(cluster.network_link, pipelined=True))
    assert float(collective_seconds(both, "all_to_all", 32, 1, size)) == pytest.approx(waits + across)


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
