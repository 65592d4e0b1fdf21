from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.compute import attention_seconds, matmul_efficiency, matmul_seconds, stream_seconds
from costmodels.hardware import MatmulRate, load_device
from costmodels.memory import optimizer_bytes_per_parameter, sharded
from costmodels.overlap import bucketed_tail_seconds, exposed_seconds

DIMS = st.integers(1, 65536)


def test_half_sizes_halve_the_efficiency() -> None:
    rate = MatmulRate(peak_fraction=0.8, m_half=100.0)
    assert matmul_efficiency(rate, 100, 10**9, 10**9) == pytest.approx(0.4)
    assert matmul_efficiency(rate, 10**12, 10**9, 10**9) == pytest.approx(0.8)


@given(DIMS, DIMS, DIMS)
def test_products_never_beat_the_peak(m: int, n: int, k: int) -> None:
    device = load_device("a100-80g")
    assert float(matmul_seconds(device, "bf16", m, n, k)) >= 2 * m * n * k / device.peak("bf16")


def test_backward_is_two_products() -> None:
    device = load_device("a100-80g")
    forward = matmul_seconds(device, "bf16", 512, 1024, 2048)
    assert matmul_seconds(device, "bf16", 512, 1024, 2048, backward=True) == pytest.approx(2 * forward)


def test_a_causal_mask_halves_attention() -> None:
    device = dataclasses.replace(load_device("h100"), op_overhead=0.0)
    shape = dict(batch=2, heads=16, query_len=4096, key_len=4096, head_size=128)
    full = attention_seconds(device, "bf16", **shape, causal=False)
    assert attention_seconds(device, "bf16", **shape, causal=True) == pytest.approx(full / 2)


def test_flash_attention_on_a100_reaches_its_chart() -> None:
    """FlashAttention-2 on A100, causal, head size 128, 8k tokens: about 190 TFLOP/s (chart of the repository)."""
    device = load_device("a100-80g")
    shape = dict(batch=2, heads=16, query_len=8192, key_len=8192, head_size=128, causal=True)
    flops = 3.5 * 4 * 2 * 16 * 8192**2 * 128 / 2
    seconds = attention_seconds(device, "bf16", **shape) + attention_seconds(device, "bf16", **shape, backward=True)
    assert flops / seconds == pytest.approx(190e12, rel=0.05)


def test_streams_have_a_bandwidth_per_kind() -> None:
    device = dataclasses.replace(
        load_device("cpu"), bandwidth_fraction={"default": 0.5, "loss": 0.1, "loss.backward": 0.2}, op_overhead=0.0
    )
    default = stream_seconds(device, 1e6, "elementwise")
    assert stream_seconds(device, 1e6, "loss") == pytest.approx(5 * default)
    assert stream_seconds(device, 1e6, "loss", backward=True) == pytest.approx(2.5 * default)


def test_adam_keeps_twelve_bytes_beside_half_precision() -> None:
    assert optimizer_bytes_per_parameter("adamw", 2, True) == 12
    assert optimizer_bytes_per_parameter("adamw", 4, True) == 8
    assert optimizer_bytes_per_parameter("adamw", 2, False) == 4
    assert optimizer_bytes_per_parameter("sgd", 2, True) == 4
    assert sharded(12.0, np.array([0, 1, 2, 3]), 2, 4).tolist() == [12, 12, 3, 3]


def test_overlap_hides_no_more_than_the_window() -> None:
    assert exposed_seconds(3.0, 2.0, hidden=1.0, leak=0.0) == pytest.approx(1.0)
    assert exposed_seconds(3.0, 2.0, hidden=0.0, leak=0.5) == pytest.approx(3.0)
    assert exposed_seconds(1.0, 2.0, hidden=1.0, leak=0.25) == pytest.approx(0.25)


@given(st.floats(1.0, 400.0), st.floats(0.01, 3.0), st.floats(0.0, 3.0), st.floats(0.5, 5.0), st.floats(5.0, 60.0))
def test_bucket_tail_equals_the_queue_of_buckets(
    total: float, window: float, c: float, first: float, bucket: float
) -> None:
    """Fill buckets in order, each ready when its last byte is, and reduce them one after another."""
    ready, clock, limit = 0.0, 0.0, first
    while ready < total:
        size = min(limit, total - ready)
        ready, limit = ready + size, bucket
        clock = max(clock, window * ready / total) + c * size / total
    tail = bucketed_tail_seconds(c, window, total, first, bucket)
    assert float(tail) == pytest.approx(clock - window, rel=1e-6, abs=1e-9)
