"""Shares of a device's peak that its kernels reach, as functions of the shape: constants only, the laws are in compute.

Symbols: m, n, k dimensions of a product [m, k] x [k, n]; s key length; d head size; G experts of a grouped product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulRate:
    """Efficiency of a product: e = peak_fraction / (1 + m_half/m + n_half/n + k_half/k), and its additive bytes.

    Each ``*_half`` is the size at which that dimension alone halves the efficiency. The reciprocal is linear in the
    four constants, so that a fit has one solution.

    Attributes:
        rows_half: of grouped products, the rows per group that halve the efficiency: e / (1 + rows_half G/m).
        byte_cost: c of the term c bytes / memory_bandwidth that is added to the time of the multiplications; 0 = off.
        tile_m, tile_n: the block of the result that one unit of the device computes at a time.
        quantization: exponent x of the slowdown q^x by partly filled tiles and waves; 0 = off.
        misalignment: c of the slowdown of products whose rows of weights start off multiples of 16 bytes; 0 = off.
    """

    peak_fraction: float
    m_half: float = 0.0
    n_half: float = 0.0
    k_half: float = 0.0
    rows_half: float = 0.0
    byte_cost: float = 0.0
    tile_m: int = 128
    tile_n: int = 256
    quantization: float = 0.0
    misalignment: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRate:
    """Fused attention: e = peak_fraction / ((1 + s0/s) (1 + head_half/d) sqrt(1 + (wave_half/w)^2)).

    s0 is len_half under a causal mask and len_half_full without one; w waves, the blocks of 128 queries over all heads
    divided by the units of the device: few heads on a rank leave units idle.

    Attributes:
        len_half_full: None means len_half.
        unequal_share: share of the rate that is left where queries and values differ in width (multi-latent attention).
    """

    peak_fraction: float
    len_half: float = 0.0
    len_half_full: float | None = None
    head_half: float = 0.0
    wave_half: float = 0.0
    unequal_share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """A generation of fused attention: its rates forward and backward."""

    forward: AttentionRate
    backward: AttentionRate
