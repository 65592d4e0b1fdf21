"""Collectives: rings and switches of NVLink, networks between nodes. Times are of collectives that run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from costmodels.collectives import collective_seconds
from costmodels.fit_tables.solve import Array, TableFit, fit
from costmodels.fit_tables.tables import Row, numbers, rows_where
from costmodels.hardware import load_cluster
from costmodels.links import Link, load_fabric

MIB = 2**20
SCALED = {"latency_us": ("latency", 1e-6), "base_latency_us": ("base_latency", 1e-6), "ramp_MB": ("ramp_bytes", 1e6),
          "in_network_ramp_MB": ("in_network_ramp", 1e6)}  # fmt: skip
RANKS = "efficiency_of."


def with_constants(link: Link, constants: Mapping[str, float]) -> Link:
    """The link with constants as specification files name them (``ramp_MB``, ``efficiency_of.2``) put in."""
    plain = {name: value for name, value in constants.items() if not name.startswith(RANKS)}
    for name, (field, scale) in SCALED.items():
        if name in plain:
            plain[field] = plain.pop(name) * scale
    own = {name.removeprefix(RANKS): value for name, value in constants.items() if name.startswith(RANKS)}
    return dataclasses.replace(link, efficiency_of={**link.efficiency_of, **own}, **plain)  # type: ignore[arg-type]


def fit_link_tables() -> tuple[TableFit, ...]:
    """One fit for each generation of links and each network that a table has."""
    a100 = _rows("a100", nodes=1, at_least=2 * MIB)
    v100 = _rows("v100", nodes=1)
    ring = {"latency_us": 2.0, "base_latency_us": 20.0, "efficiency": 0.7}
    switch = {"base_latency_us": 20.0, "in_network": 0.6, "in_network_ramp_MB": 10.0}
    some = {f"{RANKS}{ranks}": 0.6 for ranks in (2, 3)}
    every = {f"{RANKS}{ranks}": 0.5 for ranks in range(2, 9)}
    network = {"efficiency": 0.9, "base_latency_us": 100.0, "ramp_MB": 5.0}
    tree = {"efficiency": 0.9, "tree": 0.7, "ramp_MB": 2.0}
    two_levels = _rows("h100", nodes=12) + _rows("h100", nodes=2, tables=("two-node-logs-a", "two-node-logs-b"))
    return (
        _fit("a100 rings", a100, "a100-80g", {**ring, "ramp_MB": 0.5, **some}, "vTrain and ml-engineering"),
        _fit(
            "a100 rings, one law for all ranks",
            a100,
            "a100-80g",
            {**ring, "ramp_MB": 0.5},
            "vTrain",
            "ranks",
            ships=False,
        ),
        _fit("v100 rings", v100, "v100", {"latency_us": 2.0, "base_latency_us": 20.0, **every}, "vTrain"),
        _fit("h100 rings", _ring(("h100", "h200")), "h100", {"efficiency": 0.8}, "ml-engineering", "ranks"),
        _fit("h100 switch", _switch(("h100", "h200")), "h100", switch, "dgxc-benchmarking and ml-engineering"),
        _fit("b200 rings", _ring(("b200",)), "b200", {"efficiency": 0.8}, "ml-engineering", "ranks"),
        _fit("b200 switch", _switch(("b200",)), "b200", switch, "ml-engineering"),
        _fit("gb200 switch", _rows("gb200", nodes=18), "gb200", {"in_network": 0.5}, "coreweave, 72 ranks"),
        _fit("efa", _rows("b200", nodes=4, at_least=MIB), "b200", network, "ml-engineering, 32 B200", fabric="efa"),
        _fit(
            "infiniband",
            two_levels,
            "h100",
            tree,
            "12 and 2 nodes of H100 (coreweave and two logs)",
            "table",
            fabric="infiniband",
        ),
    )


def _rows(device: str | tuple[str, ...], nodes: int, at_least: int = 0, tables: tuple[str, ...] = ()) -> list[Row]:
    found = rows_where("collectives", device=device, kind="all_reduce", nodes=str(nodes))
    return [r for r in found if float(r["num_bytes"]) >= at_least and (not tables or r["table"] in tables)]


def _ring(devices: tuple[str, ...]) -> list[Row]:
    return [row for row in _rows(devices, nodes=1) if row["algorithm"] == "ring"]


def _switch(devices: tuple[str, ...]) -> list[Row]:
    return [row for row in _rows(devices, nodes=1, at_least=MIB) if row["algorithm"] != "ring"]


def predicted_seconds(rows: Sequence[Row], device: str, link: Link, *, across: bool) -> Array:
    """Seconds of rows of all-reduces on a device's machines whose node link or network is replaced."""
    nodes = max(int(row["nodes"]) for row in rows)
    shape = load_cluster(f"{device}:{nodes if across else 1}x8")
    cluster = dataclasses.replace(shape, **{"network_link" if across else "node_link": link})  # type: ignore[arg-type]
    if across:
        cluster = dataclasses.replace(cluster, node_link=dataclasses.replace(cluster.node_link, slowdown=1.0))
    else:
        cluster = dataclasses.replace(cluster, domain_size=cluster.domain_size or 8)
    ranks, sizes = numbers(rows, "ranks"), numbers(rows, "num_bytes")
    seconds: Array = np.asarray(collective_seconds(cluster, "all_reduce", ranks, 1, sizes))
    return seconds


def _fit(
    name: str,
    rows: Sequence[Row],
    device: str,
    start: Mapping[str, float],
    table: str,
    left_out: str = "num_bytes",
    *,
    fabric: str = "",
    ships: bool = True,
) -> TableFit:
    """Constants of a link; those that are not fitted as the shipped file has them."""
    cluster = load_cluster(f"{device}:2x8")
    known = cluster.node_link
    if fabric:
        known = load_fabric(fabric, cluster.network_link.bandwidth)
    known = dataclasses.replace(known, slowdown=1.0)
    if "rings" in name:
        known = dataclasses.replace(known, in_network=0.0, efficiency_of={})
    if name in ("h100 rings", "b200 rings"):
        known = dataclasses.replace(known, ramp_bytes=0.0)

    def law(constants: Mapping[str, float]) -> Array:
        return predicted_seconds(rows, device, with_constants(known, constants), across=bool(fabric))

    parts = [row[left_out] for row in rows]
    words = {"num_bytes": "a size", "ranks": "a number of ranks", "table": "a table"}[left_out]
    place = (("fabrics", fabric) if fabric else ("devices", device, "node_link")) if ships else ()
    measured = numbers(rows, "microseconds") * 1e-6
    table = f"all-reduces of {table}"
    return fit(name, law, start, measured, parts, table=table, left_out=words, ships_in=place)
