"""What a measurement says, under the names of the estimate: seconds of stages and collectives, idle, memory by item.

All of it is derived from the spans, moments and counts of measurement.json; nothing here is stored. One step of each
rank was inspected. What a rank did in it adds up to the step: passes of its stages, communication that no compute hid,
the optimizer, waiting for other stages and for their messages, and whatever lies between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autopar.errors import PlanError
from autopar.measurement import Measurement, RankMeasurement, Span
from autopar.plan import Plan
from autopar.schedule.notation import Action, Direction, dependencies, parse_action, provides

POINT_TO_POINT = ("send", "recv")
COMMUNICATION = "communication"


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSeconds:
    """One pass of one virtual stage: seconds per microbatch, the mean over ranks and microbatches.

    Attributes:
        compute: without what ``communication`` took.
        communication: within the pass, not hidden by compute.
        count: passes that were measured.
    """

    compute: float
    communication: float
    count: int

    @property
    def total(self) -> float:
        """Seconds from beginning to end."""
        return self.compute + self.communication


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveSeconds:
    """Collectives of one kind on one axis, of one rank in one step.

    Attributes:
        seconds: from begin to end, summed over the calls.
        moving: seconds of those for which every rank of the group was there: the shortest span of each call. Equal to
            ``seconds`` for messages, and where ranks of the group have unlike calls.
        exposed: seconds that no compute of this rank hid.
    """

    kind: str
    axis: str
    count: int
    num_bytes: int
    seconds: float
    moving: float
    exposed: float

    @property
    def waiting(self) -> float:
        """Seconds in which the other ranks of the group were not there yet."""
        return self.seconds - self.moving

    @property
    def overlapped(self) -> float:
        """Seconds beside which this rank computed."""
        return self.seconds - self.exposed


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSeconds:
    """What one rank did in the inspected step; all together is ``step_s``.

    Attributes:
        passes: seconds of computing by (virtual stage, ``forward`` or ``backward``); recomputation and both halves of
            a backward are backward.
        communication: exposed seconds by (kind, axis), messages of the pipeline left out.
        optimizer: seconds.
        bubble: waiting for a stage on another rank to end its pass, or for the others to end the step.
        transfer: from then until the pass that waited began.
        between: all else.
    """

    rank: int
    step_s: float
    passes: Mapping[tuple[int, str], float]
    communication: Mapping[tuple[str, str], float]
    optimizer: float
    bubble: float
    transfer: float
    between: float

    @property
    def idle(self) -> float:
        """Seconds without work of its own."""
        return self.bubble + self.transfer + self.between


def inspected_step_s(measurement: Measurement) -> float:
    """Seconds of the inspected step: until the last rank was through."""
    return max((span.end_s for rank in measurement.ranks for span in rank.spans), default=0.0)


def pass_seconds(measurement: Measurement) -> dict[tuple[int, Direction], PassSeconds]:
    """Seconds of every pass of every virtual stage, by stage and direction."""
    found: dict[tuple[int, Direction], list[tuple[float, float]]] = defaultdict(list)
    for rank in measurement.ranks:
        exposed = _exposed_by_span(rank.spans, measurement.plan)
        inside = _within_actions(rank.spans, exposed)
        for span, action in _actions(rank.spans):
            if action is not None:
                hidden = sum(inside[id(span)].values())
                found[action.stage, action.direction].append((span.seconds - hidden, hidden))
    return {
        key: PassSeconds(
            compute=sum(c for c, _ in pairs) / len(pairs), communication=sum(c for _, c in pairs) / len(pairs),
            count=len(pairs),
        )
        for key, pairs in sorted(found.items())
    }  # fmt: skip


def collective_seconds(measurement: Measurement) -> dict[int, tuple[CollectiveSeconds, ...]]:
    """Collectives of every rank by kind and axis, by rank."""
    calls = {rank.rank: _calls(rank.spans) for rank in measurement.ranks}
    found = {}
    for rank in measurement.ranks:
        exposed = _exposed_by_span(rank.spans, measurement.plan)
        entries = []
        for (kind, axis), spans in calls[rank.rank].items():
            peers = group_of(measurement.plan, axis, rank.rank)
            together = [calls[peer].get((kind, axis), []) for peer in peers if peer in calls]
            moving = [span.seconds for span in spans]
            if kind not in POINT_TO_POINT and all(len(other) == len(spans) for other in together):
                moving = [min(span.seconds for span in same) for same in zip(*together, strict=True)]
            entries.append(
                CollectiveSeconds(
                    kind=kind, axis=axis, count=len(spans), num_bytes=sum(span.num_bytes for span in spans),
                    seconds=sum(span.seconds for span in spans), moving=sum(moving),
                    exposed=sum(exposed[id(span)] for span in spans),
                )
            )  # fmt: skip
        found[rank.rank] = tuple(entries)
    return found


def group_of(plan: Plan, axis: str, rank: int) -> tuple[int, ...]:
    """Ranks of the group of a rank along an axis of CountedCollective; the rank alone for one that has no name."""
    axes = AXIS_PARTS.get(axis, (axis,))
    try:
        groups = plan.layout.groups(*axes)
    except PlanError:
        return (rank,)
    return next(group for group in groups if rank in group)


AXIS_PARTS: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp_replicate", "dp_shard", "cp"),
    "dp_shard": ("dp_shard", "cp"),
}
"""Axes of counted collectives that span several of the mesh: context parallel ranks reduce gradients too."""


def rank_seconds(measurement: Measurement) -> tuple[RankSeconds, ...]:
    """What every rank did in the inspected step, by rank; those without spans are left out."""
    ends = _ends(measurement)
    step_s = inspected_step_s(measurement)
    return tuple(_rank_seconds(measurement.plan, rank, ends, step_s) for rank in measurement.ranks if rank.spans)


def _rank_seconds(
    plan: Plan, rank: RankMeasurement, ends: Mapping[int, Mapping[Action, float]], step_s: float
) -> RankSeconds:
    exposed = _exposed_by_span(rank.spans, plan)
    inside = _within_actions(rank.spans, exposed)
    communication: dict[tuple[str, str], float] = defaultdict(float)
    passes: dict[tuple[int, str], float] = defaultdict(float)
    bubble = transfer = between = optimizer = clock = 0.0
    for span in rank.spans:
        if span.phase == COMMUNICATION and not _is_message(span):
            kind, axis = _kind_and_axis(span)
            # The loss of four bytes that the last stage tells the others: all of it is waiting for them.
            if axis == "pp":
                bubble += exposed[id(span)]
            else:
                communication[kind, axis] += exposed[id(span)]
    for span, action in _actions(rank.spans):
        gap = max(0.0, span.start_s - clock - _outside(rank.spans, exposed, clock, span.start_s))
        arrived = _dependency_end(action, plan, rank.rank, ends)
        if arrived is None:
            between += gap
        else:
            waited = min(gap, max(0.0, arrived - clock))
            bubble, transfer = bubble + waited, transfer + gap - waited
        own = max(0.0, span.seconds - sum(inside[id(span)].values()))
        if action is None:
            optimizer += own
        else:
            passes[action.stage, "forward" if action.direction is Direction.FORWARD else "backward"] += own
        clock = max(clock, span.end_s)
    rest = step_s - sum(passes.values()) - sum(communication.values()) - optimizer - bubble - transfer - between
    if plan.layout.pp > 1:
        bubble += rest
    else:
        between += rest
    return RankSeconds(
        rank=rank.rank, step_s=step_s, passes=dict(passes), communication=dict(communication), optimizer=optimizer,
        bubble=bubble, transfer=transfer, between=between,
    )  # fmt: skip


def _actions(spans: Sequence[Span]) -> list[tuple[Span, Action | None]]:
    """Passes and other spans of the rank's own work, in order; None for what is no pass."""
    own = [span for span in spans if span.phase != COMMUNICATION]
    return [(span, _parsed(span.name)) for span in sorted(own, key=lambda span: span.start_s)]


