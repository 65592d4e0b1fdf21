"""Schedules are complete, keep order and dependencies, and hold what the closed form says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.plan import ScheduleName
from autopar.schedule.actions import V_SHAPED, build_schedule, build_steps
from autopar.schedule.memory import held_curve, held_microbatches
from autopar.schedule.notation import (
    Action,
    Direction,
    Pair,
    dependencies,
    parse_action,
    parse_row,
    provides,
    rank_of_stage,
    row_text,
)
from autopar.schedule.simulate import Duration, simulate, simulate_shared, with_halves
from costmodels.pipeline import group_size, in_flight, peak_in_flight, waiting_at_peak

KINDS = [
    (ScheduleName.GPIPE, 1),
    (ScheduleName.ONE_F_ONE_B, 1),
    (ScheduleName.INTERLEAVED, 2),
    (ScheduleName.INTERLEAVED, 4),
    (ScheduleName.ZB_H1, 1),
    (ScheduleName.ZB_H1, 2),
    (ScheduleName.ZB_H2, 1),
    (ScheduleName.ZB_V, 2),
    (ScheduleName.DUALPIPE_V, 2),
]
CASES = st.tuples(st.sampled_from(KINDS), st.integers(2, 8), st.integers(1, 40)).filter(
    lambda case: case[0][0] is not ScheduleName.DUALPIPE_V or case[2] >= 2 * case[1]
)


def durations(num_stages: int, forward: float, backward: float) -> dict[tuple[int, Direction], Duration]:
    whole = {(stage, Direction.FORWARD): Duration(forward) for stage in range(num_stages)}
    whole |= {(stage, Direction.BACKWARD): Duration(backward) for stage in range(num_stages)}
    return dict(with_halves(whole))


@given(CASES)
def test_every_microbatch_passes_every_stage_once_each_way_on_its_rank(case) -> None:
    (name, virtual), ranks, microbatches = case
    schedule = build_schedule(name, ranks, microbatches, virtual)
    actions = [action for row in schedule for action in row]
    assert len(set(actions)) == len(actions)
    done = {direction: {a[::2] for a in actions if a.direction is direction} for direction in Direction}
    everything = set(itertools.product(range(ranks * virtual), range(microbatches)))
    assert done[Direction.FORWARD] == everything
    assert done[Direction.BACKWARD_INPUT] == done[Direction.BACKWARD_WEIGHT]
    assert done[Direction.BACKWARD] ^ done[Direction.BACKWARD_INPUT] == everything
    for rank, row in enumerate(schedule):
        assert {rank_of_stage(action.stage, ranks, name in V_SHAPED) for action in row} == {rank}


@settings(deadline=None)
@given(CASES)
def test_the_simulation_keeps_order_and_dependencies(case) -> None:
    (name, virtual), ranks, microbatches = case
    schedule = build_schedule(name, ranks, microbatches, virtual)
    timeline = simulate(schedule, durations(ranks * virtual, 1.0, 2.0), 0.5)
    ends = {provides(timed.action): (timed.end, rank) for rank, row in enumerate(timeline.ranks) for timed in row}
    for rank, row in enumerate(timeline.ranks):
        assert tuple(timed.action for timed in row) == schedule[rank]
        for before, after in itertools.pairwise(row):
            assert before.end <= after.start
        for timed in row:
            for need in dependencies(timed.action, ranks * virtual):
                end, other = ends[need]
                assert timed.start >= end + (0.5 if other != rank else 0.0)


@given(CASES, st.sampled_from([0.0, 0.25, 1.0]))
def test_activations_in_flight_equal_the_closed_form(case, weight_share: float) -> None:
    (name, virtual), ranks, microbatches = case
    schedule = build_schedule(name, ranks, microbatches, virtual)
    if name is ScheduleName.ZB_H1 and virtual > 1:
        return
    for rank in range(ranks):
        closed = peak_in_flight(name, rank, ranks, microbatches, virtual, weight_share=weight_share)
        assert held_microbatches(schedule, rank, weight_share) == float(closed)
        if name in (ScheduleName.GPIPE, ScheduleName.ONE_F_ONE_B, ScheduleName.INTERLEAVED):
            first = name is ScheduleName.GPIPE
            assert float(in_flight(rank, ranks, microbatches, virtual, all_forward_first=first)) == float(closed)


def peak_bytes(actions: Sequence[Action], virtual: int, kept: float, waiting: float) -> float:
    """Highest sum over a rank's actions: activations from forward to the last part of backward, and what waits between
    both parts, which the model's first stage has nothing of."""
    held = highest = 0.0
    for action in actions:
        part = waiting if action.stage > 0 else 0.0
        held += {Direction.FORWARD: kept, Direction.BACKWARD_INPUT: part}.get(action.direction, 0.0) / virtual
        highest = max(highest, held)
        done = {Direction.BACKWARD: kept, Direction.BACKWARD_WEIGHT: kept + part}
        held -= done.get(action.direction, 0.0) / virtual
    assert held == pytest.approx(0.0)
    return highest


