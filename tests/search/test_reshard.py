from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.estimate import Setting
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.plan import V_SCHEDULES, Plan, parse_slug
from autopar.search.reshard import Reshard, origins, reshard
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

DENSE = ModelSpec(
    name="dense", num_layers=5, hidden_size=12, num_heads=6, num_kv_heads=6, ffn_size=30, vocab_size=37,
    max_seq_len=12, tied_embeddings=True, bias=True,
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE, name="moe", num_experts=6, top_k=2, expert_ffn_size=10, tied_embeddings=False, num_layers=4
)


def make(spec: ModelSpec = DENSE, nodes: str = "1x4", stack: str = "megatron-core") -> Setting:
    return Setting(
        graph=build_graph(spec, seq_len=12),
        workload=Workload(global_batch=24, seq_len=12),
        cluster=load_cluster(f"h100:{nodes}"),
        stack=load_stack(stack),
    )


def move(setting: Setting, old: str, new: str, lost: tuple[int, ...] = ()) -> Reshard:
    before, after = parse_slug(old), parse_slug(new)
    origin = origins(before.layout.world_size, after.layout.world_size, lost)
    return reshard(setting, before, after, origin=origin, lost=lost)


# ---- every element's owners, one by one -----------------------------------------------------------------------------


def part(numbers: np.ndarray, index: int, degree: int) -> np.ndarray:
    return numbers[len(numbers) * index // degree : len(numbers) * (index + 1) // degree]


def owned(setting: Setting, plan: Plan, kind: str) -> np.ndarray:
    """Whether each rank holds each element of the model, [ranks, elements]."""
    graph, layout = setting.graph, plan.layout
    sharded = plan.zero_stage >= {"weights": 3, "state": 1}[kind]
    blocks = plan.blocks_of_stages(graph.num_blocks)
    stage_of_block = [stage for stage, number in enumerate(blocks) for _ in range(number)]
    equal = ("edp",) if layout.ep * layout.etp > 1 else ("dp_replicate", "dp_shard", "cp", "tp")
    axes = {"ep": ("ep",), "etp": ("etp",), "edp": equal, "shard": ("dp_shard", "cp")}
    place = {name: {r: i for g in layout.groups(*of) for i, r in enumerate(g)} for name, of in axes.items()}
    numbers, total = {}, 0
    for parameter in graph.parameters():
        numbers[parameter.name] = np.arange(total, total := total + parameter.elements)
    found = np.zeros((layout.world_size, total), dtype=bool)
    for rank, op in itertools.product(range(layout.world_size), graph.ops):
        at = layout.coordinates(rank)
        inside = 0 <= op.block < graph.num_blocks
        stage = stage_of_block[op.block] if inside else 0 if op.block < 0 else len(blocks) - 1
        turns_back = plan.schedule in V_SCHEDULES and stage >= layout.pp
        if (2 * layout.pp - 1 - stage if turns_back else stage % layout.pp) != at["pp"]:
            continue
        for p in op.parameters:
            elements = numbers[p.shared_with or p.name]
            if p.split.value.startswith("expert"):
                mine = part(elements.reshape(graph.num_experts, -1), place["ep"][rank], layout.ep)
                units = [part(unit, place["etp"][rank], layout.etp) for unit in mine]
                replicas = layout.dp_replicate if plan.zero_stage else layout.dp * layout.cp
                shards = max(layout.edp // replicas, 1)
                index = place["edp"][rank] % shards
            else:
                units = [elements if p.split.value in ("none", "tokens") else part(elements, at["tp"], layout.tp)]
                shards, index = layout.dp_shard * layout.cp, place["shard"][rank]
            for unit in units:
                found[rank, part(unit, index, shards) if sharded else unit] = True
    return found


def by_counting(setting: Setting, old: Plan, new: Plan, lost: tuple[int, ...]) -> dict[str, list[float]]:
    origin = origins(old.layout.world_size, new.layout.world_size, lost).tolist()
    node, width = setting.cluster.domain, {"weights": setting.weight_bytes, "state": setting.state_bytes}
    totals = {name: [0.0] * len(origin) for name in ("needed", "kept", "inside", "across", "lost")}
    for kind in ("weights", "state"):
        held, wanted = owned(setting, old, kind), owned(setting, new, kind)
        anywhere = np.delete(held, lost, axis=0).any(axis=0)
        for rank, want in enumerate(wanted):
            own = held[origin[rank]] if origin[rank] >= 0 else np.zeros_like(want)
            first = rank // node * node
            near = held[[o for o in origin[first : first + node] if o >= 0]].any(axis=0)
            masks = {
                "needed": want, "kept": want & own, "inside": want & near & ~own, "across": want & anywhere & ~near,
                "lost": want & ~anywhere,
            }  # fmt: skip
            for name, mask in masks.items():
                totals[name][rank] += int(mask.sum()) * width[kind]
    return totals


DENSE_PLANS = [
    "dp2.mb1", "dp4.mb1", "dp4.z1.mb1", "dp3.z3.mb1", "dp4.z2.mb1.rep2", "tp2.dp3.z1.mb1", "tp3.mb1", "tp2.pp2.mb1",
    "pp5.mb1", "pp2.vp2.dp2.z1.mb1", "cp2.dp2.z1.mb1", "cp2.tp2.z3.mb1", "tp6.mb1", "pp3.dp2.z3.mb1.split-1-1-3",
    "tp3.pp2.dp2.z1.mb1", "dp1.mb1", "tp2.pp2.dp2.z1.mb1.order-tp-pp-cp-dp", "cp2.dp2.z3.mb1.order-tp-dp-cp-pp",
    "tp2.pp2.dp3.z1.mb1.order-pp-cp-dp-tp", "pp2.vp2.dp2.z1.mb1.sched-zb-v",
]  # fmt: skip
MOE_PLANS = [
    "dp4.mb1", "ep2.dp4.z1.mb1", "ep3.dp3.z3.mb1", "ep2.etp2.tp2.dp2.z1.mb1", "pp2.ep6.dp6.z1.mb1", "tp2.ep2.dp4.mb1",
    "ep2.dp4.z1.mb1.rep2", "tp2.pp2.dp2.z1.mb1.order-tp-pp-cp-dp", "tp3.pp2.ep3.dp2.z1.mb1", "cp2.ep4.dp2.z3.mb1",
]  # fmt: skip


@st.composite
def lost_ranks(draw: st.DrawFn, world: int) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, world - 1), max_size=min(world, 4)))))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(["1x2", "1x4", "1x3"]))
def test_bytes_equal_those_counted_element_by_element(data: st.DataObject, nodes: str) -> None:
    spec, plans = data.draw(st.sampled_from([(DENSE, DENSE_PLANS), (MOE, MOE_PLANS)]))
    setting = make(spec, nodes)
    old, new = parse_slug(data.draw(st.sampled_from(plans))), parse_slug(data.draw(st.sampled_from(plans)))
    lost = data.draw(lost_ranks(old.layout.world_size))
    counted = by_counting(setting, old, new, lost)
    found = reshard(setting, old, new, origin=origins(old.layout.world_size, new.layout.world_size, lost), lost=lost)
    for name, numbers in counted.items():
        assert getattr(found, name).tolist() == numbers, name
    assert sum(found.moved_by_label.values()) == pytest.approx(found.moved.sum())


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", DENSE_PLANS)
def test_the_same_plan_moves_nothing(slug: str) -> None:
    found = move(make(), slug, slug)
    assert found.moved.sum() == found.lost.sum() == 0
    assert found.kept.tolist() == found.needed.tolist()