def _parsed(name: str) -> Action | None:
    try:
        return parse_action(name)
    except PlanError:
        return None


def _is_message(span: Span) -> bool:
    return span.name.partition(" ")[0] in POINT_TO_POINT


def _kind_and_axis(span: Span) -> tuple[str, str]:
    kind, _, axis = span.name.partition(" ")
    return kind, axis


def _calls(spans: Iterable[Span]) -> dict[tuple[str, str], list[Span]]:
    found: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        if span.phase == COMMUNICATION:
            found[_kind_and_axis(span)].append(span)
    return found


def _exposed_by_span(spans: Sequence[Span], plan: Plan) -> dict[int, float]:
    """Exposed seconds of every communication, by ``id`` of its span.

    Where only the span was measured: what lies outside of passes, and all of it unless it is a reduction of replicated
    gradients, which runs beside the backward.
    """
    found = {}
    for span in spans:
        if span.phase != COMMUNICATION:
            continue
        if span.exposed_s is not None:
            found[id(span)] = span.exposed_s
        elif plan.zero_stage == 0 and span.name == "all_reduce dp":
            found[id(span)] = span.seconds - sum(_overlap(span, other) for other, _ in _actions(spans))
        else:
            found[id(span)] = span.seconds
    return found


def _overlap(left: Span, right: Span) -> float:
    return max(0.0, min(left.end_s, right.end_s) - max(left.start_s, right.start_s))


