"""A Slurm batch script that runs a plan on a cluster: torchrun on every node, restarts, a checkpoint before time is up.

What the script rests on: ``sbatch --signal=B:TERM@SECONDS`` signals the script itself so long before the time limit;
``scancel --signal`` passes a signal to all processes of a step and ends nothing by itself; ``--requeue`` lets
``scontrol requeue`` queue the job again under its number (sbatch(1), scancel(1), scontrol(1)). Ranks that get SIGTERM
save a checkpoint and end well (``runtime.train``), and the job queues itself again, to go on from that checkpoint,
until ``result.json`` says that the last step was made.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import InputError

LEAST_SHUTDOWN_S = 30
_MARGIN_S = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What the script asks Slurm for, and what it runs.

    Attributes:
        name: of the job.
        nodes, ranks_per_node: processes; on CUDA as many devices on each node.
        device: cpu or cuda.
        plan: path of plan.json as the nodes see it.
        out: folder that all nodes share.
        options: further options of ``autopar run``.
        time: limit, as sbatch takes it.
        partition, account: empty for the cluster's defaults.
        cpus_per_rank: cores for each process.
        max_restarts: times that torchrun starts the ranks again within one job.
        checkpoint_s: seconds before the limit at which ranks are told to save and end.
        interface: network interface for collectives; empty leaves it to NCCL and gloo.
        setup: shell lines that prepare the environment, such as loading a module.
        python: interpreter that has autopar, on every node.
    """

    name: str
    nodes: int
    ranks_per_node: int
    device: str
    plan: str
    out: str
    options: Sequence[str] = ()
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    cpus_per_rank: int = 8
    max_restarts: int = 3
    checkpoint_s: int = 120
    interface: str = ""
    setup: Sequence[str] = ()
    python: str = "python"

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise InputError(f"a Slurm job needs nodes and ranks, not {self.nodes} of {self.ranks_per_node}")
        if self.checkpoint_s < LEAST_SHUTDOWN_S + _MARGIN_S:
            least = LEAST_SHUTDOWN_S + _MARGIN_S
            raise InputError(
                f"{self.checkpoint_s} s before the limit are too late for a checkpoint: use {least} or more"
            )
        for name in ("time", "partition", "account"):
            value = getattr(self, name)
            if value != value.strip() or any(c.isspace() for c in value):
                raise InputError(f"Slurm's {name} '{value}' holds blanks")
        if "'" in self.python:
            raise InputError(f"the interpreter's path {self.python} holds a quotation mark")


def nodes_of(world_size: int, ranks_per_node: int) -> int:
    """Nodes for so many ranks. Raises InputError if they are not whole nodes."""
    if world_size % ranks_per_node:
        raise InputError(f"a plan of {world_size} ranks does not fill nodes of {ranks_per_node}: choose a divisor")
    return world_size // ranks_per_node


def sbatch_script(job: SlurmJob) -> str:
    """The script, ready for ``sbatch``."""
    return "\n".join([*_header(job), "", *_environment(job), "", *_launch(job), "", *_end(job)]) + "\n"


def _header(job: SlurmJob) -> list[str]:
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus_per_rank * job.ranks_per_node,
        "gpus-per-node": job.ranks_per_node if job.device == "cuda" else "",
        "exclusive": None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "signal": f"B:TERM@{job.checkpoint_s}",
        "requeue": None,
        "open-mode": "append",
        "output": "slurm-%j.log",
    }
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items() if value != ""]
    return ["#!/bin/bash", *(f"#SBATCH {word}" for word in words)]


def _environment(job: SlurmJob) -> list[str]:
    lines = ["set -uo pipefail", *job.setup]
    if job.interface:
        lines += [f"export {name}_SOCKET_IFNAME={shlex.quote(job.interface)}" for name in ("NCCL", "GLOO")]
    else:
        lines += ["# Where nodes have several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0"]
    lines += [
        f"export OMP_NUM_THREADS={job.cpus_per_rank if job.device == 'cpu' else 1}",
        "# Seconds that ranks have to save after SIGTERM before torchrun kills them.",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.checkpoint_s - _MARGIN_S}",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((29400 + SLURM_JOB_ID % 1000))",
    ]
    return lines


def _launch(job: SlurmJob) -> list[str]:
    own = '--rdzv-conf=is_host=$((SLURM_NODEID == 0)) --local-addr="${SLURMD_NODENAME:-$(hostname)}"'
    torchrun = f"exec {shlex.quote(job.python)} -m torch.distributed.run {own}"
    run = ["-m", "autopar", "run", job.plan, "--out", job.out, "--device", job.device, *job.options]
    return [
        "# The time is nearly up: ranks save and end, and the job goes on later.",
        "stopped=0",
        "trap 'stopped=1; scancel --signal=TERM \"$SLURM_JOB_ID.0\"' TERM",
        "# Node 0 keeps the store of the rendezvous, and nodes are met under Slurm's names for them; left alone,",
        "# torchrun asks the host for its name, which others may not know.",
        f"srun --kill-on-bad-exit=1 bash -c '{torchrun} \"$@\"' torchrun \\",
        f'  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks_per_node} \\',
        '  --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \\',
        f"  --max-restarts={job.max_restarts} \\",
        f"  {shlex.join(run)} &",
        "srun=$!",
        'wait "$srun"; code=$?',
        "# The signal ends that wait before the step has ended.",
        'if [ "$stopped" = 1 ]; then wait "$srun"; code=$?; fi',
    ]


def _end(job: SlurmJob) -> list[str]:
    result = shlex.quote(f"{job.out.rstrip('/')}/result.json")
    return [
        f"""if [ "$stopped" = 1 ] && ! grep -qs '"stopped": false' {result}; then""",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "  exit 0",
        "fi",
        'exit "$code"',
    ]
