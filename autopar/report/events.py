"""A step as events on the tracks of its ranks, predicted or measured, for timelines and traces.

Predicted passes come from the simulation of the schedule; what follows them (gradient accumulation, data parallel
communication, optimizer) from the parts of the estimate, which are those of the rank that ends last. Other ranks have
as much or less to do, so where their tail would outlast the predicted step it is drawn shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from autopar.errors import InputError, PlanError
from autopar.estimate import Estimate, Setting, timeline, to_arrays
from autopar.estimate.timeline import boundary_transfer, stage_durations
from autopar.measurement import Measurement, Span
from autopar.plan import Plan
from autopar.schedule.actions import V_SHAPED, Action, Direction
from autopar.schedule.notation import parse_action, rank_of_stage
from autopar.schedule.simulate import TimedAction
from autopar.shard import Degrees, boundary_bytes, local_parameters

Value = int | float | str


class Track(StrEnum):
    """Where an event is drawn; computing and communicating may go on at once."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that a rank does.

    Attributes:
        rank: of the world.
        track: see Track.
        name: an action such as ``2F0``, or what is communicated.
        term: part of the step that it belongs to (``estimate.TERMS``), which gives its colour.
        start_s, end_s: seconds from the beginning of the step.
        args: stage, microbatch, bytes, where they are known.
    """

    rank: int
    track: Track
    name: str
    term: str
    start_s: float
    end_s: float
    args: Mapping[str, Value] = field(default_factory=dict)


def representatives(plan: Plan) -> tuple[int, ...]:
    """The first rank of every pipeline rank; under the model all ranks at one place do the same."""
    return tuple(place * plan.layout.stride("pp") for place in range(plan.layout.pp))


def predicted_events(setting: Setting, estimate: Estimate) -> tuple[Event, ...]:
    """The predicted step on the first rank of every pipeline rank; nothing ends after ``estimate.step_s``."""
    plan = estimate.plan
    passes = timeline(setting, plan)
    # The closed form that prices the step and the simulation differ by a percent where stages are unequal.
    stretch = min(1.0, estimate.step_s / passes.end)
    durations = stage_durations(setting, plan)
    transfer = boundary_transfer(setting, to_arrays([plan])) if plan.layout.pp > 1 else 0.0
    boundary = _boundary_bytes(setting, plan)
    events: list[Event] = []
    for place, (rank, actions) in enumerate(zip(representatives(plan), passes.ranks, strict=True)):
        for timed in actions:
            communication = durations[timed.action.stage, timed.action.direction].communication
            events.extend(_pass(rank, timed, communication, stretch))
            if transfer and _sends(timed.action, plan):
                start = timed.end * stretch
                events.append(
                    Event(
                        rank=rank, track=Track.COMMUNICATION, name=f"send {timed.action}", term="pipeline_transfer",
                        start_s=start, end_s=min(start + transfer, estimate.step_s),
                        args={**_place(timed.action), "bytes": boundary},
                    )
                )  # fmt: skip
        events.extend(_tail(setting, estimate, place, rank, actions[-1].end * stretch))
    return tuple(sorted(events, key=lambda e: (e.rank, e.start_s, e.end_s)))


def _place(action: Action) -> dict[str, Value]:
    return {"stage": action.stage, "microbatch": action.microbatch}


def _pass(rank: int, timed: TimedAction, communication: float, stretch: float) -> Iterator[Event]:
    """An action computes first and then waits for its communication, as the simulation has it."""
    forward = timed.action.direction is Direction.FORWARD
    start, end = timed.start * stretch, timed.end * stretch
    computed = max(start, end - communication)
    yield Event(
        rank=rank, track=Track.COMPUTE, name=str(timed.action), term="forward" if forward else "backward",
        start_s=start, end_s=computed, args=_place(timed.action),
    )  # fmt: skip
    if end > computed:
        yield Event(
            rank=rank, track=Track.COMMUNICATION, name=f"tensor parallel {timed.action}", term="tensor_parallel",
            start_s=computed, end_s=end, args=_place(timed.action),
        )  # fmt: skip


def _sends(action: Action, plan: Plan) -> bool:
    """Whether an action's result goes to another pipeline rank."""
    if action.direction is Direction.BACKWARD_WEIGHT:
        return False
    other = action.stage + (1 if action.direction is Direction.FORWARD else -1)
    return 0 <= other < plan.num_stages and _place_of_stage(other, plan) != _place_of_stage(action.stage, plan)


