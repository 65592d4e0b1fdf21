"""One start of a run: torchrun on every node, its files, and the end of all its processes whatever happens.

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
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from autopar.errors import RunError
from autopar.runtime.launch.nodes import INTERFACE_VARIABLE, LOCAL_ADDRESS, Node
from autopar.runtime.launch.processes import MARK_VARIABLE, end_marked
from autopar.runtime.launch.progress import (
    FOLDER_VARIABLE,
    LAUNCHER_VARIABLE,
    MESSAGE_PREFIX,
    MESSAGES_VARIABLE,
    status_name,
)

TERM_GRACE_S = 2.0


@dataclass(kw_only=True, slots=True)
class Attempt:
    """Processes and files of one start.

    Attributes:
        module, job, nodes, ranks_per_node, out_dir: as of ``launch.launch``.
        mark: tells its processes from all others.
        agents: torchrun of each node.
    """

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
        """Ranks in all."""
        return len(self.nodes) * self.ranks_per_node

    @property
    def log_root(self) -> Path:
        """Where torchrun keeps what ranks print while they run."""
        return self.out_dir / f".logs-{self.mark}"

    def files(self) -> tuple[Path, ...]:
        """Those that a start leaves in ``out_dir``, whether they exist or not."""
        ranks = range(self.world_size)
        names = [name for rank in ranks for name in (status_name(rank), f"rank{rank}.out", f"rank{rank}.err")]
        return tuple(self.out_dir / name for name in (*names, *(f"node{i}.log" for i in range(len(self.nodes)))))

    def start(self) -> None:
        """Start torchrun on every node. Raises RunError."""
        for file in self.files():
            file.unlink(missing_ok=True)
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
        """The command line that starts the ranks of a node."""
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **_interface_variables(node),
            **node.env,
            MARK_VARIABLE: self.mark,
            FOLDER_VARIABLE: str(self.out_dir),
            LAUNCHER_VARIABLE: str(os.getpid()),
            MESSAGES_VARIABLE: "1",
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

    def agent_logs(self) -> list[str]:
        """What torchrun printed on each node so far."""
        return [(self.out_dir / f"node{i}.log").read_text(errors="replace") for i in range(len(self.nodes))]

    def move_files(self, folder: Path) -> None:
        """Put the files of an ended start into a folder, out of the way of the next one."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files():
            if file.exists():
                file.replace(folder / file.name)

    def keep_logs(self) -> None:
        """Put each rank's output beside its status and drop torchrun's folders."""
        for rank in range(self.world_size):
            for stream, suffix in (("stdout", "out"), ("stderr", "err")):
                path = self.log_of(rank, stream)
                if path is not None and path.exists():
                    shutil.copyfile(path, self.out_dir / f"rank{rank}.{suffix}")

    def end(self) -> None:
        """End every process, keep the logs. Raises RunError if a process is left."""
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
