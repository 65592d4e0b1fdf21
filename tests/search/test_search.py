from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import NoFeasiblePlan
from autopar.estimate import PlanArrays, Setting, estimate, estimate_many
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, Recompute, Rejected, parse_slug, violations
from autopar.search import candidates, exhaustive
from autopar.search.bounds import core_bounds, weight_bytes
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import search
from autopar.search.reason import reason
from autopar.search.rules import plan_rules
from autopar.search.space import (
    PLAIN,
    Space,
    cores_of,
    decisions,
    enumerate_plans,
    factorisations,
    number_of_plans,
)
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SPECS = st.builds(
    ModelSpec,
    name=st.just("random"),
    num_layers=st.integers(1, 5),
    hidden_size=st.sampled_from([48, 96, 6144]),
    num_heads=st.sampled_from([6, 12]),
    num_kv_heads=st.sampled_from([2, 6]),
    ffn_size=st.sampled_from([96, 8192]),
    vocab_size=st.sampled_from([64, 50000]),
    max_seq_len=st.just(48),
    gated_mlp=st.booleans(),
    tied_embeddings=st.booleans(),
)
CLUSTERS = st.sampled_from(["a100-80g:1x6", "h100:2x2", "v100:3x1", "h100:1x1", "a100-40g:2x3"])
STACKS = st.sampled_from(["megatron-core", "torchtitan", "internevo", "megatron-2022", "autopar-nccl"])
SMALL = Space(max_vp=2, max_microbatch=2)


def make(spec: ModelSpec, cluster: str, batch: int, stack: str = "megatron-core", seq_len: int = 48) -> Setting:
    precision = Precision.FP16 if cluster.startswith("v100") else Precision.BF16
    workload = Workload(global_batch=batch, seq_len=seq_len, precision=precision)
    graph = build_graph(spec, seq_len=seq_len)
    return Setting(graph=graph, workload=workload, cluster=load_cluster(cluster), stack=load_stack(stack))


def with_memory(setting: Setting, num_bytes: float) -> Setting:
    device = dataclasses.replace(setting.cluster.device, memory_bytes=num_bytes)
    return dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, device=device))


def allowed(setting: Setting, plans: PlanArrays) -> PlanArrays:
    world = setting.cluster.world_size
    keep = [not violations(plans.plan(i), setting.graph, setting.workload, world) for i in range(len(plans))]
    return plans.select(np.asarray(keep, dtype=np.bool_))


def ranked(setting: Setting, plans: PlanArrays) -> list[tuple[float, float, str]]:
    """(seconds, bytes, slug) of the plans that fit, in the order of rank, priced all at once."""
    costs = estimate_many(setting, plans)
    fits = np.flatnonzero(costs.fits(setting)).tolist()
    return sorted((costs.step_s[i], costs.memory_bytes[i], plans.plan(i).slug) for i in fits)


@settings(max_examples=20, deadline=None)
@given(SPECS, CLUSTERS, st.sampled_from([6, 8, 12]), STACKS, st.sampled_from([None, 3e9, 6e9]))
def test_the_optimum_is_that_of_brute_force_over_single_estimates_to_the_bit(
    spec: ModelSpec, cluster: str, batch: int, stack: str, memory: float | None
) -> None:
    setting = make(spec, cluster, batch, stack)
    if memory is not None:
        setting = with_memory(setting, memory)
    plans = allowed(setting, enumerate_plans(setting, SMALL))
    some = np.random.default_rng(0).permutation(len(plans))[:150]
    costs = estimate_many(setting, plans)
    for index in some.tolist():
        alone = estimate(setting, plans.plan(index))
        assert (alone.step_s, alone.memory_bytes) == (costs.step_s[index], costs.memory_bytes[index])
        assert alone.host_bytes == costs.host_bytes[index]
    expected = ranked(setting, plans)
    if not expected:
        with pytest.raises(NoFeasiblePlan):
            search(setting, top=1, space=SMALL)
        return
    found = search(setting, top=5, space=SMALL)
    assert [e.plan.slug for e in found.best] == [slug for _, _, slug in expected[:5]]
    assert [e.step_s for e in found.best] == [step_s for step_s, _, _ in expected[:5]]
    firsts: dict[tuple[int, ...], str] = {}
    for _, _, slug in expected:
        firsts.setdefault(distinct_key(parse_slug(slug)), slug)
    differing = search(setting, top=4, space=SMALL, distinct=True)
    assert [e.plan.slug for e in differing.best] == list(firsts.values())[:4]


