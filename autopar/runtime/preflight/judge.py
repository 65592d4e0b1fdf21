"""Preflight: is every node fit for a long run? Facts that ranks gather, judged. Imports no torch; the ranks do.

Facts are one record, so that what is wrong is a pure function of it: ``judge`` compares every rank and every link with
the median of all, and names those that are off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from autopar.errors import RunError
from costmodels.records import read_record, write_record
from costmodels.units import GIB, format_bytes, format_rate, format_seconds

WORKER = "autopar.runtime.preflight"
SCHEMA = 1
STALL_TIMEOUT_S = 120.0
LARGE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightJob:
    """What the ranks are to look at.

    Attributes:
        device: cpu or cuda.
        folder: that the run will write to; every node must see the same.
        out: file that rank 0 writes its facts to.
        timeout_s: seconds without progress after which ranks end.
    """

    device: str
    folder: str
    out: str
    timeout_s: float = STALL_TIMEOUT_S


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """What one rank found out about its process and its node.

    Attributes:
        rank, node: numbers; ``host`` and ``address`` are the node's name and the address of its interface.
        interface, mtu: that collectives use, as far as it is known; 0 and empty where it is not.
        device: as its maker calls it.
        versions: of python, torch, autopar and, on CUDA, NCCL.
        clock_offset_s: of the node's clock against rank 0's.
        free_memory, free_disk: bytes: host memory, and space of the run's folder.
        compute_s: seconds of a fixed matrix product, the fastest of several.
        nodes_seen: nodes whose file in the run's folder this rank sees.
        wrong_sums: data types whose all-reduce came out wrong here, each with the rank whose share was lost.
    """

    rank: int
    node: int
    host: str
    address: str
    interface: str
    mtu: int
    device: str
    versions: Mapping[str, str]
    clock_offset_s: float
    free_memory: float
    free_disk: float
    compute_s: float
    nodes_seen: tuple[int, ...]
    wrong_sums: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction between two nodes: ``alpha_s`` seconds of a small message, ``seconds`` of LARGE_BYTES."""

    source: int
    target: int
    alpha_s: float
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the large message, its start left out."""
        return LARGE_BYTES / max(self.seconds - self.alpha_s, 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that was found: a record for each rank, and both directions of every pair of nodes."""

    ranks: tuple[RankFacts, ...]
    links: tuple[Link, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks are on."""
        return len({facts.node for facts in self.ranks})


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is still fine.

    Attributes:
        slow: how many times the median a rank's or a link's time may be.
        clock_s: seconds that a clock may be off.
        free_disk, free_memory: bytes that must be free.
        bandwidth: bytes/s that every link must reach; None compares links with each other alone.
    """

    slow: float = 1.5
    clock_s: float = 1.0
    free_disk: float = 2 * GIB
    free_memory: float = 1 * GIB
    bandwidth: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong: what kind, of whom, and the numbers in a line."""

    kind: str
    subject: str
    detail: str


def judge(facts: Facts, limits: Limits | None = None) -> tuple[Finding, ...]:
    """Everything that is wrong, in the order in which one would look: software, nodes, sums, ranks, links."""
    limits = limits or Limits()
    return (
        *_unequal(facts),
        *_nodes(facts, limits),
        *_sums(facts),
        *_slow_ranks(facts, limits),
        *_slow_links(facts, limits),
    )


def _unequal(facts: Facts) -> list[Finding]:
    """Ranks whose software or device is not what most ranks have."""
    found = []
    names = dict.fromkeys(name for rank in facts.ranks for name in rank.versions)
    looks: dict[str, Callable[[RankFacts], str]] = {name: partial(_version, name) for name in names}
    looks["device"] = lambda rank: rank.device
    for name, look in looks.items():
        usual, _ = Counter(map(look, facts.ranks)).most_common(1)[0]
        odd = [rank for rank in facts.ranks if look(rank) != usual]
        for value in dict.fromkeys(map(look, odd)):
            who = [rank for rank in odd if look(rank) == value]
            detail = f"{name} is {value}; the others have {usual}"
            found.append(Finding(kind="versions", subject=_ranks(who), detail=detail))
    mtus = Counter(rank.mtu for rank in facts.ranks if rank.mtu)
    for rank in _first_ranks(facts):
        if rank.mtu and rank.mtu != mtus.most_common(1)[0][0]:
            detail = f"{rank.interface} has an MTU of {rank.mtu}; the others have {mtus.most_common(1)[0][0]}"
            found.append(Finding(kind="interface", subject=_node(rank), detail=detail))
    return found


def _version(name: str, rank: RankFacts) -> str:
    return rank.versions.get(name, "none")


def _nodes(facts: Facts, limits: Limits) -> list[Finding]:
    found = []
    everyone = set(range(facts.num_nodes))
    for rank in _first_ranks(facts):
        missing = sorted(everyone - set(rank.nodes_seen))
        if missing:
            detail = f"does not see the files of node {', '.join(map(str, missing))}: the folder is not shared"
            found.append(Finding(kind="folder", subject=_node(rank), detail=detail))
        if abs(rank.clock_offset_s) > limits.clock_s:
            detail = f"its clock is off by {rank.clock_offset_s:+.1f} s against node 0"
            found.append(Finding(kind="clock", subject=_node(rank), detail=detail))
        for kind, free, least in (
            ("memory", rank.free_memory, limits.free_memory),
            ("disk", rank.free_disk, limits.free_disk),
        ):
            if free < least:
                detail = f"{format_bytes(free)} of {kind} free; at least {format_bytes(least)} are needed"
                found.append(Finding(kind=kind, subject=_node(rank), detail=detail))
    return found


def _sums(facts: Facts) -> list[Finding]:
    return [
        Finding(
            kind="all-reduce",
            subject=_ranks([rank]),
            detail=f"a sum in {dtype} came out wrong: the share of rank {lost} is not in it",
        )
        for rank in facts.ranks
        for dtype, lost in rank.wrong_sums.items()
    ]


def _slow_ranks(facts: Facts, limits: Limits) -> list[Finding]:
    usual = median(rank.compute_s for rank in facts.ranks)
    return [
        Finding(
            kind="slow rank",
            subject=_ranks([rank]),
            detail=f"a matrix product takes {format_seconds(rank.compute_s)}, {rank.compute_s / usual:.1f} times the "
            f"median of {format_seconds(usual)}",
        )
        for rank in facts.ranks
        if rank.compute_s > limits.slow * usual
    ]


def _slow_links(facts: Facts, limits: Limits) -> list[Finding]:
    """Slow directions; those of one node, where all that it sends or receives is slow and more than one, as one."""
    if not facts.links:
        return []
    # Of two directions the median is no more typical than either: the faster one is what the other is held against.
    usual = min(link.seconds for link in facts.links) if len(facts.links) == 2 else median(
        link.seconds for link in facts.links
    )  # fmt: skip
    bound = limits.slow * usual
    if limits.bandwidth is not None:
        bound = min(bound, limits.slow * LARGE_BYTES / limits.bandwidth)
    slow = [link for link in facts.links if link.seconds > bound]
    names = {rank.node: _node(rank) for rank in _first_ranks(facts)}
    compared = f"{format_rate(LARGE_BYTES / usual)} is usual"
    if len(slow) == len(facts.links):
        assert limits.bandwidth is not None, "not every link is slower than most"
        detail = f"{format_rate(LARGE_BYTES / usual)}; {format_rate(limits.bandwidth)} were expected"
        return [Finding(kind="slow link", subject="every link", detail=detail)]
    found, explained = [], set()
    for node, verb, end in [(n, v, e) for v, e in (("sends", "source"), ("receives", "target")) for n in names]:
        every = [link for link in facts.links if getattr(link, end) == node]
        if len(every) > 1 and all(link in slow for link in every):
            rate = LARGE_BYTES / median(link.seconds for link in every)
            detail = f"{verb} at {format_rate(rate)} with every other node; {compared}"
            found.append(Finding(kind="slow link", subject=names[node], detail=detail))
            explained.update(every)
    for link in slow:
        if link not in explained:
            rate = LARGE_BYTES / link.seconds
            subject = f"{names[link.source]} to {names[link.target]}"
            found.append(Finding(kind="slow link", subject=subject, detail=f"{format_rate(rate)}; {compared}"))
    return found


def rounds(num_nodes: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All pairs of nodes in rounds in which no node is in two pairs (circle method, as in tournaments)."""
    circle: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        found.append(tuple((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return tuple(found)


def _first_ranks(facts: Facts) -> list[RankFacts]:
    """The lowest rank of each node."""
    return [min((r for r in facts.ranks if r.node == node), key=lambda r: r.rank) for node in range(facts.num_nodes)]


def _node(rank: RankFacts) -> str:
    return f"node {rank.node} ({rank.address or rank.host})"


def _ranks(ranks: Sequence[RankFacts]) -> str:
    nodes = ", ".join(dict.fromkeys(_node(rank) for rank in ranks))
    return f"rank {', '.join(str(rank.rank) for rank in ranks)} on {nodes}"


def read_facts(path: str | Path) -> Facts:
    """Read what rank 0 wrote. Raises InputError."""
    return read_record(Facts, path, SCHEMA)


def read_preflight_job(path: str | Path) -> PreflightJob:
    """Read a job file. Raises InputError."""
    return read_record(PreflightJob, path, SCHEMA)


def preflight(
    folder: Path,
    *,
    device: str,
    start: Callable[[str, Path], None],
    leads: bool = True,
) -> Facts | None:
    """Start ranks and gather facts about them and their nodes.

    Args:
        folder: that the run will write to; a folder ``preflight`` in it keeps job, logs and facts.
        device: cpu or cuda.
        start: runs a worker module with a job file in all ranks, such as by ``launch``.
        leads: whether this process reads the facts; where every node is started by itself, one does.

    Returns:
        The facts; None if this process does not lead.

    Raises:
        RunError: a rank failed or hung; the message names it.
    """
    own = folder.resolve() / "preflight"
    job, out = own / "job.json", own / "facts.json"
    if leads:
        out.unlink(missing_ok=True)
    write_record(job, PreflightJob(device=device, folder=str(own.parent), out=str(out)), SCHEMA)
    start(WORKER, job)
    if not leads:
        return None
    if not out.exists():
        raise RunError(f"the ranks of the preflight ended well but left no {out}")
    return read_facts(out)