def _place_of_stage(stage: int, plan: Plan) -> int:
    return rank_of_stage(stage, plan.layout.pp, plan.schedule in V_SHAPED)


def _boundary_bytes(setting: Setting, plan: Plan) -> int:
    return round(float(boundary_bytes(setting.graph, _degrees(plan), setting.stack)))


def _degrees(plan: Plan) -> Degrees:
    return Degrees(tp=plan.layout.tp, cp=plan.layout.cp, sp=plan.sequence_parallel, microbatch=plan.microbatch_size)


def _tail(setting: Setting, estimate: Estimate, place: int, rank: int, start: float) -> Iterator[Event]:
    parts = (
        ("gradient_accumulation", Track.COMPUTE, "gradient accumulation"),
        ("data_parallel", Track.COMMUNICATION, "data parallel"),
        ("optimizer", Track.COMPUTE, "optimizer"),
    )
    whole = sum(estimate.breakdown[term] for term, _, _ in parts)
    room = estimate.step_s - start
    shorter = min(1.0, room / whole) if whole > 0 else 1.0
    # Where the tail fills the room it ends with the step, whatever the rounding of the sum.
    filled = whole * shorter >= room * (1 - 1e-9)
    for i, (term, track, name) in enumerate(parts):
        seconds = estimate.breakdown[term] * shorter
        end = estimate.step_s if filled and i == len(parts) - 1 else min(start + seconds, estimate.step_s)
        if seconds > 0 and end > start:
            args: dict[str, Value] = {}
            if term == "data_parallel":
                args["bytes"] = round(_weights(setting, estimate.plan, place) * setting.reduce_bytes)
            yield Event(rank=rank, track=track, name=name, term=term, start_s=start, end_s=end, args=args)
            start = end


def _weights(setting: Setting, plan: Plan, place: int) -> float:
    """Weights whose gradients a rank at this place of the pipeline reduces."""
    graph, blocks = setting.graph, plan.blocks_of_stages(setting.graph.num_blocks)
    stage_of_block = [stage for stage, count in enumerate(blocks) for _ in range(count)]

    def place_of(block: int) -> int:
        stage = 0 if block < 0 else plan.num_stages - 1 if block >= graph.num_blocks else stage_of_block[block]
        return _place_of_stage(stage, plan)

    ops = [op for op in graph.ops if place_of(op.block) == place]
    return float(local_parameters(ops, _degrees(plan), setting.stack))


def measured_events(measurement: Measurement, ranks: Sequence[int] | None = None) -> tuple[Event, ...]:
    """The inspected step of these ranks, all by default. Raises InputError for a rank that was not measured."""
    known = {rank.rank: rank for rank in measurement.ranks}
    missing = sorted(set(ranks or ()) - known.keys())
    if missing:
        raise InputError(f"the measurement of {measurement.slug} has no rank {missing[0]}")
    events = [_measured(rank, span) for rank in (ranks or sorted(known)) for span in known[rank].spans]
    return tuple(sorted(events, key=lambda e: (e.rank, e.start_s, e.end_s)))


_AXIS_TERMS = {"tp": "tensor_parallel", "cp": "context_parallel", "pp": "pipeline_transfer"}


def _measured(rank: int, span: Span) -> Event:
    communication = span.phase == "communication"
    term = span.phase
    if communication:
        words = span.name.split()
        point_to_point = words[0] in ("send", "recv") if words else False
        term = "pipeline_transfer" if point_to_point else _AXIS_TERMS.get(words[-1] if words else "", "data_parallel")
    return Event(
        rank=rank, track=Track.COMMUNICATION if communication else Track.COMPUTE, name=span.name, term=term,
        start_s=span.start_s, end_s=span.end_s, args=_action_args(span.name),
    )  # fmt: skip


def _action_args(name: str) -> dict[str, Value]:
    try:
        return _place(parse_action(name))
    except PlanError:
        return {}
