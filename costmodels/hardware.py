"""Devices, links and clusters: what the hardware can do, and where each number comes from.

A Device carries its datasheet (peaks, memory) and the shares of it that kernels reach. A Cluster is nodes of equal
devices, a link inside a node and a link between nodes. Numbers live in ``specs/*.toml``, in the user's cluster.toml,
or come from a profile of a machine; ``origins`` says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodels.errors import InputError
from costmodels.records import from_plain, read_toml
from costmodels.shipped import load_shipped, shipped_names
from costmodels.units import GB, GIB, TFLOPS


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulRate:
    """Efficiency of a product [m, k] x [k, n]: e = peak_fraction / (1 + m_half/m + n_half/n + k_half/k).

    Each ``*_half`` is the size at which that dimension alone halves the efficiency. The reciprocal is linear in the
    four constants, so that a fit has one solution.
    """

    peak_fraction: float
    m_half: float = 0.0
    n_half: float = 0.0
    k_half: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRate:
    """Fused attention reaches peak_fraction / (1 + len_half / key length) of the matmul peak."""

    peak_fraction: float
    len_half: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator, or one rank's share of a CPU.

    Attributes:
        peak_flops: dense FLOP/s by precision (``fp32``, ``fp16``, ``bf16``).
        memory_bytes: that a rank may use.
        memory_bandwidth: bytes/s of the datasheet.
        matmul, matmul_backward: of forward products, and of the two of backward (None: as forward).
        attention, attention_backward: of fused attention, likewise.
        bandwidth_fraction: share of memory_bandwidth that memory-bound operations reach, by kind of operation
            (``normalization``, ``activation``, ..., ``optimizer``), by ``<kind>.backward``, and ``default``.
        op_overhead: seconds that an operation takes however small it is.
        origins: where numbers come from, by field.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    matmul: MatmulRate
    attention: AttentionRate
    matmul_backward: MatmulRate | None = None
    attention_backward: AttentionRate | None = None
    bandwidth_fraction: Mapping[str, float] = field(default_factory=lambda: {"default": 1.0})
    op_overhead: float = 0.0
    origins: Mapping[str, str] = field(default_factory=dict)

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision. Raises InputError if the device does not have it."""
        if precision not in self.peak_flops:
            raise InputError(
                f"device {self.name} has no {precision} matrix products: use {' or '.join(sorted(self.peak_flops))}"
            )
        return self.peak_flops[precision]

    def stream_bandwidth(self, kind: str, backward: bool = False) -> float:
        """Bytes/s that memory-bound operations of a kind reach."""
        fractions = self.bandwidth_fraction
        default = fractions.get(kind, fractions["default"])
        return self.memory_bandwidth * (fractions.get(f"{kind}.backward", default) if backward else default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What connects ranks: bytes/s per rank and direction, seconds per message, share of bandwidth reached."""

    name: str
    bandwidth: float
    latency: float
    efficiency: float = 1.0
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Bytes/s reached by large messages."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCurve:
    """Measured seconds of a collective among ``group_size`` ranks, over payload sizes in ascending order.

    ``num_bytes`` is the whole tensor, as in autopar's counts.
    """

    kind: str
    group_size: int
    num_bytes: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        num_nodes, devices_per_node: its shape; ranks fill a node before the next.
        node_link: between devices of a node.
        network_link: between nodes, per device.
        curves: measured collectives; where one exists for a kind and size it replaces the formula.
        sharing: slowdown of a rank when 1, 2, ... ranks of one machine compute at the same time; empty where every
            rank has hardware of its own.
        ranks_per_machine: ranks that share a machine in the sense of ``sharing``; 0 means devices_per_node.
        link_uses_host: communication occupies the processors that compute (loopback), so nothing overlaps.
    """

    name: str
    device: Device
    num_nodes: int
    devices_per_node: int
    node_link: Link
    network_link: Link
    curves: tuple[CollectiveCurve, ...] = ()
    sharing: tuple[float, ...] = ()
    ranks_per_machine: int = 0
    link_uses_host: bool = False

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"cluster {self.name}: {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.num_nodes * self.devices_per_node

    def slowdown(self, active: int) -> float:
        """How much longer computing takes when ``active`` ranks of a machine compute at once."""
        if not self.sharing or active < 1:
            return 1.0
        if active <= len(self.sharing):
            return self.sharing[active - 1]
        return self.sharing[-1] * active / len(self.sharing)


def group_span(size: ArrayLike, stride: ArrayLike, devices_per_node: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (ranks per node, nodes) of a group of ``size`` ranks that are ``stride`` apart; arrays broadcast.

    Where the stride does not divide the node evenly, the fullest node counts, since it sets the pace.
    """
    size, stride = np.asarray(size), np.asarray(stride)
    local = np.minimum(size, np.maximum(1, -(-devices_per_node // stride)))
    return local, -(-size // local)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LinkSpec:
    name: str
    bandwidth_GBps: float
    latency_us: float
    efficiency: float = 1.0
    origins: Mapping[str, str] = field(default_factory=dict)

    def link(self) -> Link:
        return Link(
            name=self.name,
            bandwidth=self.bandwidth_GBps * GB,
            latency=self.latency_us * 1e-6,
            efficiency=self.efficiency,
            origins=self.origins,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeviceSpec:
    name: str
    description: str
    memory_GiB: float
    memory_bandwidth_GBps: float
    devices_per_node: int
    peak_TFLOPs: Mapping[str, float]
    matmul: MatmulRate
    attention: AttentionRate
    bandwidth_fraction: Mapping[str, float]
    node_link: _LinkSpec
    network_link: _LinkSpec
    matmul_backward: MatmulRate | None = None
    attention_backward: AttentionRate | None = None
    op_overhead_us: float = 0.0
    origins: Mapping[str, str] = field(default_factory=dict)

    def device(self) -> Device:
        return Device(
            name=self.name,
            peak_flops={precision: peak * TFLOPS for precision, peak in self.peak_TFLOPs.items()},
            memory_bytes=self.memory_GiB * GIB,
            memory_bandwidth=self.memory_bandwidth_GBps * GB,
            matmul=self.matmul,
            matmul_backward=self.matmul_backward,
            attention=self.attention,
            attention_backward=self.attention_backward,
            bandwidth_fraction=self.bandwidth_fraction,
            op_overhead=self.op_overhead_us * 1e-6,
            origins=self.origins,
        )


def device_names() -> tuple[str, ...]:
    """Devices that ship with the program."""
    return shipped_names("devices")


def _device_spec(name: str) -> _DeviceSpec:
    return load_shipped(_DeviceSpec, "devices", name)


def load_device(name: str) -> Device:
    """Load a shipped device by name. Raises InputError with the nearest name."""
    return _device_spec(name).device()


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClusterSpec:
    """cluster.toml: a shipped device, the number of nodes, and what differs from the device's usual machine."""

    device: str
    num_nodes: int
    name: str = "cluster"
    devices_per_node: int | None = None
    memory_GiB: float | None = None
    node_link: _LinkSpec | None = None
    network_link: _LinkSpec | None = None


def load_cluster(text: str) -> Cluster:
    """Load ``DEVICE:NODESxDEVICES`` (``h100:8x8``), ``DEVICE:DEVICES`` (one node), or a cluster.toml by its path.

    Raises:
        InputError: unknown device, malformed shape, unreadable file or unknown key.
    """
    if text.endswith(".toml") or "/" in text:
        path = Path(text)
        spec = from_plain(_ClusterSpec, read_toml(path), str(path))
        return _build_cluster(spec)
    device, separator, shape = text.partition(":")
    parts = shape.lower().split("x")
    if not separator or len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(
            f"cluster '{text}' is not DEVICE:NODESxDEVICES (such as h100:8x8, 8 nodes of 8) or a .toml file"
        )
    nodes, devices = (1, int(parts[0])) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    return _build_cluster(_ClusterSpec(device=device, num_nodes=nodes, devices_per_node=devices, name=text))


def _build_cluster(spec: _ClusterSpec) -> Cluster:
    device_spec = _device_spec(spec.device)
    device = device_spec.device()
    if spec.memory_GiB is not None:
        device = dataclasses.replace(device, memory_bytes=spec.memory_GiB * GIB)
    return Cluster(
        name=spec.name,
        device=device,
        num_nodes=spec.num_nodes,
        devices_per_node=spec.devices_per_node or device_spec.devices_per_node,
        node_link=(spec.node_link or device_spec.node_link).link(),
        network_link=(spec.network_link or device_spec.network_link).link(),
    )
