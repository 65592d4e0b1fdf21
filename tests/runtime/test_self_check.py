"""The check before training: it holds for right plans, on the model or on a small copy, and fails for wrong ones."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.errors import RunError
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import parse_slug
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.support import unsupported
from autopar.runtime.train import self_check as checks
from autopar.runtime.train.miniature import miniature
from autopar.workload import Optimizer, Precision, Workload

MODEL = ModelSpec(
    name="tiny", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256, max_seq_len=16,
    fused_qkv=False,
)  # fmt: skip
GPT = dataclasses.replace(load_preset("gpt3-175b"), tied_embeddings=False)
EXPERTS = dataclasses.replace(
    GPT, name="experts", num_experts=64, top_k=8, expert_ffn_size=1024, dense_layers=2, fused_qkv=False
)


def job_of(slug: str, optimizer: Optimizer = Optimizer.ADAMW) -> TrainJob:
    workload = Workload(global_batch=16, seq_len=16, precision=Precision.BF16, optimizer=optimizer)
    return TrainJob(model=MODEL, workload=workload, plans=(parse_slug(slug),), steps=1, out_dir="unused", clip=0.1)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        (GPT, "tp8.pp8.dp16.mb1.sp"), (GPT, "tp8.pp16.vp2.dp4.z1.mb1"), (GPT, "pp8.dp8.mb4.split-0-16x6-0.ac-full3"),
        (GPT, "tp4.cp4.dp8.z3.mb2.sp"), (GPT, "pp8.vp2.dp2.mb1.sched-zb-v"), (GPT, "pp4.vp2.mb1.sched-dualpipe-v"),
        (EXPERTS, "tp2.pp4.dp16.ep8.mb1.sp"), (EXPERTS, "dp16.ep4.etp4.z2.mb4"),
    ],
)  # fmt: skip
def test_a_small_copy_is_divided_alike(model: ModelSpec, slug: str) -> None:
    plan, workload = parse_slug(slug), Workload(global_batch=1024, seq_len=2048, precision=Precision.FP32)
    spec, small, small_plan = miniature(model, workload, plan)
    assert unsupported(small_plan, spec, small_plan.num_microbatches(small)) == ()
    assert small_plan.layout == plan.layout and small_plan.schedule is plan.schedule
    assert small.global_batch % (plan.layout.dp * small_plan.microbatch_size) == 0
    blocks = small_plan.blocks_of_stages(spec.num_layers)
    before = plan.blocks_of_stages(model.num_layers)
    assert blocks == tuple(min(number, 2) for number in before)
    assert spec.hidden_size <= 512 and spec.num_layers <= 2 * plan.num_stages and small.seq_len <= 64
    assert bool(spec.num_experts) == bool(model.num_experts)


def test_one_rank_is_checked_like_many() -> None:
    for optimizer in Optimizer:
        found = checks.self_check(job_of("mb4", optimizer), parse_slug("mb4"), torch.device("cpu"), None)
        assert found.loss_error < 1e-5 and found.norm_error < 1e-5 and not found.small


def test_another_number_is_an_error_with_both_and_the_step() -> None:
    plan = parse_slug("dp2.mb4")
    right = [[5.0, 2.0], [4.0, 1.0]]
    assert checks._compared(plan, "", right, right).loss_error == 0
    with pytest.raises(RunError, match=r"dp2.*at step 1 the loss is 4.01 under the plan and 4 in one process"):
        checks._compared(plan, "", [[5.0, 2.0], [4.01, 1.0]], right)
    for bad in (2.1, float("nan")):
        with pytest.raises(RunError, match="at step 0 the gradient norm"):
            checks._compared(plan, "", [[5.0, bad], [4.0, 1.0]], right)


@pytest.mark.dist
def test_wrong_plans_are_found_on_four_ranks(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text("{}")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    node, messages = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path}), list[dict[str, Any]]()
    launch(
        "worker_self_check", job, nodes=[node], ranks_per_node=4, out_dir=tmp_path, stall_timeout_s=240,
        on_message=messages.append,
    )  # fmt: skip
    told = [(message["name"], message["told"]) for message in messages]
    assert [name for name, _ in told] == ["right", "right", "small", "norms not reduced", "doubled"]
    for _, sentence in told[:3]:
        assert "2 steps equal those of one process" in sentence
    assert "4 blocks of width 16, 8 sequences of 16 tokens" in told[2][1]
    for _, sentence in told[3:]:
        assert "failed: at step 0 the gradient norm" in sentence and "self-check of plan" in sentence
