"""Starting ranks under torchrun on every node, watching them, and ending all of them whatever happens.

Files in ``out_dir``: ``rank<r>.json`` (status, see ``progress``), ``rank<r>.out`` and ``rank<r>.err`` (what the rank
printed), ``node<i>.log`` (what its torchrun printed).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from autopar.errors import RunError
from autopar.runtime.diagnosis import explain_failure, explain_stall
from autopar.runtime.nodes import INTERFACE_VARIABLE, LOCAL_ADDRESS, Node
from autopar.runtime.processes import MARK_VARIABLE, end_marked
from autopar.runtime.progress import (
    FAILED,
    FOLDER_VARIABLE,
    LAUNCHER_VARIABLE,
    MESSAGE_PREFIX,
    Status,
    read_statuses,
    status_name,
)

POLL_S = 0.1
SETTLE_S = 5.0
START_TIMEOUT_S = 120.0
TERM_GRACE_S = 2.0
OnMessage = Callable[[dict[str, Any]], None]


def launch(
    module: str,
    job: Path,
    *,
    nodes: Sequence[Node],
    ranks_per_node: int,
    out_dir: Path,
    stall_timeout_s: float,
    on_message: OnMessage | None = None,
) -> None:
    """Run ``python -m module job`` as ``ranks_per_node`` ranks on every node, until all of them end well.

    Args:
        module: importable module, run by each rank with RANK, WORLD_SIZE and the rest of torchrun's environment.
        job: file that the module gets as its only argument.
        nodes: where to run; the first one is the one that the others connect to.
        ranks_per_node: ranks on each node; ranks of a node are neighbours.
        out_dir: gets the logs and status files; made if missing.
        stall_timeout_s: longest time without any progress of any rank (see ``progress``) or any message. Until every
            rank has reported once, which takes importing torch, it is at least two minutes.
        on_message: called with each message that rank 0 prints (``progress.send_message``).

    Raises:
        RunError: a rank died or hung, or torchrun could not start. All ranks on all nodes are ended before.
    """
    out_dir = out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    for rank in range(len(nodes) * ranks_per_node):
        for name in (status_name(rank), f"rank{rank}.out", f"rank{rank}.err"):
            (out_dir / name).unlink(missing_ok=True)
    run = _Run(module=module, job=job.resolve(), nodes=nodes, ranks_per_node=ranks_per_node, out_dir=out_dir)
    try:
        run.start()
        _watch(run, stall_timeout_s, on_message)
    finally:
        run.end()


@dataclass(kw_only=True, slots=True)
class _Run:
    """Processes and files of one launch."""

    module: str
    job: Path
    nodes: Sequence[Node]
    ranks_per_node: int
    out_dir: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[IO[bytes]] = field(default_factory=list)
    read_bytes: int = 0

    @property
    def world_size(self) -> int:
        return len(self.nodes) * self.ranks_per_node

    @property
    def log_root(self) -> Path:
        return self.out_dir / f".logs-{self.mark}"

    def start(self) -> None:
        port = free_port()
        for position, node in enumerate(self.nodes):
            log = (self.out_dir / f"node{position}.log").open("wb")
            self.logs.append(log)
            command = self.command(position, node, port)
            try:
                agent = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise RunError(f"node {node.index}: cannot run {command[0]}: {error}") from None
            self.agents.append(agent)

    def command(self, position: int, node: Node, port: int) -> list[str]:
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **_interface_variables(node),
            **node.env,
            MARK_VARIABLE: self.mark,
            FOLDER_VARIABLE: str(self.out_dir),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
        torchrun = [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(len(self.nodes)), "--nproc-per-node", str(self.ranks_per_node),
            "--node-rank", str(position), "--master-addr", self.nodes[0].address, "--master-port", str(port),
            "--max-restarts", "0", "--redirects", "3", "--log-dir", str(self.log_root / str(position)),
            "-m", self.module, str(self.job),
        ]  # fmt: skip
        return [*node.command_prefix, "env", *(f"{key}={value}" for key, value in variables.items()), *torchrun]

    def log_of(self, rank: int, stream: str) -> Path | None:
        """Where torchrun keeps what a rank prints while the run lasts."""
        node, local_rank = divmod(rank, self.ranks_per_node)
        found = sorted((self.log_root / str(node)).glob(f"*/attempt_0/{local_rank}/{stream}.log"))
        return found[0] if found else None

    def new_messages(self) -> list[dict[str, Any]]:
        """Messages that rank 0 has printed since the last call. Raises RunError on one that is not JSON."""
        path = self.log_of(0, "stdout")
        if path is None:
            return []
        with path.open("rb") as stream:
            stream.seek(self.read_bytes)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.read_bytes += len(whole) + len(newline)
        messages = []
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(MESSAGE_PREFIX):
                try:
                    messages.append(json.loads(line.removeprefix(MESSAGE_PREFIX)))
                except json.JSONDecodeError as error:
                    raise RunError(f"rank 0 printed a message that is not JSON ({error}): {line[:200]}") from None
        return messages

    def keep_logs(self) -> None:
        """Put each rank's output beside its status and drop torchrun's folders."""
        for rank in range(self.world_size):
            for stream, suffix in (("stdout", "out"), ("stderr", "err")):
                path = self.log_of(rank, stream)
                if path is not None and path.exists():
                    shutil.copyfile(path, self.out_dir / f"rank{rank}.{suffix}")

    def end(self) -> None:
        left = end_marked(self.mark, TERM_GRACE_S)
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()
        for log in self.logs:
            log.close()
        self.keep_logs()
        shutil.rmtree(self.log_root, ignore_errors=True)
        if left:
            raise RunError(f"processes {sorted(left)} of the run could not be ended")


def _interface_variables(node: Node) -> dict[str, str]:
    if node.interface is not None:
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", INTERFACE_VARIABLE)
        return dict.fromkeys(names, node.interface)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {"GLOO_SOCKET_IFNAME": loopback} if loopback and node.address == LOCAL_ADDRESS else {}


def free_port() -> int:
    """A TCP port that nothing on this machine listens on just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _watch(run: _Run, stall_timeout_s: float, on_message: OnMessage | None) -> None:
    counts: dict[int, int] = {}
    moved = time.monotonic()
    while True:
        ended = all(agent.poll() is not None for agent in run.agents)
        for message in run.new_messages():
            moved = time.monotonic()
            if on_message is not None:
                on_message(message)
        statuses = read_statuses(run.out_dir, run.world_size)
        found = {rank: status.count for rank, status in statuses.items()}
        if found != counts:
            counts, moved = found, time.monotonic()
        if any(agent.returncode for agent in run.agents) or any(s.state == FAILED for s in statuses.values()):
            raise RunError(_failure(run))
        if ended:
            return
        patience = stall_timeout_s if len(statuses) == run.world_size else max(stall_timeout_s, START_TIMEOUT_S)
        if time.monotonic() - moved > patience:
            raise RunError(_stall(run, statuses, patience))
        time.sleep(POLL_S)


def _failure(run: _Run) -> str:
    """Give torchrun the time to see who died first, then say it."""
    end = time.monotonic() + SETTLE_S
    while any(agent.poll() is None for agent in run.agents) and time.monotonic() < end:
        if any(agent.returncode for agent in run.agents):
            end = min(end, time.monotonic() + 1.0)
        time.sleep(POLL_S)
    agent_logs = [(run.out_dir / f"node{i}.log").read_text(errors="replace") for i in range(len(run.nodes))]
    statuses = read_statuses(run.out_dir, run.world_size)
    return explain_failure(agent_logs, statuses, run.world_size, lambda rank: run.log_of(rank, "stderr"))


def _stall(run: _Run, statuses: dict[int, Status], stall_timeout_s: float) -> str:
    return explain_stall(statuses, run.world_size, stall_timeout_s, lambda rank: run.log_of(rank, "stderr"))
