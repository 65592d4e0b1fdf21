from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.collectives import collective_seconds, hierarchical_seconds, link_seconds
from costmodels.errors import InputError
from costmodels.hardware import Cluster, Link, NetworkLevel, group_span, level_counts, load_cluster

INNER = Link(name="node", bandwidth=1e9, latency=1e-5)
OUTER = Link(name="leaf", bandwidth=1e8, latency=1e-4)
SPINE = Link(name="spine", bandwidth=2e7, latency=1e-3)
KINDS = st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send"])
SIZES = st.floats(1.0, 1e12)


def three_levels(pipelined: bool = False, spine: Link = SPINE) -> Cluster:
    """Nodes of 8, pods of 4 nodes."""
    outer, top = (dataclasses.replace(link, pipelined=pipelined) for link in (OUTER, spine))
    cluster = dataclasses.replace(load_cluster("h100:16x8"), node_link=INNER, network_link=outer)
    return dataclasses.replace(cluster, levels=(NetworkLevel(size=32, link=top),))


def test_members_at_every_level() -> None:
    cluster = three_levels()
    sizes, strides = np.array([128, 128, 16, 4, 4, 2, 3]), np.array([1, 8, 8, 8, 32, 64, 1])
    counts = [count.tolist() for count in level_counts(cluster, sizes, strides)]
    assert counts == [[8, 1, 1, 1, 1, 1, 3], [4, 4, 4, 4, 1, 1, 1], [4, 32, 4, 1, 4, 2, 1]]
    plain = dataclasses.replace(cluster, levels=())
    assert [c.tolist() for c in level_counts(plain, sizes, strides)] == [
        c.tolist() for c in group_span(sizes, strides, 8)
    ]


def test_an_all_reduce_scatters_level_by_level() -> None:
    size = 1e9
    inside = 14 * 1e-5 + 2 * 7 / 8 * size / 1e9
    leaf = 6 * 1e-4 + 2 * 3 / 4 * size / 8 / 1e8
    spine = 6 * 1e-3 + 2 * 3 / 4 * size / 32 / 2e7
    assert float(collective_seconds(three_levels(), "all_reduce", 128, 1, size)) == pytest.approx(inside + leaf + spine)
    gather = inside / 2 + leaf / 2 + spine / 2
    assert float(collective_seconds(three_levels(), "all_gather", 128, 1, size)) == pytest.approx(gather)
    # One rank a pod: the spine alone, with everything.
    alone = float(collective_seconds(three_levels(), "all_reduce", 4, 32, size))
    assert alone == pytest.approx(float(link_seconds("all_reduce", 4, size, SPINE)))


def simulated_all_reduce(counts: tuple[int, ...], links: tuple[Link, ...], size: float) -> tuple[float, np.ndarray]:
    """Run the stages on real vectors: scatter up the levels, gather down; time of every ring step added up."""
    total = int(np.prod(counts))
    data = np.arange(total * total, dtype=float).reshape(*counts[::-1], total)
    expected = data.sum(axis=tuple(range(len(counts))))
    clock, share = 0.0, size
    shards = data
    for level, (count, link) in enumerate(zip(counts, links, strict=True)):
        clock += 2 * (count - 1) * (link.latency + share / count / link.bandwidth)
        share /= count
        axis = len(counts) - 1 - level
        shards = np.broadcast_to(shards.sum(axis=axis, keepdims=True), shards.shape)
    return clock, np.unique(shards.reshape(-1, total), axis=0) - expected


@pytest.mark.parametrize("counts", [(2, 3), (4, 2, 3), (2, 2, 2, 2), (1, 3, 2)])
def test_any_depth_equals_its_stages(counts: tuple[int, ...]) -> None:
    links = tuple(Link(name=str(i), bandwidth=1e9 / 3**i, latency=1e-5 * 2**i) for i in range(len(counts)))
    seconds, difference = simulated_all_reduce(counts, links, 1e8)
    assert not difference.any()
    assert float(hierarchical_seconds(links, counts, "all_reduce", 1e8)) == pytest.approx(seconds, rel=1e-12)


def test_pipelined_levels_move_bytes_at_once() -> None:
    size = 1e9
    waits = 14e-5 + 6e-4 + 6e-3
    seconds = float(collective_seconds(three_levels(pipelined=True), "all_reduce", 128, 1, size))
    leaf, spine = 2 * 127 / 128 * size / 8 / 1e8, 2 * 127 / 128 * size / 32 / 2e7
    assert seconds == pytest.approx(waits + max(2 * 7 / 8, leaf, spine))
    # An oversubscription by less than the nodes of a pod hides behind the leaf.
    assert max(leaf, spine) == spine and SPINE.bandwidth < OUTER.bandwidth / 4
    narrow = three_levels(pipelined=True, spine=dataclasses.replace(SPINE, bandwidth=1e7))
    slower = float(collective_seconds(narrow, "all_reduce", 128, 1, size))
    assert slower == pytest.approx(waits + 2 * 127 / 128 * size / 32 / 1e7)


