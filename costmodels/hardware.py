"""Devices, links and clusters: what the hardware can do, and where each number comes from.

A Device carries its datasheet (peaks, memory) and the shares of it that kernels reach. A Cluster is nodes of equal
devices, a link inside a node, a link between nodes, and any number of further levels above. Numbers live in
``specs/*.toml``, in the user's cluster.toml, or come from a profile of a machine; ``origins`` says which. Clusters of
unlike devices are in ``costmodels.islands``.
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
from costmodels.links import CollectiveCurve, LevelSpec, Link, LinkSpec, NetworkLevel, fabric_names, load_fabric
from costmodels.offload import Host, HostSpec
from costmodels.rates import AttentionKernel, AttentionRate, MatmulRate
from costmodels.records import from_plain, read_toml
from costmodels.shipped import merged, read_shipped, shipped_names
from costmodels.units import GB, GIB, TFLOPS

__all__ = [
    "AttentionKernel",
    "AttentionRate",
    "Cluster",
    "ClusterSpec",
    "CollectiveCurve",
    "Device",
    "Link",
    "MatmulRate",
    "NetworkLevel",
    "build_cluster",
    "device_names",
    "fabric_names",
    "group_span",
    "level_counts",
    "load_cluster",
    "load_device",
    "load_fabric",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator, or one rank's share of a CPU.

    Attributes:
        peak_flops: dense FLOP/s by precision (``fp32``, ``fp16``, ``bf16``, ``fp8``, ``fp8-block``, ``mxfp8``,
            ``nvfp4``).
        memory_bytes: that a rank may use.
        memory_bandwidth: bytes/s of the datasheet.
        matmul, matmul_backward: of forward products, and of the two of backward (None: as forward).
        matmul_of: of a precision whose products do not follow ``matmul`` (forward and backward).
        attention, attention_backward: of fused attention, likewise, where no kernel is named.
        attention_kernels: by name of the kernel (``flash1``, ``flash2``, ``flash3``, ``cudnn``).
        num_units: processors (SMs, compute units) that tiles of a product are spread over; 0 = unknown.
        host: its share of the host machine; None: it has none beside itself, or nothing is known, and nothing can be
            offloaded.
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
    matmul_of: Mapping[str, MatmulRate] = field(default_factory=dict)
    attention_kernels: Mapping[str, AttentionKernel] = field(default_factory=dict)
    num_units: int = 0
    host: Host | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision. Raises InputError if the device does not have it."""
        if precision not in self.peak_flops:
            raise InputError(
                f"device {self.name} has no {precision} matrix products: use {' or '.join(sorted(self.peak_flops))}"
            )
        return self.peak_flops[precision]

    def matmul_rate(self, precision: str, backward: bool = False) -> MatmulRate:
        """Efficiency of products in a precision."""
        if precision in self.matmul_of:
            return self.matmul_of[precision]
        return (self.matmul_backward or self.matmul) if backward else self.matmul

    def attention_rate(self, kernel: str | None = None, backward: bool = False) -> AttentionRate:
        """Efficiency of a fused attention kernel; None: the device's own. InputError if the device lacks the kernel."""
        if kernel is None:
            return (self.attention_backward or self.attention) if backward else self.attention
        if kernel not in self.attention_kernels:
            known = ", ".join(sorted(self.attention_kernels)) or "none"
            raise InputError(f"device {self.name} has no attention kernel '{kernel}'; it has: {known}")
        chosen = self.attention_kernels[kernel]
        return chosen.backward if backward else chosen.forward

    def stream_bandwidth(self, kind: str, backward: bool = False) -> float:
        """Bytes/s that memory-bound operations of a kind reach."""
        fractions = self.bandwidth_fraction
        default = fractions.get(kind, fractions["default"])
        return self.memory_bandwidth * (fractions.get(f"{kind}.backward", default) if backward else default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes of equal devices.

    Attributes:
        num_nodes, devices_per_node: its shape; ranks fill a node before the next.
        node_link: between devices of a node, or of a domain.
        domain_size: devices that node_link joins (72 in an NVL72 rack); 0 means devices_per_node.
        network_link: between nodes, per device.
        levels: of the network above that, from the inside out; empty: network_link joins all nodes.
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
    domain_size: int = 0
    levels: tuple[NetworkLevel, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"cluster {self.name}: {name} is {getattr(self, name)}; it must be at least 1")
        if list(self.reaches) != sorted(self.reaches):
            raise InputError(f"cluster {self.name}: levels join {self.reaches} devices; give them from the inside out")

    @property
    def domain(self) -> int:
        """Devices joined by node_link."""
        return self.domain_size or self.devices_per_node

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.num_nodes * self.devices_per_node

    @property
    def links(self) -> tuple[Link, ...]:
        """From the inside out: in a domain, between domains, between the groups of each further level."""
        return (self.node_link, self.network_link, *(level.link for level in self.levels))

    @property
    def reaches(self) -> tuple[int, ...]:
        """Devices that each of ``links`` but the last joins."""
        return (self.domain, *(level.size for level in self.levels))

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


def level_counts(cluster: Cluster, size: ArrayLike, stride: ArrayLike) -> tuple[NDArray[Any], ...]:
    """How many members a group of ``size`` ranks, ``stride`` apart, has at each of ``cluster.links``; arrays broadcast.

    Ranks in a domain, domains in a group of the first level, and so on; see ``group_span``, which is the case of two.
    """
    size, stride = np.asarray(size), np.asarray(stride)
    counts: list[NDArray[Any]] = []
    below: NDArray[Any] = np.ones_like(size)
    for reach in cluster.reaches:
        inside = np.minimum(size, np.maximum(1, -(-reach // stride)))
        counts.append(-(-inside // below))
        below = inside
    return (*counts, -(-size // below))


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeviceSpec:
    name: str
    description: str
    memory_GiB: float
    memory_bandwidth_GBps: float
    devices_per_node: int
    peak_TFLOPs: Mapping[str, float]
    matmul: MatmulRate
    bandwidth_fraction: Mapping[str, float]
    node_link: LinkSpec
    network_link: LinkSpec | None = None
    fabric: str = ""
    fabric_GBps: float = 0.0
    attention: AttentionRate | None = None
    attention_kernel: str = ""
    matmul_backward: MatmulRate | None = None
    attention_backward: AttentionRate | None = None
    op_overhead_us: float = 0.0
    matmul_of: Mapping[str, MatmulRate] = field(default_factory=dict)
    attention_kernels: Mapping[str, AttentionKernel] = field(default_factory=dict)
    num_units: int = 0
    domain_size: int = 0
    matmul_level: Mapping[str, float] = field(default_factory=dict)
    host: HostSpec | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def device(self) -> Device:
        """The device; its attention is the kernel named ``attention_kernel`` unless it has rates of its own."""
        forward, backward = self.attention, self.attention_backward
        if forward is None:
            if self.attention_kernel not in self.attention_kernels:
                raise InputError(f"device {self.name}: give [attention], or an attention_kernel that it has")
            kernel = self.attention_kernels[self.attention_kernel]
            forward, backward = kernel.forward, kernel.backward
        return Device(
            name=self.name,
            peak_flops={precision: peak * TFLOPS for precision, peak in self.peak_TFLOPs.items()},
            memory_bytes=self.memory_GiB * GIB,
            memory_bandwidth=self.memory_bandwidth_GBps * GB,
            matmul=self._levelled("default", self.matmul),
            matmul_backward=self.matmul_backward,
            attention=forward,
            attention_backward=backward,
            bandwidth_fraction=self.bandwidth_fraction,
            op_overhead=self.op_overhead_us * 1e-6,
            matmul_of={precision: self._levelled(precision, rate) for precision, rate in self.matmul_of.items()},
            attention_kernels=self.attention_kernels,
            num_units=self.num_units,
            host=self.host.host() if self.host else None,
            origins=self.origins,
        )

    def _levelled(self, precision: str, rate: MatmulRate) -> MatmulRate:
        """A rate of the device that this one is like, at the power and clocks of this one (``matmul_level``)."""
        level = self.matmul_level.get(precision, self.matmul_level.get("default", 1.0))
        return rate if level == 1.0 else dataclasses.replace(rate, peak_fraction=rate.peak_fraction * level)


def device_names() -> tuple[str, ...]:
    """Devices that ship with the program."""
    return shipped_names("devices")


def _device_spec(name: str) -> _DeviceSpec:
    return from_plain(_DeviceSpec, _inherited(read_shipped("devices", name)), f"device {name}")


def _inherited(data: dict[str, Any]) -> dict[str, Any]:
    """A specification on top of the one that it is ``like``, table by table."""
    if "like" not in data:
        return data
    return merged(_inherited(read_shipped("devices", data["like"])), {k: v for k, v in data.items() if k != "like"})


def load_device(name: str) -> Device:
    """Load a shipped device by name. Raises InputError with the nearest name."""
    return _device_spec(name).device()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """cluster.toml: a shipped device, the number of nodes, and what differs from the device's usual machine.

    The network is a [network_link] of its own, or a shipped ``fabric`` at ``fabric_GBps`` per device and direction.
    Levels above it are [[level]] tables from the inside out: pods of 32 nodes under a spine that is half as wide are
    ``name = "spine"``, ``nodes = 32``, ``oversubscription = 2``; another kind of link has a [level.link] of its own.
    """

    device: str
    num_nodes: int
    name: str = "cluster"
    devices_per_node: int | None = None
    memory_GiB: float | None = None
    domain_size: int | None = None
    node_link: LinkSpec | None = None
    network_link: LinkSpec | None = None
    fabric: str | None = None
    fabric_GBps: float | None = None
    level: tuple[LevelSpec, ...] = ()


def load_cluster(text: str) -> Cluster:
    """Load ``DEVICE:NODESxDEVICES`` (``h100:8x8``), ``DEVICE:DEVICES`` (one node), or a cluster.toml by its path.

    Raises:
        InputError: unknown device, malformed shape, unreadable file or unknown key.
    """
    if text.endswith(".toml") or "/" in text:
        path = Path(text)
        plain = read_toml(path)
        if "group" in plain:
            raise InputError(f"{path}: a mixed cluster ([[group]]) has no single device: plan it with autopar plan")
        spec = from_plain(ClusterSpec, plain, str(path))
        return build_cluster(spec)
    device, separator, shape = text.partition(":")
    parts = shape.lower().split("x")
    if not separator or len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(
            f"cluster '{text}' is not DEVICE:NODESxDEVICES (such as h100:8x8, 8 nodes of 8) or a .toml file"
        )
    nodes, devices = (1, int(parts[0])) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
    return build_cluster(ClusterSpec(device=device, num_nodes=nodes, devices_per_node=devices, name=text))


def build_cluster(spec: ClusterSpec) -> Cluster:
    """The cluster that a file or a shape describes. Raises InputError: unknown device, no network, wrong levels."""
    device_spec = _device_spec(spec.device)
    device = device_spec.device()
    if spec.memory_GiB is not None:
        device = dataclasses.replace(device, memory_bytes=spec.memory_GiB * GIB)
    cluster = Cluster(
        name=spec.name,
        device=device,
        num_nodes=spec.num_nodes,
        devices_per_node=spec.devices_per_node or device_spec.devices_per_node,
        node_link=(spec.node_link or device_spec.node_link).link(),
        network_link=_network(spec, device_spec),
        domain_size=device_spec.domain_size if spec.domain_size is None else spec.domain_size,
    )
    for level in spec.level:
        above = level.level(cluster.links[-1], cluster.reaches[-1], cluster.devices_per_node)
        cluster = dataclasses.replace(cluster, levels=(*cluster.levels, above))
    return cluster


def _network(spec: ClusterSpec, device: _DeviceSpec) -> Link:
    """The network that the cluster describes, else its fabric, else those of the device's usual machine."""
    if spec.network_link is not None:
        return spec.network_link.link()
    if spec.fabric is None and spec.fabric_GBps is None and device.network_link is not None:
        return device.network_link.link()
    name, rate = spec.fabric or device.fabric, spec.fabric_GBps or device.fabric_GBps
    if not name or not rate:
        raise InputError(f"cluster {spec.name}: name the network between nodes: fabric and fabric_GBps")
    return load_fabric(name, rate * GB)
