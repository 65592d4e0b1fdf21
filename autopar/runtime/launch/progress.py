"""What a rank tells its launcher: where it is, through one small file per rank that is always whole.

A worker wraps its work in ``report_progress()`` and calls ``Progress.update`` or ``Progress.tick`` as it goes; both
only change memory. A thread of the worker writes the file, so that a step is never held up by the disk. Lines on
standard output that start with ``@autopar`` are messages for whoever started the run. Needs no torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costmodels.records import from_plain, read_json, write_json

MESSAGE_PREFIX = "@autopar "
FOLDER_VARIABLE, LAUNCHER_VARIABLE = "AUTOPAR_STATUS_DIR", "AUTOPAR_LAUNCHER"
# Set where someone reads messages; elsewhere they would only be noise in a log.
MESSAGES_VARIABLE = "AUTOPAR_MESSAGES"
WRITE_INTERVAL_S = 0.2
STARTING, RUNNING, DONE, FAILED = "starting", "running", "done", "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A rank's latest word.

    Attributes:
        state: starting, running, done or failed.
        plan: slug of the plan, or the name of the part of the work, that it is at.
        step: training step within it.
        doing: last action begun, such as ``2F0``.
        count: grows with every report; a rank whose count stands still makes no progress.
        pid: of its process.
        time: wall clock of the last write, seconds since the epoch.
        error: of a failed rank, one line.
    """

    rank: int
    state: str
    plan: str
    step: int
    doing: str
    count: int
    pid: int
    time: float
    error: str = ""


class Progress:
    """The reporting end, in the rank. Without a folder nothing is written.

    Attributes:
        rank: whose progress this is.
        ended: set when the work is over.
    """

    def __init__(self, rank: int, folder: Path | None) -> None:
        self._path = folder / status_name(rank) if folder else None
        self.rank, self._count = rank, 0
        self.ended = threading.Event()
        self._state, self._plan, self._step, self._doing, self._error = STARTING, "", 0, "", ""
        self._lock = threading.Lock()

    def update(self, *, plan: str | None = None, step: int | None = None, doing: str = "") -> None:
        """Say which plan and step begin now."""
        self._state = RUNNING
        self._plan = self._plan if plan is None else plan
        self._step = self._step if step is None else step
        self.tick(doing)

    def tick(self, doing: str) -> None:
        """Say which action of the step begins now."""
        self._doing = doing
        self._count += 1

    def end(self, error: BaseException | None) -> None:
        """Write the last word: done, or failed with what."""
        self._state = DONE if error is None else FAILED
        if error is not None:
            self._error = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
        self._count += 1
        self.write()

    @property
    def status(self) -> Status:
        """This rank's word as it would be written now."""
        return Status(
            rank=self.rank, state=self._state, plan=self._plan, step=self._step, doing=self._doing,
            count=self._count, pid=os.getpid(), time=time.time(), error=self._error,
        )  # fmt: skip

    def write(self, folder: Path | None = None) -> None:
        """Write the status file, from now on into ``folder`` if it is given."""
        if folder is not None:
            self._path = folder / status_name(self.rank)
        if self._path is not None:
            with self._lock:
                write_json(self._path, self.status)


@contextmanager
def report_progress() -> Iterator[Progress]:
    """Report this rank to the launcher that started it, if one did, until the block ends.

    A failure is written down before it is raised on. A stack dump of every thread goes to standard error on SIGUSR1.
    The process ends itself when its launcher is gone. Without a launcher see ``watchdog.guard``.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    progress = Progress(int(os.environ.get("RANK", "0")), Path(folder) if folder else None)
    if folder:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        progress.write()
        threading.Thread(target=_write_regularly, args=(progress,), daemon=True).start()
    try:
        yield progress
    except BaseException as error:
        progress.ended.set()
        progress.end(error)
        raise
    progress.ended.set()
    progress.end(None)


def _write_regularly(progress: Progress) -> None:
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, "0"))
    while not progress.ended.wait(WRITE_INTERVAL_S):
        if launcher and not Path(f"/proc/{launcher}").exists() and Path("/proc/self").exists():
            print("the launcher is gone: ending", file=sys.stderr, flush=True)
            os._exit(1)
        if not progress.ended.is_set():
            progress.write()


class Ticks:
    """An observer of a step's actions that reports each as it begins: a slow rank is then told from a hanging one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, action: str) -> None:
        """An action begins."""
        self._progress.tick(action)

    def end(self, action: str) -> None:
        """Nothing to tell."""


def announce(message: Mapping[str, Any]) -> None:
    """``send_message`` on rank 0, nothing on the others."""
    if os.environ.get("RANK", "0") == "0":
        send_message(message)


def send_message(message: Mapping[str, Any]) -> None:
    """Print a message for the ``on_message`` of who started the ranks, if they read any; meant for rank 0."""
    if MESSAGES_VARIABLE in os.environ:
        print(MESSAGE_PREFIX + json.dumps(message), flush=True)


def status_name(rank: int) -> str:
    """File name of a rank's status."""
    return f"rank{rank}.json"


def read_statuses(folder: Path, world_size: int) -> dict[int, Status]:
    """Latest status of every rank that has written one."""
    found: dict[int, Status] = {}
    for rank in range(world_size):
        path = folder / status_name(rank)
        # Asked first: a file that comes between a failed read and the question is no error. Once there it stays whole.
        if path.exists():
            found[rank] = from_plain(Status, read_json(path), str(path))
    return found
