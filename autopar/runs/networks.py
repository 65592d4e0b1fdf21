"""Words for the links between nodes -> a shipped fabric and bytes/s per device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autopar.runs.reading import Read, has

# Named machines: (pattern, fabric, Gbit/s per node). Sources: the systems' public descriptions.
MACHINES: tuple[tuple[str, str, float], ...] = (
    (r"selene|dgx superpod|dgx a100", "infiniband", 1600), (r"\beos\b|dgx h[12]00", "infiniband", 3200),
    (r"dgx [bg]?b[23]00", "infiniband", 3200), (r"jean zay", "omnipath", 400), (r"grand teton", "roce", 3200),
    (r"p3\.16x", "ethernet", 25), (r"p3dn", "efa", 100), (r"p4de?\b", "efa", 400), (r"p5e?n?\b", "efa", 3200),
    (r"perlmutter|frontier|alps", "roce", 800), (r"nd.*a100.*v4", "infiniband", 1600),
    (r"nd.*h100.*v5", "infiniband", 3200), (r"summit", "infiniband", 200),
)  # fmt: skip

FABRICS: tuple[tuple[str, str], ...] = (
    (r"omni-?path|\bopa\b", "omnipath"), (r"\befa\b", "efa"), (r"roce|slingshot|rdma|spectrum-?x", "roce"),
    (r"infiniband|\bib\b|\b[efhnxq]dr(-?100)?\b|quantum", "infiniband"), (r"tcp|ethernet|gbe\b|\bena\b", "ethernet"),
)  # fmt: skip

# Gbit/s of one adapter of an InfiniBand generation: InfiniBand Trade Association, 4 lanes (HDR100: 2).
GENERATIONS: tuple[tuple[str, float], ...] = (
    (r"qdr", 40), (r"fdr", 56), (r"edr|hdr-?100", 100), (r"hdr", 200), (r"ndr-?200", 200), (r"ndr", 400), (r"xdr", 800),
)  # fmt: skip

ADAPTERS_PER_NODE = 8
_RATE = r"(?P<rate>\d+(?:\.\d+)?) ?(?P<scale>[GT])(?P<unit>b|B|E|ig)?(?:it|ps|/s|E|its)*(?![\w])"
_LOCAL = re.compile(r"nv-?link|nv-?switch|nvl ?\d+|pcie|xgmi|infinity fabric", re.IGNORECASE)
_BEYOND = re.compile(r"\bib\b|infiniband|roce|\befa\b|tcp|rdma", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What words say of the links between nodes: a shipped fabric and bytes/s per device."""

    fabric: str
    bandwidth: float


def parse_network(text: str, per_node: int) -> Read[Network | None]:
    """Fabric and bytes/s per device of nodes of ``per_node``; None where the words say nothing of it.

    ``4x100Gb`` and ``1600 Gbps/node`` are of a node, ``400 Gb/s per GPU`` of a device; GB is bytes, Gb bits. The name
    of an InfiniBand generation is an adapter per device, at most 8 a node.
    """
    parts = [part for part in re.split(r"\s*[+;,]\s*", text) if part]
    outside = " + ".join(part for part in parts if not _LOCAL.search(part) or _BEYOND.search(part))
    words = outside.lower()
    kind = next((fabric for pattern, fabric in FABRICS if has(words, pattern)), None)
    gbits, assumed = _stated_rate(outside, words, kind, per_node)
    if gbits is None:
        for pattern, fabric, rate in MACHINES:
            if has(text.lower(), pattern):
                return Network(fabric=fabric, bandwidth=rate / 8 * 1e9 / per_node), ()
        return None, ()
    return Network(fabric=kind or "infiniband", bandwidth=gbits / 8 * 1e9), assumed


def _stated_rate(outside: str, words: str, kind: str | None, per_node: int) -> Read[float | None]:
    """Gbit/s per device."""
    adapters = min(per_node, ADAPTERS_PER_NODE)
    several = re.search(r"(?P<count>\d+) ?[x×*] ?" + _RATE, outside)
    single = re.search(_RATE, outside)
    if several:
        return int(several["count"]) * _gbits(several) / per_node, ()
    if single:
        rate = _gbits(single)
        if has(words, r"per (gpu|device|rank|accelerator|gcd)|/ ?gpu|each gpu"):
            return rate, ()
        if has(words, r"/ ?node|per node") or kind in ("ethernet", "efa") or rate > 800:
            return rate / per_node, ()
        return rate * adapters / per_node, (f"{single[0]} taken as that of one adapter per device",)
    for pattern, rate in GENERATIONS:
        named = re.search(rf"(?:(\d+) ?[x×*] ?|\b)(?:{pattern})\b", words)
        if named:
            return (int(named[1]) if named[1] else adapters) * rate / per_node, ()
    return None, ()


def _gbits(match: re.Match[str]) -> float:
    thousands = 1000 if match["scale"] == "T" else 1
    return float(match["rate"]) * thousands * (8 if match["unit"] == "B" else 1)
