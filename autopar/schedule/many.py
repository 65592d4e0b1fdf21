"""The simulation for many plans of one schedule at once: what closed forms leave out, at milliseconds a schedule.

Virtual stages of a rank may differ here, and V-shaped schedules of unequal stages are exact.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from autopar.plan import ScheduleName
from autopar.schedule.actions import build_steps
from autopar.schedule.waves import Floats, Waves, step_ends, to_waves

ROUNDS = 6
"""Microbatches per rank from which on a step is taken to grow evenly: 0.02% off on average over unequal stages, 3% at
worst, where two ranks take nearly the same time (tests/schedule)."""


def rank_ends(waves: Waves, seconds: Floats, transfer: ArrayLike = 0.0, hidden: ArrayLike = 0.0) -> Floats:
    """End of every rank's last action, [ranks, ...]; see ``step_ends``."""
    _, ends = step_ends(waves, seconds, transfer, hidden)
    return np.stack([ends[steps[-1]] for steps in waves.of_rank])


def simulated_ends(
    name: ScheduleName,
    num_ranks: int,
    num_microbatches: int,
    virtual: int,
    forward: ArrayLike,
    backward_input: ArrayLike,
    backward_weight: ArrayLike,
    transfer: ArrayLike = 0.0,
    hidden: ArrayLike = 0.0,
) -> Floats:
    """When the last action of every rank ends, [plans, ranks].

    Args:
        name: schedule; with num_ranks, num_microbatches and virtual the same for all plans.
        num_ranks: p.
        num_microbatches: m. Beyond ROUNDS p the step grows by what p more microbatches add there.
        virtual: virtual stages per rank.
        forward: [plans, p * virtual] seconds of a microbatch's forward by virtual stage.
        backward_input: the same for gradients of inputs.
        backward_weight: the same for gradients of weights.
        transfer: [plans] seconds between ranks.
        hidden: [plans] seconds that a pair of DualPipeV saves.

    Raises:
        PlanError: see ``build_steps``.
    """
    f, b, w = (np.asarray(x, dtype=float).T for x in (forward, backward_input, backward_weight))
    seconds = np.stack([f, b + w, b, w], axis=1)

    def ends(microbatches: int) -> Floats:
        return rank_ends(_waves(name, num_ranks, microbatches, virtual), seconds, transfer, hidden).T

    # Groups of an interleaved schedule depend on the number of microbatches.
    uneven = name is ScheduleName.INTERLEAVED and num_microbatches % num_ranks > 0
    rounds = 0 if uneven else max(0, num_microbatches // num_ranks - ROUNDS)
    enough = num_microbatches - rounds * num_ranks
    found = ends(enough)
    if rounds:
        before, grown = found.max(axis=-1), ends(enough + num_ranks).max(axis=-1)
        found = found + (rounds * (grown - before))[:, None]
    return found


@lru_cache(maxsize=256)
def _waves(name: ScheduleName, num_ranks: int, num_microbatches: int, virtual: int) -> Waves:
    return to_waves(build_steps(name, num_ranks, num_microbatches, virtual))
