from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.estimate import Setting, estimate, estimate_many, timeline, to_arrays
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import even_split, parse_slug
from autopar.shard import Degrees, local_parameters
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import Host, load_stack


def make_setting(
    model: str = "gpt3-1.3b",
    cluster: str = "a100-80g:2x8",
    batch: int = 64,
    seq_len: int = 1024,
    stack: str = "megatron-core",
) -> Setting:
    workload = Workload(global_batch=batch, seq_len=seq_len)
    graph = build_graph(load_preset(model), seq_len=seq_len)
    return Setting(graph=graph, workload=workload, cluster=load_cluster(cluster), stack=load_stack(stack))


SLUGS = [
    "dp16.mb1", "dp16.z1.mb2", "tp2.dp8.z1.mb4.sp", "tp4.pp2.dp2.z1.mb2.sp", "pp4.dp4.mb1", "pp4.vp3.dp4.z1.mb1",
    "tp8.pp2.mb2.ac-full", "tp2.cp2.dp4.z1.mb1.sp", "pp8.dp2.mb4.sched-gpipe", "tp8.dp2.z1.mb1.ac-selective.sp",
    "pp4.dp4.mb1.split-5-7-7-5", "dp16.z1.mb1.rep2",
]  # fmt: skip


@pytest.mark.parametrize("slug", SLUGS)
def test_terms_add_up_to_the_step_and_items_to_the_peak(slug: str) -> None:
    result = estimate(make_setting(), parse_slug(slug))
    assert sum(result.breakdown.values()) == pytest.approx(result.step_s, rel=1e-12)
    assert sum(result.memory.values()) == pytest.approx(result.memory_bytes, rel=1e-12)
    assert all(seconds >= -1e-12 for seconds in result.breakdown.values()), result.breakdown
    assert 0 < result.mfu < 1


def test_arrays_price_like_single_plans_to_the_bit() -> None:
    setting = make_setting()
    plans = [parse_slug(slug) for slug in SLUGS]
    costs = estimate_many(setting, to_arrays(plans))
    for index, plan in enumerate(plans):
        single = estimate(setting, plan)
        assert costs.step_s[index] == single.step_s
        assert costs.memory_bytes[index] == pytest.approx(single.memory_bytes, rel=1e-15)


def test_arrays_and_plans_convert_back_and_forth() -> None:
    plans = [parse_slug(slug) for slug in SLUGS]
    arrays = to_arrays(plans)
    assert [arrays.plan(i) for i in range(len(plans))] == plans
    assert arrays.select(np.asarray([10, 3])).plan(0) == plans[10]


@pytest.mark.parametrize("m", [4, 8, 16])
def test_the_closed_form_is_the_simulation_where_stages_are_equal(m: int) -> None:
    """Blocks alone: a model whose ends cost nothing has equal stages."""
    setting = make_setting()
    graph = setting.graph
    ends = {"forward_bytes": 0, "backward_bytes": 0, "shape": None, "parameters": (), "saved": ()}
    # The last block's result has one user less, so less to sum in backward: no such sums here.
    ops = tuple(
        dataclasses.replace(op, **(ends if op.block in (-1, graph.num_blocks) else {"backward_bytes": 0}))  # type: ignore[arg-type]
        for op in graph.ops
    )
    device = dataclasses.replace(setting.cluster.device, op_overhead=0.0)
    # Launches of the ends, which still have operations, would make their stages longer.
    stack = dataclasses.replace(setting.stack, host=Host(), straggler=0.0)
    even = dataclasses.replace(
        setting,
        stack=stack,
        graph=dataclasses.replace(graph, ops=ops),
        cluster=dataclasses.replace(setting.cluster, device=device),
        workload=dataclasses.replace(setting.workload, global_batch=4 * m),
    )
    plan = parse_slug("pp4.dp4.mb1")
    terms = estimate(even, plan).breakdown
    passes = sum(
        seconds
        for name, seconds in terms.items()
        if name not in ("data_parallel", "optimizer", "gradient_accumulation")
    )
    assert passes == pytest.approx(timeline(even, plan).end, rel=1e-12)
    ideal = terms["forward"] + terms["backward"]
    assert terms["pipeline_bubble"] / ideal == pytest.approx(3 / m, rel=1e-6)


@given(st.sampled_from(SLUGS), st.floats(1.0, 50.0))
@settings(max_examples=40, deadline=None)
def test_a_faster_network_is_never_slower(slug: str, factor: float) -> None:
    setting = make_setting()
    link = setting.cluster.network_link
    faster = dataclasses.replace(link, bandwidth=link.bandwidth * factor)
    quick = dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, network_link=faster))
    plan = parse_slug(slug)
    assert estimate(quick, plan).step_s <= estimate(setting, plan).step_s * (1 + 1e-12)


