"""Where the prediction of a measured run was wrong, by name.

A step is taken apart on the pipeline rank that was busiest: passes of its stages, communication that no compute hides
by kind and axis, optimizer, waiting. Both sides add up to their step, so that the differences add up to its error.
Measured items are means over the ranks at that place of the pipeline, and scaled from the inspected step to the median
of the timed ones. Memory is taken apart on the fullest rank, by items whose differences add up to the peak's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting, timeline
from autopar.estimate.timeline import stage_durations
from autopar.estimate.traffic import expected_collectives
from autopar.estimate.traffic.prices import IN_PASSES, price_call
from autopar.measured import (
    CollectiveSeconds,
    RankSeconds,
    collective_seconds,
    inspected_step_s,
    peak_items,
    place_of,
    rank_seconds,
)
from autopar.measurement import CountedCollective, Measurement
from autopar.plan import Plan
from autopar.schedule.notation import Direction

OPTIMIZER, BUBBLE, TRANSFER, BETWEEN = "optimizer", "pipeline bubble", "pipeline transfers", "between passes"
REDUCTION = "all_reduce on dp"
TRANSIENT = ("gradients", "activations", "working")
GATHERING = ("gradients", "working", "buffers")
"""Memory items that a run under ZeRO-3 does not tell apart: what is gathered for a pass is allocated within it."""
UNTOLD = ("parameters", "buffers", *TRANSIENT)
"""Those of sharded runs of files of version 1."""
LEAST_CHANGE = 0.05
"""Of the machine's speed, that is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A part of a whole, predicted and measured, in seconds or bytes."""

    name: str
    predicted: float
    measured: float

    @property
    def difference(self) -> float:
        """Predicted less measured: what it adds to the error of the whole."""
        return self.predicted - self.measured


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveItem:
    """Calls of one kind on one axis, of one rank in a step: predicted, counted and timed.

    Attributes:
        predicted_s: price of the calls, however much of it compute hides.
        measured: None where the run called none.
    """

    kind: str
    axis: str
    group_size: int
    predicted_count: int
    predicted_bytes: int
    counted: int
    counted_bytes: int
    predicted_s: float
    measured: CollectiveSeconds | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """One run, taken apart.

    Attributes:
        rank, place: of the pipeline rank that was busiest, its first rank and its place.
        inspected: seconds of the inspected step over the median of the timed ones; far from 1 where the inspected step
            was no usual one.
        noise: distance of the quartiles of timed steps over their median.
        slowness: how many times longer than during the profile the machine took for the same work; None if not known.
        beside: whether gradients are reduced on the processors that compute the backward meanwhile.
        time, memory: items, those that add most to the error first.
        collectives: of that rank.
    """

    slug: str
    predicted_step_s: float
    measured_step_s: float
    predicted_bytes: float
    measured_bytes: float
    rank: int
    place: int
    inspected: float
    noise: float
    slowness: float | None
    beside: bool
    time: tuple[Item, ...]
    memory: tuple[Item, ...]
    collectives: tuple[CollectiveItem, ...]

    @property
    def error(self) -> float:
        """Of the step: predicted / measured - 1."""
        return self.predicted_step_s / self.measured_step_s - 1

    @property
    def named(self) -> tuple[Item, ...]:
        """Items of the step as far as both sides can tell them apart.

        A reduction on the processors that compute shows in the backward beside it, so that the two are one item.
        """
        if not self.beside:
            return self.time
        joined = [item for item in self.time if is_beside(item)]
        return _sorted(
            [
                *(item for item in self.time if not is_beside(item)),
                Item(
                    name=f"backward with {REDUCTION}", predicted=sum(item.predicted for item in joined),
                    measured=sum(item.measured for item in joined),
                ),
            ]
        )  # fmt: skip

    @property
    def memory_error(self) -> float:
        """Of the peak."""
        return self.predicted_bytes / self.measured_bytes - 1


