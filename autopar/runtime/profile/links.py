"""Collectives over group and message sizes, and how ranks that compute at once slow each other down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.runtime.observe.yardstick import Yardstick
from autopar.runtime.profile.stopwatch import summarize_times
from costmodels.profiles import CollectivePoint, SharingPoint

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send")
_KIB = 1024
SIZES = (4 * _KIB, 32 * _KIB, 256 * _KIB, 1024 * _KIB, 4096 * _KIB, 16384 * _KIB, 32768 * _KIB)
QUICK_SIZES = (16 * _KIB, 256 * _KIB, 2048 * _KIB)
_SLOW_CALL_S = 0.3
_WAITING_BYTES, _WAITING_CALLS = 64 * _KIB, 10
_BATCH_S = 0.03
TURNS = 3
PACE_ROUNDS = 3
"""Times that the yardstick's work is done to tell the machine's speed: a tenth of a second."""
_MAX_CALLS, _MIN_BATCHES, _MAX_BATCHES = 20, 2, 9


def wait_for_all() -> None:
    """Barrier among all ranks on the processor, which leaves no work on a GPU and waits without computing."""
    dist.all_reduce(torch.zeros(1))


def slowest(seconds: float) -> float:
    """The largest value among all ranks."""
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Groups that cover all ranks: ``size`` ranks each, ``stride`` apart, on ``num_nodes`` nodes."""

    size: int
    stride: int
    num_nodes: int


def layouts(ranks: int, num_nodes: int) -> tuple[Layout, ...]:
    """Groups to measure: every size that divides the ranks, inside a node, and one rank of each of several nodes."""
    local = ranks // num_nodes
    inside = [Layout(size=n, stride=1, num_nodes=1) for n in range(2, local + 1) if local % n == 0]
    across = [Layout(size=n, stride=local, num_nodes=n) for n in range(2, num_nodes + 1) if num_nodes % n == 0]
    return (*inside, *across)


def make_group(layout: Layout) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    """This rank's group of a layout and its ranks; every rank makes every group, as new_group demands."""
    span, world, me = layout.size * layout.stride, dist.get_world_size(), dist.get_rank()
    mine: tuple[dist.ProcessGroup, tuple[int, ...]] | None = None
    for start in range(world):
        if start % span < layout.stride:
            ranks = tuple(range(start, start + span, layout.stride))
            group = dist.new_group(list(ranks))
            if me in ranks:
                mine = (group, ranks)
    assert mine is not None, "groups cover all ranks"
    return mine


def measure_collectives(
    device: torch.device, num_nodes: int, sizes: Sequence[int], budget_s: float, link_rate: float | None
) -> Iterator[tuple[str, tuple[CollectivePoint, ...]]]:
    """Measure every kind in every layout of groups, all groups of a layout at once. Called by all ranks.

    Args:
        sizes: bytes of the whole tensor.
        budget_s: for one kind, size and layout.
        link_rate: bytes/s of an emulated link; sizes whose all-reduce takes longer than 0.3 s on it are left out.

    Yields:
        (kind and group size, points of it).
    """
    for layout in layouts(dist.get_world_size(), num_nodes):
        group, ranks = make_group(layout)
        slow = link_rate if layout.num_nodes > 1 else None
        for kind in KINDS:
            if kind == "send" and layout.size != 2:
                continue
            points = [
                _measure(kind, device, group, ranks, layout, size, budget_s)
                for size in sizes
                if slow is None or size <= sizes[0] or 1.5 * size / slow * layout.stride <= _SLOW_CALL_S
            ]
            yield f"{kind} of {layout.size}", tuple(points)
        dist.destroy_process_group(group)


