"""Context parallelism: attention over gathered parts is attention, and layouts with it train like one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from autopar.model.spec import ModelSpec, Norm, Position
from autopar.model.transformer import build

BATCH, SEQ, FP32, TOLERANCE = 8, 16, 4, 1e-5
GPT = ModelSpec(
    name="gpt", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=64, max_seq_len=SEQ
)
LLAMA = ModelSpec(
    name="llama", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=64,
    max_seq_len=SEQ, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
)  # fmt: skip
ENCODER = dataclasses.replace(GPT, name="encoder", causal=False)
BLOCKS = LLAMA.num_layers
KEYS_AND_VALUES = BATCH * SEQ * 2 * LLAMA.num_kv_heads * LLAMA.head_size * FP32


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_layouts_equal_one_process(compare_layouts: Callable[..., Any]) -> None:
    right = [
        (LLAMA, "cp4.mb4"), (GPT, "cp4.mb8"), (ENCODER, "cp4.mb8"), (LLAMA, "cp2.tp2.sp.mb4"), (LLAMA, "cp2.pp2.mb2"),
        (GPT, "dp2.cp2.z3.mb2.ac-full"), (GPT, "dp2.cp2.mb4.order-tp-dp-cp-pp"), (LLAMA, "cp2.tp2.z2.mb4"),
    ]  # fmt: skip
    wrong = [(GPT, "cp4.mb8", "mask"), (LLAMA, "cp4.mb8", "positions"), (GPT, "cp4.mb8", "gather")]
    found = compare_layouts(4, [*right, *wrong], batch=BATCH, seq=SEQ)
    for case in found[: len(right)]:
        assert case.loss_error < TOLERANCE and case.weight_error < TOLERANCE, case
    for case in found[len(right) :]:
        assert case.weight_error > 100 * TOLERANCE, case
    parameters = sum(p.numel() for p in build(LLAMA).parameters()) * FP32
    assert found[0].counted() == {
        ("all_gather", "cp", 4, 2 * 2 * BLOCKS, 2 * BLOCKS * KEYS_AND_VALUES),
        ("reduce_scatter", "cp", 4, 2 * BLOCKS, BLOCKS * KEYS_AND_VALUES),
        ("all_reduce", "cp", 4, 1, FP32),
        ("all_reduce", "dp", 4, 1, parameters),
    }
