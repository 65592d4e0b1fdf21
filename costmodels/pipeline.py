"""Closed forms of pipeline schedules: step time, bubble, microbatches in flight. Arrays broadcast.

Symbols: p ranks, v virtual stages per rank, m microbatches, f and b seconds of forward and backward of one
microbatch on a rank (all its virtual stages), c seconds of one transfer between neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodels.critical_path import (
    Floats,
    all_forward_first,
    dual_pipe_extra,
    interleaved,
    one_forward_one_backward,
    v_shaped_extra,
    zero_bubble,
)
from costmodels.errors import InputError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
"""Schedules that have closed forms."""
SPLIT_SCHEDULES = ("zb-h1", "zb-h2", "zb-v", "dualpipe-v")
"""Schedules whose backward comes in two parts: gradients of inputs, and later those of weights."""


def bubble_fraction(num_stages: ArrayLike, num_microbatches: ArrayLike, virtual: ArrayLike = 1) -> Any:
    """Idle time over ideal time of GPipe and 1F1B with equal stages: (p-1)/(v m). Source: Narayanan et al. 2021."""
    p, m, v = (np.asarray(x, dtype=float) for x in (num_stages, num_microbatches, virtual))
    return (p - 1) / (v * m)


def group_size(num_ranks: int, num_microbatches: int) -> int:
    """Microbatches that an interleaved schedule takes through one virtual stage before it turns to the next.

    The smallest N >= p that leaves no group with fewer than p of m microbatches; m itself below p. It is p where p
    divides m (Narayanan et al. 2021), m / floor(m/p) where that is whole (all that torch accepts), and else the least
    of the sizes that Megatron accepts (``microbatch_group_size_per_vp_stage``: p <= N <= m, and a remainder of at least
    p; Megatron's own default is p, and it refuses what p does not divide). So every number of microbatches can run.
    """
    p, m = num_ranks, num_microbatches
    return next((size for size in range(p, m) if m % size == 0 or m % size >= p), m)


def group_sizes(num_ranks: ArrayLike, num_microbatches: ArrayLike) -> Any:
    """``group_size`` of arrays."""
    p, m = np.broadcast_arrays(np.asarray(num_ranks), np.asarray(num_microbatches))
    if p.size == 1:
        return np.full(p.shape, float(group_size(int(p.flat[0]), int(m.flat[0]))))
    pairs, index = np.unique(np.stack([p.ravel(), m.ravel()]).astype(np.int64), axis=1, return_inverse=True)
    sizes = np.asarray([group_size(int(a), int(b)) for a, b in pairs.T], dtype=float)
    return sizes[index.ravel()].reshape(p.shape)


def schedule_seconds(
    schedule: str,
    forward: ArrayLike,
    backward_input: ArrayLike,
    backward_weight: ArrayLike,
    num_microbatches: ArrayLike,
    virtual: ArrayLike = 1,
    transfer: ArrayLike = 0.0,
    *,
    num_ranks: ArrayLike | None = None,
    exposed: ArrayLike = 1.0,
    hidden: ArrayLike = 0.0,
) -> Any:
    """First forward to last backward of plans with unequal stages, [...].

    Exact for equal stages (ZB-H2 and ZB-V from 2p-1 microbatches on) and transfers that are short beside a pass. For
    unequal ones: GPipe exact; 1F1B exact without transfers, within 0.3% with transfers of a tenth of a forward;
    interleaved, ZB-H1 and ZB-H2 at most 3% too low, 0.03% on average; ZB-V and DualPipeV too high, by 2% and 5% on
    average. Where the ends of the model lie in one of a rank's chunks each, interleaving takes 0.4% longer than this
    for 4p microbatches or more and 1.2% for 2p. tests/schedule holds this against the simulation.

    Args:
        schedule: one of SCHEDULES.
        forward: [..., ranks] seconds of a microbatch's forward through all virtual stages of a rank.
        backward_input: the same for the gradients of inputs.
        backward_weight: the same for the gradients of weights; where a schedule does not take them apart, the two add.
        num_microbatches: [...]; DualPipeV needs 2p.
        virtual: [...] virtual stages per rank, taken as equal; ZB-V and DualPipeV have two whatever is said.
        transfer: [...] seconds between neighbours.
        num_ranks: [...] ranks of each plan, where rows are padded; all of them by default.
        exposed: share of a transfer that is waited for; less than 1 where software sends while it computes (Megatron's
            ``overlap_p2p_comm``).
        hidden: [...] seconds that DualPipeV saves by a forward and a backward of one chunk each that run at once, less
            than either.

    Raises:
        InputError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"no closed form for the schedule '{schedule}': use one of {', '.join(SCHEDULES)}")
    f, b, w = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (forward, backward_input, backward_weight)))
    outer = np.broadcast_shapes(
        f.shape[:-1], *(np.shape(x) for x in (num_microbatches, virtual, transfer, exposed, hidden))
    )

    def column(x: ArrayLike) -> Floats:
        return np.broadcast_to(np.asarray(x, dtype=float), outer).reshape(-1, 1)

    f, b, w = (np.broadcast_to(x, (*outer, x.shape[-1])).reshape(-1, x.shape[-1]) for x in (f, b, w))
    m, v, h = column(num_microbatches), column(virtual), column(hidden)
    c = column(transfer) * column(exposed)
    if num_ranks is None:
        return _one_size(schedule, f, b, w, m, v, c if f.shape[-1] > 1 else 0 * c, h).reshape(outer)[()]
    ranks = column(num_ranks)[:, 0].astype(np.int64)
    out = np.empty(len(f))
    for p in np.unique(ranks):
        rows = ranks == p
        parts = (f[rows, :p], b[rows, :p], w[rows, :p])
        out[rows] = _one_size(schedule, *parts, m[rows], v[rows], c[rows] if p > 1 else 0 * c[rows], h[rows])
    return out.reshape(outer)[()]


