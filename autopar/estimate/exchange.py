"""Seconds of the collectives that operations cause, on the cluster of a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from autopar.estimate.setting import Setting
from autopar.shard import Collective, Degrees
from costmodels.collectives import collective_seconds
from costmodels.hardware import level_counts


def merged(collectives: Iterable[Collective]) -> list[Collective]:
    """Collectives that somebody calls, equal ones as one with the calls and bytes of all."""
    found: dict[tuple[str, str, bytes], Collective] = {}
    for collective in collectives:
        calls = np.asarray(collective.count)
        if not calls.any():
            continue
        each = np.asarray(collective.num_bytes / np.maximum(calls, 1.0))
        key = (collective.kind, collective.phase, each.tobytes())
        same = found.get(key)
        if same is not None:
            calls, num_bytes = same.count + collective.count, same.num_bytes + collective.num_bytes
            collective = dataclasses.replace(same, count=calls, num_bytes=num_bytes)
        found[key] = collective
    return list(found.values())


def collective_calls_seconds(setting: Setting, collective: Collective, ranks: Any, stride: Any) -> Any:
    """Seconds of all calls of a collective; ``num_bytes`` is the sum over the calls."""
    calls = np.asarray(collective.count, dtype=float)
    if not calls.any():
        return np.zeros_like(calls)
    each = np.asarray(collective.num_bytes, dtype=float) / np.maximum(calls, 1.0)
    seconds = collective_seconds(setting.cluster, collective.kind, ranks, stride, each, setting.stack.algorithms)
    return np.where(calls > 0, calls * (seconds + setting.collective_wait), 0.0)


def dispatch_seconds(setting: Setting, collective: Collective, degrees: Degrees) -> Any:
    """Seconds of handing tokens to experts or back: the longer of what node links and network carry at the same time.

    Of the rows that leave a rank, (l-1)/N stay in its node and (N-l)/N cross the network (l ranks per node, k nodes,
    N in all). A dispatcher that sends a token to a node once divides the crossing rows by the mean number of a
    token's experts per node that has any, e / (k (1 - (1 - 1/k)^e)) of e experts a token, and hands them on inside the
    node, where (l-1)/l of all rows pass (DeepSeek-V3 2024, DeepEP). Of further levels of the network each carries the
    rows that leave its groups, as the network those that leave a node; the slowest counts.
    """
    cluster, habits = setting.cluster, setting.stack.experts
    ranks, stride = np.asarray(degrees.ep, dtype=float), np.asarray(degrees.etp, dtype=float)
    local, *counts = level_counts(cluster, ranks, stride)
    each = habits.dispatch_bytes or setting.graph.itemsize
    size = np.asarray(collective.num_bytes, dtype=float) * each / setting.graph.itemsize
    chosen = max(setting.graph.top_k, 1)
    inner = cluster.node_link
    near = local if habits.deduplicates else ranks
    inside = size * (local - 1) / near / (inner.speed * habits.bandwidth_share)
    latency = np.where(ranks > 1, inner.latency, 0.0)
    across, below = np.zeros_like(inside), local
    for link, count in zip(cluster.links[1:], counts, strict=True):
        groups = -(-ranks // below)
        once = groups * (1 - (1 - 1 / groups) ** chosen) / chosen if habits.deduplicates else 1.0
        leaving = size * (ranks - below) / ranks * np.minimum(once, 1.0) / (link.speed * habits.network_share)
        across = np.maximum(across, np.where(ranks > below, leaving, 0.0))
        latency = latency + np.where(count > 1, link.latency, 0.0)
        below = below * count
    return np.where(np.asarray(collective.count) > 0, latency + np.maximum(inside, across), 0.0)
