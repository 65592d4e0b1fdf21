"""When a rank did what within one step, on the machine's monotonic clock: actions, and communication as it ran.

Actions are stamped as they begin and end. Communication comes from the profiler, whose clock is tied to the monotonic
one by a mark at the beginning of the step; the profiler costs about one percent of a step (8 blocks of width 384 on a
CPU), so that both are taken in the same step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autopar.measurement import Span
from autopar.runtime.counting import Call
from autopar.runtime.private import ProfilerEvent, profiler_events

MARK = "autopar: step begins"
FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION = "forward", "backward", "optimizer", "communication"
_BACKEND_EVENT = re.compile(r"(?:gloo|nccl):(\w+)")
NANO = 1e-9


@dataclass(kw_only=True, slots=True)
class SpanRecorder:
    """An observer of actions that keeps their times, in nanoseconds of ``time.monotonic_ns``."""

    device: torch.device
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    _begun: list[tuple[str, int]] = field(default_factory=list)

    def begin(self, action: str) -> None:
        """Note the beginning."""
        self._begun.append((action, self._now()))

    def end(self, action: str) -> None:
        """Note the end."""
        name, start = self._begun.pop()
        assert name == action
        self.spans.append((name, start, self._now()))

    def _now(self) -> int:
        # Work on CUDA is queued: without this an action would end before its kernels run.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic_ns()


def record_spans(
    step: Callable[[SpanRecorder], None],
    calls: Sequence[Call],
    device: torch.device,
    meet: Callable[[], object],
    first: Callable[[int], int],
) -> tuple[Span, ...]:
    """Run a step and return what it did.

    Args:
        step: runs one step under the given observer.
        calls: collectives of an equal step in the order of the calls, which give communication its axis.
        device: where the step computes.
        meet: waits for all ranks, just before the step.
        first: from this rank's beginning of the step to the earliest on any rank, monotonic nanoseconds.
    """
    recorder = SpanRecorder(device=device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        meet()
        marked_ns = time.monotonic_ns()
        with record_function(MARK):
            pass
        step(recorder)
    origin = first(marked_ns)
    events = profiler_events(profiler)
    mark = next(event.start_ns for event in events if event.name == MARK)
    events, shift = [event for event in events if event.start_ns >= mark], marked_ns - mark
    spans = [_span(name, _phase(name), start - origin, end - origin) for name, start, end in recorder.spans]
    for name, event in _communication(events, calls):
        start = event.start_ns + shift - origin
        spans.append(_span(name, COMMUNICATION, start, start + event.duration_ns))
    return tuple(sorted(spans, key=lambda span: span.start_s))


def _span(name: str, phase: str, start_ns: int, end_ns: int) -> Span:
    return Span(name=name, phase=phase, start_s=start_ns * NANO, end_s=end_ns * NANO)


def _phase(action: str) -> str:
    if action == OPTIMIZER:
        return OPTIMIZER
    return FORWARD if "F" in action else BACKWARD


def _communication(events: Sequence[ProfilerEvent], calls: Sequence[Call]) -> list[tuple[str, ProfilerEvent]]:
    """Events of the backend, named ``kind axis`` after the calls where there are as many, else by the backend."""
    every = [event for event in events if _BACKEND_EVENT.match(event.name)]
    found = [event for event in every if not event.on_cpu] or every
    if len(found) == len(calls):
        return [(f"{call.kind} {call.axis}", event) for call, event in zip(calls, found, strict=True)]
    return [(event.name.partition(":")[2], event) for event in found]
