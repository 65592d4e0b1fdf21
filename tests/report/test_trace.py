"""Events and Chrome traces: parsed back, in order, without overlap, as long as the prediction."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting, estimate
from autopar.measurement import Measurement, Span
from autopar.plan import parse_slug
from autopar.report.events import Event, Track, measured_events, predicted_events, representatives
from autopar.report.trace import assign_lanes, chrome_trace
from costmodels.hardware import load_cluster

PLANS = (
    "dp4.z0.mb4",
    "dp4.z3.mb1",
    "tp4.mb16.sp",
    "pp4.mb2",
    "pp2.dp2.mb2",
    "pp2.vp2.dp2.mb2",
    "tp2.pp2.mb4.sched-gpipe",
)


def parsed(setting: Setting, found: Estimate, run: Measurement | None = None) -> tuple[dict[str, Any], dict]:
    """A trace written and read again, and its complete events by (process name, thread name)."""
    trace = json.loads(json.dumps(chrome_trace(setting, found, run), allow_nan=False))
    processes, threads = {}, {}
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event["ph"] == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    tracks = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return trace, tracks


@pytest.mark.parametrize("slug", PLANS)
def test_trace_is_ordered_without_overlap_and_as_long_as_predicted(
    sample_setting: Setting, measure: Callable[..., Measurement], slug: str
) -> None:
    found = estimate(sample_setting, parse_slug(slug))
    run = measure(sample_setting, found, time=1.1)
    _, tracks = parsed(sample_setting, found, run)
    for events in tracks.values():
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
        for before, after in itertools.pairwise(events):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
    predicted = {track: events for track, events in tracks.items() if track[0].startswith("predicted")}
    ends = [event["ts"] + event["dur"] for events in predicted.values() for event in events]
    assert max(ends) == pytest.approx(found.step_s * 1e6, abs=1e-3)
    for (process, thread), events in predicted.items():
        if thread == "step":
            assert events[0]["dur"] == pytest.approx(found.step_s * 1e6, abs=1e-3), process
    # Where ranks share processors the simulation prices the step, so that the last rank's events reach its end.
    work = [e["ts"] + e["dur"] for (_, thread), events in predicted.items() if thread != "step" for e in events]
    assert max(work) == pytest.approx(found.step_s * 1e6, rel=1e-6)


@pytest.mark.parametrize("slug", PLANS)
def test_every_pass_is_there_once(sample_setting: Setting, slug: str) -> None:
    plan = parse_slug(slug)
    events = predicted_events(sample_setting, estimate(sample_setting, plan))
    passes = [(e.name, e.args["stage"], e.args["microbatch"]) for e in events if e.term in ("forward", "backward")]
    microbatches = plan.num_microbatches(sample_setting.workload)
    assert sorted(passes) == sorted(
        (f"{stage}{direction}{i}", stage, i)
        for stage in range(plan.num_stages) for direction in "FB" for i in range(microbatches)
    )  # fmt: skip
    sends = [event for event in events if event.term == "pipeline_transfer"]
    assert len(sends) == 2 * (plan.num_stages - 1) * microbatches
    # A microbatch of activations: sequences x tokens x width x 4 bytes, whole on every tensor parallel rank.
    boundary = plan.microbatch_size * 128 * 384 * 4
    assert all(event.args["bytes"] == boundary for event in sends)


def test_terms_add_up_on_one_rank(sample_setting: Setting) -> None:
    found = estimate(sample_setting, parse_slug("tp2.dp2.mb2"))
    seconds: dict[str, float] = defaultdict(float)
    for event in predicted_events(sample_setting, found):
        seconds[event.term] += event.end_s - event.start_s
    assert seconds["tensor_parallel"] == pytest.approx(found.breakdown["tensor_parallel"])
    for term in ("gradient_accumulation", "data_parallel", "optimizer"):
        assert seconds[term] == pytest.approx(found.breakdown[term])
    compute = sum(found.breakdown[term] for term in ("forward", "backward", "processor_sharing"))
    assert seconds["forward"] + seconds["backward"] == pytest.approx(compute)
    [reduction] = [e for e in predicted_events(sample_setting, found) if e.term == "data_parallel"]
    held = found.memory["gradients"]
    assert reduction.args["bytes"] == pytest.approx(held)


def test_nothing_outlasts_the_step_on_processors_of_their_own(sample_setting: Setting) -> None:
    setting = dataclasses.replace(sample_setting, cluster=load_cluster("cpu:1x4"))
    for slug in (*PLANS, "tp2.pp2.vp4.mb8", "pp4.mb1"):
        found = estimate(setting, parse_slug(slug))
        assert max(event.end_s for event in predicted_events(setting, found)) <= found.step_s * (1 + 1e-12)


def test_predicted_and_measured_stand_side_by_side(
    sample_setting: Setting, measure: Callable[..., Measurement]
) -> None:
    found = estimate(sample_setting, parse_slug("pp2.dp2.mb2"))
    trace, tracks = parsed(sample_setting, found, measure(sample_setting, found))
    assert {process for process, _ in tracks} == {
        "predicted rank 0", "predicted rank 2", "measured rank 0", "measured rank 1", "measured rank 2",
        "measured rank 3",
    }  # fmt: skip
    order = {
        event["pid"]: event["args"]["sort_index"]
        for event in trace["traceEvents"] if event["name"] == "process_sort_index"
    }  # fmt: skip
    assert sorted(order, key=order.__getitem__) == [0, 1, 3, 4, 5, 7]
    assert trace["otherData"]["predicted_step_ms"] == pytest.approx(1e3 * found.step_s)
    alone = parsed(sample_setting, found)[1]
    assert {process for process, _ in alone} == {"predicted rank 0", "predicted rank 2"}


def test_measured_spans_keep_their_places(sample_measurements: list[Measurement]) -> None:
    run = sample_measurements[0]
    spans = (
        Span(name="0F0", phase="forward", start_s=0.0, end_s=1.0),
        Span(name="all_gather dp_shard", phase="communication", start_s=0.2, end_s=0.6),
        Span(name="all_reduce tp", phase="communication", start_s=0.4, end_s=0.5),
        Span(name="send pp", phase="communication", start_s=1.0, end_s=1.1),
        Span(name="optimizer", phase="optimizer", start_s=1.0, end_s=1.2),
    )
    ranks = tuple(dataclasses.replace(rank, spans=spans if rank.rank == 0 else ()) for rank in run.ranks)
    events = measured_events(dataclasses.replace(run, ranks=ranks))
    assert [(e.name, e.track, e.term) for e in events] == [
        ("0F0", Track.COMPUTE, "forward"),
        ("all_gather dp_shard", Track.COMMUNICATION, "data_parallel"),
        ("all_reduce tp", Track.COMMUNICATION, "tensor_parallel"),
        ("send pp", Track.COMMUNICATION, "pipeline_transfer"),
        ("optimizer", Track.COMPUTE, "optimizer"),
    ]
    assert events[0].args == {"stage": 0, "microbatch": 0} and events[1].args == {}
    with pytest.raises(InputError, match="no rank 9"):
        measured_events(run, [9])


def test_lanes_hold_what_goes_on_at_once() -> None:
    def event(start: float, end: float) -> Event:
        return Event(rank=0, track=Track.COMMUNICATION, name="", term="", start_s=start, end_s=end)

    assert assign_lanes([event(0, 2), event(1, 3), event(2, 4), event(2.5, 5), event(3, 4)]) == [0, 1, 0, 2, 1]


def test_representatives() -> None:
    assert representatives(parse_slug("tp2.pp2.dp2.mb1")) == (0, 4)
    assert representatives(parse_slug("dp4.mb1")) == (0,)
