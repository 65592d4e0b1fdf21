"""What plans put on the wire of an emulated cluster, by the interfaces' counters, against the collectives counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.measurement import Measurement
from autopar.model.spec import ModelSpec
from autopar.plan import parse_slug
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.emulate import emulated_cluster, why_unavailable
from autopar.runtime.run import run_plans
from autopar.workload import Precision, Workload
from costmodels.units import parse_bandwidth

pytestmark = [
    pytest.mark.netns,
    pytest.mark.dist,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]
MODEL = ModelSpec(
    name="wide", num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=4, ffn_size=1024, vocab_size=256,
    max_seq_len=64, fused_qkv=False,
)  # fmt: skip
SLUGS = ("dp2.mb8", "dp2.z2.mb8", "tp2.mb16", "pp2.mb4")


def wire_bytes(measured: Measurement, rank: int) -> float:
    """Bytes that one of two ranks sends: a ring, except for gloo's reduce-scatter, which is an all-reduce."""
    per_rank = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 1.0, "send": 1.0}
    return sum(c.num_bytes * per_rank.get(c.kind, 0.0) for c in measured.ranks[rank].collectives)


def test_counted_collectives_are_what_the_wire_carries(tmp_path: Path) -> None:
    job = TrainJob(
        model=MODEL, workload=Workload(global_batch=16, seq_len=64, precision=Precision.FP32),
        plans=tuple(parse_slug(slug) for slug in SLUGS), steps=4, out_dir=str(tmp_path),
    )  # fmt: skip
    with emulated_cluster(2, parse_bandwidth("1gbit")) as nodes:
        for measured in run_plans(job, nodes=nodes, ranks_per_node=1, stall_timeout_s=120):
            assert [traffic.node for traffic in measured.traffic] == [0, 1]
            for traffic in measured.traffic:
                expected = wire_bytes(measured, traffic.node)
                assert expected > 1e6
                assert expected <= traffic.sent_bytes < 1.05 * expected, measured.slug
