"""Exchange with experts over node links and network at once; products of one input as one; stragglers by devices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autopar.estimate import Setting, estimate
from autopar.estimate.exchange import dispatch_seconds
from autopar.estimate.opcosts import op_seconds
from autopar.estimate.pieces import Section, sections
from autopar.graph import MatmulShape, OpKind, Split
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.shard import Collective, Degrees
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import ExpertHabits, load_stack

BYTES = 1e9


def setting_of(model: str, cluster: str, habits: ExpertHabits | None = None, fused: bool = True) -> Setting:
    stack = load_stack("megatron-core")
    stack = dataclasses.replace(
        stack,
        experts=habits or stack.experts,
        kernels=dataclasses.replace(stack.kernels, fused_projections=fused),
    )
    return Setting(
        graph=build_graph(load_preset(model), seq_len=4096, precision=Precision.FP8),
        workload=Workload(global_batch=64, seq_len=4096, precision=Precision.FP8),
        cluster=load_cluster(cluster),
        stack=stack,
    )


def seconds(setting: Setting, ep: int) -> float:
    one = np.ones(1)
    degrees = Degrees(tp=one, cp=one, sp=np.zeros(1, dtype=bool), microbatch=one, ep=ep * one, etp=one)
    rows = Collective(kind="all_to_all", axis="ep", phase="forward", num_bytes=BYTES * one, count=one, source="x")
    return float(dispatch_seconds(setting, rows, degrees)[0])


def test_exchange_inside_a_node_moves_all_but_the_own_share() -> None:
    setting = setting_of("qwen3-30b-a3b", "h100:1x8", ExpertHabits())
    link = setting.cluster.node_link
    assert seconds(setting, 8) == pytest.approx(link.latency + BYTES * 7 / 8 / link.speed)


def test_exchange_across_nodes_takes_as_long_as_the_slower_link() -> None:
    setting = setting_of("qwen3-30b-a3b", "h100:2x8", ExpertHabits(network_share=0.5))
    inner, outer = setting.cluster.node_link, setting.cluster.network_link
    across = BYTES * 8 / 16 / (outer.speed * 0.5)
    inside = BYTES * 7 / 16 / inner.speed
    found = seconds(setting, 16)
    assert found == pytest.approx(inner.latency + outer.latency + max(across, inside))
    assert found < inner.latency + outer.latency + across + inside


def test_a_dispatcher_that_sends_a_token_once_divides_what_crosses_and_hands_it_on_inside() -> None:
    """Of 8 experts a token among 2 nodes: 2 (1 - 1/2^8) nodes have any, so that 1/4.016 of the rows cross."""
    habits = ExpertHabits(deduplicates=True)
    setting = setting_of("qwen3-30b-a3b", "h100:2x8", habits)
    inner, outer = setting.cluster.node_link, setting.cluster.network_link
    nodes = 2 * (1 - 0.5**8)
    across = BYTES * nodes / 8 * 8 / 16 / outer.speed
    inside = BYTES * 7 / 8 / inner.speed
    assert seconds(setting, 16) == pytest.approx(inner.latency + outer.latency + max(across, inside))


def products(section: Section, fused: bool) -> list[tuple[str, int]]:
    ops = section.fused if fused else section.separate
    return [(op.name.split(".", 2)[-1], number) for op, number in ops if op.kind is OpKind.MATMUL]


def block_of(model: str) -> tuple[Setting, Section]:
    setting = setting_of(model, "h100:1x8")
    return setting, next(part for part in sections(setting.graph) if part.is_block(setting.graph))


def test_projections_of_one_input_become_one_product_with_the_same_work() -> None:
    _, block = block_of("llama3-8b")
    assert products(block, fused=False) == [
        ("attention.query", 1), ("attention.key", 2), ("attention.output", 1), ("mlp.gate", 2), ("mlp.down", 1),
    ]  # fmt: skip
    assert products(block, fused=True) == [
        ("attention.query", 1), ("attention.output", 1), ("mlp.gate", 1), ("mlp.down", 1),
    ]  # fmt: skip

    def work(fused: bool) -> int:
        shapes = [(op.shape, number) for op, number in (block.fused if fused else block.separate)]
        return sum(s.m * s.n * s.k * number for s, number in shapes if isinstance(s, MatmulShape))

    assert work(True) == work(False)


def test_products_of_different_weights_that_no_engine_joins_stay_apart() -> None:
    _, latent = block_of("deepseek-v3")
    names = [name for name, _ in products(latent, fused=True)]
    assert {"attention.query_down", "attention.kv_down"} <= set(names)


def test_a_joined_product_casts_its_input_once() -> None:
    one = np.ones(1)
    degrees = Degrees(tp=one, cp=one, sp=np.zeros(1, dtype=bool), microbatch=one)
    setting, block = block_of("llama3-8b")

    def forward(fused: bool) -> float:
        ops = block.fused if fused else block.separate
        return sum(
            float(op_seconds(op, setting, degrees, number)[0][0])
            for op, number in ops
            if op.kind is OpKind.MATMUL and op.split is Split.COLUMN
        )

    device, kernels = setting.cluster.device, setting.stack.kernels
    cast = kernels.quantize_bytes * 4096 * 4096 / device.stream_bandwidth("quantize") + device.op_overhead
    reads = device.matmul_rate("fp8").byte_cost * 4096 * 4096 / device.memory_bandwidth / kernels.matmul_rate
    launches = device.op_overhead / kernels.matmul_rate
    # Three projections and gate and up: five inputs become two.
    assert forward(False) - forward(True) == pytest.approx(3 * (cast + reads + launches), rel=1e-6)


def test_stragglers_count_machines_of_eight_or_a_domain() -> None:
    def share(cluster: str, slug: str) -> float:
        found = estimate(setting_of("llama3-8b", cluster), parse_slug(slug))
        return found.breakdown["stragglers"] / (found.step_s - found.breakdown["stragglers"])

    straggler = load_stack("megatron-core").straggler
    assert share("h100:8x8", "dp64.z1.mb1") == pytest.approx(3 * straggler)
    assert share("h100:16x4", "dp64.z1.mb1") == pytest.approx(3 * straggler)
    assert share("gb200:16x4", "dp64.z1.mb1") == 0.0  # one domain
    assert share("gb200:32x8", "dp64.tp4.z1.mb1") == pytest.approx(np.log2(256 / 72) * straggler)


def test_an_estimate_has_a_range_that_widens_where_less_is_known() -> None:
    def width(stack: str) -> float:
        setting = dataclasses.replace(setting_of("llama3-8b", "h100:1x8"), stack=load_stack(stack))
        found = estimate(setting, parse_slug("dp8.z1.mb1"))
        band = found.step_band
        assert band.low < found.step_s < band.high
        assert (band.low, band.high) == (found.step_rule.low * found.step_s, found.step_rule.high * found.step_s)
        return (band.high - band.low) / found.step_s

    assert width("nemo-2024") < width("deepspeed")  # fitted on runs on this device, fitted on nothing