def moe_setting() -> Setting:
    """Four blocks of Mixtral on two nodes."""
    return make(dataclasses.replace(load_preset("mixtral-8x7b"), num_layers=4), "h100:2x4", 32, seq_len=4096)


@pytest.mark.parametrize("memory_gib", [80, 40, 24])
def test_bounds_leave_nothing_out_where_most_plans_are_never_priced(memory_gib: int) -> None:
    setting = with_memory(moe_setting(), memory_gib * 2**30)
    space = Space(max_vp=4, max_microbatch=4)
    plans = enumerate_plans(setting, space)
    hit = np.any(list(plan_rules(setting, plans, space).values()), axis=0)
    expected = ranked(setting, plans.select(~hit))
    found = search(setting, top=8, space=space)
    assert [e.plan.slug for e in found.best] == [slug for _, _, slug in expected[:8]]
    assert found.considered == len(plans) == found.feasible + sum(found.rejected.values())
    assert found.priced < len(plans) / 4 and found.rejected["slower"] > 0
    assert found.bound_s >= found.best[-1].step_s


def test_a_bound_that_is_too_high_loses_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, space = moe_setting(), Space(max_vp=4, max_microbatch=4)
    right = search(setting, top=8, space=space).best
    for name in ("FIRST_CORES", "FIRST_CANDIDATES"):
        monkeypatch.setattr(exhaustive, name, 1)
    assert search(setting, top=8, space=space).best == right
    true_bound = candidates.pipe_seconds
    monkeypatch.setattr(candidates, "pipe_seconds", lambda *args: 3 * true_bound(*args))
    assert search(setting, top=8, space=space).best != right


@settings(max_examples=15, deadline=None)
@given(SPECS, CLUSTERS, st.sampled_from([6, 8]), STACKS)
def test_bounds_of_cores_are_below_every_plan_around_them(
    spec: ModelSpec, cluster: str, batch: int, stack: str
) -> None:
    setting = make(spec, cluster, batch, stack)
    plans = allowed(setting, enumerate_plans(setting, SMALL))
    costs = estimate_many(setting, plans)
    decided = decisions(setting, SMALL)
    cores = cores_of(setting, SMALL, decided)
    cores = cores.select(setting.workload.global_batch % (cores.dp * cores.microbatch) == 0)
    bound = core_bounds(setting, cores, weight_bytes(setting, cores, decided))
    columns = ("tp", "cp", "pp", "dp", "ep", "etp", "order", "microbatch", "sp")
    of_core = {tuple(row): i for i, row in enumerate(np.stack([getattr(cores, n) for n in columns], axis=1).tolist())}
    rows = np.stack([getattr(plans, name) for name in columns], axis=1).tolist()
    index = np.asarray([of_core[tuple(row)] for row in rows], dtype=np.int64)
    assert np.all(bound.seconds[index] <= costs.step_s * (1 + 1e-9))
    assert np.all(bound.memory[index] <= costs.memory_bytes * (1 + 1e-9))


@settings(max_examples=15, deadline=None)
@given(SPECS, CLUSTERS, st.sampled_from([6, 8]), STACKS)
def test_array_rules_equal_the_rules_of_single_plans(spec: ModelSpec, cluster: str, batch: int, stack: str) -> None:
    setting = make(spec, cluster, batch, stack)
    plans = enumerate_plans(setting, SMALL)
    assert np.all(plans.world_size == setting.cluster.world_size)
    assert len({plans.plan(i).slug for i in range(len(plans))}) == len(plans)
    rules = plan_rules(setting, plans, SMALL)
    for index in np.random.default_rng(1).permutation(len(plans))[:200].tolist():
        by_arrays = {name for name, hit in rules.items() if hit[index]}
        one_by_one = violations(plans.plan(index), setting.graph, setting.workload, setting.cluster.world_size)
        assert by_arrays == {rejected.reason for rejected in one_by_one}


