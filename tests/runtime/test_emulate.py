"""Emulated clusters: names, errors, tearing down, and what gloo really sends on their links."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.errors import InputError, RunError
from autopar.runtime.launch import emulate
from autopar.runtime.launch.emulate import (
    PAYLOAD_SHARE,
    emulated_cluster,
    parse_emulation,
    remove_leftovers,
    why_unavailable,
)
from autopar.runtime.launch.launcher import launch
from costmodels.collectives import sent_bytes
from costmodels.stack import load_stack

REASON = why_unavailable()
needs_cluster = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MIB = 2**20


def namespaces() -> set[str]:
    return set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()


def test_parse_emulation() -> None:
    assert parse_emulation("4x200mbit") == (4, 25e6)
    assert parse_emulation(" 2 X 1 gbit ") == (2, 125e6)
    assert parse_emulation("8x10MB/s") == (8, 1e7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("200mbit", "NODESxRATE"), ("4x", "NODESxRATE"), ("fourx200mbit", "NODESxRATE"), ("4x200", "unit"),
        ("4x200furlongs", "not a bandwidth"), ("1x200mbit", "1 nodes; use 2"), ("0x200mbit", "0 nodes"),
        ("65x200mbit", "65 nodes"), ("2x1kbit", "rate of 1e\\+03"), ("2x400gbit", "10gbit"), ("-2x1gbit", "NODESxRATE"),
    ],
)  # fmt: skip
def test_malformed_emulation_is_an_input_error(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_emulation(text)


def test_without_root_or_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate.os, "geteuid", lambda: 1000)
    assert "root" in str(why_unavailable())
    with pytest.raises(RunError, match="root"), emulated_cluster(2, 25e6):
        pass
    monkeypatch.setattr(emulate.os, "geteuid", lambda: 0)
    monkeypatch.setattr(emulate.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert "tc (package iproute2)" in str(why_unavailable())


@pytest.mark.netns
@needs_cluster
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left(error: type[BaseException] | None) -> None:
    before = namespaces()
    try:
        with emulated_cluster(3, 25e6) as nodes:
            assert len(namespaces() - before) == 4
            sleeper = subprocess.Popen([*nodes[2].command_prefix, "sleep", "100"])
            ping = [*nodes[0].command_prefix, sys.executable, "-c", _CONNECT, nodes[2].address]
            assert "refused" in subprocess.run(ping, capture_output=True, text=True, timeout=20).stdout
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert namespaces() == before
    assert sleeper.wait(timeout=5) != 0, "what still ran in a node was killed"


_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    print("refused: the node is there")
"""


@pytest.mark.netns
@needs_cluster
def test_two_clusters_at_once() -> None:
    with emulated_cluster(2, 25e6) as first, emulated_cluster(2, 50e6) as second:
        assert not {node.command_prefix for node in first} & {node.command_prefix for node in second}


@pytest.mark.netns
@needs_cluster
def test_leftovers_of_dead_programs_are_removed() -> None:
    program = subprocess.run(
        [sys.executable, "-c", "import os; from autopar.runtime.launch.emulate import emulated_cluster\n"
         "cluster = emulated_cluster(2, 25e6); cluster.__enter__(); print(os.getpid(), flush=True); os._exit(1)"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    pid = program.stdout.strip()
    left = {name for name in namespaces() if name.startswith(f"ap{pid}-")}
    assert len(left) == 3, program.stderr
    with emulated_cluster(2, 25e6):
        alive = {name for name in namespaces() if name.startswith(f"ap{os.getpid()}-")}
        assert left <= set(remove_leftovers()) or not left & namespaces()
        assert alive <= namespaces(), "those of a live program stay"
    assert not left & namespaces()


def run_counted(folder: Path, nodes: int, rate: float, cases: list[tuple[str, int]]) -> list[dict[str, object]]:
    job, out = folder / "cases.json", folder / "results.json"
    job.write_text(json.dumps({"cases": cases, "out": str(out)}))
    with emulated_cluster(nodes, rate) as cluster:
        env = {"PYTHONPATH": str(Path(__file__).parent)}
        started = [dataclasses.replace(node, env=env) for node in cluster]
        launch(
            "counted_collectives", job, nodes=started, ranks_per_node=1, out_dir=folder / "logs",
            stall_timeout_s=60,
        )  # fmt: skip
    return list(json.loads(out.read_text()))


@pytest.mark.netns
@pytest.mark.dist
@needs_cluster
@pytest.mark.parametrize("nodes", [2, 4])
def test_gloo_sends_what_the_formulas_say(tmp_path: Path, nodes: int) -> None:
    """Bytes on each node's interface, headers off, within 5 percent of sent_bytes; never faster than the rate."""
    rate, algorithms = 50e6, load_stack("autopar-gloo").algorithms
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
    results = run_counted(tmp_path, nodes, rate, [(kind, 4 * MIB) for kind in kinds])
    for result in results:
        kind, sent = str(result["kind"]), result["sent"]
        assert isinstance(sent, list)
        expected = float(sent_bytes(kind, nodes, 4 * MIB, algorithms))
        counted = [bytes_ * PAYLOAD_SHARE for bytes_ in (sent[:1] if kind in ("broadcast", "send") else sent)]
        assert counted == pytest.approx([expected] * len(counted), rel=0.05), kind
        if kind == "reduce_scatter":
            assert counted[0] > 1.8 * float(sent_bytes(kind, nodes, 4 * MIB, {})), "a ring would send half: control"
        if kind == "broadcast" and nodes == 4:
            assert sum(sent) * PAYLOAD_SHARE == pytest.approx(3 * 4 * MIB, rel=0.05), "each rank gets it once"
        assert result["seconds"] > 0.95 * expected / rate, f"{kind}: the links do not hold their rate"
