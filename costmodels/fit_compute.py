"""Measured operations to a Device: efficiencies of products, bandwidths of memory-bound operations, overhead.

Symbols: t seconds, t0 overhead of an operation, F FLOPs, P peak FLOP/s, e0, m0, n0, k0, s0 as in ``hardware``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodels.compute import attention_seconds, matmul_seconds, stream_seconds
from costmodels.errors import InputError
from costmodels.fitting import nonnegative_fit, relative_errors, summarize
from costmodels.hardware import AttentionRate, Device, MatmulRate
from costmodels.profiles import PHASES, PRODUCT_KINDS, STREAM_KINDS, ComputePoint, Fit, MachineProfile

Array = NDArray[np.float64]

SMALL_OP_BYTES = 64 * 1024
"""An operation that moves less than this costs its overhead and little else."""
LARGE_OP_BYTES = 2**20
"""An operation that moves more than this counts for a bandwidth."""

FITTED = {"matmul": ("peak_fraction", "m_half", "n_half", "k_half"), "attention": ("peak_fraction", "len_half")}
"""Constants of a rate that a profile is fitted for; the others keep their defaults."""


def fit_device(profile: MachineProfile) -> Device:
    """One rank's processor, as a Device whose peaks are the highest measured rates.

    Raises:
        InputError: a profile without points of forward products, attention or elementwise operations.
    """
    for kind in ("matmul", "attention", "elementwise"):
        if not _points(profile, kind, "forward"):
            raise InputError(f"the profile of {profile.device_name} has no {kind} points: measure it again")
    peak, bandwidth, overhead = profile.peaks["flops"], profile.peaks["memory_bandwidth"], _fit_overhead(profile)
    matmuls = {phase: _fit_matmul(_points(profile, "matmul", phase), peak, overhead) for phase in PHASES}
    attentions = {phase: _fit_attention(_points(profile, "attention", phase), peak, overhead) for phase in PHASES}
    fractions = {
        fit_name(kind, phase): _fit_bandwidth(_points(profile, kind, phase), overhead) / bandwidth
        for kind, phase in _measured(profile)
        if kind in STREAM_KINDS
    }
    forward_matmul, forward_attention = matmuls["forward"], attentions["forward"]
    assert forward_matmul is not None and forward_attention is not None, "their points were checked above"
    device = Device(
        name=profile.device_name,
        peak_flops={profile.precision: peak},
        memory_bytes=profile.memory_bytes,
        memory_bandwidth=bandwidth,
        matmul=forward_matmul,
        matmul_backward=matmuls["backward"],
        attention=forward_attention,
        attention_backward=attentions["backward"],
        bandwidth_fraction={**fractions, "default": fractions["elementwise"]},
        op_overhead=overhead,
    )
    return dataclasses.replace(device, origins=_origins(device, profile))


def fit_computes(device: Device, profile: MachineProfile) -> tuple[Fit, ...]:
    """How well a device's constants predict a profile's operations, one Fit per kind and phase."""
    return tuple(_compute_fit(device, profile, kind, phase) for kind, phase in _measured(profile))


def predict_points(device: Device, precision: str, points: Sequence[ComputePoint]) -> Array:
    """Seconds that a device's formulas give for measured operations, in their order."""
    return np.array([_predict(device, precision, point) for point in points])


def fit_name(kind: str, phase: str) -> str:
    """``kind`` or ``kind.backward``, as a Device names its constants."""
    return f"{kind}.backward" if phase == "backward" else kind


def _predict(device: Device, precision: str, point: ComputePoint) -> float:
    backward, dims = point.phase == "backward", point.dims
    if point.kind == "matmul":
        return float(matmul_seconds(device, precision, dims["m"], dims["n"], dims["k"], backward=backward))
    if point.kind == "attention":
        return float(
            attention_seconds(
                device, precision, batch=dims["batch"], heads=dims["heads"], query_len=dims["seq"],
                key_len=dims["seq"], head_size=dims["head_size"], causal=True, backward=backward,
            )
        )  # fmt: skip
    return float(stream_seconds(device, point.num_bytes, point.kind, backward=backward))


def _points(profile: MachineProfile, kind: str, phase: str) -> list[ComputePoint]:
    return [point for point in profile.compute if (point.kind, point.phase) == (kind, phase)]