@pytest.mark.parametrize("stack", ["megatron-core", "torchtitan", "internevo", "deepspeed"])
def test_the_space_is_counted_without_being_listed(stack: str) -> None:
    setting = make(load_preset("gpt2-small"), "h100:2x2", 8, stack, seq_len=1024)
    for space in (SMALL, PLAIN, Space(max_vp=3, offload=False, degrees={"tp": (1, 2)})):
        decided = decisions(setting, space)
        cores = cores_of(setting, space, decided)
        plans = enumerate_plans(setting, space)
        assert int(number_of_plans(cores, decided).sum()) == len(plans)
        for index in range(0, len(plans), 7):
            assert isinstance(plans.plan(index), Plan)


def test_reasons_add_up_to_what_was_considered() -> None:
    setting = make(load_preset("llama3-70b"), "h100:8x8", 256, seq_len=8192)
    result = search(setting)
    assert result.considered == result.feasible + sum(result.rejected.values())
    assert result.rejected["memory"] > 0
    steps = [candidate.step_s for candidate in result.best]
    assert steps == sorted(steps)
    assert len({candidate.plan.slug for candidate in result.best}) == len(result.best)
    lines = [reason(candidate, result.best[0]) for candidate in result.best]
    assert lines[0].startswith("fastest") and all(line[0] in "+-" for line in lines[1:])


def test_more_of_the_space_is_never_slower() -> None:
    setting = make(load_preset("llama3-70b"), "h100:4x8", 64, seq_len=4096)
    plain = search(setting, top=1, space=PLAIN).best[0]
    assert search(setting, top=1).best[0].step_s <= plain.step_s


def test_a_runtime_can_refuse_plans() -> None:
    setting = make(load_preset("gpt2-small"), "a100-80g:1x4", 16, seq_len=1024)

    def only_data_parallel(plan):
        refused = plan.layout.tp * plan.layout.pp * plan.layout.cp > 1
        return (Rejected(reason="runtime", detail="data parallel only"),) if refused else ()

    result = search(setting, unsupported=only_data_parallel, space=PLAIN)
    assert result.rejected["runtime"] > 0
    assert all(candidate.plan.layout.dp == 4 for candidate in result.best)
    assert result.considered == result.feasible + sum(result.rejected.values())


def test_a_condition_on_arrays_forbids_plans() -> None:
    setting = make(load_preset("gpt2-small"), "a100-80g:1x4", 16, seq_len=1024)
    full = tuple(Recompute).index(Recompute.FULL)
    result = search(setting, forbidden=lambda plans: plans.recompute != full)
    assert result.rejected["forbidden"] > 0
    assert all(candidate.plan.recompute is Recompute.FULL for candidate in result.best)
    assert result.considered == result.feasible + sum(result.rejected.values())


def test_nothing_fits_names_the_nearest_miss() -> None:
    setting = make(load_preset("llama3.1-405b"), "a100-40g:1x8", 8, seq_len=4096)
    with pytest.raises(NoFeasiblePlan, match=r"nearest miss, tp\d.*needs [\d.]+ GiB of 40.0 GiB.*parameters"):
        search(setting)


def test_no_layout_at_all_says_why() -> None:
    setting = make(load_preset("gpt2-small"), "a100-80g:1x17", 5, seq_len=512)
    with pytest.raises(NoFeasiblePlan, match="no layout of 17 ranks fits.*query heads.*stages"):
        search(setting)


def test_factorisations_are_complete() -> None:
    brute = {(a, b, c) for a in range(1, 25) for b in range(1, 25) for c in range(1, 25) if a * b * c == 24}
    assert set(factorisations(24, 3)) == brute
    assert len(list(factorisations(24, 3))) == len(brute)


def test_the_same_answer_twice() -> None:
    setting = make(load_preset("llama2-7b"), "a100-80g:2x8", 64, seq_len=4096)
    first, second = (search(setting) for _ in range(2))
    assert [e.plan.slug for e in first.best] == [e.plan.slug for e in second.best]
