"""A rank's own watch over its progress, where no launcher sees all ranks: under plain torchrun, on a cluster.

torchrun notices that a process has ended, not that it hangs. So a rank that makes no progress for too long says where
it is and whom it waits for, and ends; then torchrun starts all ranks again, those of other nodes too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from autopar.errors import RunError
from autopar.runtime.launch.diagnosis import place_of, slowest_ranks
from autopar.runtime.launch.progress import FOLDER_VARIABLE, Progress, read_statuses

START_TIMEOUT_S = 120.0
EXIT_STALLED = 75
"""Exit code of a rank that made no progress (EX_TEMPFAIL of sysexits: trying again may help)."""
_BACKSTOP_S = 15.0
_LONGEST_INTERVAL_S = 2.0


def guard(progress: Progress, *, timeout_s: float, folder: Path) -> None:
    """End this process when its progress stands still for ``timeout_s`` seconds; a thread watches until it ends.

    Does nothing under ``launch``, which watches all ranks itself. Until the first report of progress, which takes
    joining the others, the time is at least two minutes.

    Args:
        progress: of this rank.
        timeout_s: seconds.
        folder: gets every rank's status file; where it is shared, the message names the rank that all others wait for.
    """
    if FOLDER_VARIABLE in os.environ:
        return
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    folder.mkdir(parents=True, exist_ok=True)
    progress.write(folder)
    threading.Thread(target=_watch, args=(progress, timeout_s, folder), daemon=True).start()


def _watch(progress: Progress, timeout_s: float, folder: Path) -> None:
    interval = min(_LONGEST_INTERVAL_S, timeout_s / 10)
    begun, moved, count = progress.status.count, time.monotonic(), -1
    while not progress.ended.wait(interval):
        status = progress.status
        patience = timeout_s if status.count > begun else max(timeout_s, START_TIMEOUT_S)
        if status.count != count:
            count, moved = status.count, time.monotonic()
            # Acts also where this thread cannot run, because something keeps the interpreter's lock.
            faulthandler.dump_traceback_later(patience + _BACKSTOP_S, exit=True)
        elif time.monotonic() - moved > patience:
            _give_up(progress, patience, folder, 2 * interval)
        progress.write()
    faulthandler.cancel_dump_traceback_later()


def _give_up(progress: Progress, patience: float, folder: Path, grace_s: float) -> None:
    message = stall_message(progress, patience, folder, int(os.environ.get("WORLD_SIZE", "1")))
    print(f"autopar: {message}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    # The first to end takes the others along; they stand still as long, and have their place to tell.
    time.sleep(grace_s)
    progress.end(RunError(message))
    os._exit(EXIT_STALLED)


def stall_message(progress: Progress, patience: float, folder: Path, world_size: int) -> str:
    """One line: where this rank stands still, and which ranks it waits for as far as ``folder`` tells."""
    own = progress.status
    message = f"rank {own.rank} of {world_size} made no progress for {patience:g} s {place_of(own)}"
    statuses = read_statuses(folder, world_size)
    # Half the time that all have stood still: clocks of nodes may differ, and a living rank reports every two seconds.
    suspects, what = slowest_ranks(statuses, world_size, patience / 2)
    if suspects == [own.rank] or len(statuses) <= 1 < world_size or len(suspects) == world_size:
        return message
    first = suspects[0]
    more = f" (and {len(suspects) - 1} more)" if len(suspects) > 1 else ""
    return f"{message}; rank {first}{more} {what} {place_of(statuses.get(first))}"