def _one_size(schedule: str, f: Floats, b: Floats, w: Floats, m: Floats, v: Floats, c: Floats, h: Floats) -> Floats:
    p, whole = f.shape[-1], b + w
    if p == 1:
        return np.asarray((m * (f + whole))[:, 0])
    if schedule == "gpipe":
        return all_forward_first(f, whole, m, c)
    if schedule in ("zb-h1", "zb-h2"):
        return zero_bubble(f, b, w, m, c, 1 if schedule == "zb-h1" else 2)
    if schedule in ("zb-v", "dualpipe-v"):
        f_chunk, b_chunk, w_chunk = (x.mean(-1) / 2 for x in (f, b, w))
        passes, count = m[:, 0] * (f + whole).max(-1), m[:, 0]
        if schedule == "zb-v":
            return np.asarray(passes + v_shaped_extra(f_chunk, b_chunk, w_chunk, count, p, c[:, 0]))
        extra = dual_pipe_extra(f_chunk, b_chunk, w_chunk, count, p, c[:, 0])
        return np.asarray(passes + extra - (2 * count - p - 2) * h[:, 0])
    plain = (v[:, 0] == 1) | (schedule == "1f1b")
    out = np.empty(len(f))
    out[plain] = one_forward_one_backward(f[plain], whole[plain], m[plain], c[plain])
    if not plain.all():
        rest = ~plain
        out[rest] = interleaved(f[rest], whole[rest], m[rest], v[rest], c[rest], group_sizes(p, m[rest]))
    return out


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
    """First forward to last backward by two numbers of the stages: m t_max + (sum t - t_max)/v + 2 c x.

    ``slowest`` is the largest f+b of a rank for one microbatch, ``total`` the sum over ranks. With equal stages and
    v = 1 this is (m + p - 1)(f + b), exactly what the schedules take. The number x of round trips that are waited
    for: GPipe fills and drains once, x = p - 1. Interleaved stages have slack enough to hide all others,
    x = p v - 1, where p divides m. Under 1F1B a rank has no slack: each further microbatch waits for its neighbour, but
    one in p, x = (p-1) + (m-1) - ceil((m-1)/p). All exact for equal stages (tests/schedule). Too high for unequal ones,
    by several percent and up to a third: stages after the slowest add less than their time. ``schedule_seconds`` knows
    the stages one by one.
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
    """Microbatches whose activations a rank holds at most: GPipe, else 1F1B where v = 1 and interleaved where not."""
    v = np.asarray(virtual)
    plain, laps = (
        peak_in_flight(name, stage, num_stages, num_microbatches, virtual) for name in ("1f1b", "interleaved")
    )
    everything = peak_in_flight("gpipe", stage, num_stages, num_microbatches, virtual)
    return np.where(all_forward_first, everything, np.where(v > 1, laps, plain))


def peak_in_flight(
    schedule: str,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_microbatches: ArrayLike,
    virtual: ArrayLike = 1,
    *,
    weight_share: ArrayLike = 1.0,
) -> Any:
    """Microbatches whose activations a rank holds at most, in units of all its virtual stages. Exact.

    GPipe m; 1F1B min(m, p - i); interleaved min(m v, (v-1) N + 2(p-1-i) + 1)/v with groups of N (Narayanan et al.
    2021; ``group_size``); ZB-H1 and H2 k(p-1-i) + 1 and a share of the k i whose weights' gradients wait, k = 1 and 2
    (Qi et al. 2023); ZB-V p and DualPipeV p + 1/2 on every rank.

    Args:
        schedule: one of SCHEDULES.
        stage: pipeline rank i.
        num_stages: pipeline ranks p.
        num_microbatches: m.
        virtual: virtual stages per rank v.
        weight_share: share of the activations that is held from the gradients of inputs to those of weights.

    Raises:
        InputError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"no closed form for the schedule '{schedule}': use one of {', '.join(SCHEDULES)}")
    i, p, m, v = (np.asarray(x, dtype=float) for x in (stage, num_stages, num_microbatches, virtual))
    if schedule == "gpipe":
        return m + 0.0 * i
    if schedule in ("zb-h1", "zb-h2"):
        depth = 1 if schedule == "zb-h1" else 2
        ahead = np.minimum(m, depth * (p - 1 - i) + 1)
        return ahead + np.asarray(weight_share) * np.minimum(depth * i, m - ahead)
    if schedule == "zb-v":
        return (np.minimum(m, 2 * p - 1 - i) + np.minimum(m, i + 1)) / 2
    if schedule == "dualpipe-v":
        return p + 0.5 + 0.0 * i * m
    plain = np.minimum(m, p - i)
    if schedule == "1f1b" or np.all(v == 1):
        return plain + 0.0 * v
    laps = np.minimum(m * v, (v - 1) * group_sizes(p, m) + 2 * (p - 1 - i) + 1) / v
    return np.where(v > 1, laps, plain)


