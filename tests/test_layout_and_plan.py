from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import InputError, PlanError
from autopar.graph import RECOMPUTE_MODULES
from autopar.layout import AXES, EXPERT_AXES, Layout
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import (
    VIRTUAL_SCHEDULES,
    Plan,
    PlanFile,
    Recompute,
    ScheduleName,
    check_plan,
    even_split,
    parse_slug,
    read_plan_file,
    violations,
    write_plan_file,
)
from autopar.workload import Precision, Workload

DEGREES = st.sampled_from([1, 2, 3, 4])
LAYOUTS = st.builds(Layout, tp=DEGREES, cp=DEGREES, pp=DEGREES, dp_replicate=DEGREES, dp_shard=DEGREES)


@st.composite
def expert_layouts(draw) -> Layout:
    plain = draw(LAYOUTS)
    etp = draw(st.sampled_from([n for n in range(1, 9) if plain.stage_size % n == 0]))
    ep = draw(st.sampled_from([n for n in range(1, 65) if plain.stage_size // etp % n == 0]))
    return dataclasses.replace(plain, ep=ep, etp=etp)


GPT2 = load_preset("gpt2-small")
GRAPH = build_graph(GPT2, seq_len=1024)


@st.composite
def plans(draw) -> Plan:
    pp = draw(DEGREES)
    vp = draw(DEGREES) if pp > 1 else 1
    zero = draw(st.integers(0, 3))
    replicate, shard = draw(DEGREES), draw(DEGREES)
    if zero == 0:
        shard = 1
    elif shard == 1:
        replicate = 1
    flat = [name for name in ScheduleName if name not in VIRTUAL_SCHEDULES]
    schedules = (VIRTUAL_SCHEDULES if vp == 2 else [ScheduleName.INTERLEAVED]) if vp > 1 else flat
    schedule = draw(st.sampled_from(schedules))
    recompute = draw(st.sampled_from(Recompute))
    modules = draw(st.lists(st.sampled_from(RECOMPUTE_MODULES))) if recompute is Recompute.SELECTIVE else []
    tp, cp = draw(DEGREES), draw(DEGREES)
    etp = draw(st.sampled_from([n for n in (1, 2) if tp % n == 0]))
    ep = draw(st.sampled_from([n for n in range(1, 17) if tp * cp * replicate * shard // etp % n == 0]))
    blocks = draw(st.sampled_from([(), tuple(range(1, pp * vp + 1))]))
    return Plan(
        layout=Layout(tp=tp, cp=cp, pp=pp, vp=vp, dp_replicate=replicate, dp_shard=shard, ep=ep, etp=etp),
        microbatch_size=draw(st.integers(1, 9)),
        zero_stage=zero,
        sequence_parallel=draw(st.booleans()),
        schedule=schedule,
        recompute=recompute,
        stage_blocks=blocks,
        recompute_modules=tuple(modules),
        recompute_layers=draw(st.integers(0, 5)) if recompute is Recompute.FULL else 0,
    )  # fmt: skip


@given(LAYOUTS)
def test_degrees_multiply_to_the_world(layout: Layout) -> None:
    assert math.prod(layout.degrees()) == layout.world_size
    positions = {tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)}
    assert len(positions) == layout.world_size


@given(LAYOUTS, st.lists(st.sampled_from(AXES), min_size=1, unique=True))
def test_groups_partition_the_ranks(layout: Layout, axes: list[str]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    size = math.prod(getattr(layout, axis) for axis in axes)
    assert {len(group) for group in groups} == {size}


@given(LAYOUTS)
def test_neighbours_are_a_stride_apart(layout: Layout) -> None:
    for axis in AXES:
        for group in layout.groups(axis):
            assert all(b - a == layout.stride(axis) for a, b in itertools.pairwise(group))


@given(expert_layouts())
def test_groups_of_experts_divide_the_ranks_of_a_stage(layout: Layout) -> None:
    """Tensor parallel ranks of an expert are neighbours, then come its expert parallel ranks, then equal experts."""
    size, ep, etp = layout.stage_size, layout.ep, layout.etp
    assert layout.edp * ep * etp == size
    assert (layout.stride("etp"), layout.stride("ep"), layout.stride("edp")) == (1, etp, ep * etp)
    for axis in EXPERT_AXES:
        groups, stride, degree = layout.groups(axis), layout.stride(axis), getattr(layout, axis)
        assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
        for group in groups:
            assert group == tuple(range(group[0], group[0] + stride * degree, stride))
            assert len({rank // size for rank in group}) == 1, "a group lies in one pipeline stage"
    stages = {tuple(range(first, first + size)) for first in range(0, layout.world_size, size)}
    assert set(layout.groups("edp", "ep", "etp")) == stages


def test_groups_of_experts_by_hand() -> None:
    layout = Layout(tp=2, pp=2, dp_replicate=4, ep=4)
    assert layout.groups("tp")[0] == (0, 1)
    assert layout.groups("ep")[:2] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.groups("edp")[:2] == ((0, 4), (1, 5))
    assert Layout(tp=2, dp_replicate=4, ep=2, etp=2).groups("ep") == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_groups_of_unlike_axes() -> None:
    layout = Layout(tp=2, dp_replicate=4, ep=4)
    with pytest.raises(PlanError, match="axis 'tp' divides dense layers"):
        layout.groups("ep", "tp")
    with pytest.raises(PlanError, match="'expert' is not a mesh axis"):
        layout.groups("expert")


@given(plans())
def test_slugs_are_parsed_back(plan: Plan) -> None:
    assert parse_slug(plan.slug) == plan


def test_the_slug_of_the_documentation() -> None:
    plan = parse_slug("tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-selective")
    assert (plan.layout.dp_shard, plan.layout.dp_replicate, plan.schedule) == (2, 1, ScheduleName.INTERLEAVED)
    assert plan.slug == "tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-selective"


@pytest.mark.parametrize(
    ("slug", "field", "value"),
    [
        ("tp2.pp1.vp1.cp1.ep8.dp8.z1.mb1.ac-none", "layout", Layout(tp=2, dp_shard=8, ep=8)),
        ("tp2.pp1.vp1.cp1.ep2.etp2.dp8.z1.mb1.ac-none", "layout", Layout(tp=2, dp_shard=8, ep=2, etp=2)),
        ("tp1.pp1.vp1.cp1.dp1.z0.mb1.ac-selective", "recompute_modules", ()),
        ("tp1.pp1.vp1.cp1.dp1.z0.mb1.ac-selective+mlp+layernorm", "recompute_modules", ("mlp", "layernorm")),
        ("tp1.pp1.vp1.cp1.dp1.z0.mb1.ac-full5", "recompute_layers", 5),
        ("tp1.pp4.vp2.cp1.dp1.z0.mb1.ac-none.sched-dualpipe-v", "schedule", ScheduleName.DUALPIPE_V),
        ("tp1.pp4.vp1.cp1.dp1.z0.mb1.ac-none.sched-zb-h1", "schedule", ScheduleName.ZB_H1),
    ],
)
def test_slugs_of_experts_recomputation_and_schedules(slug: str, field: str, value: object) -> None:
    plan = parse_slug(slug)
    assert (getattr(plan, field), plan.slug) == (value, slug)


def test_plans_that_recompute_the_same_are_equal() -> None:
    plan = parse_slug("mb1.ac-selective")
    assert parse_slug("mb1.ac-selective+core_attn") == plan
    assert plan.recomputed_modules == ("core_attn",)
    assert parse_slug("mb1.ac-selective+layernorm+mlp") == parse_slug("mb1.ac-selective+mlp+layernorm")
    assert parse_slug("mb1.ac-selective+moe_act+moe") == parse_slug("mb1.ac-selective+moe")
    assert set(parse_slug("mb1.ac-selective+moe").recomputed_modules) == {"moe", "moe_act"}
    assert parse_slug("mb1.ac-full").recomputed_modules == parse_slug("mb1").recomputed_modules == ()


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("ep3.dp4.mb1", "ep.etp=3 does not divide the tp.cp.dp=4 ranks"),
        ("tp2.ep2.etp4.dp2.mb1", "ep.etp=8 does not divide the tp.cp.dp=4 ranks"),
        ("ep0.mb1", "ep is 0"),
        ("mb1.ac-selective+mlpp", "unknown recompute module 'mlpp'; did you mean 'mlp'"),
        ("mb1.ac-none+mlp", "recompute_modules need recompute selective, not none"),
        ("pp2.vp2.mb1.sched-zb-h1", "vp=2 needs the interleaved schedule, not zb-h1"),
        ("pp2.mb1.sched-zb-v", "the zb-v schedule has two virtual stages per rank: use vp=2"),
        ("pp2.vp4.mb1.sched-dualpipe-v", "use vp=2"),
        ("tp8.pp4", "the microbatch is missing"),
        ("tp8.tp4.mb1", "'tp' is given twice"),
        ("tp8.xx4.mb1", "cannot read 'xx4'"),
        ("tp0.mb1", "tp is 0"),
        ("dp4.z4.mb1", "zero_stage is 4"),
        ("dp4.z1.mb1.rep3", "rep3 must divide dp4"),
        ("mb1.ac-fulll", "unknown recompute 'fulll'; did you mean 'full'"),
        ("pp2.mb1.split-3", "stage_blocks has 1 entries for pp.vp=2"),
        ("vp2.mb1", "vp=2 needs a pipeline"),
    ],
)
def test_wrong_slugs(slug: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_slug(slug)


@given(st.integers(1, 200), st.integers(1, 64))
def test_even_splits_lose_no_block(num_blocks: int, num_stages: int) -> None:
    split = even_split(num_blocks, num_stages)
    assert sum(split) == num_blocks and max(split) - min(split) <= 1 and list(split) == sorted(split, reverse=True)


@pytest.mark.parametrize(
    ("slug", "world", "reason", "fix"),
    [
        ("tp2.dp2.mb1", 8, "world size", "is 4, but there are 8 ranks"),
        ("tp8.mb1", 8, "query heads", "tp=8 does not divide 12 query heads"),
        ("pp16.mb1", 16, "stages", "use 12 or fewer"),
        ("pp2.mb1.split-5-6", 2, "stages", "adds up to 11 of 12"),
        ("dp4.mb3", 4, "batch", "does not divide the global batch of 16"),
        ("mb1.sp", 1, "sequence parallel", "tp=1"),
        ("cp3.mb1", 3, "sequence", "1024 tokens does not divide into 6"),
        ("pp4.vp3.mb8", 4, "microbatches", "pp=4 ranks takes at least 4 microbatches, not 2"),
    ],
)
def test_violations_say_what_and_how_to_fix(slug: str, world: int, reason: str, fix: str) -> None:
    workload = Workload(global_batch=16, seq_len=1024)
    found = violations(parse_slug(slug), GRAPH, workload, world)
    assert reason in [rejected.reason for rejected in found]
    with pytest.raises(PlanError, match=fix.replace("*", r"\*")):
        check_plan(parse_slug(slug), GRAPH, workload, world)


@pytest.mark.parametrize(
    ("model", "slug", "reason", "fix"),
    [
        ("gpt2-small", "ep2.dp2.mb1", "experts", "ep=2, but the model has no experts: use ep=1"),
        ("gpt2-small", "tp2.etp2.mb1", "experts", "etp=2, but the model has no experts: use etp=1"),
        ("mixtral-8x7b", "ep16.dp16.z1.mb1", "experts", "ep=16 does not divide 8 experts"),
        ("deepseek-v2-lite", "tp16.etp16.mb1", None, ""),
        ("deepseek-v2-lite", "ep1.etp3.dp3.mb1", "expert width", "etp=3 does not divide the experts' width of 1408"),
        ("mixtral-8x7b", "ep8.dp16.z1.mb1", None, ""),
    ],
)
def test_violations_of_expert_layouts(model: str, slug: str, reason: str | None, fix: str) -> None:
    plan = parse_slug(slug)
    graph = build_graph(load_preset(model), seq_len=1024)
    found = violations(plan, graph, Workload(global_batch=48, seq_len=1024), plan.layout.world_size)
    assert [rejected.reason for rejected in found] == ([] if reason is None else [reason])
    assert not found or fix in found[0].detail


def test_a_sound_plan_has_no_violations() -> None:
    assert violations(parse_slug("tp2.pp2.dp2.z1.mb2.sp"), GRAPH, Workload(global_batch=16, seq_len=1024), 8) == ()


def test_plan_files_of_experts(tmp_path) -> None:
    plan = parse_slug("ep8.dp16.z1.mb1.ac-selective+moe_act+mla_up_proj")
    workload = Workload(global_batch=16, seq_len=1024, precision=Precision.MXFP8)
    content = PlanFile(slug=plan.slug, model=load_preset("deepseek-v3"), workload=workload, plan=plan)
    write_plan_file(tmp_path / "plan.json", content)
    assert read_plan_file(tmp_path / "plan.json") == content


def test_plan_files(tmp_path) -> None:
    plan = parse_slug("tp2.pp2.dp2.z1.mb2.sp")
    content = PlanFile(
        slug=plan.slug,
        model=GPT2,
        workload=Workload(global_batch=16, seq_len=1024),
        plan=plan,
        predicted={"step_s": 0.5},
    )
    path = tmp_path / "plan.json"
    write_plan_file(path, content)
    assert read_plan_file(path) == content
    data = json.loads(path.read_text())
    for field in ("recompute_modules", "recompute_layers"):
        del data["plan"][field]
    for field in ("ep", "etp"):
        del data["plan"]["layout"][field]
    for field in ("num_experts", "latent", "window", "dropout"):
        del data["model"][field]
    path.write_text(json.dumps(data))
    assert read_plan_file(path) == content, "files from before these fields are read"
    data["plan"]["microbatch_size"] = 4
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="was it edited by hand"):
        read_plan_file(path)
    data["plan"]["layout"]["tpp"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="unknown key 'tpp'; did you mean 'tp'"):
        read_plan_file(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="not valid JSON"):
        read_plan_file(path)
