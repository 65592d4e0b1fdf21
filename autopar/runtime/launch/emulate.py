"""An emulated cluster on one machine: network namespaces joined by a bridge, their links held to a rate.

Each node is a namespace with one interface, ``eth0``, whose other end is a port of a bridge in a namespace of its
own; nothing is added to the machine's own network. Linux only, as root (network namespaces, veth, tbf). Delay and
loss are not emulated (netem is missing from some kernels): latency is that of the machine.

How the links are set, each tried against gloo's collectives with the interfaces' byte counters:

- MTU 9000, as clusters use: headers and acknowledgements then add about 1.1 percent to the payload (4.6 at 1500).
- ``tbf`` on both ends of each link, so that sending and receiving are limited, as on a full-duplex network card.
- A burst of 20 kB, or 0.64 ms of the rate: what passes at once, unlimited. A larger one lets small messages through
  for nothing; a smaller one makes the kernel cut segments into packets, which costs processor time at high rates.
- A queue that TCP does not fill, so that nothing is lost and sent again; Reno as congestion control, since BBR paces
  by its own estimate and varies several percent from call to call; no slow start after idle time, since a training
  step is bursts with pauses.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from autopar.errors import InputError, RunError
from autopar.runtime.launch.nodes import Node
from costmodels.units import parse_bandwidth

MTU = 9000
TCP_HEADERS = 52
"""Bytes of IPv4 and TCP headers with timestamps."""
PAYLOAD_SHARE = (MTU - TCP_HEADERS) / (MTU + 14 + TCP_HEADERS / 2)
"""Payload per byte on the link: Ethernet frames of MTU bytes, and an acknowledgement for about every other one in
the opposite direction, which carries a flow of its own in a ring."""

_INTERFACE = "eth0"
_MAX_NODES = 64
_MIN_RATE, _MAX_RATE = 1e6 / 8, 10e9 / 8
_MIN_BURST, _BURST_SECONDS, _QUEUE_BYTES = 20_000, 0.64e-3, 16_000_000
_NAME = re.compile(r"ap(\d+)-\d+-(?:\d+|switch|probe)")
_clusters = count()


def parse_emulation(text: str) -> tuple[int, float]:
    """Parse ``NODESxRATE`` such as ``4x200mbit`` into (nodes, bytes/s). Raises InputError."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(.+?)\s*", text)
    if not match:
        raise InputError(f"emulated cluster '{text}' is not NODESxRATE, such as 4x200mbit (4 nodes, 200 Mbit/s each)")
    nodes, rate = int(match[1]), parse_bandwidth(match[2])
    if not 2 <= nodes <= _MAX_NODES:
        raise InputError(f"emulated cluster '{text}': {nodes} nodes; use 2 to {_MAX_NODES}")
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise InputError(
            f"emulated cluster '{text}': a rate of {rate * 8:.3g} bit/s; use 1mbit to 10gbit, since the kernel does "
            "not hold slower ones evenly and the processors do not reach faster ones"
        )
    return nodes, rate


def why_unavailable() -> str | None:
    """Say why this machine cannot emulate a cluster, or None if it can. Tries it, in milliseconds."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "an emulated cluster needs root (network namespaces)"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"an emulated cluster needs the command {' and '.join(missing)} (package iproute2)"
    name = f"ap{os.getpid()}-{next(_clusters)}-probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", name, "link", "add", "port0", "type", "veth", "peer", "name", "port1")
        _limit(name, "port0", _MIN_RATE)
        _run("ip", "netns", "exec", name, "true")
    except RunError as error:
        return f"this machine does not emulate clusters: {error}"
    finally:
        _delete(name)
    return None


@contextmanager
def emulated_cluster(num_nodes: int, rate: float) -> Iterator[tuple[Node, ...]]:
    """Set up ``num_nodes`` nodes whose links carry ``rate`` bytes/s each way, and take them down at the end.

    What processes of a dead program left behind is removed first. At the end, also after an exception, processes
    that still run in the nodes are killed and the namespaces deleted.

    Raises:
        RunError: the machine cannot do it; see why_unavailable.
    """
    reason = why_unavailable()
    if reason is not None:
        raise RunError(reason)
    remove_leftovers()
    base = f"ap{os.getpid()}-{next(_clusters)}"
    switch, names = f"{base}-switch", [f"{base}-{index}" for index in range(num_nodes)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "mtu", str(MTU), "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for index, name in enumerate(names):
            _add_node(switch, name, index, rate)
        yield tuple(
            Node(
                index=index,
                address=_address(index),
                command_prefix=("ip", "netns", "exec", name),
                env={},
                interface=_INTERFACE,
            )
            for index, name in enumerate(names)
        )
    finally:
        for name in (*names, switch):
            _delete(name)


def remove_leftovers() -> tuple[str, ...]:
    """Delete namespaces whose program is dead, with the processes in them. Returns their names."""
    if not os.path.isdir("/run/netns"):
        return ()
    left = []
    for name in sorted(os.listdir("/run/netns")):
        match = _NAME.fullmatch(name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            _delete(name)
            left.append(name)
    return tuple(left)


def _address(index: int) -> str:
    return f"10.77.0.{index + 1}"


def _add_node(switch: str, name: str, index: int, rate: float) -> None:
    port = f"port{index}"
    _run("ip", "netns", "add", name)
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", _INTERFACE, "netns", name)
    _run("ip", "-n", switch, "link", "set", port, "mtu", str(MTU), "master", "br0", "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "link", "set", _INTERFACE, "mtu", str(MTU), "up")
    _run("ip", "-n", name, "addr", "add", f"{_address(index)}/24", "dev", _INTERFACE)
    for key, value in (("tcp_congestion_control", "reno"), ("tcp_slow_start_after_idle", "0")):
        _run("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{key}")
    _limit(name, _INTERFACE, rate)
    _limit(switch, port, rate)


def _limit(namespace: str, interface: str, rate: float) -> None:
    burst = max(_MIN_BURST, int(rate * _BURST_SECONDS))
    _run(
        "tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf",
        "rate", f"{round(rate * 8)}bit", "burst", str(burst), "limit", str(_QUEUE_BYTES),
    )  # fmt: skip


def _delete(name: str) -> None:
    """Kill what runs in a namespace and delete it; fine if it does not exist."""
    for pid in _output("ip", "netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    _output("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"'{' '.join(command)}' failed: {_last_line(done.stderr) or f'exit {done.returncode}'}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
