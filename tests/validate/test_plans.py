"""Joining predictions with measurements, and the figures of merit, against closed forms and scipy."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable

import pytest
from scipy.stats import kendalltau

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting
from autopar.measurement import CountedCollective, Measurement, together
from autopar.validate import Comparison, Validation, compare, kendall_tau, summarise
from autopar.validate.plans import check_collectives
from costmodels.records import from_plain, to_plain

Measure = Callable[..., Measurement]


def comparison(slug: str, predicted: float, measured: float, memory: float = 100.0) -> Comparison:
    return Comparison(
        slug=slug, predicted_step_s=predicted, measured_step_s=measured, error=predicted / measured - 1,
        measured_low_s=measured, measured_high_s=measured, noise=0.0, predicted_memory_bytes=memory,
        measured_memory_bytes=100, memory_error=memory / 100 - 1,
    )  # fmt: skip


def brute_force_tau(left: list[float], right: list[float]) -> float:
    """Tau-b by counting pairs."""
    concordant = tied_left = tied_right = pairs = 0
    for (a, x), (b, y) in itertools.combinations(zip(left, right, strict=True), 2):
        sign = (a > b) - (a < b), (x > y) - (x < y)
        concordant += sign[0] * sign[1]
        tied_left += sign[0] == 0
        tied_right += sign[1] == 0
        pairs += 1
    return concordant / ((pairs - tied_left) * (pairs - tied_right)) ** 0.5


def test_errors_are_signed_and_exact(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    first, second = sample_estimates[:2]
    runs = [
        measure(sample_setting, first, time=1.25, memory=0.5),
        measure(sample_setting, second, time=0.8, memory=1.0),
    ]
    found = compare([first, second], runs)
    assert found.of(first.plan.slug).error == pytest.approx(1 / 1.25 - 1)
    assert found.of(second.plan.slug).error == pytest.approx(1 / 0.8 - 1)
    assert found.of(first.plan.slug).memory_error == pytest.approx(1.0, rel=1e-6)
    assert found.time_error_median == pytest.approx((0.2 + 0.25) / 2)
    assert found.time_error_worst == pytest.approx(0.25)
    assert found.memory_error_worst == pytest.approx(1.0, rel=1e-6)


def test_noise_is_the_distance_of_the_quartiles(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    run = dataclasses.replace(measure(sample_setting, sample_estimates[0]), step_s=(1.0, 2.0, 3.0, 4.0, 5.0))
    found = compare(sample_estimates[:1], [run]).comparisons[0]
    assert (found.measured_low_s, found.measured_step_s, found.measured_high_s) == (2.0, 3.0, 4.0)
    assert found.noise == pytest.approx(2 / 3)


def test_memory_by_pipeline_rank(sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure) -> None:
    estimate = next(e for e in sample_estimates if e.plan.layout.pp == 2 and e.plan.layout.dp == 2)
    run = measure(sample_setting, estimate)
    # Ranks 0 and 1 are the first pipeline rank, 2 and 3 the second; only the largest of each pair counts.
    peaks = (100, 300, 250, 200)
    run = dataclasses.replace(run, ranks=tuple(dataclasses.replace(r, peak_bytes=peaks[r.rank]) for r in run.ranks))
    found = compare([estimate], [run]).comparisons[0]
    assert [stage.measured_bytes for stage in found.stages] == [300, 250]
    assert [stage.predicted_bytes for stage in found.stages] == list(estimate.memory_per_rank)
    assert found.measured_memory_bytes == 300


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]),
        ([1.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 7.0]),
        ([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]),
        ([0.2, 0.5, 0.5, 0.1, 0.9, 0.3], [0.3, 0.4, 0.6, 0.3, 0.8, 0.1]),
    ],
)
def test_kendall_tau(left: list[float], right: list[float]) -> None:
    assert kendall_tau(left, right) == pytest.approx(brute_force_tau(left, right))
    assert kendall_tau(left, right) == pytest.approx(float(kendalltau(left, right).statistic))


def test_kendall_tau_by_hand() -> None:
    # Five pairs of six agree, one does not.
    assert kendall_tau([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert kendall_tau([1, 1], [1, 2]) is None
    assert kendall_tau([1], [1]) is None
    with pytest.raises(InputError, match="different lengths: 2 and 1"):
        kendall_tau([1, 2], [1])


def test_regret_is_what_the_choice_costs() -> None:
    found = summarise([comparison("a", 1.0, 1.2), comparison("b", 1.1, 1.0), comparison("c", 2.0, 2.0)])
    assert (found.chosen, found.best) == ("a", "b")
    assert found.regret == pytest.approx(0.2)
    assert found.kendall_tau == pytest.approx(1 / 3)
    assert [c.slug for c in found.comparisons] == ["a", "b", "c"]
    right = summarise([comparison("a", 1.0, 1.0), comparison("b", 1.1, 1.2)])
    assert right.regret == 0 and right.chosen == right.best == "a"


def test_ties_go_to_less_memory_as_in_the_search() -> None:
    found = summarise([comparison("a", 1.0, 1.2, memory=200), comparison("b", 1.0, 1.0, memory=100)])
    assert found.chosen == "b"


def test_swapped_measurements_are_noticed(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    runs = [measure(sample_setting, e, noise=0.0) for e in sample_estimates]
    honest = compare(sample_estimates, runs)
    assert honest.kendall_tau == pytest.approx(1.0) and honest.time_error_worst < 1e-9 and honest.regret == 0
    by_time = sorted(runs, key=lambda run: run.median_step_s)
    fastest, slowest = by_time[0], by_time[-1]
    swapped = [
        dataclasses.replace(fastest, step_s=slowest.step_s) if run is fastest
        else dataclasses.replace(slowest, step_s=fastest.step_s) if run is slowest
        else run
        for run in runs
    ]  # fmt: skip
    wrong = compare(sample_estimates, swapped)
    assert wrong.kendall_tau is not None and wrong.kendall_tau < 0.8
    assert wrong.regret > 0.05 and wrong.time_error_worst > 0.05
    # Whole records swapped under each other's names are refused.
    renamed = [dataclasses.replace(fastest, slug=slowest.slug), dataclasses.replace(slowest, slug=fastest.slug)]
    pair = [e for e in sample_estimates if e.plan.slug in (fastest.slug, slowest.slug)]
    with pytest.raises(InputError, match="is of another plan"):
        compare(pair, renamed)


def test_collectives_are_compared_by_kind_axis_and_size(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    estimate = sample_estimates[0]
    run, slug = measure(sample_setting, estimate), estimate.plan.slug
    counted = [list(rank.collectives) for rank in run.ranks]
    same = compare([estimate], [run], collectives={slug: counted}).comparisons[0].collectives
    assert same is not None and same.agree and same.checked == 4
    # The same bytes in one call fewer, on one rank.
    counted[2] = [dataclasses.replace(counted[2][0], count=2)]
    check = compare([estimate], [run], collectives={slug: counted}).comparisons[0].collectives
    assert check is not None and not check.agree
    [difference] = check.differences
    assert (difference.rank, difference.predicted_count, difference.counted_count) == (2, 2, 3)
    assert difference.predicted_bytes == difference.counted_bytes
    # A collective that nobody predicted.
    unforeseen = compare([estimate], [run], collectives={slug: [[]] * 4}).comparisons[0].collectives
    assert unforeseen is not None and len(unforeseen.differences) == 4
    assert compare([estimate], [run]).comparisons[0].collectives is None


def test_bytes_of_experts_exchanges_are_compared_in_sum(
    sample_measurements: list[Measurement],
) -> None:
    """Who sends how much is the router's choice; how much all of them send is not."""

    def exchange(num_bytes: int, count: int = 5) -> tuple[CountedCollective, ...]:
        return (CountedCollective(kind="all_to_all", axis="ep", group_size=4, count=count, num_bytes=num_bytes),)

    run = sample_measurements[0]
    sent = (90, 110, 120, 80)
    ranks = tuple(dataclasses.replace(rank, collectives=exchange(sent[rank.rank])) for rank in run.ranks)
    run = dataclasses.replace(run, ranks=ranks)
    assert check_collectives([exchange(100)] * 4, run).agree
    assert len(check_collectives([exchange(101)] * 4, run).differences) == 4
    assert len(check_collectives([exchange(100, count=6)] * 4, run).differences) == 4


