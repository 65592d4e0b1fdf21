from __future__ import annotations

import dataclasses
import io
import json

import pytest

from autopar.errors import InputError, NoFeasiblePlan
from autopar.estimate import Estimate, Setting, estimate
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import PlanFile, Rejected, parse_slug
from autopar.report.replan_tables import replan_json, replan_sentences, replan_table
from autopar.search.exhaustive import search
from autopar.search.replan import (
    Replanning,
    SwitchCosts,
    carry_over,
    links_seconds,
    replan,
    setting_of,
    storage_seconds,
)
from autopar.search.reshard import origins, parse_lost, reshard
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SMALL = ModelSpec(
    name="small", num_layers=8, hidden_size=1024, num_heads=16, num_kv_heads=16, ffn_size=4096, vocab_size=32000,
    max_seq_len=1024,
)  # fmt: skip


def plan_file(slug: str, spec: ModelSpec = SMALL, batch: int = 48, seq_len: int = 1024) -> PlanFile:
    plan = parse_slug(slug)
    return PlanFile(slug=plan.slug, model=spec, workload=Workload(global_batch=batch, seq_len=seq_len), plan=plan)


def on(old: PlanFile, cluster: str) -> Setting:
    return setting_of(old, load_cluster(cluster), load_stack("megatron-core"))


def carried(slug: str, cluster: str, batch: int = 48) -> Estimate:
    old = plan_file(slug, batch=batch)
    found = carry_over(on(old, cluster), old.plan)
    assert isinstance(found, Estimate)
    return found


def refused(slug: str, cluster: str, spec: ModelSpec = SMALL) -> Rejected:
    old = plan_file(slug, spec)
    found = carry_over(on(old, cluster), old.plan)
    assert isinstance(found, Rejected)
    return found


def text(found: Replanning) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(replan_table(found))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


# ---- the old plan carried over --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "cluster", "expected"),
    [
        ("tp2.dp4.mb1", "h100:1x8", "tp2.dp4.mb1"),
        ("tp2.dp4.mb1", "h100:2x8", "tp2.dp8.mb1"),
        ("tp2.dp4.z1.mb1", "h100:1x4", "tp2.dp2.z1.mb1"),
        ("tp2.dp4.z1.mb1", "h100:1x2", "tp2.dp1.z1.mb1"),
        ("tp2.dp8.z1.mb1.rep2", "h100:4x8", "tp2.dp16.z1.mb1.rep4"),
        ("tp2.dp8.z1.mb1.rep2", "h100:1x4", "tp2.dp2.z1.mb1"),
        ("tp2.dp4.mb1", "h100:1x7", "tp2.dp3.mb1"),  # one rank idle
        ("dp8.mb1", "h100:5x1", "dp4.mb1"),  # 5 does not divide the batch of 48
    ],
)
def test_the_old_plan_is_carried_over(slug: str, cluster: str, expected: str) -> None:
    found = carried(slug, cluster)
    assert found.plan == parse_slug(expected)
    if found.plan.layout.world_size == load_cluster(cluster).world_size:
        assert found.step_s == estimate(on(plan_file(slug), cluster), found.plan).step_s


def test_why_the_old_plan_cannot_run() -> None:
    assert "tp*cp*pp=8 ranks, but there are 4" in refused("tp2.pp4.dp2.mb1", "h100:1x4").detail
    assert "not whole nodes of 8" in refused("tp4.pp3.dp2.mb1", "h100:2x8").detail
    memory = refused("dp8.mb1", "h100:1x8", dataclasses.replace(SMALL, hidden_size=8192, ffn_size=32768))
    assert memory.reason == "memory"
    assert memory.numbers["memory_gib"] > memory.numbers["limit_gib"]
    # 48 sequences are no multiple of 5, and 4 ranks have too little memory.
    both = refused("dp8.mb1", "h100:5x1", dataclasses.replace(SMALL, hidden_size=8192, ffn_size=32768))
    assert "does not divide the global batch of 48; with dp=4 it needs" in both.detail
    experts = dataclasses.replace(SMALL, num_experts=8, top_k=2, expert_ffn_size=1024)
    assert "ep*etp=8 does not divide" in refused("ep8.dp8.mb1", "h100:1x6", experts).detail


# ---- the answer -----------------------------------------------------------------------------------------------------


def best_on(cluster: str) -> PlanFile:
    old = plan_file("dp1.mb1")
    best = search(on(old, cluster), top=1).best[0].plan
    return dataclasses.replace(old, slug=best.slug, plan=best)


def test_nothing_changed() -> None:
    old = best_on("h100:1x8")
    found = replan(old, on(old, "h100:1x8"))
    assert found.kept is not None
    assert found.new.plan == found.kept.plan == old.plan
    assert (found.new.switch_s, found.new.restarts, found.payback_steps) == (0.0, False, None)
    assert found.new.received.sum() == 0
    assert "It goes on as it is." in text(found)


def test_a_move_pays_after_its_seconds_over_the_gain_per_step() -> None:
    old = plan_file("tp8.dp1.mb1.ac-full")
    found = replan(old, on(old, "h100:1x8"), costs=SwitchCosts(restart_s=30))
    assert found.kept is not None
    assert (found.kept.switch_s, found.kept.restarts) == (0.0, False)
    assert found.kept.plan == old.plan
    assert found.new.switch_s == 30 + found.new.links_s
    gain = found.kept.estimate.step_s - found.new.estimate.step_s
    assert found.payback_steps == pytest.approx((30 + found.new.links_s) / gain)
    steps = found.payback_steps
    assert steps is not None
    assert found.new.total_s(steps) == pytest.approx(found.kept.total_s(steps))
    assert "steps; every step is then" in text(found)