def _measured(profile: MachineProfile) -> list[tuple[str, str]]:
    """Kinds and phases with points, in a fixed order."""
    found = {(point.kind, point.phase) for point in profile.compute if point.flops > 0 or point.num_bytes > 0}
    return [(kind, phase) for kind in (*PRODUCT_KINDS, *STREAM_KINDS) for phase in PHASES if (kind, phase) in found]


def _column(points: Sequence[ComputePoint], dim: str) -> Array:
    return np.array([point.dims[dim] for point in points], dtype=float)


def _seconds(points: Sequence[ComputePoint]) -> Array:
    return np.array([point.seconds for point in points])


def _fit_overhead(profile: MachineProfile) -> float:
    small = [p.seconds for p in profile.compute if p.phase == "forward" and 0 < p.num_bytes <= SMALL_OP_BYTES]
    return float(np.median(small)) if small else 0.0


def _fit_matmul(points: Sequence[ComputePoint], peak: float, overhead: float) -> MatmulRate | None:
    """(t - c t0) P / F = 1/e0 + m0/(e0 m) + n0/(e0 n) + k0/(e0 k), c the number of products and F their FLOPs."""
    if not points:
        return None
    products = 2 if points[0].phase == "backward" else 1
    first, m, n, k = _fit_product(points, ("m", "n", "k"), peak, overhead * products)
    return MatmulRate(peak_fraction=1 / first, m_half=m / first, n_half=n / first, k_half=k / first)


def _fit_attention(points: Sequence[ComputePoint], peak: float, overhead: float) -> AttentionRate | None:
    """(t - t0) P / F = 1/e0 + s0/(e0 s), s the key length."""
    if not points:
        return None
    first, half = _fit_product(points, ("seq",), peak, overhead)
    return AttentionRate(peak_fraction=1 / first, len_half=half / first)


def _fit_product(points: Sequence[ComputePoint], dims: Sequence[str], peak: float, overhead: float) -> list[float]:
    """Constants c of t - overhead = F/P (c0 + sum of ci/dim_i); c0 > 0, since no product is infinitely fast."""
    seconds = _seconds(points)
    scale = np.array([point.flops for point in points]) / peak
    columns = np.stack([scale, *(scale / _column(points, dim) for dim in dims)], axis=1)
    return [float(c) for c in nonnegative_fit(columns, seconds - overhead, seconds)]


def _fit_bandwidth(points: Sequence[ComputePoint], overhead: float) -> float:
    """W of t = t0 + bytes / W: the median of large operations, which move most of a step's bytes.

    A median and not least squares: small tensors stay in the caches, several times as fast, and would set W.
    """
    sizes = [size for size in (LARGE_OP_BYTES, SMALL_OP_BYTES, 0) if any(p.num_bytes > size for p in points)]
    large = [point for point in points if point.num_bytes > sizes[0]]
    per_byte = [max(point.seconds - overhead, 0.1 * point.seconds) / point.num_bytes for point in large]
    return float(1 / np.median(per_byte))


def _compute_fit(device: Device, profile: MachineProfile, kind: str, phase: str) -> Fit:
    points, name = _points(profile, kind, phase), fit_name(kind, phase)
    errors = relative_errors(predict_points(device, profile.precision, points), _seconds(points))
    if kind in PRODUCT_KINDS:
        rate = getattr(device, name.replace(".", "_"))
        constants = {constant: float(getattr(rate, constant)) for constant in FITTED[kind]}
    else:
        constants = {"bandwidth_fraction": device.bandwidth_fraction[name]}
    return summarize(name, constants, errors)


def _origins(device: Device, profile: MachineProfile) -> dict[str, str]:
    origins = {
        "peak_flops": "measured here: the fastest product",
        "memory_bandwidth": "measured here: a large copy, read and write",
        "memory_bytes": "measured here: the machine's memory, divided among its ranks",
        "op_overhead": "measured here: median of the smallest operations",
    }
    for fit in fit_computes(device, profile):
        product = fit.name.removesuffix(".backward") in PRODUCT_KINDS
        origins[fit.name.replace(".", "_") if product else f"bandwidth_fraction.{fit.name}"] = fit.origin
    return origins
