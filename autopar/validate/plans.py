"""Prediction joined with measurement, plan by plan, and what the differences say about the planner.

Errors are signed: predicted / measured - 1, so +10% predicts a step that is too slow. ``compare`` joins estimates with
measurements; ``summarise`` judges any list of comparisons, whatever it was joined from.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from autopar.errors import InputError
from autopar.estimate import Estimate
from autopar.measurement import CountedCollective, Measurement

Item = TypeVar("Item")

Collectives = Mapping[str, Sequence[Sequence[CountedCollective]]]
"""Predicted collectives by slug, then by rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Peak bytes of one pipeline rank: predicted, and the largest measured among the ranks that share its place."""

    pp: int
    predicted_bytes: float
    measured_bytes: int
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveDifference:
    """Collectives of one kind, axis and group size of one rank that were not called as predicted."""

    rank: int
    kind: str
    axis: str
    group_size: int
    predicted_count: int
    counted_count: int
    predicted_bytes: int
    counted_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCheck:
    """Collectives predicted and counted; ``checked`` kinds of all ranks, of which ``differences`` disagree."""

    checked: int
    differences: tuple[CollectiveDifference, ...]

    @property
    def agree(self) -> bool:
        """Every count and every byte is as predicted."""
        return not self.differences


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One plan, predicted and measured.

    Attributes:
        predicted_step_s, measured_step_s: seconds; measured is the median of the timed steps.
        error: of the step time.
        measured_low_s, measured_high_s: quartiles of the timed steps.
        noise: their distance as a share of the median.
        predicted_memory_bytes, measured_memory_bytes: peak of the rank that holds most.
        memory_error: of that peak.
        stages: peaks by pipeline rank.
        collectives: agreement of predicted and counted collectives, None where no prediction was given.
        slowness: seconds of the yardstick during the run over those during the profile; None where one is missing.
        at_speed_s: the step predicted for a machine as slow as it was during the run.
        at_speed_error: of that.
    """

    slug: str
    predicted_step_s: float
    measured_step_s: float
    error: float
    measured_low_s: float
    measured_high_s: float
    noise: float
    predicted_memory_bytes: float
    measured_memory_bytes: int
    memory_error: float
    stages: tuple[StageMemory, ...] = ()
    collectives: CollectiveCheck | None = None
    slowness: float | None = None
    at_speed_s: float | None = None
    at_speed_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AtSpeed:
    """Agreement once the machine's speed during each run is known.

    Attributes:
        slowest, fastest: extremes of ``slowness``.
        time_error_median, time_error_worst: absolute errors of the step time.
        kendall_tau: of what was predicted for each run's speed and what was measured.
    """

    slowest: float
    fastest: float
    time_error_median: float
    time_error_worst: float
    kendall_tau: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What the comparisons say.

    Attributes:
        comparisons: one per plan, the fastest predicted first.
        time_error_median, time_error_worst: absolute errors of the step time.
        memory_error_median, memory_error_worst: absolute errors of the peak.
        kendall_tau: agreement of the two rankings (tau-b), 1 for the same order, -1 for the reverse; None where fewer
            than two different times leave nothing to rank.
        chosen: slug of the plan predicted fastest, ties to less predicted memory, then to the slug's order.
        best: slug of the plan measured fastest.
        regret: measured time of ``chosen`` over that of ``best``, minus 1.
        at_speed: None unless every run knows how fast the machine was.
    """

    comparisons: tuple[Comparison, ...]
    time_error_median: float
    time_error_worst: float
    memory_error_median: float
    memory_error_worst: float
    kendall_tau: float | None
    chosen: str
    best: str
    regret: float
    at_speed: AtSpeed | None = None

    def of(self, slug: str) -> Comparison:
        """The comparison of one plan. Raises InputError if it is not among them."""
        for comparison in self.comparisons:
            if comparison.slug == slug:
                return comparison
        raise InputError(f"plan {slug} was not compared; known: {', '.join(c.slug for c in self.comparisons)}")


def compare(
    estimates: Sequence[Estimate],
    measurements: Sequence[Measurement],
    *,
    collectives: Collectives | None = None,
    at_speed: Mapping[str, tuple[float, float]] | None = None,
) -> Validation:
    """Join estimates with measurements by slug.

    Args:
        estimates: predictions, one per plan that was run.
        measurements: runs of the same plans, in any order.
        collectives: what each rank was predicted to call in a step, by slug; plans without an entry are not checked.
        at_speed: how many times slower the machine was during the run than during the profile, and the step predicted
            for a machine that slow, by slug.

    Raises:
        InputError: nothing to compare, a plan twice, a plan on one side only, or a run without timed steps.
    """
    predicted = _by_slug([(e.plan.slug, e) for e in estimates], "estimates")
    measured = _by_slug([(m.slug, m) for m in measurements], "measurements")
    for missing, what in (
        (predicted.keys() - measured.keys(), "no measurement of"),
        (measured.keys() - predicted.keys(), "no estimate of"),
        ((collectives or {}).keys() - predicted.keys(), "collectives, but no estimate of"),
    ):
        if missing:
            raise InputError(f"cannot compare: {what} {', '.join(sorted(missing))}")
    expected, speeds = collectives or {}, at_speed or {}
    compared = [compare_one(estimate, measured[slug], expected.get(slug)) for slug, estimate in predicted.items()]
    return summarise([_at_speed(one, *speeds[one.slug]) if one.slug in speeds else one for one in compared])


def _at_speed(comparison: Comparison, slowness: float, step_s: float) -> Comparison:
    error = relative_error(step_s, comparison.measured_step_s)
    return dataclasses.replace(comparison, slowness=slowness, at_speed_s=step_s, at_speed_error=error)


def _by_slug(named: Sequence[tuple[str, Item]], what: str) -> dict[str, Item]:
    found = dict(named)
    if len(found) != len(named):
        slugs = [slug for slug, _ in named]
        twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        raise InputError(f"cannot compare: {what} of {', '.join(twice)} given more than once")
    return found


def compare_one(
    estimate: Estimate, measurement: Measurement, collectives: Sequence[Sequence[CountedCollective]] | None = None
) -> Comparison:
    """Compare one plan's prediction with its run. Raises InputError if they are of different plans or sizes."""
    slug = estimate.plan.slug
    if estimate.plan != measurement.plan:
        raise InputError(f"cannot compare: the measurement of {measurement.slug} is of another plan than {slug}")
    if not measurement.step_s or not measurement.ranks:
        raise InputError(f"the measurement of {slug} has no timed steps or no ranks: run it with more steps")
    median = measurement.median_step_s
    low, high = (float(q) for q in np.quantile(measurement.step_s, (0.25, 0.75)))
    return Comparison(
        slug=slug,
        predicted_step_s=estimate.step_s,
        measured_step_s=median,
        error=relative_error(estimate.step_s, median),
        measured_low_s=low,
        measured_high_s=high,
        noise=(high - low) / median,
        predicted_memory_bytes=estimate.memory_bytes,
        measured_memory_bytes=measurement.peak_bytes,
        memory_error=relative_error(estimate.memory_bytes, measurement.peak_bytes),
        stages=_stages(estimate, measurement),
        collectives=None if collectives is None else check_collectives(collectives, measurement),
    )


