"""Seconds, rounds and bytes of collectives. Every formula takes floats or arrays and broadcasts.

Symbols: N ranks; M bytes of the whole tensor (all_reduce: what each rank holds; all_gather: the result;
reduce_scatter: the input); a seconds per message; B bytes/s per rank and direction; l ranks per node, k nodes.
Source: Patarasu and Yuan 2009 (ring), Thakur et al. 2005.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodels.errors import InputError
from costmodels.hardware import Cluster, CollectiveCurve, Link, level_counts

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

    Inside a domain (a node, or a rack joined by NVLink) the node's link, between domains the network's, above that the
    links of the cluster's further levels; see ``hierarchical_seconds``. A send takes the link of the level that the
    stride reaches. Measured curves of the cluster come first.
    """
    algorithms = algorithms or {}
    n, step, size = np.broadcast_arrays(
        np.asarray(num_ranks, dtype=float), np.asarray(stride, dtype=float), np.asarray(num_bytes, dtype=float)
    )
    if kind == "send":
        seconds = link_seconds("send", n, size, cluster.links[-1], algorithms)
        for link, reach in reversed(list(zip(cluster.links, cluster.reaches, strict=False))):
            seconds = np.where(step < reach, link_seconds("send", n, size, link, algorithms), seconds)
    else:
        seconds = hierarchical_seconds(cluster.links, level_counts(cluster, n, step), kind, size, algorithms)
    for curve in cluster.curves:
        if curve.kind == kind:
            match = (n == curve.group_size) if kind != "send" else np.ones(n.shape, dtype=bool)
            seconds = np.where(match, curve_seconds(curve, size), seconds)
    return seconds


def hierarchical_seconds(
    links: Sequence[Link],
    counts: Sequence[ArrayLike],
    kind: str,
    num_bytes: ArrayLike,
    algorithms: Mapping[str, str] | None = None,
) -> Any:
    """Collective over levels of links, from the inside out; ``counts`` are the members that each joins.

    With k_0 ranks in a domain, k_1 domains in a pod, k_2 pods, ..., L_i = k_0 ... k_(i-1) and N in all: an all_reduce
    reduces and scatters M inside, M/L_1 between domains, M/L_2 between pods, and gathers the same way back, so that
    t = sum_i (latency_i + bytes_i), bytes_i those of a collective of M/L_i among k_i; all_gather and reduce_scatter
    likewise; a broadcast takes M to every level. A ``pipelined`` level moves its bytes while those below move theirs:
    the longer of the two counts, and a ring runs through all N ranks. On every level an all-reduce takes the faster of
    ring, tree and switch. Of an all_to_all a rank sends (L_(i+1) - L_i)/N of M over level i, without a ramp, since no
    published table shows one; under a pipelined level what goes further up passes this one as well.

    Source: Cho et al. 2019 (BlueConnect), one stage per level; what is pipelined, NCCL's rings.
    """
    algorithms = algorithms or {}
    members = np.broadcast_arrays(*(np.asarray(count, dtype=float) for count in counts))
    size, total = np.asarray(num_bytes, dtype=float), functools.reduce(np.multiply, members)
    if kind == "all_to_all":
        return _all_to_all_seconds(links, members, size, total)
    waits, moved = _level(members[0], *_domain_seconds(kind, members[0], size, links[0], algorithms))
    below = members[0]
    for link, count in zip(links[1:], members[1:], strict=True):
        share = size if kind == "broadcast" else size / below
        outside, across = _level(count, *_network_seconds(kind, total, count, share, link, algorithms))
        waits = waits + outside
        moved = np.maximum(moved, across) if link.pipelined else moved + across
        below = below * count
    return waits + moved


def _level(count: Any, waits: Any, moved: Any) -> tuple[Any, Any]:
    """A level that joins one member costs nothing."""
    return np.where(count > 1, waits, 0.0), np.where(count > 1, moved, 0.0)


def _domain_seconds(kind: str, local: Any, size: Any, link: Link, algorithms: Mapping[str, str]) -> tuple[Any, Any]:
    return _latency_seconds(kind, local, link, algorithms), _transfer_seconds(kind, local, size, link, algorithms)


def _all_to_all_seconds(links: Sequence[Link], members: Sequence[Any], size: Any, total: Any) -> Any:
    starts: Any = 0.0
    waits: Any = 0.0
    moved: Any = 0.0
    below = np.ones_like(total)
    for i, (link, count) in enumerate(zip(links, members, strict=True)):
        here = (count - 1) * below
        starts = starts + np.where(count > 1, link.base_latency, 0.0)
        waits = waits + here * link.latency
        passing = 0 < i < len(links) - 1 and links[i + 1].pipelined
        carried = total - below if passing else here
        across = size * carried / total / (link.bandwidth * _efficiency("all_to_all", count, link)) * link.slowdown
        across = np.where(count > 1, across, 0.0)
        moved = np.maximum(moved, across) if i and link.pipelined else moved + across
        below = below * count
    return waits + starts + moved


def _network_seconds(
    kind: str, total: Any, nodes: Any, share: Any, link: Link, algorithms: Mapping[str, str]
) -> tuple[Any, Any]:
    """(latency, bytes) over a level of the network of M/L a rank, among k members.

    A pipelined ring passes through every rank, so that the network carries (N-1)/N of the share and not (k-1)/k. An
    all-reduce may instead be done by the switches, or go up and down a tree of nodes: 2 ceil(log2 k) messages.
    """
    waits = _latency_seconds(kind, nodes, link, algorithms)
    if not link.pipelined or kind not in ("all_reduce", "all_gather", "reduce_scatter"):
        return waits, _transfer_seconds(kind, nodes, share, link, algorithms)
    ring_link = dataclasses.replace(link, in_network=0.0, efficiency_of={})
    across = _transfer_seconds(kind, total, share, ring_link, algorithms)
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
