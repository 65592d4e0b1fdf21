"""Mixed clusters: the search against brute force, equal islands against the uniform estimate, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from autopar.errors import InputError, NoFeasiblePlan, PlanError
from autopar.estimate import Setting, estimate
from autopar.estimate.mixed_result import MixedEstimate, estimate_mixed
from autopar.estimate.mixed_setting import MixedSetting, Shared, mixed_setting, shard_ranks
from autopar.estimate.stages import engine_split
from autopar.mixed_plan import Line, MixedPlan, Segment, mixed_violations
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import Recompute, even_split, parse_slug, violations
from autopar.search.mixed import search_mixed, search_uneven_batch
from autopar.search.mixed_line import split_line
from autopar.search.mixed_space import MixedSpace, assignments
from autopar.workload import Workload
from costmodels.hardware import Cluster, load_cluster
from costmodels.islands import MixedCluster, load_hardware, slowed
from costmodels.records import from_plain, to_plain
from costmodels.stack import load_stack
from costmodels.units import GIB

TINY = ModelSpec(
    name="tiny", num_layers=4, hidden_size=96, num_heads=6, num_kv_heads=6, ffn_size=192, vocab_size=1000,
    max_seq_len=48, gated_mlp=True,
)  # fmt: skip


WIDE = dataclasses.replace(load_preset("llama2-7b"), num_layers=3)
"""Whose kernels are long beside their launch, so that speed counts."""


def islands(*shapes: str, speeds: tuple[float, ...] = (), memory_gib: float | None = None) -> MixedCluster:
    found = []
    for i, shape in enumerate(shapes):
        cluster = load_cluster(shape)
        device = slowed(cluster.device, speeds[i] if speeds else 1.0)
        if memory_gib is not None:
            device = dataclasses.replace(device, memory_bytes=memory_gib * GIB)
        found.append(dataclasses.replace(cluster, name=f"{shape} {i}", device=device))
    return MixedCluster(name="mixed", islands=tuple(found), between=found[0].network_link)


def make(
    spec: ModelSpec, cluster: MixedCluster, batch: int, seq_len: int, stack: str = "megatron-core"
) -> MixedSetting:
    graph, workload = build_graph(spec, seq_len=seq_len), Workload(global_batch=batch, seq_len=seq_len)
    return mixed_setting(graph, workload, cluster, load_stack(stack))


def uniform(setting: MixedSetting, cluster: Cluster) -> Setting:
    return Setting(graph=setting.graph, workload=setting.workload, cluster=cluster, stack=setting.stack)


def all_plans(setting: MixedSetting, space: MixedSpace) -> list[MixedPlan]:
    """Every plan of the space, one by one, without bounds and without any search."""
    graph, batch = setting.graph, setting.workload.global_batch
    found = []
    for assignment in assignments(len(setting.cluster.islands), space.leave_out):
        skeletons = [_lines(setting, space, line) for line in assignment]
        for lines in itertools.product(*skeletons):
            for totals in itertools.product(range(1, batch + 1), repeat=len(lines)):
                if sum(totals) != batch or any(t % line.microbatch_size for t, line in zip(totals, lines, strict=True)):
                    continue
                counts = [t // line.microbatch_size for t, line in zip(totals, lines, strict=True)]
                if any(n < line.replicas for n, line in zip(counts, lines, strict=True)):
                    continue
                whole = tuple(
                    dataclasses.replace(
                        line, batch=tuple(k * line.microbatch_size for k in even_split(n, line.replicas))
                    )
                    for n, line in zip(counts, lines, strict=True)
                )
                for zero, sharding in space.sharding_variants(setting, len(lines)):
                    for sp in (False, True):
                        plan = MixedPlan(lines=whole, zero_stage=zero, sharding=sharding, sequence_parallel=sp)
                        if _allowed(setting, plan):
                            found.append(plan)
    assert graph.num_blocks == 4
    return found


def _lines(setting: MixedSetting, space: MixedSpace, order: tuple[int, ...]) -> list[Line]:
    sizes = [setting.cluster.islands[i].world_size for i in order]
    found = []
    for replicas in range(1, min(sizes) + 1):
        options = [
            [
                Segment(island=i, stages=size // replicas // tp // cp, tp=tp, cp=cp, recompute=recompute)
                for tp, cp in itertools.product(range(1, size + 1), repeat=2)
                for recompute in space.recompute
                if size % (replicas * tp * cp) == 0
            ]
            for i, size in zip(order, sizes, strict=True)
        ]
        for segments in itertools.product(*options):
            stages = sum(segment.stages for segment in segments)
            for size in (d for d in range(1, setting.workload.global_batch + 1) if d <= space.max_microbatch):
                if setting.workload.global_batch % size:
                    continue
                for cuts in itertools.combinations(range(1, 4), stages - 1):
                    blocks = tuple(np.diff((0, *cuts, 4)).tolist())
                    found.append(Line(segments=segments, replicas=replicas, microbatch_size=size, blocks=blocks))
    return found


def _allowed(setting: MixedSetting, plan: MixedPlan) -> bool:
    divided = any(segment.tp > 1 for line in plan.lines for segment in line.segments)
    if plan.sequence_parallel and not divided:
        return False
    if mixed_violations(plan, setting.graph, setting.workload, setting.cluster):
        return False
    shared = Shared(
        replicas=plan.replicas, lines=len(plan.lines), zero_stage=plan.zero_stage, sharding=plan.sharding,
        sequence_parallel=plan.sequence_parallel,
    )  # fmt: skip
    return all(shard_ranks(setting, line, s, shared) is not None for line in plan.lines for s in line.segments)


@pytest.mark.parametrize(
    ("shapes", "speeds", "batch", "memory"),
    [
        (("h100:1x2", "a100-80g:1x1"), (1.0, 1.0), 4, None),
        (("h100:1x1", "h100:1x2"), (0.4, 1.0), 6, None),
        (("h100:1x2", "h100:1x2"), (1.0, 1.0), 2, None),
        (("h100:1x2", "a100-80g:1x2"), (1.0, 0.7), 3, 2.0205),
    ],
)
def test_the_search_finds_what_brute_force_finds(
    shapes: tuple[str, ...], speeds: tuple[float, ...], batch: int, memory: float | None
) -> None:
    setting = make(TINY, islands(*shapes, speeds=speeds, memory_gib=memory), batch, 48)
    space = MixedSpace(recompute=(Recompute.NONE, Recompute.FULL))
    best = min(
        (e.step_s for plan in all_plans(setting, space) for e in [estimate_mixed(setting, plan)] if e.fits),
    )
    result = search_mixed(setting, top=3, space=space)
    assert result.best[0].step_s == best
    assert result.bound_s == best
    assert result.considered == result.feasible + sum(result.rejected.values())


@pytest.mark.parametrize(("orders", "stages"), [((0, 1), (2, 2)), ((1, 0), (1, 3)), ((0, 1), (4, 1))])
@pytest.mark.parametrize("num_microbatches", [1, 3, 16])
def test_blocks_over_stages_are_those_of_brute_force(
    orders: tuple[int, int], stages: tuple[int, int], num_microbatches: int
) -> None:
    spec = dataclasses.replace(load_preset("gpt2-small"), num_layers=9)
    setting = make(spec, islands("h100:1x4", "a100-80g:1x4", speeds=(1.0, 0.6)), num_microbatches, 1024)
    segments = tuple(Segment(island=i, stages=n) for i, n in zip(orders, stages, strict=True))
    line, shared = Line(segments=segments, replicas=1, microbatch_size=1), Shared(replicas=1, lines=1)
    found = split_line(setting, line, shared, num_microbatches, np.inf)
    assert found is not None
    total, depth = setting.graph.num_blocks, sum(stages)
    every = [
        estimate_line(setting, dataclasses.replace(line, blocks=tuple(np.diff((0, *cuts, total)).tolist())), shared)
        for cuts in itertools.combinations(range(1, total), depth - 1)
    ]
    assert found.step_s == min(every) == found.bound_s


def estimate_line(setting: MixedSetting, line: Line, shared: Shared) -> float:
    """A step of a line with so many microbatches, as the search counts it."""
    from autopar.estimate.mixed import line_costs, line_terms, rows_of

    m = np.full(1, float(setting.workload.global_batch))
    costs = line_costs(setting, line, shared, rows_of(setting.graph, [line.blocks]), m)
    return float(sum(line_terms(setting, line, shared, costs).values(), np.zeros(1))[0])


EQUAL = [
    ("llama2-7b", "h100", 4, "megatron-core", 64, 4096),
    ("gpt2-xl", "a100-80g", 2, "torchtitan", 32, 1024),
    ("mixtral-8x7b", "h100", 4, "megatron-core", 64, 4096),
]


@pytest.mark.parametrize(("model", "device", "nodes", "stack", "batch", "seq_len"), EQUAL)
def test_equal_islands_are_one_cluster_to_the_bit(
    model: str, device: str, nodes: int, stack: str, batch: int, seq_len: int
) -> None:
    half = f"{device}:{nodes // 2}x8"
    setting = make(load_preset(model), islands(half, half), batch, seq_len, stack)
    whole = uniform(setting, load_cluster(f"{device}:{nodes}x8"))
    compared = 0
    for tp, cp, pp in itertools.product((1, 2, 8), (1, 2), (1, 2)):
        dp = nodes * 8 // (tp * cp * pp)
        for zero, recompute, sp in itertools.product(setting.stack.data.shardable, Recompute, (False, True)):
            slug = f"tp{tp}.pp{pp}.cp{cp}.dp{dp}.z{zero}.mb1.ac-{recompute}" + (".sp" if sp else "")
            if dp < 1 or (zero and dp * cp == 1):
                continue
            plan = parse_slug(slug)
            if violations(plan, whole.graph, whole.workload, whole.cluster.world_size):
                continue
            mixed = as_mixed(setting, pp, dp, Segment(island=0, stages=1, tp=tp, cp=cp, recompute=recompute))
            if mixed is None:
                continue
            one = estimate(whole, plan)
            two = estimate_mixed(setting, dataclasses.replace(mixed, zero_stage=zero, sequence_parallel=sp))
            assert (two.step_s, dict(two.breakdown)) == (one.step_s, dict(one.breakdown))
            assert max(stage.memory_bytes for stage in two.stages) == one.memory_bytes
            compared += 1
    assert compared > 20


def as_mixed(setting: MixedSetting, pp: int, dp: int, segment: Segment) -> MixedPlan | None:
    """A plan with one stage on each of two islands, or half of its replicas."""
    share, both = setting.workload.global_batch // dp, [dataclasses.replace(segment, island=i) for i in (0, 1)]
    if pp == 2:
        blocks = engine_split(setting.graph.num_blocks, 2, setting.stack)
        line = Line(segments=tuple(both), replicas=dp, microbatch_size=1, blocks=blocks, batch=(share,) * dp)
        return MixedPlan(lines=(line,))
    if dp % 2:
        return None
    blocks = (setting.graph.num_blocks,)
    return MixedPlan(
        lines=tuple(
            Line(segments=(s,), replicas=dp // 2, microbatch_size=1, blocks=blocks, batch=(share,) * (dp // 2))
            for s in both
        )
    )


def best_of(cluster: MixedCluster, batch: int = 24) -> MixedEstimate:
    """The best plan of a model that keeps devices busy, islands joined as well as devices of one."""
    cluster = dataclasses.replace(cluster, between=cluster.islands[0].node_link)
    setting = make(WIDE, cluster, batch, 2048)
    limits = MixedSpace(recompute=(Recompute.NONE,), max_cp=1, max_microbatch=2, shardings=("all",))
    return search_mixed(setting, top=1, space=limits).best[0]


def test_more_speed_is_never_slower_and_an_island_more_never_hurts() -> None:
    found = [best_of(islands("h100:1x2", "h100:1x1", speeds=(1.0, speed))) for speed in (1.0, 0.5, 1e-4, 2e-4)]
    steps = [e.step_s for e in found]
    assert steps[:3] == sorted(steps[:3])
    assert found[2].idle_devices == {"h100:1x1 1": 1}
    assert steps[2] == steps[3]  # who is left out does not matter


def test_equal_devices_take_equal_shares_and_slow_ones_fewer() -> None:
    equal = best_of(islands("h100:1x2", "h100:1x2"))
    assert {share for line in equal.plan.lines for share in line.batch} == {6}
    half = best_of(islands("h100:1x2", "h100:1x2", speeds=(1.0, 0.5)))
    assert [line.batch for line in half.plan.lines] == [(8, 8), (4, 4)]


def test_a_batch_that_the_replicas_do_not_divide() -> None:
    found = best_of(islands("h100:1x4", "h100:1x3"), batch=32)
    assert sorted(share for line in found.plan.lines for share in line.batch) == [4, 4, 4, 5, 5, 5, 5]
    setting = make(WIDE, islands("h100:1x4", "h100:1x3"), 32, 2048)
    whole = uniform(setting, load_cluster("h100:7"))
    space = MixedSpace(recompute=(Recompute.NONE,), max_cp=1, max_microbatch=1)
    [line] = search_uneven_batch(whole, top=1, space=space).best[0].plan.lines
    assert line.batch == (5, 5, 5, 5, 4, 4, 4)


def test_nothing_fits() -> None:
    setting = make(load_preset("llama2-7b"), islands("h100:1x1", "a100-80g:1x1", memory_gib=8), 4, 4096)
    with pytest.raises(NoFeasiblePlan, match="no plan of 2 devices fits.*by memory.*8 GiB"):
        search_mixed(setting, space=MixedSpace(recompute=(Recompute.FULL,)))


def test_plans_survive_json_and_say_what_is_wrong() -> None:
    segment = Segment(island=0, stages=1)
    lines = (
        Line(segments=(segment,), replicas=4, microbatch_size=1, blocks=(12,), batch=(5, 5, 5, 5)),
        Line(
            segments=(dataclasses.replace(segment, island=1),),
            replicas=3,
            microbatch_size=1,
            blocks=(12,),
            batch=(4,) * 3,
        ),
    )
    plan = MixedPlan(lines=lines, zero_stage=1)
    assert plan.slug == "z1-all_i0.pp1.tp1.cp1.ac-none.dp4.mb1.n5x4_i1.pp1.tp1.cp1.ac-none.dp3.mb1.n4x3"
    assert from_plain(MixedPlan, to_plain(plan), "plan") == plan
    setting = make(load_preset("gpt2-small"), islands("h100:1x4", "h100:1x3"), 31, 1024)
    with pytest.raises(PlanError, match="replicas take 32 of 31 sequences"):
        estimate_mixed(setting, plan)
    wrong = dataclasses.replace(plan, lines=(plan.lines[0], plan.lines[0]))
    assert mixed_violations(wrong, setting.graph, setting.workload, setting.cluster)[0].reason == "islands"


MIXED = """
name = "two generations"
[between]
name = "Ethernet"
bandwidth_GBps = 12.5
latency_us = 20
[[group]]
name = "new"
device = "h100"
num_nodes = 2
[[group]]
name = "old"
device = "a100-80g"
num_nodes = 1
devices_per_node = 4
memory_GiB = 40
speed = 0.8
"""


def test_a_cluster_file_with_groups(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    found = load_hardware(str(path))
    assert isinstance(found, MixedCluster)
    assert [island.world_size for island in found.islands] == [16, 4]
    assert (found.between.name, found.islands[1].device.memory_bytes) == ("Ethernet", 40 * GIB)
    usual = load_cluster("a100-80g:1x4").device
    assert found.islands[1].device.matmul.peak_fraction == pytest.approx(0.8 * usual.matmul.peak_fraction)
    assert found.islands[1].device.peak_flops == usual.peak_flops
    with pytest.raises(InputError, match="mixed cluster"):
        load_cluster(str(path))


def test_groups_that_are_alike_are_one_cluster(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(
        'name = "c"\n[[group]]\ndevice = "h100"\nnum_nodes = 2\n[[group]]\ndevice = "h100"\nnum_nodes = 3\n'
    )
    assert load_hardware(str(path)) == dataclasses.replace(load_cluster("h100:5x8"), name="c")
    path.write_text(
        '[[group]]\ndevice = "h100"\nnum_nodes = 2\n[[group]]\ndevice = "h100"\nnum_nodes = 3\nspeed = 0.7\n'
    )
    assert isinstance(load_hardware(str(path)), MixedCluster)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("speed", "sped"), "group 2: unknown key 'sped'"),
        (("speed = 0.8", "speed = 0"), "speed is 0; it must be above 0"),
        (('name = "old"', 'name = "new"'), "each with its own name"),
        (("[between]", "[betwen]"), "unknown key 'betwen'; did you mean 'between'"),
    ],
)
def test_wrong_groups(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED.replace(*change))
    with pytest.raises(InputError, match=message):
        load_hardware(str(path))
