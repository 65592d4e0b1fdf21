"""Evaluations under a plan: the loss of one process, and no trace in the training that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autopar.model.spec import ModelSpec

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

GPT = ModelSpec(
    name="tiny-gpt", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=64,
    max_seq_len=16, fused_qkv=False,
)  # fmt: skip
SLUGS = (
    "dp4.z2.mb1", "dp4.z3.mb2", "pp2.dp2.mb2", "pp2.vp2.dp2.z2.mb1", "pp2.vp2.dp2.z3.mb1.sched-zb-v", "tp2.pp2.mb2.sp",
    "pp4.mb1.sched-gpipe", "cp2.tp2.mb4",
)  # fmt: skip


def test_evaluations_equal_one_process(compare_layouts: Callable[..., Any]) -> None:
    for case in compare_layouts(4, [(GPT, slug) for slug in SLUGS]):
        assert case.loss_error < 1e-5 and case.weight_error < 1e-5, case