def test_an_all_to_all_shares_its_bytes_among_levels() -> None:
    size = 1e9
    waits = 7e-5 + 24e-4 + 96e-3
    within, leaf, spine = (size * part / 128 for part in (7, 24, 96))
    after = float(collective_seconds(three_levels(), "all_to_all", 128, 1, size))
    assert after == pytest.approx(waits + within / 1e9 + leaf / 1e8 + spine / 2e7)
    # At once: what crosses the spine passes the leaf's links as well.
    at_once = float(collective_seconds(three_levels(pipelined=True), "all_to_all", 128, 1, size))
    assert at_once == pytest.approx(waits + max(within / 1e9, (leaf + spine) / 1e8, spine / 2e7))


def test_a_send_takes_the_level_that_it_crosses() -> None:
    found = [float(collective_seconds(three_levels(), "send", 2, stride, 1e6)) for stride in (1, 7, 8, 31, 32, 64)]
    node, leaf, spine = (float(link_seconds("send", 2, 1e6, link)) for link in (INNER, OUTER, SPINE))
    assert found == [node, node, leaf, leaf, spine, spine]


@given(KINDS, st.integers(1, 32), st.sampled_from([1, 2, 8]), SIZES)
def test_what_stays_below_a_level_does_not_see_it(kind: str, ranks: int, stride: int, size: float) -> None:
    ranks = min(ranks, 32 // stride)
    cluster = three_levels(pipelined=True)
    plain = dataclasses.replace(cluster, levels=())
    found, expected = (float(collective_seconds(c, kind, ranks, stride, size)) for c in (cluster, plain))
    assert found == expected


@given(KINDS, st.integers(2, 512), st.sampled_from([1, 2, 8, 32]), SIZES, st.floats(1.0, 50.0), st.booleans())
def test_a_narrower_spine_is_never_faster(
    kind: str, ranks: int, stride: int, size: float, factor: float, pipelined: bool
) -> None:
    wide = three_levels(pipelined)
    narrow = three_levels(pipelined, spine=dataclasses.replace(SPINE, bandwidth=SPINE.bandwidth / factor))
    fast, slow = (float(collective_seconds(c, kind, ranks, stride, size)) for c in (wide, narrow))
    assert fast <= slow


def _free(link: Link) -> Link:
    return dataclasses.replace(link, latency=0.0)


@given(st.sampled_from(["all_reduce", "all_gather", "all_to_all"]), st.integers(2, 256), SIZES)
def test_a_level_like_the_one_below_saves_latency_and_no_bytes(kind: str, ranks: int, size: float) -> None:
    flat = dataclasses.replace(three_levels(), levels=())
    same = dataclasses.replace(flat, levels=(NetworkLevel(size=32, link=OUTER),))
    one, two = (float(collective_seconds(c, kind, ranks - ranks % 32 or ranks, 1, size)) for c in (flat, same))
    # (k1 k2 - 1)/(k1 k2) = (k1 - 1)/k1 + (k2 - 1)/(k1 k2): the same bytes, in fewer messages.
    assert two <= one * (1 + 1e-12)
    bandwidth_only = [three_levels(spine=_free(OUTER)), three_levels(spine=_free(OUTER))]
    bandwidth_only[0] = dataclasses.replace(bandwidth_only[0], levels=())
    bandwidth_only = [
        dataclasses.replace(c, node_link=_free(c.node_link), network_link=_free(c.network_link)) for c in bandwidth_only
    ]
    full = max(ranks - ranks % 32, 32)
    one, two = (float(collective_seconds(c, kind, full, 1, size)) for c in bandwidth_only)
    assert two == pytest.approx(one, rel=1e-9)


TEXT = """
device = "h100"
num_nodes = 64

[[level]]
name = "spine"
nodes = 8
oversubscription = 2

[[level]]
name = "campus"
nodes = 32
[level.link]
name = "dark fibre"
bandwidth_GBps = 1
latency_us = 50
"""


def test_a_cluster_file_names_its_levels(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    cluster = load_cluster(str(path))
    assert cluster.reaches == (8, 64, 256)
    spine, campus = cluster.levels
    assert spine.link == dataclasses.replace(
        cluster.network_link, name="spine", bandwidth=cluster.network_link.bandwidth / 2
    )
    assert (campus.size, campus.link.name, campus.link.bandwidth) == (256, "campus", 1e9)
    assert campus.link.latency == pytest.approx(50e-6)
    assert [link.name for link in cluster.links][2:] == ["spine", "campus"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nodes = 8", "nodes = 1"), "level spine: nodes is 1, 8 devices; it must be a multiple, 2 or more, of the 8"),
        (("nodes = 32", "nodes = 12"), "level campus: nodes is 12, 96 devices; it must be a multiple.*of the 64"),
        (("oversubscription = 2", "oversubscription = 0.5"), "oversubscription is 0.5; it is 1 or more"),
        (("oversubscription", "oversubscribed"), "unknown key 'oversubscribed'; did you mean 'oversubscription'"),
        (("[[level]]", "[[levels]]"), "unknown key 'levels'; did you mean 'level'"),
    ],
)
def test_wrong_levels(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(InputError, match=message):
        load_cluster(str(path))


def test_levels_ascend() -> None:
    with pytest.raises(InputError, match=r"levels join \(8, 64, 32\) devices"):
        levels = tuple(NetworkLevel(size=size, link=SPINE) for size in (64, 32))
        dataclasses.replace(three_levels(), levels=levels)