def test_new_replicas_receive_everything_once() -> None:
    setting = make(nodes="1x4")
    found = move(setting, "dp4.mb1", "dp8.mb1")
    whole = 14 * setting.graph.num_parameters
    assert found.model_bytes == whole
    assert found.moved.tolist() == [0] * 4 + [whole] * 4
    assert found.across.tolist() == found.moved.tolist()  # no rank of the second node had any of it
    near = move(make(nodes="1x8"), "dp4.mb1", "dp8.mb1")
    assert near.inside.tolist() == found.moved.tolist()


def test_shards_of_zero_move_where_their_borders_move() -> None:
    setting = make(dataclasses.replace(DENSE, tied_embeddings=False, bias=False, hidden_size=24, vocab_size=48))
    parameters = setting.graph.num_parameters
    found = move(setting, "dp2.z3.mb1", "dp4.z3.mb1")
    quarter = 14 * parameters / 4
    # From [0, 1/2) and [1/2, 1) to quarters: rank 0 has its own, rank 1 needs one of rank 0.
    assert found.needed.tolist() == [quarter] * 4
    assert found.kept.tolist() == [quarter, 0, 0, 0]
    back = move(setting, "dp4.z3.mb1", "dp2.z3.mb1")
    assert back.kept.tolist() == [quarter, 0]
    assert back.inside.tolist() == [quarter, 0]
    assert back.across.tolist() == [0, 2 * quarter]  # of ranks 2 and 3, which the new plan released


