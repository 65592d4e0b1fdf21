"""Seconds of one operation on one device. Every formula takes floats or arrays and broadcasts.

Symbols: m, n, k dimensions of a product; P peak FLOP/s; e efficiency; W bytes/s; t0 seconds of overhead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodels.hardware import Device, MatmulRate

Array = NDArray[np.float64]

OPERAND_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "fp8-block": 1.0, "mxfp8": 1.03, "nvfp4": 0.56}
"""Bytes per element of a product's operands, with their scales; results are kept in 2 bytes, in 4 with fp32."""

SOFTMAX_BYTES = (4.0, 6.0)
"""Per score of 2 bytes, forward and backward, of a fused scale, mask and softmax: in and out; two in, one out."""
UNFUSED_SOFTMAX_BYTES = (28.0, 32.0)
"""Scale 4, mask 4, to fp32 6, softmax 8, back 6; backward the same with a softmax of 12 (8 + 4)."""
DROPOUT_BYTES = (5.0, 5.0)
"""Scores in and out, and a byte of the mask."""
MISALIGNED_SLOWDOWN = 12.0
"""Of batched 2-byte products whose head size is not a multiple of 8 (16 bytes): BLOOM's trials with heads of 150."""
ATTENTION_BLOCK = 128
"""Queries that one unit of a device works on at a time in fused attention."""


