"""Who starts the ranks: this program on all nodes, this program on its own node, or torchrun or Slurm already has.

The environment decides, unless nodes are named: under torchrun, or where Slurm started a task for each rank, this
process is a rank; where Slurm started a task for each node, it starts the ranks of its node.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from autopar.errors import InputError

MASTER_PORT = 29400


class Role(Enum):
    """What this process is to a run."""

    LAUNCHER = "launcher"
    NODE = "node"
    RANK = "rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process's part of a run.

    Attributes:
        role: launcher of all ranks, one node of several, or a rank.
        num_nodes, node: how many nodes, and which one this is.
        master: host and port of the rendezvous, as ``host:port``; empty for a launcher.
        world_size, rank: of a rank; 0 otherwise.
        variables: torchrun's environment variables for a rank that Slurm started; set them before joining.
        run_id: the same on all nodes and different between runs, as far as the environment tells.
    """

    role: Role
    num_nodes: int = 1
    node: int = 0
    master: str = ""
    world_size: int = 0
    rank: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    run_id: str = "autopar"

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints for all."""
        return self.node == 0 and self.rank == 0


def find_place(
    environment: Mapping[str, str],
    *,
    nodes: int | None = None,
    node_rank: int | None = None,
    master: str = "",
    hosts_of: Callable[[str], list[str]] | None = None,
) -> Place:
    """This process's part, from options where they are given, else from the environment.

    Args:
        environment: as ``os.environ``.
        nodes, node_rank, master: ``--nodes N --node-rank i --master host:port``; all three or none.
        hosts_of: expands a Slurm list of nodes; None asks ``scontrol``.

    Raises:
        InputError: options that contradict each other.
    """
    if nodes is not None or node_rank is not None or master:
        return _named(nodes, node_rank, master)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            role=Role.RANK,
            num_nodes=int(environment.get("GROUP_WORLD_SIZE", "1")),
            node=int(environment.get("GROUP_RANK", "0")),
            world_size=int(environment["WORLD_SIZE"]),
            rank=int(environment["RANK"]),
        )
    # Set within a step that srun started, and not in the batch script around it.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _under_slurm(environment, hosts_of or _hosts_of)
    return Place(role=Role.LAUNCHER)


def _named(nodes: int | None, node_rank: int | None, master: str) -> Place:
    if nodes is None or node_rank is None or not master:
        raise InputError("--nodes, --node-rank and --master host:port go together, on every node")
    if not 0 <= node_rank < nodes:
        raise InputError(f"--node-rank {node_rank} is not one of {nodes} nodes: they count from 0 to {nodes - 1}")
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--master '{master}' is not host:port, such as node0:{MASTER_PORT}")
    return Place(role=Role.NODE, num_nodes=nodes, node=node_rank, master=master)


def _under_slurm(environment: Mapping[str, str], hosts_of: Callable[[str], list[str]]) -> Place:
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    node, job = int(environment["SLURM_NODEID"]), environment.get("SLURM_JOB_ID", "0")
    host = hosts_of(environment["SLURM_STEP_NODELIST"])[0]
    port = port_of_job(job)
    run_id = f"slurm-{job}"
    if tasks == nodes:
        return Place(role=Role.NODE, num_nodes=nodes, node=node, master=f"{host}:{port}", run_id=run_id)
    if tasks % nodes:
        raise InputError(f"Slurm started {tasks} tasks on {nodes} nodes: start one a node, or as many on each")
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    return Place(
        role=Role.RANK, num_nodes=nodes, node=node, world_size=tasks, rank=int(variables["RANK"]),
        variables=variables, run_id=run_id,
    )  # fmt: skip


def port_of_job(job: str) -> int:
    """A port for the rendezvous of a Slurm job, so that two jobs that share a node do not meet."""
    return MASTER_PORT + int(job) % 1000 if job.isdigit() else MASTER_PORT


def _hosts_of(nodes: str) -> list[str]:
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"cannot tell the first of the nodes {nodes} by `{' '.join(command)}`: {error}") from None
    return done.stdout.split()
