from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.compute import (
    attention_seconds,
    matmul_efficiency,
    matmul_seconds,
    quantization_slowdown,
    stream_seconds,
    unfused_attention_seconds,
)
from costmodels.errors import InputError
from costmodels.fit_tables.tables import numbers, rows_where
from costmodels.hardware import AttentionRate, Device, MatmulRate, load_device
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


@pytest.mark.parametrize(("width", "elements"), [(4096, 8), (4100, 4), (4098, 2), (4097, 1)])
def test_rows_off_16_bytes_slow_products(width: int, elements: int) -> None:
    """1 + c (1 - a/8), by the width or by the inner dimension; not by tokens, not in fp32."""
    plain, slow = (plain_device(MatmulRate(peak_fraction=0.5, misalignment=c)) for c in (0.0, 1.6))
    for shape in ((512, width, 1024), (512, 1024, width)):
        for backward in (False, True):
            before, after = (float(matmul_seconds(d, "bf16", *shape, backward=backward)) for d in (plain, slow))
            assert after / before == pytest.approx(1 + 1.6 * (1 - elements / 8))
            assert matmul_seconds(slow, "fp8", *shape) == matmul_seconds(plain, "fp8", *shape)
    assert matmul_seconds(slow, "bf16", width, 512, 1024) == matmul_seconds(plain, "bf16", width, 512, 1024)


def plain_device(rate: MatmulRate, **changes: object) -> Device:
    """Round numbers, so that closed forms can be written out."""
    fields: dict[str, object] = {
        "name": "plain", "peak_flops": {"bf16": 1e12, "fp8": 2e12}, "memory_bytes": 1e9, "memory_bandwidth": 1e9,
        "matmul": rate, "attention": AttentionRate(peak_fraction=0.5), "num_units": 10,
    }  # fmt: skip
    return Device(**{**fields, **changes})  # type: ignore[arg-type]


def test_backward_is_two_products() -> None:
    """dX [m, n] x [n, k] and dW [k, m] x [m, n], each by its own inner dimension."""
    device = plain_device(MatmulRate(peak_fraction=0.5, k_half=100.0), op_overhead=1e-3)
    m, n, k = 200, 400, 800
    expected = 2e-3 + 2 * m * n * k / 0.5e12 * ((1 + 100 / n) + (1 + 100 / m))
    assert float(matmul_seconds(device, "bf16", m, n, k, backward=True)) == pytest.approx(expected)


def test_a_profiled_backward_keeps_the_shape_it_was_fitted_with() -> None:
    measured = MatmulRate(peak_fraction=0.25, k_half=100.0)
    device = plain_device(MatmulRate(peak_fraction=0.5), matmul_backward=measured)
    expected = 4 * 200 * 400 * 800 / 0.25e12 * (1 + 100 / 800)
    assert float(matmul_seconds(device, "bf16", 200, 400, 800, backward=True)) == pytest.approx(expected)


def test_bytes_are_added_and_accumulation_costs_its_traffic() -> None:
    device = plain_device(MatmulRate(peak_fraction=0.5, byte_cost=0.9))
    m, n, k = 256, 512, 1024
    work, moved = 2 * m * n * k / 0.5e12, 2 * (m * k + k * n + m * n)
    assert float(matmul_seconds(device, "bf16", m, n, k)) == pytest.approx(work + 0.9 * moved / 1e9)
    fp8 = float(matmul_seconds(device, "fp8", m, n, k))
    assert fp8 == pytest.approx(work / 2 + 0.9 * (m * k + k * n + 2 * m * n) / 1e9)
    once = float(matmul_seconds(device, "bf16", m, n, k, backward=True))
    added = float(matmul_seconds(device, "bf16", m, n, k, backward=True, weight_gradient_bytes=8.0))
    assert added - once == pytest.approx(0.9 * (8 - 2) * n * k / 1e9)


