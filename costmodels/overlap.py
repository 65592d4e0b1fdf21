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
    communication: ArrayLike, window: ArrayLike, first_ready: ArrayLike, last_bucket: ArrayLike
) -> Any:
    """Time after backward until the last bucket is reduced, buckets being reduced one after another.

    Gradients become ready evenly over ``window`` seconds, the first bucket after ``first_ready``; all buckets take
    ``communication`` seconds, the last one ``last_bucket`` of them. The end is the maximum over buckets k of
    ready(k) + what is left from k on, which is linear in k between its ends:
    tail = max(last_bucket, first_ready + communication - window). Source: the schedule of DDP (Li et al. 2020);
    wrong by at most one bucket where gradients are unevenly spread over backward.
    """
    c, w = np.asarray(communication, dtype=float), np.asarray(window, dtype=float)
    tail = np.maximum(np.asarray(last_bucket, dtype=float), np.asarray(first_ready, dtype=float) + c - w)
    return np.where(c > 0, np.minimum(tail, c + 0.0 * tail), 0.0)