def attribute(
    setting: Setting, estimate: Estimate, measurement: Measurement, *, slowness: float | None = None
) -> Attribution:
    """Take apart one run and its prediction.

    Raises:
        InputError: they are of different plans, or the run has no timed steps or no spans.
    """
    if estimate.plan != measurement.plan:
        raise InputError(f"the measurement of {measurement.slug} is of another plan than {estimate.plan.slug}")
    ranks = rank_seconds(measurement)
    if not measurement.step_s or not ranks:
        raise InputError(f"the measurement of {measurement.slug} has no timed steps or no spans: run the plan again")
    places: dict[int, list[RankSeconds]] = defaultdict(list)
    for rank in ranks:
        places[place_of(measurement, rank.rank)].append(rank)
    place, members = min(places.items(), key=lambda item: sum(rank.idle for rank in item[1]) / len(item[1]))
    median = measurement.median_step_s
    inspected = inspected_step_s(measurement) / median
    expected = expected_collectives(setting, estimate.plan, norm=bool(measurement.grad_norms))[members[0].rank]
    time = _joined(predicted_time(setting, estimate, place, expected), _measured_time(members, 1 / inspected))
    fullest = max(measurement.ranks, key=lambda rank: rank.peak_bytes)
    held = _same_items(
        estimate.memory_items_per_rank[place_of(measurement, fullest.rank)],
        peak_items(fullest, measurement.plan),
        measurement.plan.zero_stage,
    )
    steps = sorted(measurement.step_s)
    quarter = len(steps) // 4
    return Attribution(
        slug=measurement.slug,
        predicted_step_s=estimate.step_s,
        measured_step_s=median,
        predicted_bytes=sum(item.predicted for item in held),
        measured_bytes=fullest.peak_bytes,
        rank=members[0].rank,
        place=place,
        inspected=inspected,
        noise=(steps[-1 - quarter] - steps[quarter]) / median,
        slowness=slowness,
        beside=_beside(setting, measurement.plan),
        time=time,
        memory=_sorted(held),
        collectives=_collectives(setting, measurement, members[0].rank, expected),
    )


def _beside(setting: Setting, plan: Plan) -> bool:
    return setting.cluster.link_uses_host and plan.zero_stage == 0 and plan.layout.dp * plan.layout.cp > 1


def is_beside(item: Item) -> bool:
    """Whether an item is a backward or the reduction of replicated gradients that runs beside it."""
    return item.name == REDUCTION or item.name.startswith("backward")


def predicted_time(
    setting: Setting, estimate: Estimate, place: int, expected: Sequence[CountedCollective]
) -> dict[str, float]:
    """Seconds of a predicted step by the names of items, for one place of the pipeline; they add up to the step.

    Communication of a term is divided over the calls that make it up by their prices.
    """
    plan, breakdown = estimate.plan, estimate.breakdown
    passes, durations = timeline(setting, plan), stage_durations(setting, plan)
    stretch = min(1.0, estimate.step_s / passes.end)
    found: dict[str, float] = defaultdict(float)
    inside = 0.0
    for timed in passes.ranks[place]:
        stage, direction, _ = timed.action
        waits = min(durations[stage, direction].communication, timed.end - timed.start) * stretch
        found[pass_name(stage, direction is Direction.FORWARD)] += (timed.end - timed.start) * stretch - waits
        inside += waits
    backwards = {name: seconds for name, seconds in found.items() if name.startswith("backward")}
    for name, seconds in backwards.items():
        found[name] += breakdown["gradient_accumulation"] * seconds / sum(backwards.values())
    in_passes = [call for call in expected if call.axis in IN_PASSES]
    of_data = [call for call in expected if call.axis not in (*IN_PASSES, "pp")]
    for seconds, calls, name in (
        (inside, in_passes, "communication in passes"),
        (breakdown["data_parallel"], of_data, "data parallel"),
    ):
        prices = {collective_name(call.kind, call.axis): price_call(setting, plan, call) for call in calls}
        whole = sum(prices.values())
        for key, price in prices.items() if whole > 0 else [(name, 1.0)] if seconds > 0 else []:
            found[key] += seconds * price / (whole or 1.0)
    found[OPTIMIZER] = breakdown["optimizer"]
    rest = estimate.step_s - sum(found.values())
    if plan.layout.pp > 1:
        found[TRANSFER] = min(breakdown["pipeline_transfer"], max(rest, 0.0))
        found[BUBBLE] = rest - found[TRANSFER]
    else:
        found[BETWEEN] = rest
    return dict(found)


def pass_name(stage: int, forward: bool) -> str:
    """``forward of stage 2``."""
    return f"{'forward' if forward else 'backward'} of stage {stage}"


def collective_name(kind: str, axis: str) -> str:
    """``all_reduce on dp``."""
    return f"{kind} on {axis}"


