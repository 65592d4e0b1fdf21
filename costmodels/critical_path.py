"""Longest paths through pipeline schedules of unequal stages, each [plans]; ``pipeline.schedule_seconds`` picks one.

A schedule is a graph of passes; its length is that of the longest path. A path starts at the first forward, stays for
most of the step on one rank r, whose passes follow each other, and leaves it at the end. So the length is the largest,
over r, of (the latest end of r's first backward) + (r's passes from there to its last forward) + (the longest way from
the start of that to the end). The ways in and out have closed forms, because forwards alone, and backwards alone, form
a flow shop of equal jobs: job k leaves machine l after sum_{i<=l} f_i + k max_{i<=l} f_i. Paths that change between
ranks in between matter where transfers do, or where chunks wrap around, and are compared as well.

All arguments are arrays: ``f``, ``b``, ``w`` [plans, p] seconds of forward, backward (or of its input part) and of the
weights' part for one microbatch and all chunks of a rank; ``m``, ``v``, ``c`` [plans, 1]. Every path that is compared
exists, so that results are lower bounds; tests/schedule compares them with the simulation. Own derivation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _from_below(values: Floats) -> Floats:
    """Largest of this rank's value and those of the ranks after it."""
    return np.maximum.accumulate(values[..., ::-1], axis=-1)[..., ::-1]


def _before(values: Floats) -> Floats:
    """Sum over the ranks before each."""
    return np.cumsum(values, axis=-1) - values


def _flow_shop(x: Floats, jobs: Floats, c: Floats) -> Floats:
    """When rank l ends its ``jobs``-th pass (counted from 0) of a flow from rank 0."""
    ranks = np.arange(x.shape[-1])
    return np.asarray(np.cumsum(x, axis=-1) + jobs * np.maximum.accumulate(x, axis=-1) + ranks * c)


def all_forward_first(f: Floats, b: Floats, m: Floats, c: Floats) -> Floats:
    """GPipe: two flow shops, one after the other. Exact."""
    jobs = m[..., 0] - 1
    turns = 2 * (f.shape[-1] - 1) * c[..., 0]
    return np.asarray(f.sum(-1) + b.sum(-1) + jobs * (f.max(-1) + b.max(-1)) + turns)


def one_forward_one_backward(f: Floats, b: Floats, m: Floats, c: Floats) -> Floats:
    """1F1B: p-r forwards before the first backward of rank r. Exact without transfers."""
    ranks = np.arange(f.shape[-1])
    warmup = np.minimum(m, f.shape[-1] - ranks)
    first = _from_below(_flow_shop(f, warmup - 1, c) + np.cumsum(b, -1) + ranks * c) - _before(b) - ranks * c
    back = _flow_shop(b, warmup - 1, c)
    last = _from_below(back + np.cumsum(f, -1) + ranks * c) - _before(f) - ranks * c
    between = np.maximum(m - 1 - warmup, 0)
    stay = first + last + _best_stay(f + b, between, c)
    short = np.maximum(first + _flow_shop(b, m - 1, c) - b, _flow_shop(f, m - 1, c) - f + last)
    return np.asarray(np.where(m > warmup, stay, short).max(axis=-1))


def _best_stay(t: Floats, times: Floats, c: Floats) -> Floats:
    """Most seconds that a path through ``times`` microbatches takes from rank i on, back to it.

    Staying on i is one way. The other goes down to rank i+n-1 and up again, over and over: as 1F1B's ranks wait for
    each other, a round takes the passes of n ranks and 2(n-1) transfers and leaves n microbatches behind.
    """
    best = times * t
    if not np.any(c):
        return best
    p = t.shape[-1]
    down = np.concatenate([np.zeros((*t.shape[:-1], 1)), np.cumsum(t + 2 * c, axis=-1)], axis=-1)
    slowest = t
    for n in range(2, p + 1):
        slowest = np.maximum(slowest[..., :-1], t[..., n - 1 :])
        rounds, left = np.divmod(times[..., : p - n + 1], n)
        left = np.broadcast_to(left, slowest.shape).astype(np.int64)
        start = down[..., : p - n + 1]
        reached = np.take_along_axis(down, np.arange(p - n + 1) + left, axis=-1)
        partly = np.where(left > 0, np.maximum(reached - start - 2 * c, left * slowest), 0.0)
        whole = rounds * (down[..., n:] - start - 2 * c)
        best[..., : p - n + 1] = np.maximum(best[..., : p - n + 1], whole + partly)
    return best


