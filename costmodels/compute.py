"""Seconds of one operation on one device. Every formula takes floats or arrays and broadcasts.

Symbols: m, n, k dimensions of a product; P peak FLOP/s; e efficiency; W bytes/s; t0 seconds of overhead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodels.hardware import AttentionRate, Device, MatmulRate

Array = NDArray[np.float64]


def matmul_efficiency(rate: MatmulRate, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Any:
    """Share of peak of a product [m, k] x [k, n]: e0 / (1 + m0/m + n0/n + k0/k).

    Source: additive form of the saturations in measured tables of products (a constant explains 5 percent of large
    A100 shapes, k0/k the rest); wrong where tile or wave quantisation dominates (m or n near a tile).
    """
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    return rate.peak_fraction / (1 + rate.m_half / m + rate.n_half / n + rate.k_half / k)


def matmul_seconds(
    device: Device, precision: str, m: ArrayLike, n: ArrayLike, k: ArrayLike, *, backward: bool = False
) -> Any:
    """Forward: t0 + 2mnk/(P e(m, n, k)). Backward, both products (dX and dW): 2 t0 + 4mnk/(P e(m, n, k))."""
    rate = (device.matmul_backward or device.matmul) if backward else device.matmul
    products = 2 if backward else 1
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    flops = 2.0 * m * n * k
    seconds = flops / (device.peak(precision) * matmul_efficiency(rate, m, n, k))
    return products * (device.op_overhead + seconds)


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
) -> Any:
    """Fused attention: t0 + F/(P e0) (1 + s0/s_k), F halved when causal; backward does 2.5 F (Dao 2022).

    Wrong for unfused attention, which is two products and memory-bound passes over the scores.
    """
    rate: AttentionRate = (device.attention_backward or device.attention) if backward else device.attention
    flops = attention_flops(batch, heads, query_len, key_len, head_size) * (0.5 if causal else 1.0)
    work = 2.5 * flops if backward else flops
    efficiency = rate.peak_fraction / (1 + rate.len_half / np.asarray(key_len, dtype=float))
    return device.op_overhead + work / (device.peak(precision) * efficiency)


def stream_seconds(device: Device, num_bytes: ArrayLike, kind: str, *, backward: bool = False, ops: float = 1.0) -> Any:
    """Memory-bound operation: ops t0 + bytes/W with W the bandwidth that this kind of operation reaches."""
    num_bytes = np.asarray(num_bytes, dtype=float)
    return ops * device.op_overhead + num_bytes / device.stream_bandwidth(kind, backward)