def matmul_efficiency(rate: MatmulRate, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Any:
    """Share of peak of a product [m, k] x [k, n]: e0 / (1 + m0/m + n0/n + k0/k).

    Source: additive form of the saturations in measured tables of products (a constant explains 5 percent of large
    A100 shapes, k0/k the rest); wrong where tile or wave quantisation dominates (m or n near a tile).
    """
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    return rate.peak_fraction / (1 + rate.m_half / m + rate.n_half / n + rate.k_half / k)


def quantization_slowdown(rate: MatmulRate, num_units: int, m: ArrayLike, n: ArrayLike, count: ArrayLike = 1) -> Any:
    """q^x of ``count`` results [m, n]: tiles that stick out, and a last wave of tiles that does not fill the units.

    q = ceil(w)/w (ceil(m/tm) tm/m) (ceil(n/tn) tn/n), w = tiles / units; 1 where the rate or the device say nothing.
    Source: NVIDIA, Matrix Multiplication Background, on tile and wave quantisation; x below 1 since kernels split
    their last wave.
    """
    if not rate.quantization or not num_units:
        return 1.0
    m, n = np.asarray(m, dtype=float), np.asarray(n, dtype=float)
    rows, columns = np.ceil(m / rate.tile_m), np.ceil(n / rate.tile_n)
    waves = rows * columns * np.asarray(count, dtype=float) / num_units
    covered = rows * rate.tile_m * columns * rate.tile_n / (m * n)
    return (np.ceil(waves) / waves * covered) ** rate.quantization


def misalignment_slowdown(rate: MatmulRate, precision: str, n: ArrayLike, k: ArrayLike) -> Any:
    """1 + c (1 - a/8) of products with weights [k, n] in 2 bytes; a = 8, 4, 2 or 1, the most that divides n and k.

    Tensor cores load 16 bytes at a time; from rows that start elsewhere kernels load a elements. Source: NVIDIA, Matrix
    Multiplication Background (multiples of 16 bytes); the form is read off heads of an undivided, halved, quartered and
    eighthed vocabulary of 50257 (1 element: 2.1 to 2.6 times slower, 2: 2.3 to 2.9, 4: 1.6). Tokens are not looked at,
    since they are multiples of 8 but in inference.
    """
    if not rate.misalignment or OPERAND_BYTES.get(precision, 2.0) != 2.0:
        return 1.0
    width, depth = (np.rint(np.asarray(x, dtype=float)).astype(np.int64) for x in (n, k))
    return 1 + rate.misalignment * (1 - np.gcd(np.gcd(width, depth), 8) / 8)


def product_seconds(
    device: Device,
    precision: str,
    rate: MatmulRate,
    shape: tuple[Any, Any, Any],
    count: Any,
    result_bytes: Any,
    few: Any = 1.0,
) -> Any:
    """``count`` equal products [m, k] x [k, n] in one operation: t0 + few F/(P e) q^x + c bytes/W."""
    m, n, k = shape
    operand = OPERAND_BYTES.get(precision, 2.0)
    work = few * count * 2.0 * m * n * k / (device.peak(precision) * matmul_efficiency(rate, m, n, k))
    moved = count * (operand * (m * k + k * n) + result_bytes * m * n)
    slow = quantization_slowdown(rate, device.num_units, m, n, count)
    return device.op_overhead + work * slow + rate.byte_cost * moved / device.memory_bandwidth


def matmul_seconds(
    device: Device,
    precision: str,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    *,
    backward: bool = False,
    groups: ArrayLike = 1,
    weight_gradient_bytes: float = 0.0,
) -> Any:
    """Product [m, k] x [k, n]: t0 + 2mnk/(P e(m, n, k)) q^x + c bytes/W; backward, dX and dW, each by its own shape.

    A device with ``matmul_backward`` (a profiled one) prices both backward products by that rate and the forward
    shape, 2 t0 + 4mnk/(P e(m, n, k)), as its fit does.

    Args:
        groups: experts; above 1 the m rows are spread over them evenly, each with weights [k, n] of its own, and few
            rows per group cost efficiency.
        weight_gradient_bytes: per weight, moved where the product of the weight's gradient adds it to a buffer
            (8 for read and write in fp32); 0: the gradient is written once, as any result.

    Source: bytes are added and not maximised, since measured tables show both at once (DeepGEMM on H800, A100).
    """
    m, n, k, groups = (np.asarray(x, dtype=float) for x in (m, n, k, groups))
    rate, result = device.matmul_rate(precision, backward), max(OPERAND_BYTES.get(precision, 2.0), 2.0)
    if backward and device.matmul_backward is not None and precision not in device.matmul_of:
        work = 2.0 * m * n * k / (device.peak(precision) * matmul_efficiency(rate, m, n, k))
        return 2 * (device.op_overhead + work)
    rows = m / groups
    few = np.where(groups > 1, 1 + rate.rows_half / rows, 1.0) * misalignment_slowdown(rate, precision, n, k)
    if not backward:
        return product_seconds(device, precision, rate, (rows, n, k), groups, result, few)
    gradient = weight_gradient_bytes or result
    inputs = product_seconds(device, precision, rate, (rows, k, n), groups, result, few)
    return inputs + product_seconds(device, precision, rate, (k, n, rows), groups, gradient, few)


def attention_flops(
    batch: ArrayLike, heads: ArrayLike, query_len: ArrayLike, key_len: ArrayLike, head_size: ArrayLike
) -> Any:
    """Forward FLOPs of attention without subtracting a mask: 4 b h s_q s_k d (two products)."""
    return (
        4.0
        * np.asarray(batch)
        * np.asarray(heads)
        * np.asarray(query_len)
        * np.asarray(key_len)
        * np.asarray(head_size)
    )


def attention_seconds(
    device: Device,
    precision: str,
    *,
    batch: ArrayLike,
    heads: ArrayLike,
    query_len: ArrayLike,
    key_len: ArrayLike,
    head_size: ArrayLike,
    causal: bool,
    backward: bool = False,
    kernel: str | None = None,
    value_size: ArrayLike | None = None,
    window: int = 0,
) -> Any:
    """Fused attention: t0 + F/(P e), e of ``AttentionRate``; F as attention_flops, halved when causal.

    Backward does five products, three as wide as queries and two as values: 2.5 F where they are equal (Dao 2022).

    Args:
        kernel: name of the kernel; None: the device's own.
        value_size: width of a head's values; None: as head_size.
        window: keys that a query sees at most; 0: all. Under a causal mask the first queries see fewer.
    """
    rate = device.attention_rate(kernel, backward)
    queries, keys, head = (np.asarray(x, dtype=float) for x in (query_len, key_len, head_size))
    values = head if value_size is None else np.asarray(value_size, dtype=float)
    seen = keys * (0.5 if causal else 1.0)
    if window:
        seen = np.where(window < keys, window - (window**2 / (2 * keys) if causal else 0.0), seen)
    flops = attention_flops(batch, heads, queries, seen, (3 * head + 2 * values) if backward else (head + values) / 2)
    len_half = rate.len_half if causal or rate.len_half_full is None else rate.len_half_full
    blocks = np.asarray(batch) * np.asarray(heads) * np.ceil(queries / ATTENTION_BLOCK)
    idle = np.sqrt(1 + (rate.wave_half * device.num_units / blocks) ** 2) if device.num_units else 1.0
    efficiency = rate.peak_fraction / (1 + len_half / keys) / (1 + rate.head_half / ((head + values) / 2)) / idle
    efficiency = efficiency * np.where(head == values, 1.0, rate.unequal_share)
    return device.op_overhead + (flops / 2 if backward else flops) / (device.peak(precision) * efficiency)


def unfused_attention_seconds(
    device: Device,
    precision: str,
    *,
    batch: ArrayLike,
    heads: ArrayLike,
    query_len: ArrayLike,
    key_len: ArrayLike,
    head_size: ArrayLike,
    value_size: ArrayLike | None = None,
    causal: bool,
    dropout: bool,
    fused_softmax: bool,
    backward: bool = False,
) -> Any:
    """Attention by batched products that write the scores, and memory-bound passes over the scores.

    The products compute the whole score matrix, causal or not: queries x keys and scores x values, backward four. A
    fused scale, mask and softmax moves 4 bytes per score forward and 6 backward, dropout 5 and 5; unfused, each is a
    pass of its own around a softmax in fp32 (without a mask one pass less).

    Source: bytes counted from the operations; products whose head size is not a multiple of 8 run about 12 times
    slower, since 2-byte tensor cores want 16-byte rows (trials of BLOOM with heads of 150).
    """
    count = np.asarray(batch, dtype=float) * np.asarray(heads, dtype=float)
    queries, keys, head = (np.asarray(x, dtype=float) for x in (query_len, key_len, head_size))
    values = head if value_size is None else np.asarray(value_size, dtype=float)
    shapes = [(queries, keys, head), (queries, values, keys)]
    if backward:
        shapes = [(queries, head, keys), (keys, head, queries), (queries, keys, values), (keys, values, queries)]
    rate, result = device.matmul_rate(precision, backward), max(OPERAND_BYTES.get(precision, 2.0), 2.0)
    products = sum(product_seconds(device, precision, rate, shape, count, result) for shape in shapes)
    if OPERAND_BYTES.get(precision, 2.0) == 2.0:
        products = products * np.where((head % 8 == 0) & (values % 8 == 0), 1.0, MISALIGNED_SLOWDOWN)
    per_score = SOFTMAX_BYTES[backward] if fused_softmax else UNFUSED_SOFTMAX_BYTES[backward] - (0 if causal else 4.0)
    per_score += DROPOUT_BYTES[backward] if dropout else 0.0
    moved = count * queries * keys * per_score * result / 2
    return products + stream_seconds(device, moved, "softmax", backward=backward, ops=1 + dropout)


def stream_seconds(device: Device, num_bytes: ArrayLike, kind: str, *, backward: bool = False, ops: float = 1.0) -> Any:
    """Memory-bound operation: ops t0 + bytes/W with W the bandwidth that this kind of operation reaches."""
    num_bytes = np.asarray(num_bytes, dtype=float)
    return ops * device.op_overhead + num_bytes / device.stream_bandwidth(kind, backward)