@pytest.mark.parametrize("template", ["dp16.z1.mb{}", "tp2.pp2.dp4.z1.mb{}.sp", "pp4.dp4.mb{}.ac-full"])
def test_memory_grows_with_the_microbatch(template: str) -> None:
    setting = make_setting(batch=256)
    peaks = [estimate(setting, parse_slug(template.format(size))).memory["activations"] for size in (1, 2, 4)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3


@pytest.mark.parametrize(
    ("slug", "fewer"),
    [("dp16.z1.mb1", "dp16.mb1"), ("dp16.z1.mb4.ac-full", "dp16.z1.mb4"), ("tp4.dp4.mb1.sp", "tp4.dp4.mb1")],
)
def test_what_saves_memory_saves_memory(slug: str, fewer: str) -> None:
    setting = make_setting()
    assert estimate(setting, parse_slug(slug)).memory_bytes < estimate(setting, parse_slug(fewer)).memory_bytes


@pytest.mark.parametrize("model", ["gpt3-1.3b", "llama3-8b", "gpt2-xl"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_nothing_of_a_model_is_lost_or_doubled_by_a_split(model: str, num_stages: int) -> None:
    """Over the stages of a pipeline and the ranks of tensor parallelism, every weight exists once.

    Norms and row-parallel biases are whole on every tensor parallel rank; tied embeddings are copied to the last stage.
    """
    graph = build_graph(load_preset(model), seq_len=128)
    stack = load_stack("megatron-core")
    split = even_split(graph.num_blocks, num_stages)
    ends = list(itertools.accumulate(split))
    tp = 2
    total = 0.0
    for stage, end in enumerate(ends):
        blocks = set(range(end - split[stage], end)) | ({-1} if stage == 0 else set())
        blocks |= {graph.num_blocks} if stage == num_stages - 1 else set()
        ops = [op for op in graph.ops if op.block in blocks]
        local = local_parameters(ops, Degrees(tp=tp, cp=1, sp=False, microbatch=1), stack)
        whole = sum(p.elements for op in ops for p in op.parameters if p.split == "none" and p.shared_with is None)
        total += tp * float(local) - (tp - 1) * whole
    assert total == graph.num_parameters


def test_megatron_memory_per_weight() -> None:
    """18 bytes a weight replicated; 6 + 12/dp with a distributed optimizer (Megatron-LM's own account)."""
    setting = make_setting()
    weights = setting.graph.num_parameters
    plain, sharded = (estimate(setting, parse_slug(slug)).memory for slug in ("dp16.mb1", "dp16.z1.mb1"))
    state = ("parameters", "gradients", "optimizer")
    assert sum(plain[item] for item in state) == pytest.approx(18 * weights)
    assert sum(sharded[item] for item in state) == pytest.approx((6 + 12 / 16) * weights)


def test_tied_embeddings_are_copied_to_the_last_stage() -> None:
    setting = make_setting("gpt2-xl", batch=64)
    one, two = (estimate(setting, parse_slug(slug)) for slug in ("dp16.mb4", "pp2.dp8.mb4"))
    embedding = 50257 * 1600
    assert one.memory["parameters"] == 2 * setting.graph.num_parameters
    last_rank_weights = sum(
        p.elements for op in setting.graph.ops if op.block >= 24 for p in op.parameters if p.shared_with is None
    )
    assert two.memory_per_rank[1] >= 2 * (last_rank_weights + embedding)


def test_shared_processors_slow_computing_ranks_down() -> None:
    workload = Workload(global_batch=16, seq_len=128, precision=Precision.FP32)
    graph = build_graph(load_preset("demo-gpt"), seq_len=128, precision=Precision.FP32)
    cluster = dataclasses.replace(load_cluster("cpu:1x4"), link_uses_host=True)
    alone = Setting(graph=graph, workload=workload, cluster=cluster, stack=load_stack("autopar-gloo"))
    crowded = dataclasses.replace(alone, cluster=dataclasses.replace(cluster, sharing=(1.0, 1.0, 1.5, 2.0)))
    for slug in ("dp4.mb4", "pp4.mb4", "pp2.dp2.mb2"):
        plan = parse_slug(slug)
        free, shared = estimate(alone, plan), estimate(crowded, plan)
        assert free.step_s < shared.step_s <= 2 * free.step_s
        assert sum(shared.breakdown.values()) == pytest.approx(shared.step_s)
        assert shared.breakdown["processor_sharing"] > 0
    # A pipeline leaves processors idle in its bubble, so it suffers less than ranks in lockstep.
    ratios = [
        estimate(crowded, parse_slug(slug)).step_s / estimate(alone, parse_slug(slug)).step_s
        for slug in ("pp4.mb4", "tp4.mb16")
    ]
    assert ratios[0] < ratios[1]


def test_wrong_plans_are_refused_before_they_are_priced() -> None:
    with pytest.raises(PlanError, match="is 8, but there are 16 ranks"):
        estimate(make_setting(), parse_slug("tp8.mb1"))


def test_every_estimate_says_where_its_numbers_come_from() -> None:
    result = estimate(make_setting(), parse_slug("dp16.mb1"))
    owners = {line.split(":")[0] for line in result.assumptions}
    assert owners == {"device a100-80g", "link NVLink 3", "link InfiniBand", "stack megatron-core"}