@given(CASES, st.sampled_from([0.3, 0.7, 1.0]))
def test_gradients_that_wait_for_their_weights_add_the_closed_form(case, waiting: float) -> None:
    (name, virtual), ranks, microbatches = case
    if name is ScheduleName.ZB_H1 and virtual > 1:
        return
    schedule = build_schedule(name, ranks, microbatches, virtual)
    for rank in range(ranks):
        exact = peak_bytes(schedule[rank], virtual, 1.0, waiting)
        closed = peak_in_flight(name, rank, ranks, microbatches, virtual) + waiting_at_peak(
            name, rank, ranks, microbatches, kept=1.0, waiting=waiting
        )
        if name is ScheduleName.ZB_V and microbatches < 2 * ranks - 1:
            assert float(closed) <= exact + 1e-9
        else:
            assert float(closed) == pytest.approx(exact)


@pytest.mark.parametrize(("ranks", "peak"), [(4, 4.0), (8, 8.0)])
def test_zero_bubbles_of_the_papers(ranks: int, peak: float) -> None:
    """Equal forward, input and weight passes: H1 a third of 1F1B's bubble, H2 and ZB-V none, on any rank."""
    idle = {}
    for name in (ScheduleName.ONE_F_ONE_B, ScheduleName.ZB_H1, ScheduleName.ZB_H2, ScheduleName.ZB_V):
        virtual = 2 if name is ScheduleName.ZB_V else 1
        schedule = build_schedule(name, ranks, 3 * ranks, virtual)
        timeline = simulate(schedule, durations(ranks * virtual, 1.0 / virtual, 2.0 / virtual))
        idle[name] = max(row[-1].end - row[0].start for row in timeline.ranks) - 9.0 * ranks
    assert idle == {
        ScheduleName.ONE_F_ONE_B: 3.0 * (ranks - 1), ScheduleName.ZB_H1: 1.0 * (ranks - 1),
        ScheduleName.ZB_H2: 0.0, ScheduleName.ZB_V: 0.0,
    }  # fmt: skip
    assert held_microbatches(build_schedule(ScheduleName.ZB_V, ranks, 3 * ranks, 2), 0) == peak


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_bubble_of_dual_pipe(ranks: int) -> None:
    """(p-1)(F&B + B - 3W) seconds of chunks (DeepSeek-V3 report, with p/2 ranks for its p); pairs shorten the step."""
    schedule = build_steps(ScheduleName.DUALPIPE_V, ranks, 4 * ranks)
    each = durations(2 * ranks, 1.0, 2.0)
    timeline = simulate(schedule, each)
    assert timeline.idle(0) == (ranks - 1) * (3.0 + 2.0 - 3.0)
    assert simulate(schedule, each, 0.0, 0.25).end < timeline.end


def test_the_curve_of_what_is_held_peaks_at_the_closed_form() -> None:
    schedule = build_schedule(ScheduleName.ZB_H1, 4, 8)
    timeline = simulate(schedule, durations(4, 1.0, 2.0))
    curves = held_curve(timeline, dict.fromkeys(range(4), 10.0), 0.5)
    assert [curve.peak for curve in curves] == [10.0 * held_microbatches(schedule, rank, 0.5) for rank in range(4)]
    assert all(curve.amounts[-1] == pytest.approx(0.0) for curve in curves)
    assert all(a <= b for curve in curves for a, b in itertools.pairwise(curve.seconds))


