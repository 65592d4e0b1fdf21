"""The measured peak against a case that can be computed by hand."""

from __future__ import annotations

import torch
from torch import nn

from autopar.runtime.memory import live_storages, local_bytes, measure_peak, storages

BATCH, IN, OUT, FP32 = 64, 256, 512, 4
WEIGHT = IN * OUT * FP32


def test_one_linear_with_adamw() -> None:
    """Held: weight, two moments, a step count, input, output gradient. On top: the output and the weight's gradient."""
    before = sum(live_storages().values())
    x, upstream = torch.randn(BATCH, IN), torch.randn(BATCH, OUT)
    layer = nn.Linear(IN, OUT, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step() -> None:
        output = layer(x)
        output.backward(upstream)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    held, peak = measure_peak(step, torch.device("cpu"), {})
    assert held - before == 3 * WEIGHT + FP32 + BATCH * (IN + OUT) * FP32
    # The optimizer's scalars come and go while the output is still alive.
    assert 0 <= peak - held - (BATCH * OUT * FP32 + WEIGHT) < 64


def test_a_passing_allocation_is_part_of_the_peak() -> None:
    def step() -> None:
        big = torch.empty(1 << 20)
        del big
        small = torch.empty(1 << 10)
        del small

    held, peak = measure_peak(step, torch.device("cpu"), {})
    assert peak - held == FP32 << 20


def test_unseen_storages_count_once() -> None:
    kept = torch.empty(1 << 16)
    address = kept.untyped_storage().data_ptr()
    alone, _ = measure_peak(lambda: None, torch.device("cpu"), {})
    same, _ = measure_peak(lambda: None, torch.device("cpu"), {address: FP32 << 16})
    other, _ = measure_peak(lambda: None, torch.device("cpu"), {1: 1000})
    assert same == alone and other == alone + 1000


def test_views_share_their_storage() -> None:
    whole = torch.empty(100)
    assert storages([whole, whole[:10], whole.view(10, 10)]) == {whole.untyped_storage().data_ptr(): 400}
    assert local_bytes([whole, whole[:10]]) == 440
