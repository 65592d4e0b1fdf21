"""What the calls that an executor makes cost, one by one: the prices of expected or counted collectives."""

from __future__ import annotations

from autopar.estimate.setting import Setting
from autopar.layout import Layout
from autopar.measurement import CountedCollective
from autopar.plan import Plan
from costmodels.collectives import collective_seconds

DATA_LABELS = ("dp", "dp_shard", "dp_replicate")
"""Axes on which gradients are reduced and weights gathered."""


def price_call(setting: Setting, plan: Plan, call: CountedCollective) -> float:
    """Seconds of all calls of an entry, each of its mean size, whatever compute hides of them."""
    if not call.count or call.group_size < 2:
        return 0.0
    ranks = 2 if call.kind in ("send", "recv") else call.group_size
    kind = "send" if call.kind == "recv" else call.kind
    seconds = collective_seconds(
        setting.cluster, kind, ranks, stride_of(plan.layout, call.axis), call.num_bytes / call.count,
        setting.stack.algorithms,
    )  # fmt: skip
    return call.count * (float(seconds) + setting.collective_wait)


def stride_of(layout: Layout, axis: str) -> int:
    """Distance in ranks between neighbours along an axis of a counted collective; 1 along all ranks together."""
    if axis == "world":
        return 1
    if axis in ("dp", "dp_shard"):
        return min(
            layout.stride(part) for part in ("dp_replicate", "dp_shard", "cp") if axis == "dp" or "rep" not in part
        )
    return layout.stride(axis)
