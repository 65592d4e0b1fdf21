"""Starting ranks under torchrun on every node, watching them, and starting them again after a fault.

A start is ended as a whole, and begun as a whole: ranks that lost a peer have nothing to go on with, and new processes
with a new rendezvous keep nothing of the old. So a rank that hangs, which torchrun does not notice, is treated like one
that was killed. Where every node is started by itself, see ``cluster``, torchrun restarts the ranks instead.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autopar.runtime.launch.attempt import Attempt
from autopar.runtime.launch.diagnosis import Fault, RunFault, explain_failure, explain_stall
from autopar.runtime.launch.nodes import Node
from autopar.runtime.launch.processes import is_live
from autopar.runtime.launch.progress import FAILED, RUNNING, STARTING, read_statuses

POLL_S = 0.1
SETTLE_S = 5.0
VANISHED_SETTLE_S = 30.0
START_TIMEOUT_S = 120.0
OnMessage = Callable[[dict[str, Any]], None]


def launch(
    module: str,
    job: Path,
    *,
    nodes: Sequence[Node],
    ranks_per_node: int,
    out_dir: Path,
    stall_timeout_s: float,
    max_restarts: int = 0,
    on_message: OnMessage | None = None,
) -> None:
    """Run ``python -m module job`` as ``ranks_per_node`` ranks on every node, until all of them end well.

    Args:
        module: importable module, run by each rank with RANK, WORLD_SIZE and the rest of torchrun's environment.
        job: file that the module gets as its only argument.
        nodes: where to run; the first one is the one that the others connect to.
        ranks_per_node: ranks on each node; ranks of a node are neighbours.
        out_dir: gets the logs and status files (see ``attempt``); made if missing. Those of starts before the last
            are in ``attempt0``, ``attempt1``, ...
        stall_timeout_s: longest time without any progress of any rank (see ``progress``) or any message. Until every
            rank has reported once, which takes importing torch, it is at least two minutes.
        max_restarts: starts after the first one, each after a rank was killed, failed or hung. What the module does
            when it is started again, such as going on from a checkpoint, is its own matter.
        on_message: called with each message that rank 0 prints (``progress.send_message``), and before each restart
            with the keys ``event`` (restart), ``rank``, ``what`` (one line), ``restart`` and ``of``.

    Raises:
        RunFault: a rank was killed, failed or hung, and there are no restarts left or they would not help.
        RunError: torchrun could not start. All ranks on all nodes are ended before.
    """
    out_dir = out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    for old in out_dir.glob("attempt[0-9]*"):
        shutil.rmtree(old, ignore_errors=True)
    faults: list[Fault] = []
    while True:
        attempt = Attempt(module=module, job=job.resolve(), nodes=nodes, ranks_per_node=ranks_per_node, out_dir=out_dir)
        try:
            attempt.start()
            fault = _watch(attempt, stall_timeout_s, on_message)
        finally:
            attempt.end()
        if fault is None:
            return
        faults.append(fault)
        reason = why_final(faults, max_restarts)
        if reason is not None:
            raise RunFault(fault, reason)
        attempt.move_files(out_dir / f"attempt{len(faults) - 1}")
        if on_message is not None:
            on_message(
                {"event": "restart", "rank": fault.rank, "what": fault.what, "restart": len(faults), "of": max_restarts}
            )


def why_final(faults: Sequence[Fault], max_restarts: int) -> str | None:
    """Why a run is not started again after the last of its faults; None if it is, empty if it never was to be."""
    *earlier, last = faults
    if max_restarts == 0:
        return ""
    if last.error and not last.begun:
        return "not started again: it would fail in the same way"
    if last.error and any(fault.what == last.what for fault in earlier):
        return "not started again: it has failed in the same way before"
    if len(faults) > max_restarts:
        return f"the run had been started again {max_restarts} {'time' if max_restarts == 1 else 'times'} before"
    return None


def _watch(attempt: Attempt, stall_timeout_s: float, on_message: OnMessage | None) -> Fault | None:
    """Wait until all ranks end well, or tell the fault of the first that does not."""
    counts: dict[int, int] = {}
    moved = time.monotonic()
    while True:
        ended = all(agent.poll() is not None for agent in attempt.agents)
        for message in attempt.new_messages():
            moved = time.monotonic()
            if on_message is not None:
                on_message(message)
        statuses = read_statuses(attempt.out_dir, attempt.world_size)
        found = {rank: status.count for rank, status in statuses.items()}
        if found != counts:
            counts, moved = found, time.monotonic()
        if any(agent.returncode for agent in attempt.agents) or any(s.state == FAILED for s in statuses.values()):
            return _failure(attempt)
        if ended:
            return None
        patience = stall_timeout_s if len(statuses) == attempt.world_size else max(stall_timeout_s, START_TIMEOUT_S)
        if time.monotonic() - moved > patience:
            return explain_stall(statuses, attempt.world_size, patience, lambda rank: attempt.log_of(rank, "stderr"))
        time.sleep(POLL_S)


def _failure(attempt: Attempt) -> Fault:
    """Give torchrun the time to see who died first, then say it."""
    statuses = read_statuses(attempt.out_dir, attempt.world_size)
    vanished = [rank for rank, s in statuses.items() if s.state in (STARTING, RUNNING) and not is_live(s.pid)]
    end = time.monotonic() + (VANISHED_SETTLE_S if vanished else SETTLE_S)
    while any(agent.poll() is None for agent in attempt.agents) and time.monotonic() < end:
        if any(agent.returncode for agent in attempt.agents):
            end = min(end, time.monotonic() + 1.0)
        time.sleep(POLL_S)
    return explain_failure(
        attempt.agent_logs(),
        read_statuses(attempt.out_dir, attempt.world_size),
        attempt.world_size,
        lambda rank: attempt.log_of(rank, "stderr"),
        vanished=vanished,
    )
