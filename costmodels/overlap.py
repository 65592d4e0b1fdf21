"""Exposed time of communication that runs beside compute. Formulas take floats or arrays and broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def exposed_seconds(communication: ArrayLike, window: ArrayLike, *, hidden: float, leak: float) -> Any:
    """Exposed part of ``communication`` beside ``window`` seconds of compute.

    max(0, c - hidden w) + leak min(c, hidden w): at most a share ``hidden`` of the window hides anything, and a share
    ``leak`` of what is hidden still costs, since kernels and collectives compete. hidden = 0 exposes everything.
    Source: form fitted on published H100 runs (DP: hidden 0.8, leak 0.235).
    """
    c, room = np.asarray(communication, dtype=float), hidden * np.asarray(window, dtype=float)
    return np.maximum(0.0, c - room) + leak * np.minimum(c, room)


def bucketed_tail_seconds(
    communication: ArrayLike, window: ArrayLike, total: ArrayLike, first: float, bucket: float
) -> Any:
    """Time after backward until the last bucket is reduced, buckets being reduced one after another.

    Gradients of ``total`` bytes become ready evenly over ``window`` seconds and fill a bucket of ``first`` bytes, then
    buckets of ``bucket`` bytes, the last with what is left; all take ``communication`` seconds, each in proportion.
    The tail is the maximum over buckets k of ready(k) + what is left from k on - window. It is linear in k over the
    full buckets, so that the first, the first and the last full one, and the last decide. Source: the schedule of DDP
    (Li et al. 2020); wrong where gradients are unevenly spread over backward.
    """
    c, w, g = (np.asarray(x, dtype=float) for x in (communication, window, np.maximum(total, 1.0)))
    head = np.minimum(first, g)
    full = np.floor((g - head) / bucket)

    def tail(before: Any, after: Any) -> Any:
        return w * after / g + c * (g - before) / g - w

    second = np.minimum(head + bucket, g)
    end = head + full * bucket
    tails = np.maximum(tail(0.0, head), tail(head, second))
    tails = np.maximum(tails, np.where(full > 0, tail(end - bucket, end), 0.0))
    tails = np.maximum(tails, tail(end, g))
    return np.where(c > 0, np.clip(tails, 0.0, c), 0.0)
