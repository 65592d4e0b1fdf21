"""Schedules are complete and their simulation equals the closed forms where these are exact."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.plan import ScheduleName
from autopar.schedule.actions import Action, Direction, build_schedule, dependencies
from autopar.schedule.simulate import Duration, held_microbatches, simulate, simulate_shared
from costmodels.pipeline import bubble_fraction, in_flight, pipeline_seconds

KINDS = [
    (ScheduleName.GPIPE, 1),
    (ScheduleName.ONE_F_ONE_B, 1),
    (ScheduleName.INTERLEAVED, 2),
    (ScheduleName.INTERLEAVED, 4),
]
CASES = st.tuples(
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.integers(1, 5),
)


def equal_durations(num_stages: int, forward: float, backward: float) -> dict[tuple[int, Direction], Duration]:
    return {
        (stage, direction): Duration(seconds)
        for stage in range(num_stages)
        for direction, seconds in ((Direction.FORWARD, forward), (Direction.BACKWARD, backward))
    }


@given(CASES)
def test_every_microbatch_passes_every_stage_once_each_way(case) -> None:
    (name, virtual), ranks, groups = case
    schedule = build_schedule(name, ranks, ranks * groups, virtual)
    expected = {
        Action(stage, direction, microbatch)
        for stage in range(ranks * virtual)
        for direction in Direction
        for microbatch in range(ranks * groups)
    }
    actions = [action for rank in schedule for action in rank]
    assert len(actions) == len(expected)
    assert set(actions) == expected
    assert all(action.stage % ranks == rank for rank, taken in enumerate(schedule) for action in taken)


@given(CASES)
def test_simulation_equals_the_closed_form_for_equal_stages_exactly(case) -> None:
    """Powers of two as durations: sums are exact, so equality is too."""
    (name, virtual), ranks, groups = case
    m = ranks * groups
    schedule = build_schedule(name, ranks, m, virtual)
    end = simulate(schedule, equal_durations(ranks * virtual, 1.0 / virtual, 2.0 / virtual)).end
    assert end == float(pipeline_seconds(3.0, 3.0 * ranks, ranks, m, virtual))
    ideal = 3.0 * m
    assert (end - ideal) / ideal == pytest.approx(float(bubble_fraction(ranks, m, virtual)), rel=1e-12)


@given(CASES, st.sampled_from([0.0078125, 0.125, 0.25]))
def test_transfers_equal_the_closed_form(case, transfer: float) -> None:
    (name, virtual), ranks, groups = case
    m = ranks * groups
    schedule = build_schedule(name, ranks, m, virtual)
    end = simulate(schedule, equal_durations(ranks * virtual, 1.0, 2.0), transfer).end
    closed = pipeline_seconds(
        3.0 * virtual, 3.0 * virtual * ranks, ranks, m, virtual, transfer, all_forward_first=name is ScheduleName.GPIPE
    )
    assert end == float(closed)


@given(st.integers(2, 8), st.integers(1, 24), st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0, 3))
def test_1f1b_transfers_for_any_number_of_microbatches(ranks: int, m: int, f: float, b: float, c: float) -> None:
    end = simulate(build_schedule(ScheduleName.ONE_F_ONE_B, ranks, m), equal_durations(ranks, f, b), c).end
    assert end == pytest.approx(float(pipeline_seconds(f + b, (f + b) * ranks, ranks, m, 1, c)), rel=1e-9)


def test_the_control_that_must_fail() -> None:
    """GPipe's formula for transfers does not describe 1F1B."""
    schedule = build_schedule(ScheduleName.ONE_F_ONE_B, 4, 8)
    end = simulate(schedule, equal_durations(4, 1.0, 2.0), 0.25).end
    assert end != float(pipeline_seconds(3.0, 12.0, 4, 8, 1, 0.25, all_forward_first=True))


@given(CASES)
def test_activations_in_flight_equal_the_closed_form(case) -> None:
    (name, virtual), ranks, groups = case
    schedule = build_schedule(name, ranks, ranks * groups, virtual)
    for rank in range(ranks):
        closed = in_flight(rank, ranks, ranks * groups, virtual, all_forward_first=name is ScheduleName.GPIPE)
        assert held_microbatches(schedule, rank) == float(closed)


@settings(deadline=None)
@given(CASES, st.floats(0.0, 0.5))
def test_sharing_without_slowdown_changes_nothing(case, transfer: float) -> None:
    (name, virtual), ranks, groups = case
    schedule = build_schedule(name, ranks, ranks * groups, virtual)
    durations = equal_durations(ranks * virtual, 1.0, 2.0)
    alone = simulate(schedule, durations, transfer).end
    assert simulate_shared(schedule, durations, transfer, lambda active: 1.0).end == pytest.approx(alone)


def test_sharing_conserves_work() -> None:
    """Four ranks on two cores: no faster than the work over the cores, no slower than one rank after the other."""
    schedule = build_schedule(ScheduleName.ONE_F_ONE_B, 4, 8)
    durations = equal_durations(4, 1.0, 2.0)
    shared = simulate_shared(schedule, durations, 0.0, lambda active: max(1.0, active / 2)).end
    work = 4 * 8 * 3.0
    assert work / 2 <= shared <= work
    assert shared > simulate(schedule, durations).end
    assert simulate_shared(schedule, durations, 0.0, lambda active: float(active)).end == pytest.approx(work)


@given(CASES)
def test_the_simulation_keeps_order_and_dependencies(case) -> None:
    (name, virtual), ranks, groups = case
    schedule = build_schedule(name, ranks, ranks * groups, virtual)
    timeline = simulate(schedule, equal_durations(ranks * virtual, 1.0, 2.0), 0.5)
    ends = {timed.action: timed.end for rank in timeline.ranks for timed in rank}
    for rank, timed_actions in enumerate(timeline.ranks):
        for before, after in itertools.pairwise(timed_actions):
            assert before.end <= after.start
        for timed in timed_actions:
            for need in dependencies(timed.action, ranks * virtual):
                gap = 0.5 if need.stage % ranks != rank else 0.0
                assert timed.start >= ends[need] + gap


def test_interleaving_needs_a_multiple_of_the_ranks() -> None:
    with pytest.raises(PlanError, match="multiple of pp=4 microbatches, not 6"):
        build_schedule(ScheduleName.INTERLEAVED, 4, 6, 2)
