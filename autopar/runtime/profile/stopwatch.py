"""Timing of operations the way training runs them: new buffers each time, backward after all forwards.

A microbenchmark that repeats one operation on one buffer finds it in the caches; in a training step each operation
meets data that many others have displaced. So every measurement goes round several sets of buffers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MAX_SETS = 6
_MAX_ROUNDS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median seconds, and the distance of the quartiles as a share of it."""

    seconds: float
    spread: float


def summarize_times(seconds: Sequence[float]) -> Timing:
    """Median and spread of repeats (at least one)."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Timing(seconds=median, spread=0.0)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(seconds=median, spread=(high - low) / median)


class Clock:
    """Times calls on one device: the processor's clock, or events on CUDA's stream.

    ``time`` returns a result and a mark; ``read`` turns marks into seconds once the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def time(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """Call it; returns its result and a mark for ``read``."""
        if not self._cuda:
            start = time.perf_counter()
            result = call()
            return result, time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = call()
        end.record()
        return result, (begin, end)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def read(self, marks: Sequence[Any]) -> list[float]:
        """Seconds of each mark."""
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks] if self._cuda else list(marks)


def count_sets(num_bytes: float, cache_bytes: float = 64 * 2**20) -> int:
    """Sets of buffers of ``num_bytes`` that together do not fit the caches: 2 to 6."""
    return int(min(_MAX_SETS, max(2, -(-cache_bytes // max(num_bytes, 1.0)))))


def time_operation(
    clock: Clock,
    make: Callable[[], Sequence[Tensor]],
    forward: Callable[..., Tensor],
    *,
    num_sets: int,
    budget_s: float,
    backward: bool = True,
) -> tuple[Timing, Timing | None]:
    """Time the forward of an operation and its backward.

    Args:
        make: makes the arguments of ``forward``; gradients are taken for those that require them.
        num_sets: sets of arguments that the measurement goes round.
        budget_s: stop after a round beyond this; one round to warm up and one measured are always made.

    Returns:
        Timing of forward and of backward (None where ``backward`` is False).
    """
    sets = [tuple(make()) for _ in range(num_sets)]
    wanted = [[tensor for tensor in arguments if tensor.requires_grad] for arguments in sets]
    forwards: list[float] = []
    backwards: list[float] = []
    gradient: Tensor | None = None
    start = time.perf_counter()
    for round_index in range(_MAX_ROUNDS):
        outputs, marks = zip(*(clock.time(partial(forward, *arguments)) for arguments in sets), strict=True)
        seconds, back = clock.read(marks), []
        if backward:
            if gradient is None:
                gradient = torch.rand_like(outputs[0])
            held = []
            for output, inputs in zip(reversed(outputs), reversed(wanted), strict=True):
                result, mark = clock.time(partial(torch.autograd.grad, output, inputs, gradient))
                held.append(result)
                back.append(mark)
            del held
        del outputs
        if round_index:
            forwards += seconds
            backwards += clock.read(back)
            if time.perf_counter() - start > budget_s:
                break
        else:
            clock.synchronize()
    return summarize_times(forwards), summarize_times(backwards) if backward else None
