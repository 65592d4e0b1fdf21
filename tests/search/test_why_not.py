"""Why a plan is not the answer: limits with numbers, remedies that hold, differences that add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autopar.errors import PlanError
from autopar.estimate import Setting, estimate
from autopar.plan import parse_slug, violations
from autopar.search.exhaustive import SearchResult, search
from autopar.search.neighbours import neighbours, with_degrees
from autopar.search.why_not import forbidden, waterfall, whole_slug, why_not


@pytest.fixture(scope="module")
def setting(setting_of: Callable[..., Setting]) -> Setting:
    return setting_of("llama3-70b", "h100:8x8", 256, 8192)


@pytest.fixture(scope="module")
def found(setting: Setting) -> SearchResult:
    return search(setting, top=20)


def test_too_much_memory_names_excess_items_and_remedies(setting: Setting, found: SearchResult) -> None:
    plan = parse_slug("tp8.pp4.vp4.cp1.dp2.z0.mb2.ac-none.sp")
    price = estimate(setting, plan)
    answer = why_not(setting, plan, found)
    [refused] = answer.rejections
    assert refused.reason == "memory" and answer.rank is None and answer.estimate == price
    assert refused.numbers["over_gib"] == pytest.approx((price.memory_bytes - price.memory_limit) / 2**30)
    items = sum(value for name, value in refused.numbers.items() if name not in ("need_gib", "limit_gib", "over_gib"))
    assert items - refused.numbers["limit_gib"] == pytest.approx(refused.numbers["over_gib"])
    assert len(answer.remedies) > 2
    for remedy in answer.remedies:
        single = estimate(setting, remedy.estimate.plan)
        assert single.step_s == remedy.estimate.step_s and single.memory_bytes <= single.memory_limit
        assert not forbidden(setting, remedy.estimate.plan)
    steps = [remedy.estimate.step_s for remedy in answer.remedies]
    assert steps == sorted(steps)


def test_the_remedy_of_each_kind_is_the_fastest_neighbour_that_fits(setting: Setting, found: SearchResult) -> None:
    plan = parse_slug("tp8.pp4.vp4.cp1.dp2.z0.mb2.ac-none.sp")
    answer = why_not(setting, plan, found)
    by_words = {remedy.words: remedy.estimate for remedy in answer.remedies}
    fastest: dict[str, tuple[float, str]] = {}
    for neighbour in neighbours(setting, plan):
        if not forbidden(setting, neighbour.plan):
            price = estimate(setting, neighbour.plan)
            if price.memory_bytes <= price.memory_limit:
                entry = (price.step_s, neighbour.words)
                fastest[neighbour.kind] = min(entry, fastest.get(neighbour.kind, entry))
    assert {words: e.step_s for words, e in by_words.items()} == {words: step for step, words in fastest.values()}


def test_two_decisions_where_one_is_not_enough(setting: Setting, found: SearchResult) -> None:
    plan = parse_slug("tp1.pp8.cp1.dp8.z0.mb8.ac-none")
    answer = why_not(setting, plan, found)
    assert answer.rejections[0].reason == "memory"
    assert answer.remedies and all(" and " in remedy.words for remedy in answer.remedies)
    assert all(r.estimate.memory_bytes <= r.estimate.memory_limit for r in answer.remedies)
    assert why_not(setting, parse_slug("tp1.pp2.cp1.dp32.z0.mb8.ac-none"), found).remedies == ()


def test_violations_come_with_numbers_and_remedies(setting: Setting, found: SearchResult) -> None:
    answer = why_not(setting, parse_slug("tp16.pp4.dp1.mb3.ac-full.sp"), found)
    assert {r.reason for r in answer.rejections} == {"key-value heads", "batch"}
    assert answer.estimate is None and answer.slower is None and answer.rank is None
    assert dict(answer.rejections[0].numbers) == {"tp": 16, "heads": 8}
    ranks = why_not(setting, parse_slug("tp8.pp4.dp1.mb1.ac-full.sp"), found)
    assert [r.reason for r in ranks.rejections] == ["world size"]
    assert any(r.estimate.plan.layout.dp == 2 and r.words == "dp" for r in ranks.remedies)


def test_an_engine_without_a_sharding_stage(setting: Setting, found: SearchResult) -> None:
    answer = why_not(setting, parse_slug("tp8.pp4.dp2.z3.mb1.ac-full.sp"), found)
    assert [r.reason for r in answer.rejections] == ["engine"] and "use z0, z1" in answer.rejections[0].detail


def test_a_feasible_plan_has_a_rank_and_differences_that_add_up(setting: Setting, found: SearchResult) -> None:
    for place, candidate in enumerate(found.best, start=1):
        answer = why_not(setting, candidate.plan, found)
        assert not answer.rejections and not answer.remedies
        assert answer.rank == place or candidate.step_s == found.best[answer.rank - 1].step_s
        steps = waterfall(candidate, found.best[0], smallest=0.002)
        assert sum(steps.values()) == pytest.approx(candidate.step_s - found.best[0].step_s, abs=1e-9)
    slow = why_not(setting, parse_slug("tp8.pp8.dp1.mb1.ac-full.sp"), found)
    assert slow.rank is None and slow.slower is not None and slow.slower > 0.2
    assert waterfall(found.best[0], found.best[0]) == {}


def test_neighbours_are_whole_plans_that_differ(setting: Setting) -> None:
    plan = parse_slug("tp4.pp4.vp5.cp1.dp4.z1.mb2.ac-none.sp")
    found = neighbours(setting, plan)
    slugs = [n.plan.slug for n in found]
    assert len(set(slugs)) == len(slugs) > 30 and plan.slug not in slugs
    assert all(n.plan.layout.world_size == 64 for n in found)
    assert all(parse_slug(slug) == n.plan for slug, n in zip(slugs, found, strict=True))
    kinds = {n.kind for n in found}
    assert kinds == {"recompute", "sharding", "microbatch", "tp", "pp", "cp", "virtual stages", "offload"}
    refused = [n for n in found if violations(n.plan, setting.graph, setting.workload, 64)]
    assert len(refused) < len(found) / 2


def test_degrees_leave_the_rest_to_data_parallelism() -> None:
    plan = parse_slug("tp4.pp4.vp5.cp1.dp4.z1.mb2.rep2.sp")
    assert with_degrees(plan, 64, tp=8).slug == "tp8.pp4.vp5.cp1.dp2.z1.mb2.ac-none.sp"
    assert with_degrees(plan, 64, pp=1).slug == "tp4.pp1.vp1.cp1.dp16.z1.mb2.ac-none.sp.rep2"
    with pytest.raises(PlanError, match="do not divide 64"):
        with_degrees(plan, 64, tp=3)


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("tp4.pp2", r"not whole, dp and mb are missing: for 64 ranks for example tp4.pp2.dp8.mb1"),
        ("tp4.pp2.mb2", r"dp is missing: for 64 ranks for example tp4.pp2.mb2.dp8"),
        ("tp4.pp2.dp8", r"mb is missing: for 64 ranks for example tp4.pp2.dp8.mb1"),
        ("tp8.pp8", r"mb is missing: for 64 ranks for example tp8.pp8.mb1"),
        ("tp4.qq2", r"cannot read 'qq2'"),
    ],
)
def test_slugs_that_are_not_whole_are_completed(slug: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        whole_slug(slug, 64)


def test_whole_slugs_are_read() -> None:
    assert whole_slug("tp8.pp8.mb1", 64) == parse_slug("tp8.pp8.mb1")
    assert whole_slug("tp4.pp2.dp8.mb1.z1", 64) == parse_slug("tp4.pp2.dp8.mb1.z1")