def test_missing_and_doubled_plans_are_named(sample_estimates: list[Estimate], sample_measurements: list) -> None:
    slug = sample_estimates[-1].plan.slug
    with pytest.raises(InputError, match=f"no measurement of {slug}"):
        compare(sample_estimates, sample_measurements[:-1])
    with pytest.raises(InputError, match=f"no estimate of {slug}"):
        compare(sample_estimates[:-1], sample_measurements)
    with pytest.raises(InputError, match="more than once"):
        compare([*sample_estimates, sample_estimates[0]], sample_measurements)
    with pytest.raises(InputError, match="nothing to compare"):
        compare([], [])
    empty = dataclasses.replace(sample_measurements[0], step_s=())
    with pytest.raises(InputError, match="no timed steps"):
        compare(sample_estimates[:1], [empty])


def test_validation_survives_json(sample_estimates: list[Estimate], sample_measurements: list[Measurement]) -> None:
    found = compare(sample_estimates, sample_measurements)
    assert from_plain(Validation, json.loads(json.dumps(to_plain(found), allow_nan=False)), "validation") == found


def test_what_the_speed_of_the_machine_explains(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    """Runs on a machine that took 1.5 and 2 times as long are predicted exactly once that is known."""
    chosen, slowness = sample_estimates[:2], (1.5, 2.0)
    runs = [measure(sample_setting, e, time=factor) for e, factor in zip(chosen, slowness, strict=True)]
    speeds = {e.plan.slug: (f, f * e.step_s) for e, f in zip(chosen, slowness, strict=True)}
    found = compare(chosen, runs, at_speed=speeds)
    assert found.time_error_worst == pytest.approx(0.5)
    assert found.at_speed is not None and found.at_speed.time_error_worst == pytest.approx(0.0, abs=1e-12)
    assert (found.at_speed.fastest, found.at_speed.slowest) == slowness
    partly = compare(chosen, runs, at_speed={chosen[0].plan.slug: speeds[chosen[0].plan.slug]})
    assert partly.at_speed is None
    assert partly.comparisons[0].slowness is None or partly.comparisons[1].slowness is None


def test_runs_of_a_plan_are_one_measurement(
    sample_setting: Setting, sample_estimates: list[Estimate], measure: Measure
) -> None:
    first, second = (
        dataclasses.replace(measure(sample_setting, sample_estimates[0]), step_s=times, yardstick_s=times[:1])
        for times in ((1.0, 3.0), (2.0,))
    )
    found = together([first, second])
    assert found.step_s == (1.0, 3.0, 2.0) and found.median_step_s == 2.0 and found.yardstick_s == (1.0, 2.0)
    assert found.ranks == first.ranks
    for wrong in ([], [first, measure(sample_setting, sample_estimates[1])]):
        with pytest.raises(InputError, match="same plan"):
            together(wrong)
