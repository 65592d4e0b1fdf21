from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Setting, estimate
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import Rejected, violations
from autopar.search.exhaustive import search
from autopar.search.reason import reason
from autopar.search.space import enumerate_plans, factorisations, rule_out
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SPECS = st.builds(
    ModelSpec,
    name=st.just("random"),
    num_layers=st.integers(1, 6),
    hidden_size=st.sampled_from([48, 96]),
    num_heads=st.sampled_from([6, 12]),
    num_kv_heads=st.sampled_from([2, 6]),
    ffn_size=st.sampled_from([96, 192]),
    vocab_size=st.sampled_from([64, 1000]),
    max_seq_len=st.just(48),
    gated_mlp=st.booleans(),
    tied_embeddings=st.booleans(),
)
CLUSTERS = st.sampled_from(["a100-80g:1x6", "h100:2x4", "v100:3x2", "h100:1x1", "a100-40g:2x3"])


def make(spec: ModelSpec, cluster: str, batch: int, stack: str = "megatron-core", seq_len: int = 48) -> Setting:
    precision = Precision.FP16 if cluster.startswith("v100") else Precision.BF16
    workload = Workload(global_batch=batch, seq_len=seq_len, precision=precision)
    graph = build_graph(spec, seq_len=seq_len)
    return Setting(graph=graph, workload=workload, cluster=load_cluster(cluster), stack=load_stack(stack))


@settings(max_examples=25, deadline=None)
@given(SPECS, CLUSTERS, st.sampled_from([6, 8, 12]), st.sampled_from(["megatron-core", "torchtitan"]))
def test_the_optimum_is_that_of_brute_force_to_the_bit(spec: ModelSpec, cluster: str, batch: int, stack: str) -> None:
    setting = make(spec, cluster, batch, stack)
    plans = enumerate_plans(setting)
    best = None
    for index in range(len(plans)):
        plan = plans.plan(index)
        if violations(plan, setting.graph, setting.workload, setting.cluster.world_size):
            continue
        result = estimate(setting, plan)
        if result.memory_bytes <= result.memory_limit:
            key = (result.step_s, result.memory_bytes, plan.slug)
            best = key if best is None or key < best else best
    found = search(setting, top=1).best[0]
    assert best is not None
    assert (found.step_s, found.plan.slug) == (best[0], best[2])


@settings(max_examples=15, deadline=None)
@given(SPECS, CLUSTERS, st.sampled_from([6, 8]))
def test_array_rules_equal_the_rules_of_single_plans(spec: ModelSpec, cluster: str, batch: int) -> None:
    setting = make(spec, cluster, batch)
    plans = enumerate_plans(setting)
    assert np.all(plans.world_size == setting.cluster.world_size)
    rules = rule_out(setting, plans)
    for index in range(len(plans)):
        by_arrays = {name for name, hit in rules.items() if hit[index]}
        one_by_one = violations(plans.plan(index), setting.graph, setting.workload, setting.cluster.world_size)
        assert by_arrays == {rejected.reason for rejected in one_by_one}


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


def test_a_runtime_can_refuse_plans() -> None:
    setting = make(load_preset("gpt2-small"), "a100-80g:1x4", 16, seq_len=1024)

    def only_data_parallel(plan):
        refused = plan.layout.tp * plan.layout.pp * plan.layout.cp > 1
        return (Rejected(reason="runtime", detail="data parallel only"),) if refused else ()

    result = search(setting, unsupported=only_data_parallel)
    assert result.rejected["runtime"] > 0
    assert all(candidate.plan.layout.dp == 4 for candidate in result.best)
    assert result.considered == result.feasible + sum(result.rejected.values())


def test_nothing_fits_names_the_nearest_miss() -> None:
    setting = make(load_preset("llama3.1-405b"), "a100-40g:1x8", 8, seq_len=4096)
    with pytest.raises(NoFeasiblePlan, match=r"nearest miss, tp\d.*needs [\d.]+ GiB of 40.0 GiB.*optimizer"):
        search(setting)


def test_no_layout_at_all_says_why() -> None:
    setting = make(load_preset("gpt2-small"), "a100-80g:1x13", 5, seq_len=512)
    with pytest.raises(NoFeasiblePlan, match="no layout of 13 ranks fits.*query heads.*stages"):
        search(setting)


def test_factorisations_are_complete() -> None:
    brute = {(a, b, c) for a in range(1, 25) for b in range(1, 25) for c in range(1, 25) if a * b * c == 24}
    assert set(factorisations(24, 3)) == brute
    assert len(list(factorisations(24, 3))) == len(brute)


def test_the_same_answer_twice() -> None:
    setting = make(load_preset("llama2-7b"), "a100-80g:2x8", 64, seq_len=4096)
    first, second = (search(setting) for _ in range(2))
    assert [e.plan.slug for e in first.best] == [e.plan.slug for e in second.best]
