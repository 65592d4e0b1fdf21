"""The part of one node in a run that every node is started for by itself: by hand, by Slurm, by any other scheduler.

torchrun starts the ranks here, meets those of other nodes at the master, and starts all of them again when one ends
badly. Ranks that hang end themselves (see ``watchdog``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from autopar.errors import InputError, RunError
from autopar.runtime.launch.interfaces import address_of, interface_names
from autopar.runtime.launch.launcher import OnMessage
from autopar.runtime.launch.nodes import INTERFACE_VARIABLE
from autopar.runtime.launch.places import Place
from autopar.runtime.launch.progress import MESSAGE_PREFIX, MESSAGES_VARIABLE

SHUTDOWN_TIMEOUT_S = 60
"""Seconds that ranks have to end after SIGTERM, such as to write a checkpoint, before torchrun kills them."""


def torchrun_command(
    place: Place, module: str, job: Path, *, ranks_per_node: int, max_restarts: int, local_address: str = ""
) -> list[str]:
    """The command line that joins this node's ranks to the run."""
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(place.num_nodes), "--nproc-per-node", str(ranks_per_node),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", place.master, "--rdzv-id", place.run_id,
        # Otherwise torchrun compares names of hosts to tell who keeps the store, and may find that nobody does.
        "--rdzv-conf", f"is_host={int(place.node == 0)}",
        *(("--local-addr", local_address) if local_address else ()),
        "--max-restarts", str(max_restarts),
        "-m", module, str(job),
    ]  # fmt: skip


def interface_variables(interface: str) -> dict[str, str]:
    """Environment that keeps gloo and NCCL to an interface. Raises InputError if it has no address here."""
    if not interface:
        return {}
    if not address_of(interface):
        raise InputError(f"interface '{interface}' has no IPv4 address here; there are {', '.join(interface_names())}")
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", INTERFACE_VARIABLE), interface)


def run_node(
    place: Place,
    module: str,
    job: Path,
    *,
    ranks_per_node: int,
    max_restarts: int = 0,
    interface: str = "",
    on_message: OnMessage | None = None,
) -> None:
    """Run this node's ranks until all ranks of all nodes end well.

    What ranks print goes to standard error; messages of rank 0, if it is on this node, to ``on_message``.

    Raises:
        InputError: the interface does not exist.
        RunError: torchrun gave up; what it and the ranks printed says why.
    """
    variables = interface_variables(interface)
    command = torchrun_command(
        place, module, job, ranks_per_node=ranks_per_node, max_restarts=max_restarts,
        local_address=address_of(interface) if interface else "",
    )  # fmt: skip
    env = {
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),
        **os.environ, **variables, MESSAGES_VARIABLE: "1",
    }  # fmt: skip
    agent = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    usual = signal.signal(signal.SIGTERM, lambda number, frame: agent.send_signal(number))
    try:
        assert agent.stdout is not None
        for line in agent.stdout:
            _pass_on(line, on_message)
        code = agent.wait()
    finally:
        signal.signal(signal.SIGTERM, usual)
        if agent.poll() is None:
            agent.terminate()
            agent.wait()
    if code:
        raise RunError(f"node {place.node} of {place.num_nodes}: torchrun ended with code {code}; see above who failed")


def _pass_on(line: str, on_message: OnMessage | None) -> None:
    """Show a line, or hand on the message in it; a ``log`` message has been shown as a line before."""
    if not line.startswith(MESSAGE_PREFIX):
        print(line, end="", file=sys.stderr, flush=True)
        return
    message = json.loads(line.removeprefix(MESSAGE_PREFIX))
    if on_message is not None and message.get("event") != "log":
        on_message(message)


def run_rank(place: Place, module: str, arguments: Sequence[str]) -> None:
    """Be a rank: run ``main(arguments)`` of a module, or of a package's ``__main__``, in this process.

    What it raises is told with its stack.
    """
    os.environ.update(place.variables)
    try:
        found = import_module(module)
        program = import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
        program.main(arguments)
    except Exception:
        traceback.print_exc()
        raise
