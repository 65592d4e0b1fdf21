"""Seconds, rounds and bytes of collectives. Every formula takes floats or arrays and broadcasts.

Symbols: N ranks; M bytes of the whole tensor (all_reduce: what each rank holds; all_gather: the result;
reduce_scatter: the input); a seconds per message; B bytes/s per rank and direction; l ranks per node, k nodes.
Source: Patarasu and Yuan 2009 (ring), Thakur et al. 2005.
"""

from __future__ import annotations

import dataclasses
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


def _efficiency(kind: str, num_ranks: Any, link: Link) -> Any:
    if kind == "all_to_all" and link.all_to_all is not None:
        return link.all_to_all
    share: Any = np.full_like(num_ranks, link.efficiency)
    for ranks, efficiency in link.efficiency_of.items():
        share = np.where(num_ranks == int(ranks), efficiency, share)
    return share


def _transfer_seconds(kind: str, n: Any, size: Any, link: Link, algorithms: Mapping[str, str]) -> Any:
    """Seconds that bytes take over one kind of link, latencies left out; zero for one rank."""
    moved = serial_bytes(kind, n, size, algorithms) / (link.bandwidth * _efficiency(kind, n, link))
    ramp: Any = link.ramp_bytes
    if kind == "all_reduce" and link.in_network:
        switch = in_network_bytes(n, size) / (link.bandwidth * link.in_network)
        chosen = (n > 1) & (switch < moved)
        moved, ramp = np.where(chosen, switch, moved), np.where(chosen, link.in_network_ramp, ramp)
    if kind != "send" and np.any(ramp):
        moved = moved * (1 + np.sqrt(ramp / np.maximum(size, 1.0)))
    return moved * link.slowdown


def _latency_seconds(kind: str, n: Any, link: Link, algorithms: Mapping[str, str]) -> Any:
    start = 0.0 if kind == "send" else link.base_latency
    return start + rounds(kind, n, algorithms) * link.latency


def in_network_bytes(num_ranks: ArrayLike, num_bytes: ArrayLike) -> Any:
    """Bytes per rank and direction of an all-reduce that a switch computes: (N+1)/N M.

    Every rank hands over all its data once, and one N-th of the sum on top, since the ranks take turns as its owner
    (NVLS); the same way back.
    """
    n = np.asarray(num_ranks, dtype=float)
    return (n + 1) / n * np.asarray(num_bytes, dtype=float)


def link_seconds(
    kind: str, num_ranks: ArrayLike, num_bytes: ArrayLike, link: Link, algorithms: Mapping[str, str] | None = None
) -> Any:
    """Collective over one kind of link; zero for one rank.

    t = base_latency + rounds a + slowdown serial (1 + sqrt(ramp/M)) / (B efficiency). An all-reduce goes through the
    switch where the link computes in the network and that is faster for large messages. A send is one message, with
    neither start nor ramp.

    Source: ring or pairwise algorithms; the square root is how measured tables of NVLink approach their bandwidth
    (1 MiB to 1 GiB), between a fixed latency (too early) and a fixed message size per step (too late).
    """
    algorithms = algorithms or {}
    n, size = np.asarray(num_ranks, dtype=float), np.asarray(num_bytes, dtype=float)
    seconds = _latency_seconds(kind, n, link, algorithms) + _transfer_seconds(kind, n, size, link, algorithms)
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

    Inside a domain (a node, or a rack joined by NVLink) the node's link, between domains the network's. A group with l
    ranks on each of k domains goes in two levels: all_reduce = reduce_scatter inside, all_reduce of M/l across,
    all_gather inside; all_gather and reduce_scatter likewise, the share of a domain (M/k ... M/l) crossing the network
    once. Over a ``pipelined`` network both levels move bytes at the same time, and a ring runs through all ranks. A
    send crosses the network when the stride reaches out of the domain. An all_to_all has no ramp, since no published
    table shows one. Measured curves of the cluster come first.
    """
    algorithms = algorithms or {}
    n, step, size = np.broadcast_arrays(
        np.asarray(num_ranks, dtype=float), np.asarray(stride, dtype=float), np.asarray(num_bytes, dtype=float)
    )
    if kind == "send":
        inside = step < cluster.domain
        seconds = np.where(
            inside,
            link_seconds("send", n, size, cluster.node_link, algorithms),
            link_seconds("send", n, size, cluster.network_link, algorithms),
        )
    else:
        local, nodes = group_span(n, step, cluster.domain)
        seconds = _two_level_seconds(cluster, kind, local, nodes, size, algorithms)
    for curve in cluster.curves:
        if curve.kind == kind:
            match = (n == curve.group_size) if kind != "send" else np.ones(n.shape, dtype=bool)
            seconds = np.where(match, curve_seconds(curve, size), seconds)
    return seconds


def _two_level_seconds(
    cluster: Cluster, kind: str, local: Any, nodes: Any, size: Any, algorithms: Mapping[str, str]
) -> Any:
    """Latencies of both levels, and the bytes of both: after one another, or at the same time if pipelined."""
    inner, outer = cluster.node_link, cluster.network_link
    if kind == "all_to_all":
        n = local * nodes
        waits = (local - 1) * inner.latency + (n - local) * outer.latency
        waits += np.where(local > 1, inner.base_latency, 0.0) + np.where(nodes > 1, outer.base_latency, 0.0)
        within = size * (local - 1) / n / (inner.bandwidth * _efficiency(kind, local, inner)) * inner.slowdown
        across = size * (n - local) / n / (outer.bandwidth * _efficiency(kind, nodes, outer)) * outer.slowdown
    else:
        share = size if kind == "broadcast" else size / local
        waits = np.where(local > 1, _latency_seconds(kind, local, inner, algorithms), 0.0)
        within = _transfer_seconds(kind, local, size, inner, algorithms)
        outside, across = _network_seconds(kind, local, nodes, share, outer, algorithms)
        waits = waits + np.where(nodes > 1, outside, 0.0)
    within, across = np.where(local > 1, within, 0.0), np.where(nodes > 1, across, 0.0)
    return waits + (np.maximum(within, across) if outer.pipelined else within + across)


def _network_seconds(
    kind: str, local: Any, nodes: Any, share: Any, link: Link, algorithms: Mapping[str, str]
) -> tuple[Any, Any]:
    """(latency, bytes) over the network of M/l a rank.

    A pipelined ring passes through every rank, so that the network carries (N-1)/N of the share and not (k-1)/k. An
    all-reduce may instead be done by the switches, or go up and down a tree of nodes: 2 ceil(log2 k) messages.
    """
    waits = _latency_seconds(kind, nodes, link, algorithms)
    if not link.pipelined or kind not in ("all_reduce", "all_gather", "reduce_scatter"):
        return waits, _transfer_seconds(kind, nodes, share, link, algorithms)
    ring_link = dataclasses.replace(link, in_network=0.0, efficiency_of={})
    across = _transfer_seconds(kind, nodes * local, share, ring_link, algorithms)
    if kind != "all_reduce":
        return waits, across
    depth = link.base_latency + 2 * np.ceil(np.log2(nodes)) * link.latency
    others = []
    if link.in_network:
        others.append(dataclasses.replace(ring_link, in_network=link.in_network))
    if link.tree:
        others.append(dataclasses.replace(ring_link, efficiency=link.tree))
    for other in others:
        bytes_seconds = _transfer_seconds(kind, nodes, share, other, algorithms)
        better = depth + bytes_seconds < waits + across
        waits, across = np.where(better, depth, waits), np.where(better, bytes_seconds, across)
    return waits, across
