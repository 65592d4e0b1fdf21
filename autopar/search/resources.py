"""What a cluster and its software offer, resource by resource, and settings in which one of them is better."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from autopar.estimate import Setting
from costmodels.hardware import Cluster, CollectiveCurve, Link
from costmodels.offload import Host


class Resource(StrEnum):
    """What a step can be short of."""

    COMPUTE = "compute"
    MEMORY_BANDWIDTH = "memory bandwidth"
    NODE_LINK = "node link"
    NETWORK_LINK = "network link"
    LAUNCHES = "launches"
    HOST = "host"
    MEMORY_CAPACITY = "memory capacity"


RATES = tuple(resource for resource in Resource if resource is not Resource.MEMORY_CAPACITY)
"""Resources that take time; capacity decides what is possible."""


def improved(setting: Setting, resource: Resource, factor: float) -> Setting:
    """The setting with one resource ``factor`` times as good, everything else as it is.

    Compute: FLOP/s of every precision. Links: bandwidth, and latencies that many times shorter, the network's on all of
    its levels; measured curves of collectives likewise, by whether their groups lie in a domain. Launches: host seconds
    per kernel, per call and per step, and the start of each kernel on the device. Host: bandwidth of its memory and of
    the link to it, where state is offloaded; nothing where the device names no host.
    """
    cluster, device = setting.cluster, setting.cluster.device
    if resource is Resource.COMPUTE:
        peaks = {precision: peak * factor for precision, peak in device.peak_flops.items()}
        changed = dataclasses.replace(cluster, device=dataclasses.replace(device, peak_flops=peaks))
    elif resource is Resource.MEMORY_BANDWIDTH:
        faster = dataclasses.replace(device, memory_bandwidth=device.memory_bandwidth * factor)
        changed = dataclasses.replace(cluster, device=faster)
    elif resource is Resource.MEMORY_CAPACITY:
        larger = dataclasses.replace(device, memory_bytes=device.memory_bytes * factor)
        changed = dataclasses.replace(cluster, device=larger)
    elif resource is Resource.HOST:
        changed = dataclasses.replace(
            cluster, device=dataclasses.replace(device, host=_faster_host(device.host, factor))
        )
    elif resource is Resource.NODE_LINK:
        curves = _curves(cluster, factor, inside=True)
        changed = dataclasses.replace(cluster, node_link=_faster(cluster.node_link, factor), curves=curves)
    elif resource is Resource.NETWORK_LINK:
        curves = _curves(cluster, factor, inside=False)
        levels = tuple(dataclasses.replace(level, link=_faster(level.link, factor)) for level in cluster.levels)
        network = _faster(cluster.network_link, factor)
        changed = dataclasses.replace(cluster, network_link=network, levels=levels, curves=curves)
    else:
        return _faster_launches(setting, factor)
    return dataclasses.replace(setting, cluster=changed)


def _faster_host(host: Host | None, factor: float) -> Host | None:
    if host is None:
        return None
    return dataclasses.replace(
        host, link_bandwidth=host.link_bandwidth * factor, memory_bandwidth=host.memory_bandwidth * factor
    )


def _faster(link: Link, factor: float) -> Link:
    return dataclasses.replace(
        link,
        bandwidth=link.bandwidth * factor,
        latency=link.latency / factor,
        base_latency=link.base_latency / factor,
    )


def _curves(cluster: Cluster, factor: float, *, inside: bool) -> tuple[CollectiveCurve, ...]:
    return tuple(
        dataclasses.replace(curve, seconds=tuple(seconds / factor for seconds in curve.seconds))
        if (curve.group_size <= cluster.domain) is inside
        else curve
        for curve in cluster.curves
    )


def _faster_launches(setting: Setting, factor: float) -> Setting:
    stack, device = setting.stack, setting.cluster.device
    host = dataclasses.replace(
        stack.host,
        launch_seconds=stack.host.launch_seconds / factor,
        step_seconds=stack.host.step_seconds / factor,
    )
    overheads = {name: seconds / factor for name, seconds in stack.overheads.items()}
    started = dataclasses.replace(device, op_overhead=device.op_overhead / factor)
    return dataclasses.replace(
        setting,
        cluster=dataclasses.replace(setting.cluster, device=started),
        stack=dataclasses.replace(stack, host=host, overheads=overheads),
    )