def _measured_time(ranks: Sequence[RankSeconds], scale: float) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    share = scale / len(ranks)
    for rank in ranks:
        for (stage, direction), seconds in rank.passes.items():
            found[pass_name(stage, direction == "forward")] += seconds * share
        for (kind, axis), seconds in rank.communication.items():
            found[collective_name(kind, axis)] += seconds * share
        found[OPTIMIZER] += rank.optimizer * share
        found[BUBBLE] += rank.bubble * share
        found[TRANSFER] += rank.transfer * share
        found[BETWEEN] += rank.between * share
    return dict(found)


def _joined(predicted: Mapping[str, float], measured: Mapping[str, float]) -> tuple[Item, ...]:
    names = dict.fromkeys((*predicted, *measured))
    items = [Item(name=n, predicted=predicted.get(n, 0.0), measured=measured.get(n, 0.0)) for n in names]
    return _sorted([item for item in items if item.predicted or item.measured])


def _sorted(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: -abs(item.difference)))


def _same_items(predicted: Mapping[str, float], measured: Mapping[str, float], zero_stage: int) -> list[Item]:
    """Items that both sides tell apart; those that one does not are taken together."""
    together: tuple[str, ...] = GATHERING if zero_stage == 3 else ()
    if "transient" in measured:
        together = UNTOLD if zero_stage >= 2 else TRANSIENT
    sides: list[dict[str, float]] = []
    for side in (predicted, measured):
        merged: dict[str, float] = defaultdict(float)
        for name, size in side.items():
            merged[", ".join(together) if name in (*together, "transient") else name] += size
        sides.append(merged)
    left, right = sides
    names = dict.fromkeys((*left, *right))
    items = [Item(name=name, predicted=left.get(name, 0.0), measured=right.get(name, 0.0)) for name in names]
    return [item for item in items if item.predicted or item.measured]


def _collectives(
    setting: Setting, measurement: Measurement, rank: int, expected: Sequence[CountedCollective]
) -> tuple[CollectiveItem, ...]:
    counted = {(c.kind, c.axis, c.group_size): c for r in measurement.ranks if r.rank == rank for c in r.collectives}
    guessed = {(c.kind, c.axis, c.group_size): c for c in expected}
    timed = {(c.kind, c.axis): c for c in collective_seconds(measurement)[rank]}
    found = []
    for key in dict.fromkeys((*guessed, *counted)):
        kind, axis, size = key
        guess, real = guessed.get(key), counted.get(key)
        found.append(
            CollectiveItem(
                kind=kind, axis=axis, group_size=size,
                predicted_count=guess.count if guess else 0, predicted_bytes=guess.num_bytes if guess else 0,
                counted=real.count if real else 0, counted_bytes=real.num_bytes if real else 0,
                predicted_s=price_call(setting, measurement.plan, guess) if guess else 0.0,
                measured=timed.get((kind, axis)),
            )
        )  # fmt: skip
    return tuple(found)


def verdict(found: Attribution) -> str:
    """One line: by how much the step was missed and the items that make up most of it, in percent of the step.

    ``step predicted 12% too long: 9 of it all_reduce on dp, 2 backward of stage 0``.
    """
    error = found.error
    side = "too long" if error > 0 else "too short"
    line = f"step predicted {abs(error):.0%} {side}"
    if abs(error) < 0.005:
        line = "step predicted as measured"
    shares = [(item.difference / found.measured_step_s, item.name) for item in found.named]
    guilty = [(share, name) for share, name in shares if share * error > 0 and abs(share) >= 0.005]
    named: list[str] = []
    covered = 0.0
    for share, name in guilty[:3]:
        if covered >= 0.9 * abs(error):
            break
        named.append(f"{100 * abs(share):.0f} of it {name}" if not named else f"{100 * abs(share):.0f} {name}")
        covered += abs(share)
    line += f": {', '.join(named)}" if named and abs(error) >= 0.005 else ""
    against = [(share, name) for share, name in shares if share * error < 0 and abs(share) >= 0.02]
    if against and covered > abs(error) + 0.02:
        share, name = against[0]
        line += f"; {name} is {100 * abs(share):.0f} the other way"
    if abs(error) < found.noise:
        line += f" (timed steps vary by {found.noise:.0%})"
    if found.slowness is not None and abs(found.slowness - 1) >= LEAST_CHANGE:
        line += f"; the machine took {found.slowness:.2f} times as long as during the profile"
    return line
