"""Finding and ending all processes of a run, however they were detached, by a mark in their environment (Linux)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MARK_VARIABLE = "AUTOPAR_RUN"
POLL_S = 0.02


def marked(mark: str) -> set[int]:
    """Live processes whose environment carries ``AUTOPAR_RUN=mark``; zombies are not live."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found: set[int] = set()
    for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0") and is_live(int(entry.name)):
            found.add(int(entry.name))
    return found


def state_of(pid: int) -> str:
    """One letter as in proc(5): R running, S sleeping, T stopped, Z zombie; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def is_live(pid: int) -> bool:
    """Whether there is such a process and it has not ended."""
    return state_of(pid) not in ("", "Z", "X")


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end_marked(mark: str, grace_s: float) -> set[int]:
    """End every marked process: SIGTERM, then SIGKILL after ``grace_s``. Returns those that even that left."""
    send(marked(mark), signal.SIGTERM)
    send(marked(mark), signal.SIGCONT)
    for number, patience in ((None, grace_s), (signal.SIGKILL, 5.0), (signal.SIGKILL, 5.0)):
        if number is not None:
            send(marked(mark), number)
        end = time.monotonic() + patience
        while (left := marked(mark)) and time.monotonic() < end:
            time.sleep(POLL_S)
        if not left:
            return set()
    return left
