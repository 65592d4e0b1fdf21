"""Seconds, rounds and bytes of collectives. Every formula takes floats or arrays and broadcasts.

Symbols: N ranks; M bytes of the whole tensor (all_reduce: what each rank holds; all_gather: the result;
reduce_scatter: the input); a seconds per message; B bytes/s per rank and direction; l ranks per node, k nodes.
Source: Patarasu and Yuan 2009 (ring), Thakur et al. 2005.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodels.errors import InputError
from costmodels.hardware import Cluster, CollectiveCurve, Link, group_span

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send")


def ring_all_reduce_bytes(num_ranks: ArrayLike, num_bytes: ArrayLike) -> Any:
    """Bytes that each rank sends (and receives): 2 (N-1)/N M."""
    n = np.asarray(num_ranks, dtype=float)
    return 2 * (n - 1) / n * np.asarray(num_bytes, dtype=float)


def ring_shard_bytes(num_ranks: ArrayLike, num_bytes: ArrayLike) -> Any:
    """Bytes that each rank sends in a ring all-gather or reduce-scatter: (N-1)/N M."""
    return ring_all_reduce_bytes(num_ranks, num_bytes) / 2


def sent_bytes(kind: str, num_ranks: ArrayLike, num_bytes: ArrayLike, algorithms: Mapping[str, str]) -> Any:
    """Bytes that each rank sends, by the algorithm that the backend uses for this kind.

    ``algorithms`` maps a kind to ``ring`` (the default) or, for reduce_scatter, to ``all_reduce``: gloo reduces the
    whole tensor on every rank and so moves what an all-reduce moves. A broadcast counts the root: one copy where ranks
    pass it on in a pipeline, ceil(log2 N) copies in a binomial ``tree`` (gloo), N-1 copies if ``flat``.
    """
    n, size = np.asarray(num_ranks, dtype=float), np.asarray(num_bytes, dtype=float)
    if kind == "reduce_scatter" and algorithms.get(kind, "ring") == "all_reduce":
        kind = "all_reduce"
    if kind == "all_reduce":
        return ring_all_reduce_bytes(n, size)
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return ring_shard_bytes(n, size)
    if kind == "broadcast":
        copies = {"flat": n - 1, "tree": np.ceil(np.log2(n))}.get(algorithms.get(kind, "ring"), np.ones_like(n))
        return np.where(n > 1, copies * size, 0.0)
    if kind == "send":
        return size + 0.0 * n
    raise InputError(f"unknown collective '{kind}'; known: {', '.join(KINDS)}")


def rounds(kind: str, num_ranks: ArrayLike, algorithms: Mapping[str, str]) -> Any:
    """Messages one after another: 2 (N-1) in a ring all-reduce, N-1 in its halves, log2 N in a tree, 1 in a send."""
    n = np.asarray(num_ranks, dtype=float)
    if kind == "broadcast" and algorithms.get(kind) == "tree":
        return np.ceil(np.log2(n))
    if kind == "all_reduce" or (kind == "reduce_scatter" and algorithms.get(kind, "ring") == "all_reduce"):
        return 2 * (n - 1)
    return np.ones_like(n) if kind == "send" else n - 1


def serial_bytes(kind: str, num_ranks: ArrayLike, num_bytes: ArrayLike, algorithms: Mapping[str, str]) -> Any:
    """Bytes that pass one after another until the last rank has finished: sent_bytes, but for two of gloo's algorithms.

    A broadcast by a ``tree`` of depth L = ceil(log2 N): the root sends L copies at once, its first child L-1 copies
    after it has received its own, and so on, in all L (L+1)/2 (exact for powers of two, else an upper bound). An
    all_gather in ``segments`` between two ranks: each sends its half in two segments and is ready to receive only
    once the first is out, so that the rank that comes second delays the other by a segment: 3/2 of the half.
    """
    n, sent = np.asarray(num_ranks, dtype=float), sent_bytes(kind, num_ranks, num_bytes, algorithms)
    if kind == "broadcast" and algorithms.get(kind) == "tree":
        return sent * (np.ceil(np.log2(n)) + 1) / 2
    if kind == "all_gather" and algorithms.get(kind) == "segments":
        return np.where(n == 2, 1.5 * sent, sent)
    return sent


def link_seconds(
    kind: str, num_ranks: ArrayLike, num_bytes: ArrayLike, link: Link, algorithms: Mapping[str, str] | None = None
) -> Any:
    """Collective over one kind of link: rounds a + serial bytes / B; zero for one rank."""
    algorithms = algorithms or {}
    n = np.asarray(num_ranks, dtype=float)
    serial = serial_bytes(kind, n, num_bytes, algorithms)
    seconds = rounds(kind, n, algorithms) * link.latency + serial / link.speed
    return seconds if kind == "send" else np.where(n > 1, seconds, 0.0)


def curve_seconds(curve: CollectiveCurve, num_bytes: ArrayLike) -> Any:
    """Interpolate a measured curve in log-log; below it the first time holds, above it the last bandwidth."""
    size = np.asarray(num_bytes, dtype=float)
    x, y = np.asarray(curve.num_bytes, dtype=float), np.maximum.accumulate(np.asarray(curve.seconds, dtype=float))
    inside = np.exp(np.interp(np.log(np.maximum(size, x[0])), np.log(x), np.log(y)))
    return np.where(size > x[-1], y[-1] * size / x[-1], inside)


def collective_seconds(
    cluster: Cluster,
    kind: str,
    num_ranks: ArrayLike,
    stride: ArrayLike,
    num_bytes: ArrayLike,
    algorithms: Mapping[str, str] | None = None,
) -> Any:
    """Seconds of a collective among ``num_ranks`` ranks that are ``stride`` apart; arrays broadcast.

    Inside a node the node's link, between nodes the network's. A group with l ranks on each of k nodes goes in two
    levels: all_reduce = reduce_scatter in the node, all_reduce of M/l between nodes, all_gather in the node;
    all_gather and reduce_scatter likewise, the share of a node (M/k ... M/l) crossing the network once. A send
    crosses the network when the stride reaches out of the node. Measured curves of the cluster come first.
    """
    algorithms = algorithms or {}
    n, step, size = np.broadcast_arrays(
        np.asarray(num_ranks, dtype=float), np.asarray(stride, dtype=float), np.asarray(num_bytes, dtype=float)
    )
    if kind == "send":
        inside = step < cluster.devices_per_node
        seconds = np.where(
            inside,
            link_seconds("send", n, size, cluster.node_link, algorithms),
            link_seconds("send", n, size, cluster.network_link, algorithms),
        )
    else:
        local, nodes = group_span(n, step, cluster.devices_per_node)
        seconds = _two_level_seconds(cluster, kind, local, nodes, size, algorithms)
    for curve in cluster.curves:
        if curve.kind == kind:
            match = (n == curve.group_size) if kind != "send" else np.ones(n.shape, dtype=bool)
            seconds = np.where(match, curve_seconds(curve, size), seconds)
    return seconds


def _two_level_seconds(
    cluster: Cluster, kind: str, local: Any, nodes: Any, size: Any, algorithms: Mapping[str, str]
) -> Any:
    inner, outer = cluster.node_link, cluster.network_link
    if kind == "all_reduce":
        inside = link_seconds(kind, local, size, inner, algorithms)
        across = link_seconds(kind, nodes, size / local, outer, algorithms)
        return inside + across
    if kind in ("all_gather", "reduce_scatter"):
        inside = link_seconds(kind, local, size, inner, algorithms)
        across = link_seconds(kind, nodes, size / local, outer, algorithms)
        return inside + across
    if kind == "all_to_all":
        n = local * nodes
        inside = (local - 1) * inner.latency + size * (local - 1) / n / inner.speed
        across = np.where(nodes > 1, (n - local) * outer.latency + size * (n - local) / n / outer.speed, 0.0)
        return inside + across
    flat = link_seconds(kind, local, size, inner, algorithms)
    return flat + link_seconds(kind, nodes, size, outer, algorithms)
