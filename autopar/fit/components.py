"""Specifications under trial values: devices, networks and stacks as records, and what differs put into a cluster."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from costmodels.hardware import Cluster, Link, device_names, fabric_names, load_cluster, load_fabric
from costmodels.shipped import SpecPath, replaced
from costmodels.stack import Stack, load_stack

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Specifications as records: a device with its usual links (as a cluster of one), stacks, networks; by name."""

    devices: Mapping[str, Cluster]
    stacks: Mapping[str, Stack]
    fabrics: Mapping[str, Link]


def read_components(devices: Iterable[str], stacks: Iterable[str], values: Mapping[SpecPath, float]) -> Components:
    """Read the specifications of these names with ``values`` in place; devices that do not ship are left out."""
    with replaced(values):
        by_name = {load_fabric(name, 0.0).name: load_fabric(name, 0.0) for name in fabric_names()}
        return Components(
            devices={name: load_cluster(f"{name}:1") for name in devices if name in device_names()},
            stacks={name: inspect.unwrap(load_stack)(name) for name in stacks},
            fabrics=by_name,
        )


def patched_cluster(cluster: Cluster, base: Components, trial: Components) -> Cluster:
    """``cluster`` with the differences between ``base`` and ``trial``, keeping what it states otherwise."""
    name = cluster.device.name
    if name not in trial.devices:
        return cluster
    old, new = base.devices[name], trial.devices[name]
    fabric = cluster.network_link.name
    known = fabric in trial.fabrics
    old_network = base.fabrics[fabric] if known else old.network_link
    new_network = trial.fabrics[fabric] if known else new.network_link
    levels = tuple(
        dataclasses.replace(level, link=patched(level.link, trial_of(base, level.link), trial_of(trial, level.link)))
        for level in cluster.levels
    )
    return dataclasses.replace(
        cluster,
        levels=levels,
        device=patched(cluster.device, old.device, new.device),
        node_link=patched(cluster.node_link, old.node_link, new.node_link),
        network_link=patched(cluster.network_link, old_network, new_network),
    )


def trial_of(components: Components, link: Link) -> Link:
    """The shipped network of a link's name; the link itself where it is none."""
    return components.fabrics.get(link.name, link)


def patched(record: Item, old: Any, new: Any) -> Item:
    """``record`` with the differences between ``old`` and ``new``, keeping what it states otherwise."""
    if old == new:
        return record
    if dataclasses.is_dataclass(new) and not isinstance(new, type) and type(record) is type(old) is type(new):
        changes = {
            field.name: patched(getattr(record, field.name), getattr(old, field.name), getattr(new, field.name))
            for field in dataclasses.fields(new)
            if getattr(old, field.name) != getattr(new, field.name)
        }
        return cast(Item, dataclasses.replace(cast(Any, record), **changes))
    if isinstance(record, Mapping) and isinstance(old, Mapping) and isinstance(new, Mapping):
        merged = dict(record)
        for key, value in new.items():
            if key not in old or old[key] != value:
                merged[key] = patched(merged[key], old[key], value) if key in old and key in merged else value
        return cast(Item, merged)
    return cast(Item, new)