def relative_error(predicted: float, measured: float) -> float:
    """Return predicted / measured - 1. Raises InputError where nothing was measured."""
    if not measured > 0:
        raise InputError(f"a measured value of {measured} cannot be compared: it must be more than 0")
    return predicted / measured - 1


def _stages(estimate: Estimate, measurement: Measurement) -> tuple[StageMemory, ...]:
    layout = measurement.plan.layout
    peaks = [0] * layout.pp
    for rank in measurement.ranks:
        place = layout.coordinates(rank.rank)["pp"]
        peaks[place] = max(peaks[place], rank.peak_bytes)
    if len(estimate.memory_per_rank) != layout.pp:
        raise InputError(
            f"plan {measurement.slug}: {len(estimate.memory_per_rank)} predicted peaks for {layout.pp} pipeline ranks"
        )
    unseen = [str(place) for place, peak in enumerate(peaks) if peak == 0]
    if unseen:
        raise InputError(f"the measurement of {measurement.slug} has no rank of pipeline rank {', '.join(unseen)}")
    return tuple(
        StageMemory(pp=place, predicted_bytes=guess, measured_bytes=peak, error=relative_error(guess, peak))
        for place, (guess, peak) in enumerate(zip(estimate.memory_per_rank, peaks, strict=True))
    )


