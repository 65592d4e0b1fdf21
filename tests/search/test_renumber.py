from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.estimate import Setting
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.plan import PlanFile, parse_slug
from autopar.report.replan_tables import ranges_text, replan_sentences
from autopar.search.renumber import bytes_that_stay, node_order, origins_of
from autopar.search.replan import replan
from autopar.search.reshard import origins, reshard
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SPEC = ModelSpec(
    name="dense", num_layers=4, hidden_size=12, num_heads=6, num_kv_heads=6, ffn_size=24, vocab_size=36, max_seq_len=12
)
PLANS = [
    "dp4.mb1", "dp8.z1.mb1", "tp2.dp2.z1.mb1", "pp2.dp2.z1.mb1", "pp2.dp4.z1.mb1", "pp4.dp2.mb1", "tp2.pp2.dp2.z3.mb1",
    "dp6.z3.mb1", "pp2.dp3.z1.mb1", "tp6.mb1", "pp4.mb1", "dp2.mb1", "pp2.vp2.dp2.mb1",
]  # fmt: skip


def make(nodes: str) -> Setting:
    return Setting(
        graph=build_graph(SPEC, seq_len=12),
        workload=Workload(global_batch=24, seq_len=12),
        cluster=load_cluster(f"h100:{nodes}"),
        stack=load_stack("megatron-core"),
    )


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(PLANS), st.sampled_from(PLANS))
def test_the_order_leaves_as_much_as_the_best_of_all_orders(data: st.DataObject, before: str, after: str) -> None:
    setting, old, new = make("4x2"), parse_slug(before), parse_slug(after)
    lost = tuple(sorted(data.draw(st.sets(st.integers(0, old.layout.world_size - 1), max_size=3))))
    places, machines = new.layout.world_size // 2, old.layout.world_size // 2
    stays = bytes_that_stay(setting, old, new, lost)

    def kept(order: tuple[int, ...]) -> float:
        found = origins_of(np.asarray(order), 2, lost)
        return float(reshard(setting, old, new, origin=found, lost=lost).kept.sum())

    found = node_order(setting, old, new, lost=lost)
    assert found is not None
    real = [machine for machine in found.tolist() if machine >= 0]
    assert len(set(real)) == len(real)
    candidates = [*range(machines), *[-1] * places]
    best = max(
        sum(float(stays[p, j]) for p, j in enumerate(order) if j >= 0)
        for order in set(itertools.permutations(candidates, places))
    )
    assert kept(tuple(found.tolist())) == pytest.approx(best)


def test_nodes_stay_where_no_order_is_better() -> None:
    setting = make("4x2")
    for slug in PLANS:
        plan = parse_slug(slug)
        order = node_order(setting, plan, plan)
        assert order is not None
        assert order.tolist() == list(range(plan.layout.world_size // 2))
    assert node_order(make("1x4"), parse_slug("dp6.mb1"), parse_slug("dp4.mb1")) is None


def test_halving_replicas_of_a_pipeline_takes_nodes_of_every_stage() -> None:
    """Stages lie one after another: numbers that stay leave half of the second stage nothing to keep."""
    setting, old, new = make("4x2"), parse_slug("pp2.dp4.mb1"), parse_slug("pp2.dp2.mb1")
    order = node_order(setting, old, new)
    assert order is not None
    assert order.tolist() == [0, 2]
    assert reshard(setting, old, new, origin=origins_of(order, 2)).moved.sum() == 0
    assert reshard(setting, old, new, origin=origins(8, 4)).moved.sum() > 0


def test_a_replanning_names_the_order() -> None:
    old = PlanFile(
        slug="pp2.dp4.mb1",
        model=SPEC,
        workload=Workload(global_batch=24, seq_len=12),
        plan=parse_slug("pp2.dp4.mb1"),
    )
    plain, ordered = (replan(old, make("2x2"), renumber=renumber) for renumber in (False, True))
    assert plain.kept is not None
    assert ordered.kept is not None
    assert ordered.kept.node_order == (0, 2)
    assert (plain.kept.received.sum() > 0, ordered.kept.received.sum()) == (True, 0)
    assert ordered.new.received.sum() <= plain.new.received.sum()
    assert "in this order of their old numbers" in " ".join(replan_sentences(ordered))


def test_runs_of_numbers_are_drawn_together() -> None:
    assert ranges_text([0, 1, 2, 8, 5, 6, -1, -1, 0]) == "0-2 8 5-6 + + 0"
