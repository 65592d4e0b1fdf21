"""Machines that ranks run on: how to start a command there and what its network interface counted."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.errors import RunError

LOCAL_ADDRESS = "127.0.0.1"
# Tells a rank which interface its node is counted by.
INTERFACE_VARIABLE = "AUTOPAR_INTERFACE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine, or a network namespace that stands for one.

    Attributes:
        index: 0 is the node that the others connect to.
        address: IP address or host name under which the other nodes reach it.
        command_prefix: what to put before a command so that it runs there, such as ``("ip", "netns", "exec", "n0")``.
        env: environment variables that its ranks get.
        interface: network interface that the ranks use and whose bytes are counted; None leaves the choice to the
            backend (loopback on a single machine) and counts nothing.
    """

    index: int
    address: str
    command_prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None


def local_node() -> Node:
    """This machine, all ranks on it."""
    return Node(index=0, address=LOCAL_ADDRESS)


def counter_paths(interface: str) -> tuple[str, str]:
    """Files with the bytes that an interface has sent and received since it exists (Linux)."""
    folder = f"/sys/class/net/{interface}/statistics"
    return f"{folder}/tx_bytes", f"{folder}/rx_bytes"


def read_traffic(node: Node) -> tuple[int, int]:
    """Bytes sent and received by the node's interface so far, headers included.

    Raises:
        RunError: the node has no interface, or it cannot be read.
    """
    if node.interface is None:
        raise RunError(f"node {node.index} has no interface whose bytes could be counted")
    command = [*node.command_prefix, "cat", *counter_paths(node.interface)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        sent, received = map(int, done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip()
        raise RunError(f"node {node.index}: cannot read the counters of interface {node.interface}: {detail}") from None
    return sent, received