def check_collectives(predicted: Sequence[Sequence[CountedCollective]], measurement: Measurement) -> CollectiveCheck:
    """Compare what every rank called with what was predicted for it, by kind, axis and group size.

    Bytes of an all-to-all are compared in the sum over the ranks, since a router decides how much each of them sends.

    Raises:
        InputError: predictions for another number of ranks than were measured.
    """
    if len(predicted) != len(measurement.ranks):
        raise InputError(
            f"plan {measurement.slug}: collectives predicted for {len(predicted)} ranks, counted on "
            f"{len(measurement.ranks)}"
        )
    routed = _sums_of_exchanges(predicted), _sums_of_exchanges(rank.collectives for rank in measurement.ranks)
    checked, differences = 0, []
    for counted in measurement.ranks:
        guess, found = _totals(predicted[counted.rank]), _totals(counted.collectives)
        for key in sorted(guess.keys() | found.keys()):
            checked += 1
            (guess_count, guess_bytes), (count, num_bytes) = guess.get(key, (0, 0)), found.get(key, (0, 0))
            if guess_count == count and key in routed[0] and routed[0][key] == routed[1].get(key):
                continue
            if (guess_count, guess_bytes) != (count, num_bytes):
                kind, axis, size = key
                differences.append(
                    CollectiveDifference(
                        rank=counted.rank, kind=kind, axis=axis, group_size=size, predicted_count=guess_count,
                        counted_count=count, predicted_bytes=guess_bytes, counted_bytes=num_bytes,
                    )
                )  # fmt: skip
    return CollectiveCheck(checked=checked, differences=tuple(differences))


def _sums_of_exchanges(ranks: Iterable[Iterable[CountedCollective]]) -> dict[tuple[str, str, int], int]:
    """Bytes of all-to-alls over all ranks, by kind, axis and group size."""
    sums: dict[tuple[str, str, int], int] = {}
    for collectives in ranks:
        for key, (_, num_bytes) in _totals(collectives).items():
            if key[0] == "all_to_all":
                sums[key] = sums.get(key, 0) + num_bytes
    return sums


def _totals(collectives: Iterable[CountedCollective]) -> dict[tuple[str, str, int], tuple[int, int]]:
    totals: dict[tuple[str, str, int], tuple[int, int]] = {}
    for item in collectives:
        key = (item.kind, item.axis, item.group_size)
        count, num_bytes = totals.get(key, (0, 0))
        totals[key] = (count + item.count, num_bytes + item.num_bytes)
    return totals


def summarise(comparisons: Sequence[Comparison]) -> Validation:
    """Judge comparisons. Raises InputError if there are none."""
    if not comparisons:
        raise InputError("nothing to compare: no plan was both predicted and measured")
    ranked = sorted(comparisons, key=lambda c: (c.predicted_step_s, c.predicted_memory_bytes, c.slug))
    chosen, best = ranked[0], min(ranked, key=lambda c: c.measured_step_s)
    time, memory = [abs(c.error) for c in ranked], [abs(c.memory_error) for c in ranked]
    return Validation(
        comparisons=tuple(ranked),
        time_error_median=statistics.median(time),
        time_error_worst=max(time),
        memory_error_median=statistics.median(memory),
        memory_error_worst=max(memory),
        kendall_tau=kendall_tau([c.predicted_step_s for c in ranked], [c.measured_step_s for c in ranked]),
        chosen=chosen.slug,
        best=best.slug,
        regret=chosen.measured_step_s / best.measured_step_s - 1,
        at_speed=_summary_at_speed(ranked),
    )


def _summary_at_speed(comparisons: Sequence[Comparison]) -> AtSpeed | None:
    known = [
        (c.slowness, c.at_speed_s, abs(c.at_speed_error), c.measured_step_s) for c in comparisons
        if c.slowness is not None and c.at_speed_s is not None and c.at_speed_error is not None
    ]  # fmt: skip
    if len(known) < len(comparisons):
        return None
    slowness, predicted, errors, measured = zip(*known, strict=True)
    return AtSpeed(
        slowest=max(slowness), fastest=min(slowness), time_error_median=statistics.median(errors),
        time_error_worst=max(errors), kendall_tau=kendall_tau(predicted, measured),
    )  # fmt: skip


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Kendall's tau-b of two equally long lists: (concordant - discordant) pairs, ties taken out of the denominator.

    None where one list has no two different values. Source: Kendall 1945; computed by scipy.
    """
    if len(left) != len(right):
        raise InputError(f"two rankings of different lengths: {len(left)} and {len(right)}")
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    from scipy.stats import kendalltau  # a second that planning does not need

    tau = float(kendalltau(left, right).statistic)
    assert math.isfinite(tau), "tau of lists with two different values each is a number"
    return tau
