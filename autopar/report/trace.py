"""A predicted and a measured step side by side as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

Processes are ranks, ``predicted rank 0`` next to ``measured rank 0``; threads are tracks. Times are microseconds from
the beginning of the step. Format: Trace Event Format (Google, 2016), complete events (``ph: X``) and metadata.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from autopar.estimate import Estimate, Setting
from autopar.measurement import Measurement
from autopar.report.events import Event, Track, measured_events, predicted_events

MICROSECONDS = 1e6
LANES = 64
"""Thread numbers that each track may take."""


def chrome_trace(setting: Setting, estimate: Estimate, measurement: Measurement | None = None) -> dict[str, Any]:
    """The trace as plain data for json.

    Each process has a track ``step`` with one event, as long as the predicted step, or as the inspected one; compute
    and communication have a track each, and another where events of one kind go on at once.
    """
    sources = [("predicted", 0, predicted_events(setting, estimate), estimate.step_s)]
    if measurement is not None:
        events = measured_events(measurement)
        sources.append(("measured", 1, events, max((event.end_s for event in events), default=0.0)))
    found: list[dict[str, Any]] = []
    for source, order, events, step_s in sources:
        for rank, members in itertools.groupby(events, key=lambda event: event.rank):
            process = 2 * rank + order
            found.append(_meta("process_name", process, 0, name=f"{source} rank {rank}"))
            found.append(_meta("process_sort_index", process, 0, sort_index=process))
            found.append(_meta("thread_name", process, 0, name="step"))
            found.append(_complete("step", "step", process, 0, 0.0, step_s, {"plan": estimate.plan.slug}))
            found.extend(_tracks(process, list(members)))
    metadata: dict[str, Any] = {"plan": estimate.plan.slug, "predicted_step_ms": 1e3 * estimate.step_s}
    if measurement is not None:
        metadata |= {"measured_median_step_ms": 1e3 * measurement.median_step_s, "device": measurement.device}
    return {"displayTimeUnit": "ms", "otherData": metadata, "traceEvents": found}


def _tracks(process: int, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    for number, track in enumerate(Track):
        chosen = [event for event in events if event.track is track]
        lanes = assign_lanes(chosen)
        for lane in sorted(set(lanes)):
            thread = 1 + number * LANES + lane
            yield _meta("thread_name", process, thread, name=f"{track} {lane + 1}" if lane else str(track))
            yield _meta("thread_sort_index", process, thread, sort_index=thread)
        for event, lane in zip(chosen, lanes, strict=True):
            thread = 1 + number * LANES + lane
            yield _complete(event.name, event.term, process, thread, event.start_s, event.end_s, dict(event.args))


def assign_lanes(events: Sequence[Event]) -> list[int]:
    """For every event, in order of start, the first lane that is free by then."""
    free_from: list[float] = []
    lanes = []
    for event in events:
        start, end = _microseconds(event.start_s), _microseconds(event.end_s)
        lane = next((i for i, free in enumerate(free_from) if free <= start), len(free_from))
        if lane == len(free_from):
            free_from.append(end)
        free_from[lane] = end
        lanes.append(lane)
    return lanes


def _microseconds(seconds: float) -> float:
    return round(seconds * MICROSECONDS, 3)


def _complete(
    name: str, category: str, process: int, thread: int, start_s: float, end_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    start, end = _microseconds(start_s), _microseconds(end_s)
    return {
        "ph": "X", "name": name, "cat": category, "pid": process, "tid": thread,
        "ts": start, "dur": round(end - start, 3), "args": args,
    }  # fmt: skip


def _meta(kind: str, process: int, thread: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": args}