def test_an_old_plan_that_has_to_restart_as_well_pays_for_it() -> None:
    old = plan_file("tp8.dp1.mb1.ac-full")
    found = replan(old, on(old, "h100:2x8"))
    assert found.kept is not None
    assert found.kept.restarts
    assert found.kept.plan.layout.dp == 2
    gain = found.kept.estimate.step_s - found.new.estimate.step_s
    assert found.payback_steps == pytest.approx(max(found.new.switch_s - found.kept.switch_s, 0) / gain)


def test_the_choice_for_the_remaining_steps_is_the_least_of_all() -> None:
    old = plan_file("tp2.dp4.mb1.ac-full")
    setting, costs = on(old, "h100:1x8"), SwitchCosts(restart_s=30)
    long_run = replan(old, setting, remaining_steps=1e6, costs=costs)
    short_run = replan(old, setting, remaining_steps=10, costs=costs)
    assert long_run.new.plan == search(setting, top=1).best[0].plan
    assert short_run.new.plan == old.plan
    assert "still the best for the 10 steps that remain" in text(short_run)
    for steps in (10, 200, 1000, 1e6):
        found = replan(old, setting, remaining_steps=steps, costs=costs)
        rivals = [long_run.new, short_run.new, *([found.kept] if found.kept else [])]
        assert all(found.new.total_s(steps) <= rival.total_s(steps) for rival in rivals)


def test_lost_state_comes_from_replicas_or_from_the_checkpoint() -> None:
    costs = SwitchCosts(restart_s=0, storage_bandwidth=1e9, steps_since_checkpoint=5)
    doubled = plan_file("dp8.z1.mb1.rep2")
    kept = replan(doubled, on(doubled, "h100:1x8"), lost={3}, costs=costs).kept
    assert kept is not None
    assert not kept.from_checkpoint
    assert kept.received.tolist()[:3] == [0, 0, 0]
    assert kept.switch_s == kept.links_s
    alone = plan_file("dp8.z1.mb1")
    found = replan(alone, on(alone, "h100:1x8"), lost={3}, costs=costs)
    assert found.kept is not None
    assert found.kept.from_checkpoint
    assert found.kept.received.tolist() == found.kept.move.needed.tolist()
    assert found.kept.switch_s == pytest.approx(found.kept.move.model_bytes / 1e9 + 5 * found.kept.estimate.step_s)
    said = " ".join(replan_sentences(found))
    assert "State of 1 old rank is lost" in said
    assert "goes back to the last checkpoint" in said
    assert "5 steps run again" in said


def test_an_old_plan_that_cannot_run_is_said_to() -> None:
    old = plan_file("tp2.pp4.dp1.mb1")
    found = replan(old, on(old, "h100:1x4"))
    assert found.kept is None
    assert found.payback_steps is None
    assert "The old plan cannot run: one replica" in text(found)
    huge = plan_file("tp8.pp8.dp1.mb1", load_preset("llama3-70b"), seq_len=8192)
    with pytest.raises(NoFeasiblePlan, match="no plan fits in memory"):
        replan(huge, on(huge, "h100:1x2"))


def test_plain_data() -> None:
    old = plan_file("tp8.dp1.mb1.ac-full")
    found = replan(old, on(old, "h100:2x8"), lost=parse_lost("7", 8, 8))
    data = json.loads(json.dumps(replan_json(found)))
    assert data["old"] == {"slug": old.slug, "ranks": 8, "lost": [7]}
    assert data["new"]["slug"] == found.new.plan.slug
    assert data["new"]["moved_bytes"] == pytest.approx(found.new.received.sum())
    assert data["payback_steps"] == found.payback_steps


# ---- seconds --------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_slowest_rank() -> None:
    old = plan_file("dp8.mb1")
    setting = on(old, "h100:2x8")
    cluster, whole = setting.cluster, 14 * setting.graph.num_parameters
    move = reshard(setting, old.plan, parse_slug("dp16.mb1"), origin=origins(8, 16))
    network = cluster.network_link.bandwidth * cluster.network_link.efficiency
    assert links_seconds(cluster, move) == pytest.approx(whole / network)
    assert storage_seconds(cluster, move, 1e9, writes=False) == pytest.approx(whole / 1e9)
    assert storage_seconds(cluster, move, 1e9, writes=True) == pytest.approx(2 * whole / 1e9)
    assert storage_seconds(cluster, move, 1e15, writes=False) == pytest.approx(whole / network)
    one = on(old, "h100:1x16")
    node = one.cluster.node_link.bandwidth * one.cluster.node_link.efficiency
    inside = reshard(one, old.plan, parse_slug("dp16.mb1"), origin=origins(8, 16))
    assert links_seconds(one.cluster, inside) == pytest.approx(whole / node)


def test_lost_ranks_are_parsed() -> None:
    assert parse_lost("3,17", 8, 64) == {3, 17}
    assert parse_lost("8-10, 0", 8, 64) == {0, 8, 9, 10}
    assert parse_lost("node2", 8, 64) == set(range(16, 24))
    assert parse_lost("node0-1,60", 4, 64) == {*range(8), 60}
    assert parse_lost("", 8, 64) == frozenset()
    for words in ("x3", "node", "3-", "64", "node8", "9-3"):
        with pytest.raises(InputError, match="lost '"):
            parse_lost(words, 8, 64)


def test_costs_are_not_negative() -> None:
    with pytest.raises(InputError, match="restart_s is -1"):
        SwitchCosts(restart_s=-1)
