"""Which rank is to blame when a run fails or hangs, in one line, with the end of its log.

When one rank dies, the others fail moments later because their connections break. A rank that a signal killed, or
else the one that reported its failure first, is the cause; the rest is left out.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import RunError
from autopar.runtime.launch import processes
from autopar.runtime.launch.progress import DONE, FAILED, STARTING, Status

LAST_LINES = 6
FROZEN_S = 2.0
DUMP_S = 1.0
LogOf = Callable[[int], Path | None]

# The table that torchrun prints of the ranks whose end it noticed (torch.distributed.elastic, ChildFailedError).
_ENTRY = re.compile(r"^\s+rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What ended a run.

    Attributes:
        what: one line: the rank, what happened to it, and where it was.
        details: further lines, such as the end of its error log; may be empty.
        rank: that is to blame; None where none could be told from the others.
        begun: whether that rank had begun with a plan.
        error: that the rank itself reported, with its type; empty if it was killed or hung.
    """

    what: str
    details: str = ""
    rank: int | None = None
    begun: bool = False
    error: str = ""

    @property
    def text(self) -> str:
        """Everything there is to say."""
        return f"{self.what}{self.details}"


class RunFault(RunError):
    """A run ended by a fault of a rank.

    Attributes:
        fault: which and where.
    """

    def __init__(self, fault: Fault, note: str = "") -> None:
        super().__init__(f"{fault.text}\n{note}" if note else fault.text)
        self.fault = fault


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cause:
    """A rank and how it ended; ``exit_code`` is negative for a signal and None where nobody noticed it."""

    rank: int
    exit_code: int | None


def explain_failure(
    agent_logs: Sequence[str],
    statuses: Mapping[int, Status],
    world_size: int,
    log_of: LogOf,
    *,
    vanished: Sequence[int] = (),
) -> Fault:
    """Name the rank that ended a run: what it was doing, exit code or signal, and the end of its error log.

    Args:
        agent_logs: what each node's torchrun printed.
        statuses: last status of each rank.
        world_size: ranks in all.
        log_of: error log of a rank, if there is one.
        vanished: ranks whose processes had ended without a word when others failed, or torchrun did.
    """
    exit_codes = {int(m[1]): int(m[2]) for text in agent_logs for m in _ENTRY.finditer(text)}
    cause = _first_cause(exit_codes, statuses, vanished)
    if cause is None:
        last = "\n".join(_last_lines("\n".join(agent_logs)))
        return Fault(what="the run could not be started or ended badly; torchrun said:", details=f"\n{last}")
    status = statuses.get(cause.rank)
    # Of a rank that told its failure, whatever torchrun noted is how the process went afterwards.
    error = status.error if status is not None and status.state == FAILED else ""
    ending = f"failed {place_of(status)}: {error}" if error else f"{_ending(cause.exit_code)} {place_of(status)}"
    return Fault(
        what=f"rank {cause.rank} of {world_size} {ending}",
        details=_log_end(cause.rank, log_of, _last_lines),
        rank=cause.rank,
        begun=_begun(status),
        error=error,
    )


def _first_cause(
    exit_codes: Mapping[int, int], statuses: Mapping[int, Status], vanished: Sequence[int]
) -> _Cause | None:
    # torchrun ends the others with SIGTERM, and a communicator that lost its peer aborts: consequences as a rule.
    consequences = (-signal.SIGTERM, -signal.SIGABRT)
    failed = [status for status in statuses.values() if status.state == FAILED]
    unheard = [rank for rank in exit_codes if rank not in statuses or statuses[rank].state != FAILED]
    sudden = [rank for rank in unheard if exit_codes[rank] not in consequences]
    if sudden:
        # The last in torchrun's table is the one that it noticed first.
        rank = next((rank for rank in reversed(sudden) if exit_codes[rank] < 0), sudden[-1])
    elif vanished and failed and not exit_codes:
        # A processor that is busy keeps torchrun from noticing.
        rank = vanished[0]
    elif failed:
        rank = min(failed, key=lambda status: status.time).rank
    elif unheard:
        rank = unheard[-1]
    else:
        return None
    return _Cause(rank=rank, exit_code=exit_codes.get(rank))


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended without a word"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (often the system's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def explain_stall(statuses: Mapping[int, Status], world_size: int, stall_timeout_s: float, log_of: LogOf) -> Fault:
    """Name the ranks that a run without progress waits for, with the end of their error logs.

    Ranks that still run are asked for a stack dump first, which is then the end of their log. Their processes must be
    on this machine.
    """
    alive = {rank: status for rank, status in statuses.items() if processes.state_of(status.pid)}
    processes.send((status.pid for status in alive.values()), signal.SIGUSR1)
    time.sleep(DUMP_S)
    stopped = [rank for rank, status in alive.items() if processes.state_of(status.pid) in ("T", "t")]
    suspects, what = (stopped, "is stopped") if stopped else slowest_ranks(statuses, world_size, FROZEN_S)
    first, *others = suspects
    lines = [f"; no rank made progress for {stall_timeout_s:g} s{_log_end(first, log_of, _innermost_calls)}"]
    for rank in others[:3]:
        place = place_of(statuses.get(rank))
        lines.append(f"rank {rank} of {world_size} {what} {place}{_log_end(rank, log_of, _innermost_calls)}")
    if len(others) > 3:
        lines.append(f"and {len(others) - 3} more ranks")
    return Fault(
        what=f"rank {first} of {world_size} {what} {place_of(statuses.get(first))}",
        details="\n".join(lines),
        rank=first,
        begun=_begun(statuses.get(first)),
    )


def slowest_ranks(statuses: Mapping[int, Status], world_size: int, frozen_s: float) -> tuple[list[int], str]:
    """Ranks that a run without progress waits for, and what is wrong with them; never empty.

    Those whose last report is ``frozen_s`` seconds older than the latest of any rank; else those that never started;
    else those that got least far.
    """
    latest = max((status.time for status in statuses.values()), default=0.0)
    silent = [rank for rank, s in statuses.items() if s.state != DONE and latest - s.time > frozen_s]
    if silent:
        return silent, "does not respond"
    missing = [rank for rank in range(world_size) if rank not in statuses]
    if missing:
        return missing, "never reported"
    waiting = [status for status in statuses.values() if status.state != DONE]
    least = min((status.count for status in waiting), default=0)
    return [status.rank for status in waiting if status.count == least] or list(range(world_size)), "hangs"


def place_of(status: Status | None) -> str:
    """Where a rank was, as words that follow what happened to it."""
    if status is None or status.state == STARTING:
        return "before its first step"
    action = f", {status.doing}" if status.doing else ""
    return f"at plan {status.plan}, step {status.step}{action}" if status.plan else f"at step {status.step}{action}"


def _begun(status: Status | None) -> bool:
    return status is not None and status.plan != ""


def _log_end(rank: int, log_of: LogOf, pick: Callable[[str], list[str]]) -> str:
    path = log_of(rank)
    if path is None or not path.exists():
        return ""
    lines = pick(path.read_text(errors="replace"))
    return "; the end of its error log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


def _last_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _innermost_calls(text: str) -> list[str]:
    """The innermost calls of the main thread in the stack dump at the end of a log; else its last lines."""
    _, found, dump = text.rpartition("Current thread 0x")
    return _last_lines(text) if not found else [line.rstrip() for line in dump.splitlines()[1 : LAST_LINES + 1]]
