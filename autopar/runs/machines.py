"""The machine of a run: words for its devices and network -> Cluster of costmodels.hardware."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from autopar.runs.reading import CannotRead, Read, find_int, has
from autopar.runs.rows import RunRow
from autopar.workload import Precision
from costmodels.hardware import Cluster, Device, Link, device_names, load_cluster, load_device, load_fabric
from costmodels.units import GIB

# (pattern, shipped device); the first match counts.
DEVICES: tuple[tuple[str, str], ...] = (
    (r"gb300", "gb300"), (r"gb200", "gb200"), (r"b300", "b300"), (r"b200", "b200"), (r"gh200", "h100"),
    (r"h200", "h200"), (r"h800", "h800"), (r"h100.*(500 ?w|hbm2e|9[4-6] ?gi?b)", "h100-500w"), (r"h100", "h100"),
    (r"a800", "a800"), (r"a100.*40 ?g", "a100-40g"), (r"a100", "a100-80g"), (r"v100", "v100"),
    (r"mi300", "mi300x"), (r"\bcpu\b", "cpu"),
)  # fmt: skip

# Named machines: (pattern, fabric, Gbit/s per node). Sources: the systems' public descriptions.
MACHINES: tuple[tuple[str, str, float], ...] = (
    (r"selene|dgx superpod|dgx a100", "infiniband", 1600), (r"\beos\b|dgx h[12]00", "infiniband", 3200),
    (r"dgx [bg]?b[23]00", "infiniband", 3200), (r"jean zay", "omnipath", 400), (r"grand teton", "roce", 3200),
    (r"p3\.16x", "ethernet", 25), (r"p3dn", "efa", 100), (r"p4de?\b", "efa", 400), (r"p5e?n?\b", "efa", 3200),
    (r"perlmutter", "roce", 800), (r"nd.*a100.*v4", "infiniband", 1600), (r"nd.*h100.*v5", "infiniband", 3200),
)  # fmt: skip

FABRICS: tuple[tuple[str, str], ...] = (
    (r"omni-?path|\bopa\b", "omnipath"), (r"\befa\b", "efa"), (r"roce|slingshot|rdma|spectrum-x", "roce"),
    (r"infiniband|\bib\b|\b[efhnx]dr(100)?\b|quantum", "infiniband"), (r"tcp|ethernet|gbe|\benA?\b", "ethernet"),
)  # fmt: skip

# Gbit/s of one adapter of an InfiniBand generation: InfiniBand Trade Association, 4 lanes (HDR100: 2).
GENERATIONS: tuple[tuple[str, float], ...] = (
    (r"\bqdr\b", 40), (r"\bfdr\b", 56), (r"\bedr\b|hdr-?100\b", 100), (r"\bhdr\b", 200), (r"\bndr\b", 400),
    (r"\bxdr\b", 800),
)  # fmt: skip

ADAPTERS_PER_NODE = 8
_GBIT = r"(\d+(?:\.\d+)?) ?(?:gb/s|gbps|gbit/s|gbit|gbe|gb)"
_LOCAL = re.compile(r"nv-?link|nv-?switch|nvl ?\d+|pcie")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What words say of the links between nodes: a shipped fabric and bytes/s per device."""

    fabric: str
    bandwidth: float


def read_device(row: RunRow) -> Read[tuple[str, Device]]:
    """The shipped device (name, device), with the memory that the row names. Raises CannotRead."""
    words, assumed = row.words("gpu"), []
    if not words:
        words = _guess_device(row)
        assumed.append(f"device not stated: {words} assumed")
    found = next((device for pattern, device in DEVICES if has(words, pattern)), None)
    if found is None or found not in device_names():
        raise CannotRead(f"no numbers of device '{row.gpu}'")
    device = load_device(found)
    if found == "a100-80g" and not has(words, r"80 ?g"):
        assumed.append("A100 of 80 GB assumed")
    stated = find_int(words, r"(\d+) ?gi?b\b")
    if stated and abs(stated * GIB / device.memory_bytes - 1) > 0.15:
        device = dataclasses.replace(device, memory_bytes=stated * GIB)
    return (found, device), tuple(assumed)


