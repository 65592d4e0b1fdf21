"""When a rank did what within one step, on the machine's monotonic clock: actions, and communication as it ran.

Actions are stamped as they begin and end: by the host's clock on a CPU, by events on CUDA's stream, so that nothing
waits inside the step. Communication comes from the profiler, whose clock is tied to the monotonic one by a mark at the
beginning of the step; the profiler costs about one percent of a step (8 blocks of width 384 on a CPU), so that both are
taken in the same step. What this rank computes meanwhile comes from the profiler too: kernels on CUDA, on a CPU the
operators that call no collective.
"""

from __future__ import annotations

import bisect
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autopar.measurement import Span
from autopar.runtime.observe.counting import Call
from autopar.runtime.private import ProfilerEvent, profiler_events

MARK = "autopar: step begins"
FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION = "forward", "backward", "optimizer", "communication"
_BACKEND_EVENT = re.compile(r"(?:gloo|nccl):(\w+)")
_COLLECTIVE_CALL = re.compile(r"c10d|gloo:|nccl:")
NANO, MILLI = 1e-9, 1e-3


class SpanRecorder:
    """An observer of actions that keeps their times, in seconds since it was made.

    On CUDA an action begins when the stream reaches it and ends when its last kernel has run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._begun: list[tuple[str, Any]] = []
        if self._cuda:
            torch.cuda.synchronize(device)
        self.made_ns = time.monotonic_ns()
        self._origin = self._now()

    def begin(self, action: str) -> None:
        """Note the beginning."""
        self._begun.append((action, self._now()))

    def end(self, action: str) -> None:
        """Note the end."""
        name, start = self._begun.pop()
        assert name == action
        self._spans.append((name, start, self._now()))

    def read(self) -> list[tuple[str, float, float]]:
        """Name, start and end of every action; waits for the device."""
        if not self._cuda:
            return [
                (name, (start - self.made_ns) * NANO, (end - self.made_ns) * NANO) for name, start, end in self._spans
            ]
        torch.cuda.synchronize()
        since = self._origin.elapsed_time
        return [(name, since(start) * MILLI, since(end) * MILLI) for name, start, end in self._spans]

    def _now(self) -> Any:
        if not self._cuda:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def record_spans(
    step: Callable[[SpanRecorder], None],
    calls: Sequence[Call],
    device: torch.device,
    meet: Callable[[], object],
    everyone: Callable[[Any], Sequence[Any]],
) -> tuple[Span, ...]:
    """Run a step and return what it did.

    Args:
        step: runs one step under the given observer.
        calls: collectives of an equal step in the order of the calls, which give communication its axis and bytes.
        device: where the step computes.
        meet: waits for all ranks, just before the step.
        everyone: gathers a value of every rank.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        meet()
        recorder = SpanRecorder(device)
        with record_function(MARK):
            pass
        step(recorder)
        spans = recorder.read()
    early = _seconds_after_first(recorder.made_ns, everyone)
    events = profiler_events(profiler)
    mark = next(event.start_ns for event in events if event.name == MARK)
    events = [event for event in events if event.start_ns >= mark]
    covered = _Covered()
    for event in _compute_events(events):
        covered.add(event.start_ns, event.start_ns + event.duration_ns)
    found = [Span(name=n, phase=_phase(n), start_s=early + start, end_s=early + end) for n, start, end in spans]
    # Of communication at the same time the first counts as exposed; messages wait for others, and count last.
    for name, num_bytes, event in sorted(_communication(events, calls), key=_precedence):
        begin, end = event.start_ns, event.start_ns + event.duration_ns
        found.append(
            Span(
                name=name, phase=COMMUNICATION,
                start_s=early + (begin - mark) * NANO, end_s=early + (end - mark) * NANO,
                num_bytes=num_bytes, exposed_s=(end - begin - covered.within(begin, end)) * NANO,
            )
        )  # fmt: skip
        covered.add(begin, end)
    return tuple(sorted(found, key=lambda span: span.start_s))


def _seconds_after_first(made_ns: int, everyone: Callable[[Any], Sequence[Any]]) -> float:
    """How much later than the first rank of its machine this one began; machines have clocks of their own."""
    here = socket.gethostname()
    return (made_ns - min(other for host, other in everyone((here, made_ns)) if host == here)) * NANO


def _phase(action: str) -> str:
    if action == OPTIMIZER:
        return OPTIMIZER
    return FORWARD if "F" in action else BACKWARD


def _precedence(communication: tuple[str, int, ProfilerEvent]) -> tuple[bool, int]:
    name, _, event = communication
    return name.startswith(("send", "recv")), event.start_ns


class _Covered:
    """A union of intervals, kept as intervals that do not touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Cover an interval."""
        first, last = bisect.bisect_left(self._ends, start), bisect.bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def within(self, start: int, end: int) -> int:
        """Length of what is covered between two times."""
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._starts, end)
        return sum(min(self._ends[i], end) - max(self._starts[i], start) for i in range(first, last))


def _compute_events(events: Sequence[ProfilerEvent]) -> list[ProfilerEvent]:
    """Kernels where there are any; else operators, without those within which a collective is called or waited for."""
    kernels = [e for e in events if not e.on_cpu and not e.annotation and not _COLLECTIVE_CALL.search(e.name)
               and "nccl" not in e.name.lower()]  # fmt: skip
    if kernels:
        return kernels
    called: dict[int, list[int]] = {}
    for event in events:
        if _COLLECTIVE_CALL.search(event.name) and not event.asynchronous:
            called.setdefault(event.thread, []).append(event.start_ns)

    def waits(event: ProfilerEvent) -> bool:
        starts = called.get(event.thread, [])
        place = bisect.bisect_left(starts, event.start_ns)
        return place < len(starts) and starts[place] < event.start_ns + event.duration_ns

    return [event for event in events if event.on_cpu and event.name.startswith("aten::") and not waits(event)]


def _communication(events: Sequence[ProfilerEvent], calls: Sequence[Call]) -> list[tuple[str, int, ProfilerEvent]]:
    """Events of the backend, named ``kind axis`` after the calls where there are as many, else by the backend."""
    every = [event for event in events if _BACKEND_EVENT.match(event.name)]
    found = [event for event in every if not event.on_cpu] or every
    if len(found) == len(calls):
        return [(f"{call.kind} {call.axis}", call.num_bytes, event) for call, event in zip(calls, found, strict=True)]
    return [(event.name.partition(":")[2], 0, event) for event in found]
