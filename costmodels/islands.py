"""Clusters of unlike devices: islands of equal devices, each a Cluster, and the link between them.

Ranks of a tensor parallel group do equal work in step, so that a slow device slows all of them: they stay on one
island. Pipelines and data parallel replicas may cross. A node that is slower than its like (a throttled device, a bad
cable) is an island of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodels.errors import InputError
from costmodels.hardware import (
    AttentionRate,
    Cluster,
    ClusterSpec,
    Device,
    Link,
    MatmulRate,
    build_cluster,
    load_cluster,
)
from costmodels.links import LinkSpec, load_fabric
from costmodels.records import from_plain, read_toml
from costmodels.units import GB


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedCluster:
    """Islands of equal devices.

    Attributes:
        islands: each a cluster of its own, with its own name.
        between: link from device to device of different islands.
    """

    name: str
    islands: tuple[Cluster, ...]
    between: Link

    def __post_init__(self) -> None:
        names = [island.name for island in self.islands]
        if not names or len(set(names)) < len(names):
            raise InputError(f"cluster {self.name}: islands are {names}; give one or more, each with its own name")

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return sum(island.world_size for island in self.islands)


def slowed(device: Device, speed: float) -> Device:
    """A device that computes at a share ``speed`` of its usual rates (clocks throttled, a part shared or broken).

    Every operation takes 1/speed as long; datasheet peaks stay, so that MFU counts what is lost.

    Raises:
        InputError: a speed that is not above 0.
    """
    if not speed > 0:
        raise InputError(f"device {device.name}: speed is {speed}; it must be above 0 (1 is the usual)")
    if speed == 1:
        return device

    def rate(found: MatmulRate) -> MatmulRate:
        return dataclasses.replace(found, peak_fraction=found.peak_fraction * speed, byte_cost=found.byte_cost / speed)

    def attention(found: AttentionRate) -> AttentionRate:
        return dataclasses.replace(found, peak_fraction=found.peak_fraction * speed)

    return dataclasses.replace(
        device,
        matmul=rate(device.matmul),
        matmul_backward=device.matmul_backward and rate(device.matmul_backward),
        matmul_of={name: rate(found) for name, found in device.matmul_of.items()},
        attention=attention(device.attention),
        attention_backward=device.attention_backward and attention(device.attention_backward),
        attention_kernels={
            name: dataclasses.replace(found, forward=attention(found.forward), backward=attention(found.backward))
            for name, found in device.attention_kernels.items()
        },
        bandwidth_fraction={name: share * speed for name, share in device.bandwidth_fraction.items()},
        op_overhead=device.op_overhead / speed,
        origins={**device.origins, "speed": f"{speed:g} of the device's, by cluster.toml"},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _MixedSpec:
    """A cluster.toml with [[group]] tables, one an island.

    Each [[group]] has the keys of a cluster.toml of its own (``name``, ``device``, ``num_nodes``, ``devices_per_node``,
    ``memory_GiB``, [group.node_link], [group.network_link], [[group.level]], ...), and ``speed``: 1 is as fast as such
    devices are. The link between islands is [between], or ``fabric`` at ``fabric_GBps``; left out, it is the slowest
    of the islands' networks.
    """

    group: tuple[Mapping[str, Any], ...]
    name: str = "mixed cluster"
    between: LinkSpec | None = None
    fabric: str | None = None
    fabric_GBps: float | None = None


def load_hardware(text: str) -> Cluster | MixedCluster:
    """Load ``DEVICE:NODESxDEVICES``, or a cluster.toml: of equal devices a Cluster, of [[group]] tables a MixedCluster.

    Groups that differ in nothing but name and number of nodes, on one network, are one Cluster.

    Raises:
        InputError: as ``hardware.load_cluster``; fewer than one group, equal names, a speed that is not above 0.
    """
    plain = read_toml(Path(text)) if text.endswith(".toml") or "/" in text else {}
    if "group" not in plain:
        return load_cluster(text)
    spec = from_plain(_MixedSpec, plain, text)
    islands = tuple(_island(group, i, text) for i, group in enumerate(spec.group))
    if not islands:
        raise InputError(f"{text}: group is empty; give a [[group]] for every kind of node")
    between = _between(spec, islands)
    alike = {"name": spec.name, "num_nodes": sum(island.num_nodes for island in islands)}
    whole = dataclasses.replace(islands[0], **alike)  # type: ignore[arg-type]
    on_one_network = len(islands) == 1 or (not whole.levels and whole.network_link == between)
    if on_one_network and all(dataclasses.replace(island, **alike) == whole for island in islands):  # type: ignore[arg-type]
        return whole
    return MixedCluster(name=spec.name, islands=islands, between=between)


def load_uniform(text: str) -> Cluster:
    """As ``load_hardware``, for what takes equal devices. Raises InputError for a mixed cluster."""
    found = load_hardware(text)
    if isinstance(found, MixedCluster):
        names = ", ".join(island.name for island in found.islands)
        raise InputError(f"{text} has islands of unlike devices ({names}): this takes one kind; autopar plan takes all")
    return found


def _island(group: Mapping[str, Any], index: int, where: str) -> Cluster:
    keys = {key: value for key, value in group.items() if key != "speed"}
    spec = from_plain(ClusterSpec, {"name": f"island {index + 1}", **keys}, f"{where}: group {index + 1}")
    speed = group.get("speed", 1.0)
    if isinstance(speed, bool) or not isinstance(speed, int | float):
        raise InputError(f"{where}: group {index + 1}: speed: expected float, found {speed!r}")
    cluster = build_cluster(spec)
    return dataclasses.replace(cluster, device=slowed(cluster.device, speed))


def _between(spec: _MixedSpec, islands: tuple[Cluster, ...]) -> Link:
    if spec.between is not None:
        return spec.between.link()
    if spec.fabric is not None or spec.fabric_GBps is not None:
        if spec.fabric is None or not spec.fabric_GBps:
            raise InputError(f"cluster {spec.name}: name the network between islands: fabric and fabric_GBps, both")
        return load_fabric(spec.fabric, spec.fabric_GBps * GB)
    return min((island.links[-1] for island in islands), key=lambda link: link.speed)