def test_zero_1_moves_state_and_zero_0_has_it_already() -> None:
    setting = make(dataclasses.replace(DENSE, bias=False, hidden_size=24, vocab_size=48))
    parameters = setting.graph.num_parameters
    assert move(setting, "dp4.mb1", "dp4.z1.mb1").moved.sum() == 0
    gathered = move(setting, "dp4.z1.mb1", "dp4.mb1")
    assert gathered.inside.tolist() == [12 * parameters * 3 / 4] * 4


def test_a_lost_shard_without_a_replica_is_lost_and_with_one_is_not() -> None:
    setting = make(dataclasses.replace(DENSE, bias=False, hidden_size=24, vocab_size=48))
    parameters = setting.graph.num_parameters
    alone = move(setting, "dp4.z1.mb1", "dp4.z1.mb1", lost=(3,))
    assert alone.lost.tolist() == [0, 0, 0, 12 * parameters / 4]
    assert alone.inside.tolist() == [0, 0, 0, 2 * parameters]
    doubled = move(setting, "dp4.z1.mb1.rep2", "dp4.z1.mb1.rep2", lost=(3,))
    assert doubled.lost.sum() == 0
    assert doubled.moved.tolist() == [0, 0, 0, 2 * parameters + 12 * parameters / 2]


def test_pipeline_stages_that_stay_in_place_keep_their_blocks() -> None:
    spec = dataclasses.replace(DENSE, num_layers=4, tied_embeddings=False)
    setting = make(spec)
    block = 14 * sum(op.num_parameters for op in setting.graph.block_ops(0))
    found = move(setting, "pp2.mb1.split-2-2", "pp2.mb1.split-1-3")
    assert found.moved.tolist() == [0, block]
    interleaved = move(setting, "pp2.mb1", "pp2.vp2.mb1")  # blocks 0 1 | 2 3 become 0 2 | 1 3
    assert interleaved.moved.tolist() == [block, block]


def test_fp32_shards_are_the_weights() -> None:
    setting = make(stack="torchtitan")
    assert setting.stack.data.shards_fp32
    parameters = setting.graph.num_parameters
    assert move(setting, "dp2.z3.mb1", "dp2.z3.mb1").needed.sum() == 12 * parameters
    assert move(setting, "dp2.z3.mb1", "dp2.mb1").needed.sum() == 2 * 14 * parameters


# ---- numbers of ranks -----------------------------------------------------------------------------------------------


def test_origins() -> None:
    assert origins(4, 6).tolist() == [0, 1, 2, 3, -1, -1]
    assert origins(4, 4, (1,)).tolist() == [0, -1, 2, 3]  # replaced
    assert origins(6, 4).tolist() == [0, 1, 2, 3]
    assert origins(6, 4, (1, 2)).tolist() == [0, 3, 4, 5]  # numbered anew
    assert origins(6, 5, (0, 1)).tolist() == [2, 3, 4, 5, -1]
    with pytest.raises(PlanError, match="lost rank 9 is outside of the old plan's 0..3"):
        origins(4, 4, (9,))


def test_large_moves_stay_exact() -> None:
    """Sums that must agree whatever the number of ranks."""
    spec = dataclasses.replace(
        DENSE, hidden_size=96, num_heads=8, num_kv_heads=8, ffn_size=256, vocab_size=1024, num_layers=16
    )
    setting = make(spec, nodes="32x8")
    found = move(setting, "tp4.pp4.dp16.z1.mb1", "tp8.pp2.dp16.z1.mb1", lost=(3, 100))
    assert np.array_equal(found.kept + found.inside + found.across + found.lost, found.needed)
    # Every weight has 16 replicas, every shard of the state one holder: what two ranks held of it is gone.
    assert 0 < found.lost.sum() <= 2 * 12 * setting.graph.num_parameters / (4 * 16)
