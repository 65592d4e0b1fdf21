"""Profiling a machine or an emulated cluster, from the parent's side: starts the worker, returns what it measured."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import InputError
from autopar.runtime.launch.emulate import PAYLOAD_SHARE
from autopar.runtime.launch.launcher import OnMessage, launch
from autopar.runtime.launch.nodes import Node
from costmodels.profiles import MachineProfile, read_profile
from costmodels.records import read_record, write_record

JOB_SCHEMA = 1
STALL_TIMEOUT_S = 120.0
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""glibc keeps freed memory, as it does in a training process once its first steps are over. A process that frees
everything between two measurements would give it back and pay page faults, several times the operation's own time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileJob:
    """What the worker measures.

    Attributes:
        device: cpu or cuda.
        precision: fp32, bf16 or fp16.
        num_nodes: nodes that the ranks are spread over.
        quick: a coarse profile in a third of the time.
        link_rate: bytes/s of the nodes' links in an emulated cluster.
        link_efficiency: payload per byte on those links.
        out: where the profile is written.
    """

    device: str
    precision: str
    num_nodes: int
    quick: bool
    out: str
    link_rate: float | None = None
    link_efficiency: float = 1.0


def read_profile_job(path: str | Path) -> ProfileJob:
    """Read a job file. Raises InputError."""
    return read_record(ProfileJob, path, JOB_SCHEMA)


def profile_machine(
    *,
    ranks: int,
    nodes: Sequence[Node],
    device: str,
    precision: str,
    out: Path,
    quick: bool = False,
    link_rate: float | None = None,
    on_message: OnMessage | None = None,
) -> MachineProfile:
    """Measure operations, sharing, collectives and host overheads with real ranks, and write profile.json.

    Takes about a minute with 4 ranks on 2 cores, a third of it when quick.

    Args:
        ranks: processes in all, spread evenly over the nodes; as many as will train.
        nodes: where they run.
        device: cpu or cuda.
        precision: fp32, bf16 or fp16 (cuda).
        out: path of profile.json.
        link_rate: bytes/s of each node's link where the nodes are an emulated cluster.
        on_message: gets ``{"profile": part, "done": n, "of": total}`` as parts are measured.

    Raises:
        InputError: ranks do not divide over the nodes, or device or precision is unknown.
        RunError: a rank failed.
    """
    if ranks < 1 or ranks % len(nodes):
        raise InputError(f"{ranks} ranks do not divide over {len(nodes)} nodes: use a multiple of {len(nodes)}")
    for name, value, known in (
        ("device", device, ("cpu", "cuda")),
        ("precision", precision, ("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16")),
    ):
        if value not in known:
            raise InputError(f"profile: {name} '{value}' is not {' or '.join(known)}")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    started = (
        [dataclasses.replace(node, env={**KEEP_MEMORY, **node.env}) for node in nodes] if device == "cpu" else nodes
    )
    with tempfile.TemporaryDirectory(prefix="autopar-profile-", dir=out.parent) as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "profile.json"
        content = ProfileJob(
            device=device, precision=precision, num_nodes=len(nodes), quick=quick, out=str(result),
            link_rate=link_rate, link_efficiency=PAYLOAD_SHARE if link_rate else 1.0,
        )  # fmt: skip
        write_record(job, content, JOB_SCHEMA)
        launch(
            "autopar.runtime.profile", job, nodes=started, ranks_per_node=ranks // len(nodes),
            out_dir=Path(folder) / "logs", stall_timeout_s=STALL_TIMEOUT_S, on_message=on_message,
        )  # fmt: skip
        profile = read_profile(result)
        result.replace(out)
    return profile
