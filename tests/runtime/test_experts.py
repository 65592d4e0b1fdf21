"""Expert parallelism: gradients equal those of one process under every division of experts and ranks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from autopar.model.spec import ModelSpec, Norm, Position
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node

DROPLESS = ModelSpec(
    name="dropless", num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=48, vocab_size=64,
    max_seq_len=16, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
    num_experts=8, top_k=2, expert_ffn_size=24, shared_ffn_size=40, dense_layers=1,
)  # fmt: skip
CAPACITY = dataclasses.replace(
    DROPLESS, name="capacity", num_layers=2, gated_mlp=False, bias=True, shared_ffn_size=0, dense_layers=0,
    norm=Norm.LAYERNORM, capacity_factor=1.0,
)  # fmt: skip
BATCH, SEQ = 8, 16
TOKENS_BYTES = BATCH * SEQ * 32 * 4
HYBRID = "dp4.z3.rep2.ep2.mb2"
PLANS = {
    "dropless": (
        "dp4.ep2.mb2", "dp4.ep4.mb1", "dp4.ep2.etp2.mb2", "dp4.etp2.mb2", "dp2.tp2.sp.mb2", "dp2.tp2.sp.ep2.mb4",
        "dp2.tp2.sp.ep4.mb2", "dp2.tp2.sp.etp2.ep2.mb4", "tp4.sp.ep2.mb8", "dp2.pp2.ep2.mb1", "dp4.z2.ep2.mb1",
        "dp4.z3.ep2.mb1.ac-full", "dp4.z1.ep4.mb2", "dp2.tp2.z3.sp.ep2.mb2.ac-full", "dp2.pp2.z2.ep2.mb1.sched-zb-h1",
        "dp2.pp2.ep2.mb2.sched-zb-h1",
        "dp4.z3.ep2.etp2.mb2", "cp2.dp2.z3.ep2.mb4", HYBRID,
    ),
    "capacity": ("dp4.ep2.mb2", "dp2.tp2.sp.ep2.mb2", "dp4.z3.etp2.ep2.mb1.ac-full", "tp4.sp.mb8",
        "cp2.tp2.sp.ep2.mb8", "cp2.dp2.ep4.mb2"),
}  # fmt: skip


def rows_of(spec: ModelSpec) -> int:
    """Bytes of the rows of the global batch."""
    return TOKENS_BYTES * spec.top_k


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text("{}")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    heard: list[str] = []
    launch(
        "worker_experts", job, nodes=[Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})], ranks_per_node=4,
        out_dir=tmp_path, stall_timeout_s=120, on_message=lambda message: heard.append(message["checked"]),
    )  # fmt: skip
    expected = [f"{name} {slug}" for name, slugs in PLANS.items() for slug in slugs]
    assert heard == [*expected, "wrong scale seen", "counted"]