def zero_bubble(f: Floats, b: Floats, w: Floats, m: Floats, c: Floats, depth: int) -> Floats:
    """ZB-H1 (depth 1) and ZB-H2 (depth 2): depth (p-1-r) + 1 forwards first, weights depth r backwards late.

    Exact for equal stages, for H2 from 2p-1 microbatches on; to a few percent of the bubble otherwise.
    """
    p = f.shape[-1]
    ranks = np.arange(p)
    warmup, lag = np.minimum(m, depth * (p - 1 - ranks) + 1), depth * ranks
    first = _from_below(_flow_shop(f, warmup - 1, c) + np.cumsum(b, -1) + ranks * c) - _before(b) - ranks * c
    # From the start of rank l's first backward after its last forward to the end, which rank l - n reaches.
    out = np.zeros(np.broadcast_shapes(f.shape, m.shape))
    rate, climb = np.zeros_like(out), np.zeros_like(out)
    for n in range(p):
        here, end = slice(n, p), slice(0, p - n)
        climb[..., here] += b[..., end]
        weights = np.maximum(m - 1 - np.maximum(m - warmup[..., here], lag[end]), 0)
        rate[..., here] = np.maximum(rate[..., here], (warmup[..., here] - 1) * b[..., end] + weights * w[..., end])
        owed = np.minimum(m, lag[end] + 1) * w[..., end]
        out[..., here] = np.maximum(out[..., here], climb[..., here] + rate[..., here] + n * c + owed)
    last = _from_below(np.cumsum(f, -1) + out + ranks * c) - _before(f) - ranks * c
    stay = first + last + (m - 1 - warmup) * (f + b) + np.maximum(m - warmup - lag, 0) * w
    short = np.maximum(first - b + out, _flow_shop(f, m - 1, c) - f + last)
    return np.asarray(np.where(m > warmup, stay, short).max(axis=-1))


