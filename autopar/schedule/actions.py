"""A schedule is data: for every pipeline rank the actions that it takes, in order. Here they are made, by name.

All but the V-shaped ones follow one pattern: some forwards to warm up, then a backward and a forward in turn, then the
backwards that are left. They differ in the order of virtual stages, in the number of forwards and in when gradients of
weights are taken. Sources: GPipe (Huang et al. 2019); 1F1B and interleaving (Narayanan et al. 2019, 2021); zero bubble
H1 and H2 (Qi et al. 2023). tests/schedule holds them against torch.distributed.pipelining's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.errors import PlanError
from autopar.plan import ScheduleName
from autopar.schedule.notation import Action, Direction, Schedule, Steps, dependencies, flat
from autopar.schedule.v_shaped import dual_pipe_v, zero_bubble_v
from costmodels.pipeline import group_size

__all__ = ["Action", "Direction", "Schedule", "build_schedule", "build_steps", "dependencies"]

V_SHAPED = frozenset({ScheduleName.ZB_V, ScheduleName.DUALPIPE_V})
"""Schedules whose second virtual stage runs up the ranks again: its last rank is the pipeline's first."""


def build_schedule(
    name: ScheduleName, num_ranks: int, num_microbatches: int, virtual: int = 1, group: int = 0
) -> Schedule:
    """Actions of every rank.

    Args:
        name: which schedule. Interleaving with one virtual stage is 1F1B.
        num_ranks: p >= 1.
        num_microbatches: m >= 1; DualPipeV needs 2p.
        virtual: virtual stages per rank; ZB-V and DualPipeV have two whatever is said.
        group: microbatches that go through one virtual stage before the next has its turn; 0 means
            ``costmodels.pipeline.group_size``.

    Raises:
        PlanError: too few microbatches or ranks, or a schedule without virtual stages.
    """
    return flat(build_steps(name, num_ranks, num_microbatches, virtual, group))


def build_steps(name: ScheduleName, num_ranks: int, num_microbatches: int, virtual: int = 1, group: int = 0) -> Steps:
    """As ``build_schedule``, with DualPipeV's forwards and backwards that run at once told apart as pairs."""
    p, m, v = num_ranks, num_microbatches, virtual
    if min(p, m, v) < 1:
        raise PlanError(f"a schedule needs ranks, microbatches and virtual stages, not {p}, {m} and {v}")
    if name is ScheduleName.DUALPIPE_V:
        return dual_pipe_v(p, m)
    if name is ScheduleName.ZB_V:
        return zero_bubble_v(p, m)
    if v > 1 and name not in (ScheduleName.INTERLEAVED, ScheduleName.ZB_H1):
        raise PlanError(f"the {name} schedule has one virtual stage per rank, not {v}: use vp=1 or interleaved")
    size = group or group_size(p, m)
    return tuple(_alternating(name, rank, p, m, v, size) for rank in range(p))


def _warmup(name: ScheduleName, rank: int, p: int, m: int, v: int, size: int) -> tuple[int, int | None]:
    """Forwards before the first backward, and by how many backwards those of weights lag (None: not apart)."""
    left = p - 1 - rank
    if name is ScheduleName.GPIPE:
        return m, None
    if name is ScheduleName.ZB_H1:
        return (v - 1) * size + left + 1, rank
    if name is ScheduleName.ZB_H2:
        return 2 * left + 1, 2 * rank
    if name is ScheduleName.INTERLEAVED and v > 1:
        return (v - 1) * size + 2 * left + 1, None
    return left + 1, None


def _alternating(name: ScheduleName, rank: int, p: int, m: int, v: int, size: int) -> tuple[Action, ...]:
    forwards = _order(rank, p, m, range(v), size)
    backwards = _order(rank, p, m, range(v - 1, -1, -1), size)
    warmup, lag = _warmup(name, rank, p, m, v, size)
    back = Direction.BACKWARD if lag is None else Direction.BACKWARD_INPUT
    actions = [Action(stage, Direction.FORWARD, i) for stage, i in forwards[:warmup]]
    for k, (stage, i) in enumerate(backwards):
        actions.append(Action(stage, back, i))
        if lag is not None and k >= lag:
            late, j = backwards[k - lag]
            actions.append(Action(late, Direction.BACKWARD_WEIGHT, j))
        if warmup + k < len(forwards):
            ahead, j = forwards[warmup + k]
            actions.append(Action(ahead, Direction.FORWARD, j))
    if lag:
        actions += [Action(stage, Direction.BACKWARD_WEIGHT, i) for stage, i in backwards[max(m * v - lag, 0) :]]
    return tuple(actions)


def _order(rank: int, p: int, m: int, chunks: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Virtual stage and microbatch in the order in which a rank takes them: group after group, chunk after chunk."""
    groups = [range(start, min(start + size, m)) for start in range(0, m, size)]
    return [(chunk * p + rank, i) for group in groups for chunk in chunks for i in group]
