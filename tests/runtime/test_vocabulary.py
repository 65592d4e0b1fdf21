"""Vocabulary and fused projections divided over tensor parallel ranks: exact, with the collectives foreseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import PlanError
from autopar.estimate import Setting
from autopar.estimate.traffic import expected_collectives
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.model.transformer import build
from autopar.plan import parse_slug
from autopar.runtime.parallel.fused import fused_widths, put_rows, row_order
from autopar.runtime.parallel.tensor_styles import resolve_plan
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

BATCH, SEQ, TOLERANCE = 8, 16, 1e-5
GPT = ModelSpec(
    name="gpt", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=64, max_seq_len=SEQ
)
TIED = dataclasses.replace(GPT, name="tied", tied_embeddings=True)
ODD = dataclasses.replace(GPT, name="odd", vocab_size=63)
GROUPED = ModelSpec(
    name="grouped", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=64,
    max_seq_len=SEQ, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
)  # fmt: skip


def foreseen(spec: ModelSpec, slug: str) -> list[set[tuple[str, str, int, int, int]]]:
    """What the cost model says that each rank calls."""
    workload = Workload(global_batch=BATCH, seq_len=SEQ, precision=Precision.FP32)
    setting = Setting(
        graph=build_graph(spec, seq_len=SEQ, precision=Precision.FP32), workload=workload,
        cluster=load_cluster("cpu:1x4"), stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    ranks = expected_collectives(setting, parse_slug(slug))
    return [{(c.kind, c.axis, c.group_size, c.count, c.num_bytes) for c in rank} for rank in ranks]


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_layouts_equal_one_process(compare_layouts: Callable[..., Any]) -> None:
    right = [
        (GPT, "tp2.mb4"), (GROUPED, "tp2.sp.mb4"), (TIED, "tp2.sp.mb4"), (ODD, "tp2.sp.mb8"),
        (GPT, "tp2.sp.mb4.ac-full1"), (GPT, "cp2.mb4.ac-selective"), (GROUPED, "tp2.mb4.ac-selective+core_attn+mlp"),
    ]  # fmt: skip
    wrong = [(GPT, "tp2.mb8", "rows"), (GPT, "tp2.sp.mb8", "scattered")]
    found = compare_layouts(2, [*right, *wrong], batch=BATCH, seq=SEQ)
    for (spec, slug), case in zip(right, found, strict=False):
        assert case.loss_error < TOLERANCE and case.weight_error < TOLERANCE, case
        for rank, expected in enumerate(foreseen(spec, slug)):
            assert spec is ODD or case.counted(rank) == expected, (slug, rank)
    for case in found[len(right) :]:
        assert case.weight_error > 100 * TOLERANCE, case


def test_rows_of_fused_parts_are_shared_out() -> None:
    product = nn.Linear(1, 8, bias=False)
    with torch.no_grad():
        product.weight.copy_(torch.arange(8.0).view(8, 1))
    assert fused_widths("colwise-fused 4 2 2") == (4, 2, 2) and fused_widths("colwise") == ()
    put_rows(product, row_order((4, 2, 2), 2))
    assert product.weight.flatten().tolist() == [0, 1, 4, 6, 2, 3, 5, 7]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"blocks.*.attention.qkv": "colwise-fused 32 32"}, "adds up to 64 of the 96 features"),
        ({"blocks.*.attention.qkv": "colwise-fused 33 32 31"}, "tp=2 does not divide the 33 features"),
        ({"embedding.token": "vocab"}, "are one parameter, but divided unlike"),
        ({"embedding": "vocab"}, "is a Embedding; only Linear can be divided"),
    ],
)
def test_wrong_styles_are_refused(declared: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_plan(build(TIED), declared, 2)
