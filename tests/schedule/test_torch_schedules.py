"""The generators against those of torch.distributed.pipelining, action by action."""

from __future__ import annotations

import pytest

from autopar.plan import ScheduleName
from autopar.schedule.actions import build_steps

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

CASES = [
    (ScheduleName.GPIPE, "ScheduleGPipe", 1),
    (ScheduleName.ONE_F_ONE_B, "Schedule1F1B", 1),
    (ScheduleName.INTERLEAVED, "ScheduleInterleaved1F1B", 2),
    (ScheduleName.INTERLEAVED, "ScheduleInterleaved1F1B", 3),
    (ScheduleName.ZB_H1, "ScheduleInterleavedZeroBubble", 1),
    (ScheduleName.ZB_H1, "ScheduleInterleavedZeroBubble", 2),
    (ScheduleName.ZB_V, "ScheduleZBVZeroBubble", 2),
    (ScheduleName.DUALPIPE_V, "ScheduleDualPipeV", 2),
]


def torch_rows(kind: str, ranks: int, microbatches: int, virtual: int) -> list[list[str]]:
    """Rows without idle places. The object skips its constructor, which wants modules and processes."""
    schedule = object.__new__(getattr(schedules, kind))
    schedule.pp_group_size, schedule._n_microbatches, schedule.n_local_stages = ranks, microbatches, virtual
    schedule._num_stages = schedule.num_stages = ranks * virtual
    schedule.microbatches_per_round = microbatches // max(1, microbatches // ranks)
    if hasattr(schedule, "_calculate_single_rank_operations"):
        rows = [schedule._calculate_single_rank_operations(rank) for rank in range(ranks)]
    else:
        rows = list(schedule._get_pipeline_order().values())
    return [[str(action) for action in row if action is not None and action.is_compute_op] for row in rows]


def takes(name: ScheduleName, ranks: int, microbatches: int) -> bool:
    """What torch accepts."""
    if name is ScheduleName.DUALPIPE_V:
        return microbatches >= 2 * ranks
    if name in (ScheduleName.INTERLEAVED, ScheduleName.ZB_H1):
        return microbatches % max(1, microbatches // ranks) == 0
    return name is not ScheduleName.ONE_F_ONE_B or microbatches >= ranks


@pytest.mark.parametrize(("name", "kind", "virtual"), CASES)
def test_every_action_is_torchs(name: ScheduleName, kind: str, virtual: int) -> None:
    compared = 0
    for ranks in (2, 3, 4, 8):
        for microbatches in range(1, 25):
            if not takes(name, ranks, microbatches):
                continue
            ours = [[str(step) for step in row] for row in build_steps(name, ranks, microbatches, virtual)]
            theirs = torch_rows(kind, ranks, microbatches, virtual)
            if name is ScheduleName.ONE_F_ONE_B:
                # torch's description of the last rank counts forwards from 1; what it runs does not.
                ours, theirs = ours[:-1], theirs[:-1]
            assert ours == theirs
            compared += 1
    assert compared > 20