def test_grouped_products_read_every_groups_weights_and_suffer_from_few_rows() -> None:
    device = plain_device(MatmulRate(peak_fraction=0.5, byte_cost=1.0, rows_half=250.0))
    m, n, k, groups = 8000, 512, 1024, 16
    work = 2 * m * n * k / 0.5e12 * (1 + 250 / 500)
    moved = 2 * (m * k + groups * k * n + m * n)
    assert float(matmul_seconds(device, "bf16", m, n, k, groups=groups)) == pytest.approx(work + moved / 1e9)
    several = matmul_seconds(device, "bf16", m, n, k, groups=np.array([1, 16]))
    assert several[1] == pytest.approx(work + moved / 1e9)
    assert several[0] == pytest.approx(float(matmul_seconds(device, "bf16", m, n, k)))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 8))
def test_quantization_counts_tiles_and_waves(m: int, n: int, count: int) -> None:
    rate = MatmulRate(peak_fraction=1.0, tile_m=128, tile_n=256, quantization=1.0)
    tiles = count * -(-m // 128) * -(-n // 256)
    busy = -(-tiles // 10) * 10 * 128 * 256  # tile elements that ten units spend, idle ones included
    assert float(quantization_slowdown(rate, 10, m, n, count)) == pytest.approx(busy / (count * m * n))
    assert quantization_slowdown(rate, 0, m, n, count) == 1.0


def test_low_precisions_have_rates_of_their_own() -> None:
    h100, b200 = load_device("h100"), load_device("b200")
    shape = (8192, 8192, 8192)
    assert 1.5 < float(matmul_seconds(h100, "bf16", *shape) / matmul_seconds(h100, "fp8", *shape)) < 2.6
    order = [float(matmul_seconds(b200, p, *shape)) for p in ("bf16", "mxfp8", "fp8", "nvfp4")]
    assert order == sorted(order, reverse=True)
    with pytest.raises(InputError, match="h100 has no nvfp4"):
        matmul_seconds(h100, "nvfp4", *shape)


def test_a_causal_mask_halves_attention() -> None:
    device = dataclasses.replace(load_device("cpu"), op_overhead=0.0)
    shape = dict(batch=2, heads=16, query_len=4096, key_len=4096, head_size=128)
    full = attention_seconds(device, "fp32", **shape, causal=False)
    assert attention_seconds(device, "fp32", **shape, causal=True) == pytest.approx(full / 2)


def test_windows_and_unequal_widths_count_their_products() -> None:
    device = plain_device(MatmulRate(peak_fraction=1.0), attention=AttentionRate(peak_fraction=1.0))
    shape = dict(batch=1, heads=1, query_len=1024, key_len=1024, head_size=192, value_size=128)
    pairs = sum(min(i + 0.5, 256) for i in range(1024))
    forward = float(attention_seconds(device, "bf16", **shape, causal=True, window=256))
    assert forward == pytest.approx(2 * pairs * (192 + 128) / 1e12, rel=1e-6)
    backward = float(attention_seconds(device, "bf16", **shape, causal=True, window=256, backward=True))
    assert backward == pytest.approx(2 * pairs * (3 * 192 + 2 * 128) / 1e12, rel=1e-6)
    whole = float(attention_seconds(device, "bf16", **shape, causal=True))
    assert float(attention_seconds(device, "bf16", **shape, causal=True, window=1024)) == pytest.approx(whole)
    assert whole == pytest.approx(1024**2 * (192 + 128) / 1e12)


def test_few_heads_leave_units_idle() -> None:
    """SimuMax on B200, 4k tokens: 4, 16 and 64 heads at 0.083, 0.29 and 0.436 of the peak."""
    device = dataclasses.replace(load_device("b200"), op_overhead=0.0)
    shape = dict(batch=1, query_len=4096, key_len=4096, head_size=128, causal=True, kernel="cudnn")
    heads = np.array([4, 16, 64])
    share = 2 * heads * 4096**2 * 128 / attention_seconds(device, "bf16", heads=heads, **shape) / 2250e12
    assert share == pytest.approx([0.083, 0.29, 0.436], rel=0.2)


def test_kernels_have_names_and_generations() -> None:
    device = load_device("h100")
    shape = dict(batch=1, heads=32, query_len=8192, key_len=8192, head_size=128, causal=True)
    order = [float(attention_seconds(device, "bf16", **shape, kernel=name)) for name in ("flash1", "flash2", "flash3")]
    assert order == sorted(order, reverse=True)
    assert attention_seconds(device, "bf16", **shape) == attention_seconds(device, "bf16", **shape, kernel="cudnn")
    with pytest.raises(InputError, match="no attention kernel 'flash4'; it has: cudnn, flash1, flash2, flash3"):
        attention_seconds(device, "bf16", **shape, kernel="flash4")


@pytest.mark.parametrize("causal", ["0", "1"])
@pytest.mark.parametrize(("name", "error"), [("a100-80g", 0.2), ("h100", 0.35)])
def test_unfused_attention_is_as_slow_as_its_chart(name: str, error: float, causal: str) -> None:
    """PyTorch's attention in FlashAttention's charts: a softmax in half precision, the scale and the mask as passes.

    Nothing is fitted to these rows. H100's bandwidth is that of a training step's operations, below what these reach.
    """
    rows = rows_where("attention", device=name, kernel="unfused", causal=causal, phase="fwd+bwd")
    rows = [row for row in rows if int(row["seq"]) >= 1024]
    device = load_device(name)
    head, seq, count = numbers(rows, "head_size"), numbers(rows, "seq"), numbers(rows, "batch") * numbers(rows, "heads")
    measured = 3.5 * 4 * count * seq**2 * head * (0.5 if causal == "1" else 1.0)
    measured /= device.peak("bf16") * numbers(rows, "efficiency")
    shape = dict(batch=count, heads=1, query_len=seq, key_len=seq, head_size=head, dropout=False, fused_softmax=True)
    predicted = sum(unfused_attention_seconds(device, "bf16", **shape, causal=True, backward=b) for b in (False, True))
    passes = 4.0 * (3 if causal == "1" else 2)
    predicted = predicted + stream_seconds(device, passes * count * seq**2, "softmax")
    assert float(np.mean(np.abs(predicted / measured - 1))) < error


def test_heads_off_the_grid_are_slow() -> None:
    device = load_device("a100-80g")
    shape = dict(batch=1, heads=96, query_len=2048, key_len=2048, causal=True, dropout=False, fused_softmax=True)
    even, odd = (float(unfused_attention_seconds(device, "bf16", **shape, head_size=size)) for size in (152, 150))
    assert odd > 4 * even
    assert float(unfused_attention_seconds(load_device("cpu"), "fp32", **shape, head_size=150)) < float(
        unfused_attention_seconds(load_device("cpu"), "fp32", **shape, head_size=152)
    )


def test_softmax_and_dropout_are_passes_over_the_scores() -> None:
    device = plain_device(MatmulRate(peak_fraction=1.0), bandwidth_fraction={"default": 0.5})
    shape = dict(batch=2, heads=4, query_len=256, key_len=512, head_size=64, causal=True)
    scores = 2 * 4 * 256 * 512
    for backward, fused, dropped in ((False, 4, 5), (True, 6, 5)):
        base = float(
            unfused_attention_seconds(device, "bf16", **shape, dropout=False, fused_softmax=True, backward=backward)
        )
        products = (4 if backward else 2) * 2 * scores * 64 / 1e12
        assert base == pytest.approx(products + fused * scores / 0.5e9)
        both = unfused_attention_seconds(device, "bf16", **shape, dropout=True, fused_softmax=True, backward=backward)
        assert float(both) - base == pytest.approx(dropped * scores / 0.5e9)
        slow = unfused_attention_seconds(device, "bf16", **shape, dropout=False, fused_softmax=False, backward=backward)
        assert float(slow) > base


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
    assert optimizer_bytes_per_parameter("adamw", 2, True, master_bytes=2, moment_bytes=2) == 6
    assert optimizer_bytes_per_parameter("adamw", 4, True, master_bytes=2, moment_bytes=2) == 8
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
