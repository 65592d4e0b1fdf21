"""The machine of a run: words for its devices and network -> Cluster of costmodels.hardware."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from autopar.runs.networks import parse_network
from autopar.runs.reading import CannotRead, Read, find_int, has
from autopar.runs.rows import RunRow
from autopar.workload import Precision
from costmodels.hardware import Cluster, Device, Link, device_names, load_cluster, load_fabric
from costmodels.units import GB, GIB, TFLOPS

# (pattern, shipped device); the first match counts.
DEVICES: tuple[tuple[str, str], ...] = (
    (r"gb300", "gb300"), (r"gb200", "gb200"), (r"b300", "b300"), (r"b200", "b200"),
    (r"h200", "h200"), (r"h800", "h800"), (r"h100.*(500 ?w|hbm2e|9[4-6] ?gi?b)", "h100-500w"), (r"h100", "h100"),
    (r"a800", "a800"), (r"a100.*40 ?g", "a100-40g"), (r"a100", "a100-80g"), (r"v100|dgx-?2", "v100"),
    (r"mi300", "mi300x"), (r"\bcpu\b", "cpu"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Relative:
    """A device that does not ship, as one that does with its own datasheet: dense TFLOP/s of bf16, GiB, GB/s."""

    like: str
    bf16_tflops: float
    memory_gib: float
    bandwidth_gbps: float


# Sources: the vendors' datasheets.
RELATIVES: tuple[tuple[str, Relative], ...] = (
    (r"gh200", Relative(like="h100", bf16_tflops=989.4, memory_gib=96, bandwidth_gbps=4000)),
    (r"\bh20\b", Relative(like="h100", bf16_tflops=148, memory_gib=96, bandwidth_gbps=4000)),
    (r"h100.*pcie", Relative(like="h100", bf16_tflops=756, memory_gib=80, bandwidth_gbps=2000)),
    (r"h100.*nvl", Relative(like="h100", bf16_tflops=835, memory_gib=94, bandwidth_gbps=3900)),
    (r"mi325", Relative(like="mi300x", bf16_tflops=1307.4, memory_gib=256, bandwidth_gbps=6000)),
    (r"mi35[05]", Relative(like="mi300x", bf16_tflops=2300, memory_gib=288, bandwidth_gbps=8000)),
    (r"mi250", Relative(like="mi300x", bf16_tflops=191.5, memory_gib=64, bandwidth_gbps=1638)),
)


def read_device(row: RunRow) -> Read[tuple[str, Relative | None]]:
    """Name of a shipped device, and what differs where the row's is a relative of it. Raises CannotRead."""
    words, assumed = row.words("gpu"), []
    if not words:
        words = _guess_device(row)
        assumed.append(f"device not stated: {words} assumed")
    relative = next((relative for pattern, relative in RELATIVES if has(words, pattern)), None)
    if relative is not None:
        return (relative.like, relative), (f"{row.gpu} taken as {relative.like} with its own peaks and memory",)
    found = next((device for pattern, device in DEVICES if has(words, pattern)), None)
    if found is None or found not in device_names():
        raise CannotRead(f"no numbers of device '{row.gpu}'")
    if found == "v100" and (row.gpus_per_node == 16 or has(row.words("interconnect"), "nvswitch")):
        found = "v100-dgx2"
    if found == "a100-80g" and not has(words, r"80 ?g"):
        assumed.append("A100 of 80 GB assumed")
    return (found, None), tuple(assumed)


def _as_stated(device: Device, relative: Relative | None, row: RunRow) -> Device:
    """The device with the relative's datasheet, or with the memory that the row names where it differs."""
    if relative is not None:
        return _as_relative(device, relative)
    stated = find_int(row.words("gpu"), r"(\d+) ?gi?b\b")
    if stated and abs(stated * GIB / device.memory_bytes - 1) > 0.15:
        return dataclasses.replace(device, memory_bytes=stated * GIB)
    return device


def _as_relative(device: Device, relative: Relative) -> Device:
    scale = relative.bf16_tflops * TFLOPS / device.peak("bf16")
    return dataclasses.replace(
        device,
        peak_flops={precision: peak * scale for precision, peak in device.peak_flops.items()},
        memory_bytes=relative.memory_gib * GIB,
        memory_bandwidth=relative.bandwidth_gbps * GB,
    )


def _guess_device(row: RunRow) -> str:
    around = row.words("source_ref", "notes", "interconnect")
    for pattern, _ in DEVICES:
        match = re.search(pattern, around)
        if match:
            return match[0]
    return "a100-80gb" if (row.year or 2024) < 2024 or has(around, r"\blts\b|_lts") else "h100-80gb"