def _measure(
    kind: str,
    device: torch.device,
    group: dist.ProcessGroup,
    ranks: tuple[int, ...],
    layout: Layout,
    num_bytes: int,
    budget_s: float,
) -> CollectivePoint:
    """Seconds per call of batches of calls, so that the ranks' unequal starts count once per batch."""
    call = make_call(kind, device, group, ranks, num_bytes)
    once = _time_calls(call, 1, device)
    calls = int(min(_MAX_CALLS, max(1, _BATCH_S // once)))
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < _MIN_BATCHES or (
        len(seconds) < _MAX_BATCHES and slowest(time.perf_counter() - start) < budget_s
    ):
        seconds.append(_time_calls(call, calls, device) / calls)
    timing = summarize_times(seconds)
    return CollectivePoint(
        kind=kind, group_size=layout.size, num_bytes=float(num_bytes), seconds=timing.seconds, spread=timing.spread,
        num_nodes=layout.num_nodes,
    )  # fmt: skip


def _time_calls(call: Callable[[], None], calls: int, device: torch.device) -> float:
    wait_for_all()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return slowest(time.perf_counter() - start)


def make_call(
    kind: str, device: torch.device, group: dist.ProcessGroup, ranks: tuple[int, ...], num_bytes: int
) -> Callable[[], None]:
    """A collective on buffers of its own. ``num_bytes`` is of the whole tensor; fp32 elements."""
    count, me = len(ranks), dist.get_rank()
    part = max(1, num_bytes // 4 // count)
    whole, shard = torch.zeros(part * count, device=device), torch.zeros(part, device=device)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, shard, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(shard, whole, group=group)
    if kind == "broadcast":
        return lambda: dist.broadcast(whole, ranks[0], group=group)
    if kind == "all_to_all":
        received = torch.zeros_like(whole)
        return lambda: dist.all_to_all_single(received, whole, group=group)
    assert kind == "send", f"a known kind of collective, not {kind}"
    operation = dist.isend if me == ranks[0] else dist.irecv
    peer = ranks[1] if me == ranks[0] else ranks[0]

    def send() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(operation, whole, peer, group=group)]):
            work.wait()

    return send


def measure_sharing(dtype: torch.dtype, window_s: float) -> tuple[SharingPoint, ...]:
    """Slowdown of ranks of one machine that compute at the same time, the others idle. Called by all ranks; CPU.

    Each active rank does the yardstick's work again and again for ``window_s`` seconds; the mean time of one, over the
    time of one with a single active rank, is the slowdown. Numbers of active ranks take turns, since the machine itself
    changes its speed.
    """
    ranks, work = dist.get_world_size(), Yardstick(dtype)
    counts = range(1, ranks + 1) if ranks <= 8 else sorted({1, 2, 4, 8, ranks // 2, ranks})
    turns = [{active: _mean_iteration(work, active, window_s / TURNS) for active in counts} for _ in range(TURNS)]
    return tuple(
        SharingPoint(active=active, slowdown=statistics.median(turn[active] / turn[1] for turn in turns))
        for active in counts
    )


def _mean_iteration(work: Yardstick, active: int, window_s: float) -> float:
    wait_for_all()
    iterations, start, elapsed = 0, time.perf_counter(), 0.0
    while dist.get_rank() < active and elapsed < window_s:
        work.once()
        iterations += 1
        elapsed = time.perf_counter() - start
    total = torch.tensor([elapsed / max(iterations, 1)], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total.item()) / active


def measure_waiting(device: torch.device, num_nodes: int, dtype: torch.dtype, window_s: float) -> float:
    """Seconds that a collective between passes waits for ranks to get a processor. Called by all ranks; CPU.

    All ranks compute forward passes of a transformer block, with and without a small all-reduce after each. What the
    all-reduce adds beyond its own time among idle ranks is waiting: where ranks share processors, a rank whose message
    has come is not always running. Mean over group sizes; never below zero.
    """
    work, found = Yardstick(dtype), []
    for layout in layouts(dist.get_world_size(), num_nodes):
        group, ranks = make_group(layout)
        call = make_call("all_reduce", device, group, ranks, _WAITING_BYTES)
        _time_calls(call, 1, device)
        alone = min(_time_calls(call, _WAITING_CALLS, device) for _ in range(3)) / _WAITING_CALLS
        apart = _mean_pass(work, None, window_s)
        together = _mean_pass(work, call, window_s)
        found.append(together - apart - alone)
        dist.destroy_process_group(group)
    return max(0.0, sum(found) / len(found))


def _mean_pass(work: Yardstick, call: Callable[[], None] | None, window_s: float) -> float:
    """Mean seconds of a forward pass, each followed by ``call``, while all ranks do the same; as many on each."""
    passes = max(4, int(window_s / max(slowest(_one_pass(work)), 1e-4)))
    wait_for_all()
    start = time.perf_counter()
    for _ in range(passes):
        work.forward()
        if call is not None:
            call()
    return slowest(time.perf_counter() - start) / passes


def _one_pass(work: Yardstick) -> float:
    wait_for_all()
    start = time.perf_counter()
    for _ in range(4):
        work.forward()
    return (time.perf_counter() - start) / 4
