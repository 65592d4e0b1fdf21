"""Closed forms of pipeline schedules: step time, bubble, microbatches in flight. Arrays broadcast.

Symbols: p stages, v virtual stages per rank, m microbatches, f and b seconds of forward and backward of one
microbatch on a rank (all its virtual stages), c seconds of one transfer between neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def bubble_fraction(num_stages: ArrayLike, num_microbatches: ArrayLike, virtual: ArrayLike = 1) -> Any:
    """Idle time over ideal time of GPipe and 1F1B with equal stages: (p-1)/(v m). Source: Narayanan et al. 2021."""
    p, m, v = (np.asarray(x, dtype=float) for x in (num_stages, num_microbatches, virtual))
    return (p - 1) / (v * m)


def pipeline_seconds(
    slowest: ArrayLike,
    total: ArrayLike,
    num_stages: ArrayLike,
    num_microbatches: ArrayLike,
    virtual: ArrayLike = 1,
    transfer: ArrayLike = 0.0,
    *,
    all_forward_first: ArrayLike = False,
) -> Any:
    """First forward to last backward: m t_max + (sum t - t_max)/v + 2 c x.

    ``slowest`` is the largest f+b of a rank for one microbatch, ``total`` the sum over ranks. With equal stages and
    v = 1 this is (m + p - 1)(f + b), exactly what the schedules take. The number x of round trips that are waited
    for: GPipe fills and drains once, x = p - 1. Interleaved stages have slack enough to hide all others,
    x = p v - 1. Under 1F1B a rank has no slack: each further microbatch waits for its neighbour, but one in p,
    x = (p-1) + (m-1) - ceil((m-1)/p). All exact for equal stages (tests/schedule); wrong where stages differ and the
    slowest is not on the critical path of fill and drain, and for interleaved stages shorter than a transfer.
    """
    t_max, t_sum = np.asarray(slowest, dtype=float), np.asarray(total, dtype=float)
    p, m, v, c = (np.asarray(x, dtype=float) for x in (num_stages, num_microbatches, virtual, transfer))
    tight = (p - 1) + (m - 1) - np.ceil((m - 1) / p)
    trips = np.where(np.logical_or(all_forward_first, v > 1), p * v - 1, tight)
    return m * t_max + (t_sum - t_max) / v + 2 * c * trips


def in_flight(
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_microbatches: ArrayLike,
    virtual: ArrayLike = 1,
    *,
    all_forward_first: ArrayLike = False,
) -> Any:
    """Microbatches whose activations a rank holds at most, in units of all its virtual stages.

    GPipe m; 1F1B min(m, p - stage); interleaved min(m v, (v-1)p + 2(p-1-stage) + 1)/v (Narayanan et al. 2021).
    """
    i, p, m, v = (np.asarray(x, dtype=float) for x in (stage, num_stages, num_microbatches, virtual))
    plain = np.minimum(m, p - i)
    interleaved = np.minimum(m * v, (v - 1) * p + 2 * (p - 1 - i) + 1) / v
    return np.where(all_forward_first, m + 0.0 * i, np.where(v > 1, interleaved, plain))
