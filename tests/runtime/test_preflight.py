"""What is wrong with a cluster is told by name: from made-up facts, and from an emulated cluster with a slow node."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autopar.cli import run
from autopar.report.preflight_tables import finding_lines, link_columns, node_columns, preflight_json
from autopar.runtime.launch import emulate
from autopar.runtime.launch.emulate import emulated_cluster, why_unavailable
from autopar.runtime.launch.launcher import launch
from autopar.runtime.preflight.judge import LARGE_BYTES, Facts, Limits, Link, RankFacts, judge, preflight, rounds

NODES = 4
REASON = why_unavailable()


def rank_facts(rank: int, **changed: Any) -> RankFacts:
    facts = RankFacts(
        rank=rank, node=rank // 2, host=f"host{rank // 2}", address=f"10.0.0.{rank // 2 + 1}", interface="eth0",
        mtu=9000, device="H100", versions={"python": "3.11.7", "torch": "2.13.0"}, clock_offset_s=0.01,
        free_memory=64e9, free_disk=100e9, compute_s=1e-3 * (1 + rank / 100), nodes_seen=tuple(range(NODES)),
    )  # fmt: skip
    return dataclasses.replace(facts, **changed)


def healthy() -> Facts:
    links = [
        Link(source=a, target=b, alpha_s=1e-4, seconds=0.1 * (1 + (a + b) / 50))
        for a in range(NODES) for b in range(NODES) if a != b
    ]  # fmt: skip
    return Facts(ranks=tuple(rank_facts(rank) for rank in range(2 * NODES)), links=tuple(links))


def with_rank(rank: int, **changed: Any) -> Facts:
    facts = healthy()
    return dataclasses.replace(
        facts, ranks=tuple(dataclasses.replace(r, **changed) if r.rank == rank else r for r in facts.ranks)
    )


def with_slow(*slow: tuple[int, int], times: float = 3.0) -> Facts:
    facts = healthy()
    links = [
        dataclasses.replace(link, seconds=link.seconds * times) if (link.source, link.target) in slow else link
        for link in facts.links
    ]
    return dataclasses.replace(facts, links=tuple(links))


def told(facts: Facts, limits: Limits | None = None) -> list[str]:
    return finding_lines(judge(facts, limits))


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert told(healthy()) == []
    assert told(with_slow((0, 1), times=1.3)) == [], "within the spread that is allowed"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (with_rank(5, versions={"python": "3.11.7", "torch": "2.11.0"}),
         "versions: rank 5 on node 2 (10.0.0.3): torch is 2.11.0; the others have 2.13.0"),
        (with_rank(1, device="A100"), "versions: rank 1 on node 0 (10.0.0.1): device is A100; the others have H100"),
        (with_rank(2, mtu=1500),
         "interface: node 1 (10.0.0.2): eth0 has an MTU of 1500; the others have 9000"),
        (with_rank(6, nodes_seen=(3,)),
         "folder: node 3 (10.0.0.4): does not see the files of node 0, 1, 2: the folder is not shared"),
        (with_rank(4, clock_offset_s=-7.25), "clock: node 2 (10.0.0.3): its clock is off by -7.2 s against node 0"),
        (with_rank(0, free_disk=1e6), "disk: node 0 (10.0.0.1): "),
        (with_rank(0, free_memory=1e6), "memory: node 0 (10.0.0.1): "),
        (with_rank(7, wrong_sums={"bfloat16": 3}),
         "all-reduce: rank 7 on node 3 (10.0.0.4): a sum in bfloat16 came out wrong: the share of rank 3 is not in it"),
        (with_rank(3, compute_s=3e-3), "slow rank: rank 3 on node 1 (10.0.0.2): a matrix product takes 3"),
        (with_slow((1, 2)), "slow link: node 1 (10.0.0.2) to node 2 (10.0.0.3): "),
        (with_slow((2, 0), (2, 1), (2, 3)), "slow link: node 2 (10.0.0.3): sends at "),
        (with_slow((0, 2), (1, 2), (3, 2)), "slow link: node 2 (10.0.0.3): receives at "),
    ],
)  # fmt: skip
def test_one_thing_that_is_wrong_is_the_one_that_is_named(facts: Facts, expected: str) -> None:
    [line] = told(facts)
    assert line.startswith(expected)


def test_links_against_what_is_expected() -> None:
    usual = LARGE_BYTES / 0.1
    assert told(healthy(), Limits(bandwidth=usual)) == []
    [line] = told(healthy(), Limits(bandwidth=4 * usual))
    assert line.startswith("slow link: every link: ")


def test_two_nodes_have_two_directions_to_compare() -> None:
    def facts(back: float) -> Facts:
        links = (Link(source=0, target=1, alpha_s=0, seconds=0.1), Link(source=1, target=0, alpha_s=0, seconds=back))
        return Facts(ranks=tuple(rank_facts(rank, nodes_seen=(0, 1)) for rank in range(4)), links=links)

    assert told(facts(0.12)) == []
    [line] = told(facts(0.3))
    assert line.startswith("slow link: node 1 (10.0.0.2) to node 0 (10.0.0.1): ")


@pytest.mark.parametrize("nodes", range(1, 9))
def test_rounds_pair_everyone_once_and_no_one_twice_at_once(nodes: int) -> None:
    found = rounds(nodes)
    pairs = [pair for each in found for pair in each]
    assert sorted(pairs) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    for each in found:
        busy = [node for pair in each for node in pair]
        assert len(busy) == len(set(busy))


def test_tables_and_json() -> None:
    facts = with_slow((1, 2))
    assert [column.cells[0] for column in node_columns(facts)][:3] == ["0", "host0", "0-1"]
    assert len(link_columns(facts)) == NODES + 1
    document = json.loads(json.dumps(preflight_json(facts, judge(facts))))
    assert document["findings"][0]["kind"] == "slow link" and len(document["links"]) == NODES * (NODES - 1)


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["preflight", "--nodes", "2", "-o", str(tmp_path)]) == 2
    assert "--nodes, --node-rank and --master host:port go together" in capsys.readouterr().err


@pytest.mark.netns
@pytest.mark.dist
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_throttled_node_is_named(tmp_path: Path) -> None:
    """Three nodes, of which one sends at an eighth of the rate: that node, and nothing of the others."""
    with emulated_cluster(3, 50e6) as nodes:
        namespace = nodes[1].command_prefix[-1]
        subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", "eth0", "root"], check=True)
        emulate._limit(namespace, "eth0", 6e6)

        def start(module: str, job: Path) -> None:
            launch(module, job, nodes=nodes, ranks_per_node=1, out_dir=tmp_path / "logs", stall_timeout_s=100)

        facts = preflight(tmp_path, device="cpu", start=start)
    assert facts is not None
    links = [finding for finding in judge(facts) if finding.kind == "slow link"]
    assert [finding.subject for finding in links] == ["node 1 (10.77.0.2)"] and "sends at" in links[0].detail
    assert {finding.kind for finding in judge(facts)} <= {"slow link", "slow rank", "disk", "memory"}
    assert [rank.interface for rank in facts.ranks] == ["eth0"] * 3 and facts.ranks[0].mtu == emulate.MTU
    assert all(abs(rank.clock_offset_s) < 1 for rank in facts.ranks), "one machine, one clock"
