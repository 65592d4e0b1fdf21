"""A quick profile of two real ranks gives a cluster that predicts what it has not measured."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autopar.errors import InputError
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.profile.compute import Paced, at_one_speed, make_grid
from autopar.runtime.profile.links import layouts
from autopar.runtime.profile.machine import profile_machine
from autopar.runtime.profile.stopwatch import Clock, count_sets, summarize_times, time_operation
from costmodels.calibration import MachineProfile, profile_cluster, read_profile, residuals
from costmodels.collectives import collective_seconds
from costmodels.compute import attention_seconds, matmul_seconds, stream_seconds
from costmodels.profiles import ComputePoint

OVERHEADS = {
    "tensor_parallel.linear.forward", "tensor_parallel.linear.backward", "tensor_parallel.norm.forward",
    "tensor_parallel.norm.backward", "fsdp.module.forward", "fsdp.module.backward", "pipeline.action",
    "collective.wait",
}  # fmt: skip


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[MachineProfile, Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    messages: list[dict[str, Any]] = []
    profile = profile_machine(
        ranks=2, nodes=[local_node()], device="cpu", precision="fp32", out=path, quick=True, on_message=messages.append
    )
    return profile, path, messages


@pytest.mark.dist
def test_profile_holds_every_kind_and_is_written(profiled: Any) -> None:
    profile, path, messages = profiled
    assert read_profile(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"], "no logs are left behind"
    kinds = {(point.kind, point.phase) for point in profile.compute}
    assert len(kinds) == 14, "eight kinds; optimizer and addition have no backward"
    assert {point.kind for point in profile.collectives} == {
        "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send",
    }  # fmt: skip
    assert [point.active for point in profile.sharing] == [1, 2] and profile.sharing[0].slowdown == 1.0
    assert set(profile.host_overheads) == OVERHEADS
    assert profile.host_overheads["tensor_parallel.linear.forward"] > 0, "DTensor's dispatch is never free"
    steps = [message["done"] for message in messages]
    assert steps == list(range(1, messages[0]["of"] + 1)), "every part is announced once, and the total is right"


@pytest.mark.dist
def test_profile_predicts_sizes_that_it_did_not_measure(profiled: Any) -> None:
    """Within a factor of 3 in each case: the machine may be busy. The numbers span a factor of 1,000."""
    profile, _, _ = profiled
    cluster = profile_cluster(profile)
    device, torch_device = cluster.device, torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = Clock(torch_device)
        for m, n, k in ((192, 96, 160), (768, 768, 384), (1536, 384, 1536)):
            ahead, back = time_operation(clock, partial(_tensors, (m, k), (n, k)), F.linear, num_sets=3, budget_s=0.1)
            assert back is not None
            _within(float(matmul_seconds(device, "fp32", m, n, k)), ahead.seconds, 3)
            _within(float(matmul_seconds(device, "fp32", m, n, k, backward=True)), back.seconds, 3)
        ahead, _ = time_operation(
            clock, lambda: [torch.rand(3000, 700)], F.gelu, num_sets=3, budget_s=0.1, backward=False
        )
        _within(float(stream_seconds(device, 2 * 3000 * 700 * 4, "activation")), ahead.seconds, 4)
        ahead, _ = time_operation(
            clock, lambda: [torch.rand(2, 6, 384, 48) for _ in range(3)],
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            num_sets=3, budget_s=0.1, backward=False,
        )  # fmt: skip
        predicted = attention_seconds(
            device, "fp32", batch=2, heads=6, query_len=384, key_len=384, head_size=48, causal=True
        )
        _within(float(predicted), ahead.seconds, 4)
    finally:
        torch.set_num_threads(threads)


def _tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.rand(shape, requires_grad=True) for shape in shapes]


def _within(predicted: float, measured: float, factor: float) -> None:
    assert abs(math.log(predicted / measured)) < math.log(factor), (predicted, measured)


@pytest.mark.dist
def test_profiled_cluster_prices_collectives_and_sharing(profiled: Any) -> None:
    profile, _, _ = profiled
    cluster = profile_cluster(profile)
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.link_uses_host) == (1, 2, True)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "send"):
        seconds = [float(collective_seconds(cluster, kind, 2, 1, size)) for size in (1e4, 1e5, 1e6, 1e7)]
        assert seconds[0] > 0 and seconds == sorted(seconds), kind
    assert cluster.slowdown(2) >= 1.0
    assert {"matmul", "matmul.backward", "node_link"} <= set(residuals(profile))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ranks": 3}, "3 ranks do not divide over 2 nodes"), ({"device": "tpu"}, "device 'tpu' is not cpu or cuda"),
     ({"precision": "fp8"}, "precision 'fp8' is not fp32 or bf16"), ({"ranks": 0}, "0 ranks")],
)  # fmt: skip
def test_wrong_arguments_are_input_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"ranks": 2, "device": "cpu", "precision": "fp32", **changes}
    with pytest.raises(InputError, match=message):
        profile_machine(nodes=[local_node(), local_node()], out=tmp_path / "profile.json", **arguments)
    assert not list(tmp_path.iterdir())


def test_time_operation_times_forward_and_backward_of_every_set() -> None:
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(id(x))
        return x * 2

    ahead, back = time_operation(
        Clock(torch.device("cpu")), lambda: [torch.rand(4, requires_grad=True)], forward, num_sets=3, budget_s=0.0
    )
    assert len(calls) == 6 and len(set(calls)) == 3, "one round to warm up, one measured, three sets each"
    assert ahead.seconds > 0 and back is not None and back.seconds > 0


def test_summary_of_repeats() -> None:
    timing = summarize_times([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.seconds, timing.spread) == (3.0, pytest.approx(2 / 3))
    assert summarize_times([5.0]).spread == 0.0


def test_sets_of_buffers_exceed_the_caches() -> None:
    assert [count_sets(2.0**power) for power in (10, 24, 25, 30)] == [6, 4, 2, 2]


def test_groups_cover_all_ranks_of_any_shape() -> None:
    assert [(x.size, x.stride, x.num_nodes) for x in layouts(4, 1)] == [(2, 1, 1), (4, 1, 1)]
    assert [(x.size, x.stride, x.num_nodes) for x in layouts(4, 4)] == [(2, 1, 2), (4, 1, 4)]
    assert [(x.size, x.stride, x.num_nodes) for x in layouts(4, 2)] == [(2, 1, 1), (2, 2, 2)]
    assert layouts(1, 1) == ()


@pytest.mark.parametrize("quick", [True, False])
def test_grid_covers_what_a_model_may_use(quick: bool) -> None:
    grid = make_grid("cpu", quick)
    for index, (low, high) in enumerate(((64, 1024), (64, 1024), (64, 1024))):
        sizes = [shape[index] for shape in grid.matmuls]
        assert min(sizes) <= low and max(sizes) >= high
    assert len(set(grid.matmuls)) == len(grid.matmuls) >= 10
    assert len({shape[2] for shape in grid.attentions}) >= 3, "a length fit needs several lengths"


def test_points_of_a_machine_that_changed_its_speed_are_those_of_one() -> None:
    """The true seconds are 2.0 at the median speed; without a yardstick nothing is changed."""
    point = ComputePoint(
        kind="elementwise", phase="forward", dims={"tokens": 8, "width": 8}, flops=0.0, num_bytes=1.0, seconds=2.0,
        spread=0.0,
    )  # fmt: skip
    paces = (0.5, 1.0, 1.5, 1.0, 2.0)
    found = [Paced(points=(dataclasses.replace(point, seconds=2.0 * pace),), pace=pace) for pace in paces]
    points, reference = at_one_speed(found)
    assert reference == 1.0 and [p.seconds for p in points] == pytest.approx([2.0] * 5)
    unknown = [dataclasses.replace(paced, pace=0.0) for paced in found]
    assert at_one_speed(unknown) == (tuple(p for paced in unknown for p in paced.points), 0.0)
