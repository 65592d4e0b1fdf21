"""Optimizer state in host memory: gradients go down, the host updates, weights come up. Arrays broadcast.

Symbols: P weights whose state a rank holds (its ZeRO shard), g and w bytes of a gradient and of a weight on the
device, s bytes of state per weight, u bytes that an update of one weight reads and writes; L and W bytes/s of the host
link (per direction) and of host memory, a device's share while all devices of the machine use them.

Where this belongs in an estimate (``setting`` and ``plans`` as in autopar.estimate, P per group of weights):
the term ``optimizer`` of an offloading plan is ``offloaded_step(host, P, ...).seconds()`` in place of
``stream_seconds(..., "optimizer")`` (estimate/step.py, ``_update``; u is its ``moved`` before the stack's traffic); the
memory item ``optimizer`` loses ``device_bytes_saved`` and ``working`` the ``step_bytes`` of the update
(estimate/memory.py); a plan is rejected where the device has no host, or ``host_bytes`` exceed ``host.memory_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodels.errors import InputError
from costmodels.units import GB, GIB

UPDATE_SHARE = 0.5
"""Of host memory's datasheet bandwidth that a fused update reaches on all cores: 0.53 to 0.46, from the 0.22 s for 1
billion weights and 2.57 s for 10 of Ren et al. 2021, table 4 (CPU-Adam on a DGX-2 of 256 GB/s, 30 bytes per weight;
quoted from memory). Memory bounds it on one core of an EPYC too: torch's fused AdamW moved 28 bytes per weight at 31
GB/s, an addition of vectors 29 GB/s."""
LINK_SHARE = 0.83
"""Of the host link that copies of pinned memory reach: 12.1 of 15.75 GB/s (PCIe 3 x16) and 26.2 of 31.5 (PCIe 4) in
Microway's table of buses, 55.6 of 63 (PCIe 5) in NVIDIA's example of nvbandwidth, which are 0.77, 0.83 and 0.88."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What one device has of its machine's host, while all devices of the machine use it.

    Attributes:
        memory_bytes: host memory.
        link_bandwidth: bytes/s per direction between device and host, of the datasheet.
        memory_bandwidth: bytes/s of host memory, of the datasheet.
    """

    memory_bytes: float
    link_bandwidth: float
    memory_bandwidth: float

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "link_bandwidth", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise InputError(f"host: {name} is {getattr(self, name)}; it must be above 0, or leave the host out")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpec:
    """A Host as files write it."""

    memory_GiB: float
    link_GBps: float
    memory_bandwidth_GBps: float

    def host(self) -> Host:
        """The host."""
        return Host(
            memory_bytes=self.memory_GiB * GIB,
            link_bandwidth=self.link_GBps * GB,
            memory_bandwidth=self.memory_bandwidth_GBps * GB,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadedStep:
    """Seconds of the parts of an offloaded update, floats or arrays.

    Attributes:
        down: gradients to the host.
        update: on the host.
        up: updated weights to the device.
    """

    down: Any
    update: Any
    up: Any

    def seconds(self, buckets: int = 1) -> Any:
        """The whole update in n equal buckets: (d + u + p)/n + (n - 1)/n max(d, u, p).

        One bucket, the default, is their sum: Megatron-Core copies all gradients down, updates, and copies all weights
        up. With ``--overlap-cpu-optimizer-d2h-h2d`` every tensor is a bucket: while one is updated the next goes down
        and the last comes up, since a link carries both directions at once; many buckets approach the longest part.
        Published runs do not show that gain (NeMo-RL on H100, Qwen3 0.6B, half offloaded: 1.19 s a step without
        overlap, 1.22 s with), so it is not the default.
        """
        parts = [np.asarray(part, dtype=float) for part in (self.down, self.update, self.up)]
        longest = np.maximum(np.maximum(parts[0], parts[1]), parts[2])
        return (parts[0] + parts[1] + parts[2]) / buckets + (buckets - 1) / buckets * longest


def offloaded_step(
    host: Host, weights: ArrayLike, *, gradient_bytes: float, weight_bytes: float, moved_bytes: float
) -> OffloadedStep:
    """Update P weights on the host: d = P g / (0.83 L), u = P u / (0.5 W), p = P w / (0.83 L).

    Copies have the device's types (torch converts on the host): Megatron-Core sends fp32 gradients (g = 4),
    ZeRO-Offload fp16 ones (g = 2). Adam does some 20 FLOP per weight, less than one per byte, so that memory bounds it.
    Nothing hides behind the passes of the step: Megatron-Core copies once all gradients are reduced. ZeRO-Offload sends
    gradients during the last backward (then only ``update`` and ``up`` show) and may delay the update by a step, which
    changes the training and is not covered.

    Source: Ren et al. 2021 (ZeRO-Offload, ATC), sections 4 and 5; Megatron-Core's HybridDeviceOptimizer. Wrong where an
    update has few cores or is not one fused kernel: torchrun gives each rank one thread (OMP_NUM_THREADS=1), which
    moves about 10 GB/s, and torch's plain Adam takes 20 passes instead of 7 (6 times slower in that paper). What users
    of Megatron-Core report is slower than this: 0.93 s a step for the 0.58 s here (Qwen3 0.6B on one H100, NeMo-RL's
    trial of the option), 9.6 s for 3.2 s (GLM-4.5-Air on 32 H100, profiler on, THUDM/slime issue 1139).

    Args:
        host: the device's share of its host.
        weights: P.
        gradient_bytes, weight_bytes: g and w.
        moved_bytes: u; with fp32 master weights and moments 2 * 12 + g + w.
    """
    count = np.asarray(weights, dtype=float)
    link, memory = LINK_SHARE * host.link_bandwidth, UPDATE_SHARE * host.memory_bandwidth
    return OffloadedStep(
        down=count * gradient_bytes / link, update=count * moved_bytes / memory, up=count * weight_bytes / link
    )


def device_bytes_saved(weights: ArrayLike, state_bytes: float) -> Any:
    """Bytes of optimizer state that leave the device: P s.

    Gradients and weights stay: Megatron-Core's gradient buffers last from step to step, and forward needs the weights.
    """
    return np.asarray(weights, dtype=float) * state_bytes


def host_bytes(weights: ArrayLike, *, state_bytes: float, gradient_bytes: float, weight_bytes: float) -> Any:
    """Bytes that the host holds for one rank: P (s + g + w), the state and pinned buffers of both directions.

    Without a master copy the weights coming up are the host's own copy of them, so that the sum is the same.
    """
    return np.asarray(weights, dtype=float) * (state_bytes + gradient_bytes + weight_bytes)