def read_cluster(row: RunRow, num_devices: int) -> Read[Cluster]:
    """The cluster of a run on ``num_devices`` devices. Raises CannotRead for an unknown device."""
    (name, relative), assumed = read_device(row)
    usual = load_cluster(f"{name}:1x{num_devices}")
    per_node = row.gpus_per_node or min(usual_node(name), num_devices)
    if num_devices <= per_node:
        nodes, per_node = 1, num_devices
    elif num_devices % per_node:
        shape = math.gcd(num_devices, per_node)
        assumed = (*assumed, f"{num_devices} devices do not fill nodes of {per_node}: nodes of {shape}")
        nodes, per_node = num_devices // shape, shape
    else:
        nodes = num_devices // per_node
    network, label = usual.network_link, ""
    domain = domain_size(row, usual.domain_size)
    if num_devices > (domain or per_node):
        link, more = read_network(row, per_node, usual.network_link)
        network, label, assumed = link, f" {link.name} {link.bandwidth / 1e9:g} GB/s", (*assumed, *more)
    cluster = dataclasses.replace(
        usual, name=f"{name}:{nodes}x{per_node}{label}", device=_as_stated(usual.device, relative, row),
        num_nodes=nodes, devices_per_node=per_node,
        network_link=network, domain_size=domain if domain > per_node else 0,
    )  # fmt: skip
    return cluster, assumed


def usual_node(device: str) -> int:
    """Devices of a usual node: four on boards with Grace processors, else eight."""
    return 4 if device.startswith("gb") else 8


def domain_size(row: RunRow, usual: int) -> int:
    """Devices that NVLink joins: NVL72 and the like in words, else the device's usual; 0 means a node."""
    return find_int(row.words("interconnect"), r"nvl-?(\d{2,})") or usual


def read_network(row: RunRow, per_node: int, usual: Link) -> Read[Link]:
    """Link between nodes from words, else the device's usual one."""
    found, assumed = parse_network(row.interconnect or "", per_node)
    if found is None:
        stated = f"'{row.interconnect}'" if row.interconnect else "not stated"
        return usual, (f"network between nodes {stated}: {usual.name} {usual.bandwidth / 1e9:g} GB/s assumed",)
    return load_fabric(found.fabric, found.bandwidth), assumed


def read_precision(row: RunRow, device: Device) -> Read[Precision]:
    """Type of the products from ``dtype`` and notes; a type that the device lacks becomes its nearest."""
    words, dtype, assumed = row.words("notes"), row.words("dtype"), []
    if not dtype:
        dtype = "fp16" if device.name.startswith("v100") else "bf16"
        assumed.append(f"precision not stated: {dtype} assumed")
    label = _label(dtype, words)
    if label is Precision.NVFP4 and has(words, r"bf16 tail"):
        assumed.append("last blocks in bf16 are taken as nvfp4")
    for option in _nearest_types(label):
        if option.value in device.peak_flops:
            if option is not label:
                assumed.append(f"{device.name} has no {label}: {option} assumed")
            return option, tuple(assumed)
    raise CannotRead(f"device {device.name} has no products in {label}")


def _label(dtype: str, words: str) -> Precision:
    if has(dtype, r"fp8|float8|fp4|mx"):
        # The label that a table prints comes before the name of the recipe.
        printed = re.search(r"precision label ([\w.-]+)", words)
        for text in (dtype, printed[1] if printed else "", words):
            if has(text, r"nvfp4|fp4"):
                return Precision.NVFP4
            if has(text, r"mxfp8|fp8[-_ ]mx\b|fp8_mx"):
                return Precision.MXFP8
            if has(text, r"fp8[-_ ]sc\b|block-?wise|fp8[-_ ]block|128x128|subchannel"):
                return Precision.FP8_BLOCK
            if has(text, r"fp8[-_ ](cs|ds)|current[- ]scaling|delayed|tensor-?wise"):
                return Precision.FP8
        return Precision.FP8
    if has(dtype, r"bf16|bfloat"):
        return Precision.BF16
    if has(dtype, r"fp16|float16|half|amp|mixed"):
        return Precision.FP16
    return Precision.FP32


def _nearest_types(wanted: Precision) -> tuple[Precision, ...]:
    narrow = (wanted, Precision.FP8, Precision.BF16, Precision.FP16)
    wide = (wanted, Precision.BF16 if wanted is Precision.FP16 else Precision.FP16)
    return narrow if wanted not in (Precision.BF16, Precision.FP16, Precision.FP32) else wide