@settings(deadline=None)
@given(CASES, st.floats(0.0, 0.5))
def test_sharing_without_slowdown_changes_nothing(case, transfer: float) -> None:
    (name, virtual), ranks, microbatches = case
    schedule = build_schedule(name, ranks, min(microbatches, 2 * ranks), virtual)
    each = durations(ranks * virtual, 1.0, 2.0)
    alone = simulate(schedule, each, transfer).end
    assert simulate_shared(schedule, each, transfer, lambda active: 1.0).end == pytest.approx(alone)


def test_sharing_conserves_work() -> None:
    """Four ranks on two cores: no faster than the work over the cores, no slower than one rank after the other."""
    schedule = build_schedule(ScheduleName.ONE_F_ONE_B, 4, 8)
    each = durations(4, 1.0, 2.0)
    shared = simulate_shared(schedule, each, 0.0, lambda active: max(1.0, active / 2)).end
    work = 4 * 8 * 3.0
    assert work / 2 <= shared <= work
    assert shared > simulate(schedule, each).end
    assert simulate_shared(schedule, each, 0.0, lambda active: float(active)).end == pytest.approx(work)


@given(st.integers(1, 12), st.integers(1, 200))
def test_groups_of_interleaving_leave_no_bubble_of_their_own(ranks: int, microbatches: int) -> None:
    size = group_size(ranks, microbatches)
    left = microbatches % size
    if microbatches < ranks:
        assert size == microbatches
        return
    assert ranks <= size <= microbatches and (left == 0 or left >= ranks)
    assert microbatches % ranks or size == ranks
    rounds = microbatches // ranks
    assert microbatches % rounds or size == microbatches // rounds


def test_a_smaller_last_group_waits() -> None:
    """The control: groups of p where p does not divide m, which Megatron refuses, take longer."""
    each = durations(8, 0.5, 1.0)
    good, bad = (build_schedule(ScheduleName.INTERLEAVED, 4, 9, 2, group) for group in (0, 4))
    assert simulate(good, each).end < simulate(bad, each).end


@given(CASES)
def test_rows_print_and_parse(case) -> None:
    (name, virtual), ranks, microbatches = case
    for row in build_steps(name, ranks, microbatches, virtual):
        assert parse_row(row_text(row)) == row


def test_notation_is_that_of_torch() -> None:
    assert parse_action("2F0") == Action(2, Direction.FORWARD, 0)
    assert str(Action(1, Direction.BACKWARD_WEIGHT, 12)) == "1W12"
    pair = Pair(Action(0, Direction.FORWARD, 3), Action(7, Direction.BACKWARD, 0))
    assert parse_row(",0F0, ,(0F3;7B0)OVERLAP_F_B") == (Action(0, Direction.FORWARD, 0), pair)
    with pytest.raises(PlanError, match="cannot read the action '2X0'"):
        parse_action("2X0")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0B0,0F0",), "before its forward"),
        (("0F0,0B0", "1B0,1F0"), "before its forward"),
        (("0F0,0B0", "1F0"), "lacks an action"),
        (("0F0,0F0,0B0",), "twice"),
        (("0F0,0I0,0W0", "1F0,1W0,1I0"), "before its forward"),
        (("0F0,3F0,3B0,0B0", "2F0,1F0,2B0,1B0"), "waits for itself"),
    ],
)
def test_what_cannot_run_is_refused(rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        simulate(tuple(map(parse_row, rows)), durations(4, 1.0, 2.0))


def test_limits_are_errors() -> None:
    with pytest.raises(PlanError, match=r"needs 2\*pp=8 microbatches or more, not 7"):
        build_schedule(ScheduleName.DUALPIPE_V, 4, 7)
    with pytest.raises(PlanError, match="1f1b schedule has one virtual stage per rank, not 2"):
        build_schedule(ScheduleName.ONE_F_ONE_B, 4, 8, 2)
    whole = {(stage, d): Duration(1.0) for stage in range(4) for d in (Direction.FORWARD, Direction.BACKWARD)}
    with pytest.raises(PlanError, match="no duration is given for I of virtual stage"):
        simulate(build_schedule(ScheduleName.ZB_H1, 4, 8), whole)
