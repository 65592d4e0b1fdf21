from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Setting, estimate
from autopar.graph import MatmulShape, Op, OpGraph, OpKind, Parameter, SavedTensor, Split, check_graph
from autopar.plan import parse_slug
from autopar.search import layer_plans
from autopar.search.layer_plans import layer_plan, reshard_seconds
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

WIDTH = 2


def pair(block: int, name: str, rows: int, inner: int, outer: int, middle: int) -> list[Op]:
    """A column and a row product [rows, inner] -> [rows, middle] -> [rows, outer] of one sample."""
    ops = []
    for kind, split, k, n in (("up", Split.COLUMN, inner, middle), ("down", Split.ROW, middle, outer)):
        flops = 2 * rows * k * n
        given = Split.GATHERED if split is Split.COLUMN else Split.FEATURES
        ops.append(
            Op(
                name=f"{name}.{kind}", kind=OpKind.MATMUL, block=block, split=split,
                shape=MatmulShape(m=rows, n=n, k=k), forward_flops=flops, backward_flops=2 * flops,
                parameters=(Parameter(name=f"{name}.{kind}.weight", elements=k * n, split=split),),
                saved=(SavedTensor(name=f"{name}.{kind}.input", num_bytes=WIDTH * rows * k, split=given),),
                output_bytes=WIDTH * rows * n, output_split=Split.TOKENS if split is Split.ROW else Split.FEATURES,
            )
        )  # fmt: skip
    return ops


def chain(blocks: list[list[Op]]) -> OpGraph:
    ops = [op for block in blocks for op in block]
    edges = tuple((a.name, b.name) for a, b in itertools.pairwise(ops))
    graph = OpGraph(
        name="chain", ops=tuple(ops), edges=edges, num_blocks=len(blocks), batch_size=1, seq_len=1, itemsize=WIDTH
    )
    check_graph(graph)
    return graph


def convolutions_then_linear() -> OpGraph:
    """Six convolutions of 3x3 on 28x28 points of 256 channels (as products by im2col), then a linear layer of 2.5 G."""
    convolutions = [pair(i, f"conv{i}", 28 * 28, 9 * 256, 256, 256) for i in range(6)]
    return chain([*convolutions, pair(6, "linear", 1, 28 * 28 * 64, 256, 49152)])


def setting_for(graph: OpGraph, cluster: str = "h100:1x8", batch: int = 64) -> Setting:
    return Setting(
        graph=graph, workload=Workload(global_batch=batch, seq_len=1), cluster=load_cluster(cluster),
        stack=load_stack("megatron-core"),
    )  # fmt: skip


def test_data_parallel_convolutions_before_a_tensor_parallel_linear_layer() -> None:
    """Krizhevsky 2014: weights are few and activations many in convolutions, the other way round in linear layers."""
    found = layer_plan(setting_for(convolutions_then_linear()))
    assert [layer.tp for layer in found.layers[:6]] == [1] * 6
    assert found.layers[6].tp == 8
    assert found.step_s < found.uniform_s and found.gain > 0.1
    assert found.reshard_s > 0


def test_equal_layers_get_the_uniform_plan() -> None:
    found = layer_plan(setting_for(chain([pair(i, f"block{i}", 512, 4096, 4096, 16384) for i in range(5)])))
    assert set(found.layers) == {found.uniform}
    assert found.reshard_s == 0 and found.step_s == pytest.approx(found.uniform_s)


def test_memory_makes_some_layers_recompute_and_not_all() -> None:
    graph = chain([pair(i, f"block{i}", 4096, 4096, 4096, 16384) for i in range(8)])
    loose = setting_for(graph, "h100:1x2", 32)
    free = layer_plan(loose)
    device = dataclasses.replace(loose.cluster.device, memory_bytes=free.memory_bytes * 0.93)
    tight = layer_plan(dataclasses.replace(loose, cluster=dataclasses.replace(loose.cluster, device=device)))
    assert tight.memory_bytes <= device.memory_bytes < free.memory_bytes
    assert tight.step_s >= free.step_s and tight.step_s <= tight.uniform_s
    small = dataclasses.replace(loose.cluster.device, memory_bytes=1e9)
    with pytest.raises(NoFeasiblePlan, match="fits in 0.9 GiB"):
        layer_plan(dataclasses.replace(loose, cluster=dataclasses.replace(loose.cluster, device=small)))


def test_the_choice_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = chain(
        [pair(0, "a", 28 * 28, 2304, 256, 256), pair(1, "b", 1, 50176, 256, 8192), pair(2, "c", 9, 256, 256, 64)]
    )
    setting = setting_for(graph, "h100:1x4", 8)
    best = np.inf
    for sequence, m, strategies in layer_plans._questions(setting):
        time, memory, reserve = layer_plans._tables(setting, strategies, m, sequence)
        transition = m * layer_plans._transitions(setting, strategies, m, sequence)
        limit = setting.cluster.device.memory_bytes - reserve
        for choice in itertools.product(range(len(strategies)), repeat=3):
            if sum(memory[layer, s] for layer, s in enumerate(choice)) <= limit:
                cost = sum(time[layer, s] for layer, s in enumerate(choice))
                best = min(best, cost + sum(transition[a, b] for a, b in itertools.pairwise(choice)))
    assert layer_plan(setting).step_s == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("slug", ["dp4.z0.mb2", "dp4.z1.mb1", "tp2.dp2.z1.mb1", "tp2.dp2.z1.mb2.sp"])
def test_uniform_layers_cost_what_estimate_says(slug: str, setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("llama2-7b", "a100-80g:1x4", 8, 2048)
    plan = parse_slug(slug)
    m = plan.num_microbatches(setting.workload)
    strategy = layer_plans.LayerStrategy(tp=plan.layout.tp, zero_stage=plan.zero_stage, recompute=plan.recompute)
    time, _, _ = layer_plans._tables(setting, [strategy], m, plan.sequence_parallel)
    told = estimate(setting, plan)
    left_out = sum(told.breakdown[name] for name in ("launch_bound", "step_overhead", "stragglers"))
    assert time.sum() == pytest.approx(told.step_s - left_out, rel=0.05)


def test_resharding() -> None:
    setting = setting_for(convolutions_then_linear())
    tp = np.asarray([1, 2, 4, 8])
    gathered = reshard_seconds(setting, tp[:, None], tp[None, :], 1e9, False)
    assert np.all(np.diag(gathered) == 0) and np.allclose(gathered, gathered.T)
    assert gathered[0, 3] > gathered[0, 2] > gathered[0, 1] > 0
    exchanged = reshard_seconds(setting, tp[:, None], tp[None, :], 1e9, True)
    assert np.all(np.diag(exchanged) == 0) and exchanged[0, 3] < gathered[0, 3]
