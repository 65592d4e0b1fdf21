"""Expected collectives against closed forms; tests/test_demo.py holds them against what real runs call."""

from __future__ import annotations

import pytest

from autopar.estimate import Setting
from autopar.estimate.traffic import expected_collectives, num_buckets, num_gathers
from autopar.measurement import CountedCollective
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.schedule.actions import build_schedule
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack
from costmodels.units import MIB

SPEC = load_preset("demo-gpt")
WORKLOAD = Workload(global_batch=16, seq_len=128, precision=Precision.FP32)
GRAPH = build_graph(SPEC, seq_len=128, precision=Precision.FP32)
SETTING = Setting(graph=GRAPH, workload=WORKLOAD, cluster=load_cluster("cpu:1x4"), stack=load_stack("autopar-gloo"))
WIDTH, BLOCKS = SPEC.hidden_size, SPEC.num_layers


def of(slug: str, rank: int = 0) -> dict[tuple[str, str], CountedCollective]:
    return {(c.kind, c.axis): c for c in expected_collectives(SETTING, parse_slug(slug))[rank]}


def stream(sequences: int) -> int:
    """Bytes of the residual stream of some sequences."""
    return sequences * 128 * WIDTH * 4


def test_replicated_gradients_are_reduced_once() -> None:
    found = of("dp4.mb4")
    assert found.keys() == {("all_reduce", "dp")}
    assert found["all_reduce", "dp"].num_bytes == 4 * GRAPH.num_parameters


def scalars(sequences: int) -> int:
    """Bytes of one number for each token."""
    return sequences * 128 * 4


def test_tensor_parallel_reduces_twice_each_way_in_a_block() -> None:
    """And the stream behind the embedding, its gradient before the head, and three numbers a token for the loss."""
    found = of("tp4.mb8")
    reduce = found["all_reduce", "tp"]
    assert reduce.count == 2 * (4 * BLOCKS + 2 + 3)
    assert reduce.num_bytes == 2 * ((4 * BLOCKS + 2) * stream(8) + 3 * scalars(8))


def test_sequence_parallel_moves_the_same_bytes_in_halves() -> None:
    """Korthikanti et al. 2022, section 4.2.2: an all-reduce is an all-gather and a reduce-scatter."""
    plain, found = of("tp4.mb16"), of("tp4.mb16.sp")
    streams = plain["all_reduce", "tp"].num_bytes - 3 * scalars(16)
    assert found["reduce_scatter", "tp"].num_bytes == found["all_gather", "tp"].num_bytes == streams
    partial = (2 * BLOCKS + 1) * 2 * WIDTH + SPEC.max_seq_len * WIDTH
    assert found["all_reduce", "tp"].count == 1 + 3
    assert found["all_reduce", "tp"].num_bytes == 4 * partial + 3 * scalars(16)


def test_context_parallel_gathers_twice_and_reduces_once() -> None:
    found = of("cp2.dp2.mb4")
    keys_and_values = 8 * 128 * 2 * WIDTH * 4
    assert (found["all_gather", "cp"].count, found["reduce_scatter", "cp"].count) == (2 * 2 * BLOCKS, 2 * BLOCKS)
    assert found["all_gather", "cp"].num_bytes == 2 * BLOCKS * keys_and_values
    assert found["reduce_scatter", "cp"].num_bytes == BLOCKS * keys_and_values
    assert found["all_reduce", "cp"].num_bytes == 4
    assert (found["all_reduce", "dp"].group_size, found["all_reduce", "dp"].num_bytes) == (4, 4 * GRAPH.num_parameters)
    hybrid = {
        (c.kind, c.axis): c.group_size for c in expected_collectives(SETTING, parse_slug("cp2.dp4.z3.rep2.mb4"))[0]
    }
    assert hybrid["all_gather", "dp_shard"] == 4 and hybrid["all_reduce", "dp_replicate"] == 2


def test_recomputation_repeats_the_forward_collectives_of_blocks() -> None:
    """But for the last one: nothing of the block needs its result."""
    assert of("tp4.mb16.ac-full")["all_reduce", "tp"].count == 5 * BLOCKS + 2 + 3
    assert of("tp4.mb16.ac-full3")["all_reduce", "tp"].count == 4 * BLOCKS + 3 + 2 + 3
    assert of("pp2.tp2.mb2.ac-full3")["all_reduce", "tp"].count == 8 * (4 * BLOCKS // 2 + 3 + 1)


@pytest.mark.parametrize(
    ("slug", "gathers"), [("dp4.z2.mb4", 1), ("dp4.z3.mb4", 2), ("dp4.z3.mb1", 8), ("dp4.z2.mb1", 1)]
)
def test_sharded_parameters_are_gathered_by_stage_and_microbatch(slug: str, gathers: int) -> None:
    found = of(slug)
    assert found["all_gather", "dp"].num_bytes == gathers * 4 * GRAPH.num_parameters
    assert found["all_gather", "dp"].count == gathers * (BLOCKS + 1)
    assert found["reduce_scatter", "dp"].num_bytes == 4 * GRAPH.num_parameters


def test_pipeline_neighbours_exchange_every_microbatch() -> None:
    for rank, neighbours in enumerate((1, 2, 2, 1)):
        found = of("pp4.mb2", rank)
        assert found["send", "pp"].count == found["recv", "pp"].count == 8 * neighbours
        assert found["send", "pp"].num_bytes == 8 * neighbours * stream(2)
        assert found["broadcast", "pp"].num_bytes == 4


def test_every_message_is_sent_once_and_received_once() -> None:
    plan = parse_slug("pp2.dp2.mb2")
    ranks = expected_collectives(SETTING, plan)
    totals = {kind: sum(c.num_bytes for rank in ranks for c in rank if c.kind == kind) for kind in ("send", "recv")}
    assert totals["send"] == totals["recv"] > 0


def test_gathers_under_1f1b() -> None:
    plan = parse_slug("pp2.dp2.z3.mb1")
    for microbatches in (2, 4, 8):
        schedule = build_schedule(plan.schedule, 2, microbatches)
        assert [num_gathers(actions, plan) for actions in schedule] == [microbatches + 1, microbatches + 1]
    assert num_gathers(build_schedule(plan.schedule, 2, 8)[0], parse_slug("pp2.dp2.z2.mb1")) == 1


def test_buckets_close_when_they_are_full() -> None:
    stack = load_stack("autopar-gloo")
    assert num_buckets([4.0], stack) == 1
    # From the last parameter on: 2 MiB fill the small first bucket; 20 + 6 MiB reach 25.
    assert num_buckets([3 * MIB, 6 * MIB, 20 * MIB, 2 * MIB], stack) == 3
    assert num_buckets([], stack) == 0
