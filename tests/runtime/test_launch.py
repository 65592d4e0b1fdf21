"""Starting, watching and ending ranks: every way to die names the right rank and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import RunError
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.diagnosis import explain_failure
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node, local_node, read_traffic
from autopar.runtime.launch.processes import end_marked, state_of
from autopar.runtime.launch.progress import FAILED, RUNNING, Status, read_statuses
from autopar.runtime.run import run_plans
from autopar.workload import Precision, Workload

PLAN = "dp2.mb1"


def processes_of(folder: Path) -> list[int]:
    """Live processes with a file of ``folder`` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command and state_of(int(entry.name)) not in ("", "Z"):
                found.append(int(entry.name))
    return found


def start(folder: Path, mode: str, ranks: int = 2, stall_timeout_s: float = 60, on_message: Any = None) -> None:
    job = folder / "job.json"
    job.write_text(json.dumps({"mode": mode}))
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": str(Path(__file__).parent)})
    launch(
        "worker_modes", job, nodes=[node], ranks_per_node=ranks, out_dir=folder, stall_timeout_s=stall_timeout_s,
        on_message=on_message,
    )  # fmt: skip


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Path]:
    """A folder for a run that may leave no process."""
    yield tmp_path
    assert processes_of(tmp_path) == []


def train_long(folder: Path, stall_timeout_s: float) -> None:
    job = TrainJob(
        model=load_preset("demo-gpt"), workload=Workload(global_batch=2, seq_len=32, precision=Precision.FP32),
        plans=(parse_slug(PLAN),), steps=100_000, out_dir=str(folder),
    )  # fmt: skip
    run_plans(job, nodes=[local_node()], ranks_per_node=2, stall_timeout_s=stall_timeout_s)


def signal_at_step(folder: Path, rank: int, step: int, number: signal.Signals) -> threading.Thread:
    """Send a signal to a rank once it reports a step."""

    def wait_and_send() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            status = read_statuses(folder, 2).get(rank)
            if status is not None and status.step >= step:
                os.kill(status.pid, number)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    return thread


@pytest.mark.dist
def test_a_killed_rank_is_named(watched: Path) -> None:
    signal_at_step(watched, 1, 8, signal.SIGKILL)
    with pytest.raises(RunError, match=r"rank 1 of 2 was killed by SIGKILL .* at plan tp1.*, step \d+") as caught:
        train_long(watched, 60)
    assert "rank 0" not in str(caught.value)


@pytest.mark.dist
def test_a_stopped_rank_is_named(watched: Path) -> None:
    signal_at_step(watched, 1, 8, signal.SIGSTOP)
    with pytest.raises(RunError, match=r"rank 1 of 2 is stopped at plan tp1.*, step .*; no rank made progress for 8 s"):
        train_long(watched, 8)