def _guess_device(row: RunRow) -> str:
    around = row.words("source_ref", "notes", "interconnect")
    for pattern, _ in DEVICES:
        match = re.search(pattern, around)
        if match:
            return match[0]
    return "a100-80gb" if (row.year or 2024) < 2024 or has(around, r"\blts\b|_lts") else "h100-80gb"


def read_cluster(row: RunRow, num_devices: int) -> Read[Cluster]:
    """The cluster of a run on ``num_devices`` devices. Raises CannotRead for an unknown device."""
    (name, device), assumed = read_device(row)
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
    network, label = usual.network_link, usual.network_link.name
    domain = domain_size(row, usual.domain_size)
    if num_devices > (domain or per_node):
        link, more = read_network(row, per_node, usual.network_link)
        network, label, assumed = link, f"{link.name} {link.bandwidth / 1e9:g} GB/s", (*assumed, *more)
    cluster = dataclasses.replace(
        usual, name=f"{name}:{nodes}x{per_node} {label}", device=device, num_nodes=nodes, devices_per_node=per_node,
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
    words = row.words("interconnect")
    found, assumed = parse_network(words, per_node)
    if found is None:
        stated = f"'{row.interconnect}'" if words else "not stated"
        return usual, (f"network between nodes {stated}: {usual.name} {usual.bandwidth / 1e9:g} GB/s assumed",)
    return load_fabric(found.fabric, found.bandwidth), assumed


def parse_network(words: str, per_node: int) -> Read[Network | None]:
    """Fabric and bytes/s per device; None where the words say nothing of the links between nodes.

    ``4x100Gb`` and ``1600 Gbps/node`` are of a node, ``400 Gb/s per GPU`` of a device. The name of an InfiniBand
    generation is an adapter per device, at most 8 a node.
    """
    parts = [part for part in re.split(r"\s*[+;,]\s*", words.lower()) if part]
    outside = " + ".join(part for part in parts if not _LOCAL.search(part) or has(part, r"\bib\b|roce|efa|tcp"))
    kind = next((fabric for pattern, fabric in FABRICS if has(outside, pattern)), None)
    adapters = min(per_node, ADAPTERS_PER_NODE)
    several = re.search(r"(\d+) ?[x×] ?" + _GBIT, outside)
    single = re.search(_GBIT, outside)
    per_device: float | None = None
    assumed: tuple[str, ...] = ()
    if several:
        per_device = int(several[1]) * float(several[2]) / per_node
    elif single and has(outside, r"per (gpu|device|rank|accelerator)|/ ?gpu|each gpu"):
        per_device = float(single[1])
    elif single and (has(outside, r"/ ?node|per node") or kind in ("ethernet", "efa") or float(single[1]) > 800):
        per_device = float(single[1]) / per_node
    elif single:
        per_device = float(single[1]) * adapters / per_node
        assumed = (f"{single[0]} taken as one adapter per device",)
    if per_device is None:
        for pattern, rate in GENERATIONS:
            if has(outside, pattern):
                per_device = rate * adapters / per_node
    if per_device is None:
        for pattern, fabric, rate in MACHINES:
            if has(words.lower(), pattern):
                return Network(fabric=fabric, bandwidth=rate / 8 * 1e9 / per_node), ()
        return None, ()
    return Network(fabric=kind or "infiniband", bandwidth=per_device / 8 * 1e9), assumed


def read_precision(row: RunRow, device: Device) -> Read[Precision]:
    """Type of the products from ``dtype`` and notes; a type that the device lacks becomes its nearest."""
    words, dtype, assumed = row.words("notes"), row.words("dtype"), []
    if not dtype:
        dtype = "fp16" if device.name in ("v100",) else "bf16"
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
