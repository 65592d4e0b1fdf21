"""Schedules of a pipeline that runs down the ranks and up again, two virtual stages per rank: ZB-V and DualPipeV.

Rank r holds the virtual stages r and 2p-1-r, so that the first rank has both ends of the model. Sources: ZB-V, Qi et
al. 2023 (section 6); DualPipeV, DeepSeek-AI 2025 (github.com/deepseek-ai/DualPipe), the halved form of DualPipe
(DeepSeek-V3 technical report, 2024), which keeps one copy of the weights.
"""

from __future__ import annotations

from collections import deque

from autopar.errors import PlanError
from autopar.schedule.notation import Action, Direction, Pair, Step, Steps

F, B, I, W = Direction.FORWARD, Direction.BACKWARD, Direction.BACKWARD_INPUT, Direction.BACKWARD_WEIGHT  # noqa: E741


class _Row:
    """Builds the actions of one rank; knows which microbatch of a virtual stage is next."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._next: dict[tuple[int, Direction], int] = {}
        self._owed: deque[Action] = deque()

    def take(self, stage: int, direction: Direction) -> Action:
        """The next microbatch of this pass; whole backwards and those of inputs count together."""
        key = (stage, I if direction is B else direction)
        microbatch = self._next.get(key, 0)
        self._next[key] = microbatch + 1
        if direction is I:
            self._owed.append(Action(stage, W, microbatch))
        return Action(stage, direction, microbatch)

    def add(self, *passes: tuple[int, Direction]) -> None:
        self.steps.extend(self.take(stage, direction) for stage, direction in passes)

    def pay(self, stage: int | None = None) -> None:
        """The oldest gradient of weights that is owed, of this stage if one is named; nothing where none is owed."""
        owed = next((action for action in self._owed if stage in (None, action.stage)), None)
        if owed:
            self._owed.remove(owed)
            self.steps.append(owed)

    def pay_all(self, stage: int | None = None) -> None:
        """All that is owed, of this stage if one is named, oldest first."""
        for _ in range(len(self._owed)):
            self.pay(stage)

    def count(self, stage: int, direction: Direction) -> int:
        return self._next.get((stage, direction), 0)


def zero_bubble_v(num_ranks: int, num_microbatches: int) -> Steps:
    """ZB-V. Fewer than 2p-1 microbatches take the schedule of 2p-1 and leave the others out."""
    p, m = num_ranks, num_microbatches
    rows = [_zero_bubble_row(rank, p, max(2 * p - 1, m)) for rank in range(p)]
    return tuple(tuple(step for step in row if isinstance(step, Action) and step.microbatch < m) for row in rows)


def _zero_bubble_row(rank: int, p: int, m: int) -> list[Step]:
    down, up = rank, 2 * p - 1 - rank
    row = _Row()
    row.add(*[(down, F)] * (2 * (p - rank) - 1))
    row.add(*[(up, F), (down, F)] * rank)
    for _ in range(p - rank):
        row.add((up, F), (up, I))
        row.pay()
    while row.count(up, F) < m:
        if row.count(down, F) < m:
            row.add((down, F))
        row.add((down, I))
        row.pay()
        row.add((up, F), (up, I))
        row.pay()
    row.add(*[(down, I), (up, I)] * rank)
    # The last microbatches: gradients of inputs go on, those of weights fill the gaps.
    for _ in range(p - rank):
        row.add((down, I))
        row.pay(down)
    row.pay_all(up)
    row.pay_all(down)
    return row.steps


def dual_pipe_v(num_ranks: int, num_microbatches: int) -> Steps:
    """DualPipeV.

    Raises:
        PlanError: fewer than 2p microbatches.
    """
    p, m = num_ranks, num_microbatches
    if m < 2 * p:
        raise PlanError(f"the dualpipe-v schedule needs 2*pp={2 * p} microbatches or more, not {m}")
    return tuple(_dual_pipe_row(rank, p, m) for rank in range(p))


def _dual_pipe_row(rank: int, p: int, m: int) -> tuple[Step, ...]:
    down, up = rank, 2 * p - 1 - rank
    after = p - 1 - rank
    row = _Row()

    def at_once(forward: int, backward: int) -> None:
        row.steps.append(Pair(row.take(forward, F), row.take(backward, B)))

    row.add(*[(down, F)] * (2 * after))
    row.add(*[(down, F), (up, F)] * (rank + 1))
    for _ in range(after):
        row.add((up, I))
        row.pay()
        row.add((up, F))
    for i in range(m - 2 * p + rank + 1):
        if i == 0 and rank == p - 1:
            # The last rank turns the first microbatch around: running at once would only delay it.
            row.add((down, F), (up, B))
        else:
            at_once(down, up)
        at_once(up, down)
    for _ in range(after):
        row.add((up, B))
        at_once(up, down)
    # Half of the backwards that are left are taken apart, so that gradients of weights fill the end.
    apart = rank + 1
    for k in range(2 * (rank + 1)):
        row.add((down if k % 2 else up, I if k >= apart else B))
    for _ in range(after):
        row.pay()
        row.add((down, I))
    row.pay_all()
    return tuple(row.steps)