@pytest.mark.dist
def test_messages_and_logs(watched: Path) -> None:
    messages: list[dict[str, Any]] = []
    start(watched, "well", on_message=messages.append)
    assert messages == [{"rank": 0, "said": i} for i in range(3)]
    assert "hello of rank 1" in (watched / "rank1.out").read_text()
    assert {status.state for status in read_statuses(watched, 2).values()} == {"done"}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raise", r"rank 1 of 2 failed at plan p, step 2: ValueError: bad luck.*\n(.*\n)*.*worker_modes"),
        ("exit", r"rank 1 of 2 exited with code 3 at plan p, step 2"),
        ("import", r"rank \d of 2 exited with code 1 before its first step.*\n(.*\n)*.*no_such_module"),
        ("torn", r"rank 0 printed a message that is not JSON"),
    ],
)
def test_failures_are_told(watched: Path, mode: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        start(watched, mode)


@pytest.mark.dist
def test_a_sleeping_rank_is_told_with_its_stack(watched: Path) -> None:
    with pytest.raises(RunError, match=r"rank 1 of 2 hangs at plan p, step 2") as caught:
        start(watched, "hang", stall_timeout_s=6)
    assert "in oversleep" in str(caught.value)


@pytest.mark.dist
def test_an_interrupt_ends_all_ranks(watched: Path) -> None:
    def interrupt(message: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(watched, "hang", on_message=interrupt)


@pytest.mark.dist
def test_ranks_end_with_a_killed_launcher(watched: Path) -> None:
    code = f"from test_launch import start; from pathlib import Path; start(Path({str(watched)!r}), 'hang')"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    end = time.monotonic() + 120
    while len(read_statuses(watched, 2)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(processes_of(watched)) >= 3
    launcher.kill()
    launcher.wait()
    while processes_of(watched) and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.dist
def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    node = Node(index=0, address="127.0.0.1", command_prefix=("no-such-command",))
    with pytest.raises(RunError, match="node 0: cannot run no-such-command"):
        launch("m", tmp_path / "j", nodes=[node], ranks_per_node=1, out_dir=tmp_path, stall_timeout_s=5)


def status(rank: int, state: str, when: float) -> Status:
    error = "RuntimeError: connection closed" if state == FAILED else ""
    return Status(rank=rank, state=state, plan="p", step=3, doing="0B1", count=9, pid=1, time=when, error=error)


def table(*entries: tuple[int, int]) -> str:
    return "".join(f"  rank      : {r} (local_rank: {r})\n  exitcode  : {code} (pid: 1)\n" for r, code in entries)


@pytest.mark.parametrize(
    ("logs", "states", "expected"),
    [
        # One rank is killed; those whose connection it broke fail and report it, even on another node.
        (
            [table((0, 1), (1, -9)), table((2, 1))],
            {0: FAILED, 1: RUNNING, 2: FAILED},
            "rank 1 of 3 was killed by SIGKILL",
        ),
        ([table((0, -15), (1, -11))], {0: RUNNING, 1: RUNNING}, "rank 1 of 3 was killed by SIGSEGV"),
        ([table((0, -6), (1, -9))], {0: RUNNING, 1: RUNNING}, "rank 1 of 3 was killed by SIGKILL"),
        # The first to report is the cause.
        ([table((0, 1), (2, 1))], {0: FAILED, 1: RUNNING, 2: FAILED}, "rank 0 of 3 failed"),
        ([table((0, -15), (2, 7))], {0: RUNNING, 2: RUNNING}, "rank 2 of 3 exited with code 7"),
        (["cannot bind"], {}, "torchrun said:\ncannot bind"),
    ],
)
def test_the_cause_is_told_from_its_consequences(logs: list[str], states: dict[int, str], expected: str) -> None:
    statuses = {rank: status(rank, state, float(rank)) for rank, state in states.items()}
    assert expected in explain_failure(logs, statuses, 3, lambda rank: None).text


def test_a_rank_that_vanished_is_the_cause_before_torchrun_says_so() -> None:
    statuses = {0: status(0, RUNNING, 1.0), 1: status(1, FAILED, 2.0)}
    assert "rank 1 of 2 failed" in explain_failure([""], statuses, 2, lambda rank: None).text
    told = explain_failure([""], statuses, 2, lambda rank: None, vanished=[0]).text
    assert told == "rank 0 of 2 ended without a word at plan p, step 3, 0B1"
    seen = explain_failure([table((0, -9), (1, 1))], statuses, 2, lambda rank: None, vanished=[0]).text
    assert "rank 0 of 2 was killed by SIGKILL" in seen


def test_traffic_of_an_interface() -> None:
    loopback = Node(index=0, address="127.0.0.1", interface="lo")
    sent, received = read_traffic(loopback)
    assert sent >= 0 and received >= 0
    with pytest.raises(RunError, match="node 0 has no interface"):
        read_traffic(local_node())
    with pytest.raises(RunError, match="cannot read the counters of interface nope"):
        read_traffic(Node(index=0, address="127.0.0.1", interface="nope"))


def test_nothing_is_ended_that_is_not_marked() -> None:
    ended: Callable[..., set[int]] = end_marked
    assert ended("a mark that no process has", 0.1) == set()
    assert state_of(os.getpid()) == "R"
