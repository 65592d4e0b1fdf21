"""A preflight for the terminal and as plain data: nodes, links between them, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autopar.report.columns import Column, terminal_table
from autopar.runtime.preflight.judge import Facts, Finding
from costmodels.records import to_plain
from costmodels.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_NODES_IN_MATRIX = 12


def node_columns(facts: Facts) -> list[Column]:
    """A row for each node: its ranks, address, clock, space and slowest rank."""
    nodes = [[rank for rank in facts.ranks if rank.node == node] for node in range(facts.num_nodes)]
    firsts = [ranks[0] for ranks in nodes]
    return [
        Column(header="node", cells=tuple(str(rank.node) for rank in firsts)),
        Column(header="host", cells=tuple(rank.host for rank in firsts), text=True, drop=1),
        Column(header="ranks", cells=tuple(f"{ranks[0].rank}-{ranks[-1].rank}" for ranks in nodes)),
        Column(header="interface", cells=tuple(rank.interface or "-" for rank in firsts), text=True),
        Column(header="address", cells=tuple(rank.address or "-" for rank in firsts), text=True),
        Column(header="MTU", cells=tuple(str(rank.mtu or "-") for rank in firsts), drop=3),
        Column(header="clock", cells=tuple(f"{rank.clock_offset_s * 1e3:+.1f} ms" for rank in firsts), drop=2),
        Column(header="memory free", cells=tuple(format_bytes(rank.free_memory) for rank in firsts), drop=4),
        Column(header="disk free", cells=tuple(format_bytes(rank.free_disk) for rank in firsts), drop=5),
        Column(
            header="product of slowest rank",
            cells=tuple(format_seconds(max(rank.compute_s for rank in ranks)) for ranks in nodes),
        ),
    ]


def link_columns(facts: Facts) -> list[Column]:
    """Alpha and bandwidth from each node (row) to each other one."""
    by_ends = {(link.source, link.target): link for link in facts.links}
    nodes = range(min(facts.num_nodes, _MOST_NODES_IN_MATRIX))

    def cell(source: int, target: int) -> str:
        link = by_ends.get((source, target))
        return f"{format_seconds(link.alpha_s)} {format_rate(link.bandwidth)}" if link else "-"

    head = Column(header="from", cells=tuple(f"node {node}" for node in nodes), text=True)
    return [head, *(Column(header=f"to node {t}", cells=tuple(cell(s, t) for s in nodes)) for t in nodes)]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding."""
    return [f"{finding.kind}: {finding.subject}: {finding.detail}" for finding in findings]


def preflight_table(facts: Facts, findings: Sequence[Finding], *, width: int = 120) -> RenderableType:
    """Nodes, links, and the verdict."""
    from rich.console import Group
    from rich.text import Text

    versions = ", ".join(f"{name} {value}" for name, value in facts.ranks[0].versions.items())
    parts: list[RenderableType] = [
        terminal_table(node_columns(facts), width, title=f"{len(facts.ranks)} ranks, {versions}")
    ]
    if facts.links:
        more = f"; the first {_MOST_NODES_IN_MATRIX} nodes" if facts.num_nodes > _MOST_NODES_IN_MATRIX else ""
        parts.append(terminal_table(link_columns(facts), width, title=f"Links: start and bandwidth{more}"))
    lines = finding_lines(findings) or ["nothing is wrong"]
    return Group(*parts, *map(Text, lines))


def preflight_json(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything that was found, and what is wrong with it."""
    return {**to_plain(facts), "findings": [to_plain(finding) for finding in findings]}
