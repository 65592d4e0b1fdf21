"""What the calls that an executor makes cost, one by one: the prices of expected or counted collectives."""

from __future__ import annotations

from autopar.estimate.setting import Setting
from autopar.layout import Layout
from autopar.measurement import CountedCollective
from autopar.plan import Plan
from costmodels.collectives import collective_seconds

IN_PASSES = ("tp", "cp", "ep", "etp")
"""Axes on which passes communicate; on the others but the pipeline's, weights and gradients travel."""
TIED_AXIS = "embedding"
"""Pipeline ranks that have copies of a weight that their stages share."""


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
        parts = ("dp_replicate", "dp_shard", "cp") if axis == "dp" else ("dp_shard", "cp")
        return min(layout.stride(part) for part in parts)
    if axis == "edp_replicate":
        return layout.stride("edp") * layout.edp // layout.dp_replicate
    return layout.stride("pp" if axis == TIED_AXIS else axis)
