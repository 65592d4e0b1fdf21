"""The measured peak against a case that can be computed by hand."""

from __future__ import annotations

import torch
from torch import nn

from autopar.runtime.observe.memory import live_storages, local_bytes, measure_peak, storages
from autopar.runtime.parallel.pipeline import Observer, Unobserved, observed

BATCH, IN, OUT, FP32 = 64, 256, 512, 4
WEIGHT = IN * OUT * FP32


def test_one_linear_with_adamw() -> None:
    """Held: weight, two moments, a step count, input, output gradient. On top: the output and the weight's gradient."""
    before = sum(live_storages().values())
    x, upstream = torch.randn(BATCH, IN), torch.randn(BATCH, OUT)
    layer = nn.Linear(IN, OUT, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step(observer: Observer) -> None:
        with observed(observer, "0F0"):
            output = layer(x)
        with observed(observer, "0B0"):
            output.backward(upstream)
        with observed(observer, "optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(Unobserved())
    peak = measure_peak(step, torch.device("cpu"), {})
    assert peak.held - before == 3 * WEIGHT + FP32 + BATCH * (IN + OUT) * FP32
    forward, backward, update = peak.moments
    assert [moment.name for moment in peak.moments] == ["0F0", "0B0", "optimizer"]
    assert (forward.begin_bytes, forward.end_bytes) == (0, BATCH * OUT * FP32)
    assert backward.end_bytes - backward.begin_bytes == update.end_bytes - BATCH * OUT * FP32 == WEIGHT
    # The optimizer's scalars come and go while the output is still alive.
    assert 0 <= peak.highest - peak.held - (BATCH * OUT * FP32 + WEIGHT) < 64


def test_a_passing_allocation_is_part_of_the_peak() -> None:
    def step(observer: Observer) -> None:
        big = torch.empty(1 << 20)
        del big
        small = torch.empty(1 << 10)
        del small

    peak = measure_peak(step, torch.device("cpu"), {})
    assert peak.highest - peak.held == FP32 << 20


def test_unseen_storages_count_once() -> None:
    kept = torch.empty(1 << 16)
    address = kept.untyped_storage().data_ptr()
    alone, same, other = (
        measure_peak(lambda observer: None, torch.device("cpu"), unseen).held
        for unseen in ({}, {address: FP32 << 16}, {1: 1000})
    )
    assert same == alone and other == alone + 1000


def test_views_share_their_storage() -> None:
    whole = torch.empty(100)
    assert storages([whole, whole[:10], whole.view(10, 10)]) == {whole.untyped_storage().data_ptr(): 400}
    assert local_bytes([whole, whole[:10]]) == 440