def waiting_at_peak(
    schedule: str,
    stage: ArrayLike,
    num_stages: ArrayLike,
    num_microbatches: ArrayLike,
    *,
    kept: ArrayLike,
    waiting: ArrayLike,
) -> Any:
    """Bytes that a rank's peak lies above ``kept`` times ``peak_in_flight``, where backward comes in two parts.

    From the gradients of inputs to those of weights a microbatch holds its activations and ``waiting`` bytes more. The
    first stage has no gradient of its input, so that nothing waits there. ZB-H1 and H2 (k = 1, 2): min(k i + 1, m) wait
    at the peak of i > 0. ZB-V: half a microbatch, one of two virtual stages, while p are held; or, in the tail,
    i + 1/2 while (p + i)/2 are held. DualPipeV peaks where nothing waits. Exact for the schedules of
    ``autopar.schedule`` and no more waiting than kept; of ZB-V from 2p - 1 microbatches on, since the tail of fewer is
    left out.

    Args:
        schedule: one of SCHEDULES; 0 for those with whole backwards.
        stage: pipeline rank i.
        num_stages: pipeline ranks p.
        num_microbatches: m.
        kept: bytes of a microbatch's activations on the rank, all its virtual stages.
        waiting: bytes of the gradients that wait, likewise.
    """
    i, p, m, a, w = (np.asarray(x, dtype=float) for x in (stage, num_stages, num_microbatches, kept, waiting))
    if schedule in ("zb-h1", "zb-h2"):
        return np.where(i > 0, w * np.minimum((1 if schedule == "zb-h1" else 2) * i + 1, m), 0.0)
    if schedule == "zb-v":
        tail = w * (i + 0.5) - a * (peak_in_flight(schedule, i, p, m) - (p + i) / 2)
        return np.where(m >= 2 * p - 1, np.maximum(w / 2, tail), w / 2)
    return 0.0 * (i + p + m + a + w)