def interleaved(f: Floats, b: Floats, m: Floats, v: Floats, c: Floats, group: Floats) -> Floats:
    """Interleaved 1F1B with groups of ``group`` [plans, 1] microbatches, chunks of a rank taken as equal.

    Exact for equal stages; 0.03% off on average and at most 3% too low elsewhere.
    """
    p = f.shape[-1]
    ranks = np.arange(p)
    f, b = f / v, b / v
    warmup = np.minimum(m * v, (v - 1) * group + 2 * (p - 1 - ranks) + 1)
    first = _from_below(_around(f, warmup - 1, v, c, group) + np.cumsum(b, -1) + ranks * c) - _before(b) - ranks * c
    smaller = m - group * ((m - 1) // group)
    last = _from_below(_around(b, warmup - 1, v, c, smaller) + np.cumsum(f, -1) + ranks * c) - _before(f) - ranks * c
    between = m * v - 1 - warmup
    stay = first + last + between * (f + b)
    jobs = m * v - 1
    short = np.maximum(first + _around(b, jobs, v, c, group) - b, last + _around(f, jobs, v, c, group) - f)
    best = np.where(between >= 0, stay, short).max(axis=-1)
    for way_in, way_out, x in ((first, last, f), (last, first, b)):
        best = np.maximum(best, _wrapped(way_in, way_out, x, f + b, between, c, group))
    return np.asarray(best)


def _around(x: Floats, jobs: Floats, v: Floats, c: Floats, group: Floats) -> Floats:
    """As ``_flow_shop``, for passes that come back to rank 0 for the next chunk, a group of passes later."""
    p = x.shape[-1]
    out = _flow_shop(x, jobs, c)
    most = np.minimum(v - 1, jobs // group)
    lap, slowest = x.sum(-1, keepdims=True) + p * c, x.max(-1, keepdims=True)
    for laps in (np.minimum(1, most), most):
        way = np.cumsum(x, -1) + np.arange(p) * c + laps * lap + (jobs - laps * group) * slowest
        out = np.where(laps > 0, np.maximum(out, way), out)
    return out


def _wrapped(
    way_in: Floats, way_out: Floats, x: Floats, t: Floats, between: Floats, c: Floats, group: Floats
) -> Floats:
    """Longest path that stays on one rank, wraps around from the last rank to the first, and stays on another.

    The wrap leaves a group of passes behind. Where it falls is bound to the chunks, within one more group: that one
    is counted at the pace of the faster of the two ranks.
    """
    p = x.shape[-1]
    ranks = np.arange(p)
    leave = way_in + x.sum(-1, keepdims=True) - np.cumsum(x, -1) + (p - 1 - ranks) * c
    arrive = way_out + np.cumsum(x, -1) + (1 + ranks) * c
    best = np.zeros(np.broadcast_shapes(x.shape, between.shape)[:-1])
    for rank in range(p):
        here = slice(rank, rank + 1)
        passes = between[..., here] - 2 * group
        stays = passes * np.maximum(t, t[..., here]) + group * np.minimum(t, t[..., here])
        allowed = (passes >= 0) & (between >= 0)
        best = np.maximum(best, np.where(allowed, leave[..., here] + arrive + stays, 0.0).max(axis=-1))
    return best


def v_shaped_extra(f: Floats, b: Floats, w: Floats, m: Floats, p: int, c: Floats) -> Floats:
    """What ZB-V's fill and drain add to the passes of one rank; seconds of a chunk.

    The length with equal stages is piecewise linear; these are its pieces, coefficients of f, b, w and c read off the
    simulation for p = 2..8 and linear in p. Exact while a transfer is short beside a pass; from 2p-1 microbatches on,
    and up to p, where everything waits for the first backward. Between the two it is a few percent off.
    """
    n = p - 1
    pieces = (
        (0, n, 0, 5 * p - 7), (0, 2 * n, -2 * n, 6 * p - 8), (0, 1, p - 2, 3 * n), (1, 0, p - 2, 3 * p - 5),
        (2 * p - 3, 2 - p, 0, 3 * p - 5), (2 * n, 0, 1 - 2 * p, 4 * n), (2 * p - 3, 1, -2 * n, 4 * p - 6),
        (2 * n, -n, -1, 3 * n), (p - 2, p, -2 * n, 6 * p - 8), (p - 2, 1, 0, 5 * p - 7),
    )  # fmt: skip
    full = _longest(pieces, f, b, w, c)
    late = np.maximum(m - p, 0)
    down = 2 * np.maximum(p - m, 0) * f + 2 * n * b - 2 * late * w + (4 * n + 2 * np.maximum(late - 1, 0)) * c
    few = np.maximum(down, (2 * p - m - 1) * (f + b + 2 * c))
    return np.asarray(np.where(m <= p, few, np.where(m < 2 * p - 1, np.maximum(full, down), full)))


def dual_pipe_extra(f: Floats, b: Floats, w: Floats, m: Floats, p: int, c: Floats) -> Floats:
    """The same for DualPipeV, from 2p microbatches on; each further one waits for its neighbours, as in 1F1B."""
    n = p - 1
    waits = 2 * ((m - 1) - np.ceil((m - 1) / p) - (2 * p - 3)) * c
    pieces = (
        (2 * n, 0, 0, 5 * p - 7), (2 * n, n, -n, 6 * p - 8), (p - 2, 2 * n, -n, 8 * p - 10), (p - 2, n, 0, 7 * p - 9),
    )  # fmt: skip
    return _longest(pieces, f, b, w, c) + waits


def _longest(pieces: tuple[tuple[int, int, int, int], ...], f: Floats, b: Floats, w: Floats, c: Floats) -> Floats:
    return np.asarray(np.max([x * f + y * b + z * w + u * c for x, y, z, u in pieces], axis=0))
