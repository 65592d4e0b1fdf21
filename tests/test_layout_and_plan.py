from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import InputError, PlanError
from autopar.layout import AXES, Layout
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import (
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
from autopar.workload import Workload

DEGREES = st.sampled_from([1, 2, 3, 4])
LAYOUTS = st.builds(Layout, tp=DEGREES, cp=DEGREES, pp=DEGREES, dp_replicate=DEGREES, dp_shard=DEGREES)
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
    schedule = (
        ScheduleName.INTERLEAVED if vp > 1 else draw(st.sampled_from([ScheduleName.GPIPE, ScheduleName.ONE_F_ONE_B]))
    )
    blocks = draw(st.sampled_from([(), tuple(range(1, pp * vp + 1))]))
    return Plan(
        layout=Layout(tp=draw(DEGREES), cp=draw(DEGREES), pp=pp, vp=vp, dp_replicate=replicate, dp_shard=shard),
        microbatch_size=draw(st.integers(1, 9)),
        zero_stage=zero,
        sequence_parallel=draw(st.booleans()),
        schedule=schedule,
        recompute=draw(st.sampled_from(Recompute)),
        stage_blocks=blocks,
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


@given(plans())
def test_slugs_are_parsed_back(plan: Plan) -> None:
    assert parse_slug(plan.slug) == plan


def test_the_slug_of_the_documentation() -> None:
    plan = parse_slug("tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-selective")
    assert (plan.layout.dp_shard, plan.layout.dp_replicate, plan.schedule) == (2, 1, ScheduleName.INTERLEAVED)
    assert plan.slug == "tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-selective"


@pytest.mark.parametrize(
    ("slug", "message"),
    [
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
        ("pp4.vp3.mb8", 4, "microbatches", "multiple of pp=4 microbatches, not 2"),
    ],
)
def test_violations_say_what_and_how_to_fix(slug: str, world: int, reason: str, fix: str) -> None:
    workload = Workload(global_batch=16, seq_len=1024)
    found = violations(parse_slug(slug), GRAPH, workload, world)
    assert reason in [rejected.reason for rejected in found]
    with pytest.raises(PlanError, match=fix.replace("*", r"\*")):
        check_plan(parse_slug(slug), GRAPH, workload, world)


def test_a_sound_plan_has_no_violations() -> None:
    assert violations(parse_slug("tp2.pp2.dp2.z1.mb2.sp"), GRAPH, Workload(global_batch=16, seq_len=1024), 8) == ()


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