def _within_actions(spans: Sequence[Span], exposed: Mapping[int, float]) -> dict[int, dict[int, float]]:
    """Exposed seconds of communication within every action, by ``id`` of both spans, the action's first.

    A communication that outlasts the action in which it began is exposed at its end first.
    """
    own = [span for span, _ in _actions(spans)]
    found: dict[int, dict[int, float]] = {id(span): {} for span in own}
    for span in spans:
        if span.phase != COMMUNICATION or _is_message(span):
            continue
        shares = {id(action): _overlap(span, action) for action in own}
        inside = sum(shares.values())
        left = max(0.0, exposed[id(span)] - (span.seconds - inside))
        for action, share in shares.items():
            if share > 0 and left > 0:
                found[action][id(span)] = left * share / inside
    return found


def _outside(spans: Sequence[Span], exposed: Mapping[int, float], start: float, end: float) -> float:
    """Exposed seconds of communication, messages left out, between two actions."""
    gap = Span(name="", phase="", start_s=start, end_s=max(start, end))
    chosen = [span for span in spans if span.phase == COMMUNICATION and not _is_message(span)]
    return sum(min(exposed[id(span)], _overlap(span, gap)) for span in chosen)


def _ends(measurement: Measurement) -> dict[int, dict[Action, float]]:
    """When every rank ended its passes; a whole backward as its gradient of the input."""
    return {
        rank.rank: {provides(action): span.end_s for span, action in _actions(rank.spans) if action is not None}
        for rank in measurement.ranks
    }


def _dependency_end(
    action: Action | None, plan: Plan, rank: int, ends: Mapping[int, Mapping[Action, float]]
) -> float | None:
    """When the pass on another rank ended that this one needs; None where it needs none."""
    if action is None:
        return None
    peers = group_of(plan, "pp", rank)
    times = [
        ends[peer][need]
        for need in dependencies(action, plan.num_stages) if need.stage != action.stage
        for peer in peers if peer != rank and peer in ends and need in ends[peer]
    ]  # fmt: skip
    return max(times, default=None)


def peak_items(rank: RankMeasurement, plan: Plan) -> dict[str, float]:
    """Bytes at the peak of one rank by the names of ``estimate.memory.ITEMS``; their sum is the peak.

    Activations are what forwards left allocated and backwards have not used up; gradients, what else has stayed from
    pass to pass when the action of the peak begins; working, what that action adds. Weights that ZeRO-2 gathers once a
    step are parameters, their shards buffers. Without moments (files of version 1) transient bytes are not told apart.
    """
    held: dict[str, float] = {name: rank.memory.get(name, 0) for name in ("parameters", "optimizer", "buffers")}
    if not rank.moments:
        return {**held, "transient": rank.peak_bytes - sum(held.values())}
    top = max(range(len(rank.moments)), key=lambda i: rank.moments[i].peak_bytes)
    passes = [_parsed(moment.name) for moment in rank.moments]
    own = passes[top]
    gathered = _gathered_bytes(rank, plan) if own is not None else 0
    if gathered:
        held["parameters"], held["buffers"] = gathered, held["buffers"] + held["parameters"]
    of_stage = gathered / max(1, len({action.stage for action in passes if action is not None}))
    flight: dict[tuple[int, int], float] = {}
    begun: set[int] = set()
    for moment, action in zip(rank.moments[: top + 1], passes[: top + 1], strict=True):
        if action is not None and action.direction is Direction.FORWARD:
            weights = 0.0 if action.stage in begun else of_stage
            flight[action.stage, action.microbatch] = moment.end_bytes - moment.begin_bytes - weights
        elif (
            action is not None and action.direction is not Direction.BACKWARD_INPUT and moment is not rank.moments[top]
        ):
            flight.pop((action.stage, action.microbatch), None)
        if moment is not rank.moments[top]:
            begun |= {action.stage} if action is not None else set()
    activations = sum(flight.values()) if own is not None else 0.0
    before = activations
    if own is not None and own.direction is Direction.FORWARD:
        before -= flight[own.stage, own.microbatch]
    gradients = rank.moments[top].begin_bytes - before - of_stage * len(begun)
    working = rank.peak_bytes - sum(held.values()) - gradients - activations
    return {**held, "gradients": gradients, "activations": activations, "working": working}


def _gathered_bytes(rank: RankMeasurement, plan: Plan) -> int:
    """Weights that ZeRO-1 and ZeRO-2 gather once and keep until the last backward."""
    gathers = [c for c in rank.collectives if c.kind == "all_gather" and c.axis.startswith("dp")]
    return sum(c.num_bytes for c in gathers) if plan.zero_stage in (1, 2) else 0


def place_of(measurement: Measurement, rank: int) -> int:
    """Place of a rank in its pipeline."""
    return measurement.plan.layout.coordinates(rank)["pp"]
