"""Closed forms against the simulation: exact for equal stages, and how far off for unequal ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.plan import ScheduleName
from autopar.schedule.actions import V_SHAPED, build_steps
from autopar.schedule.many import rank_ends, simulated_ends
from autopar.schedule.notation import rank_of_stage
from autopar.schedule.waves import to_waves
from costmodels.errors import InputError
from costmodels.pipeline import bubble_fraction, peak_in_flight, pipeline_seconds, schedule_seconds

SIZES = ((2, 4), (4, 8), (4, 10), (4, 40), (8, 16), (8, 20), (8, 64))


def simulated(
    name: ScheduleName, passes: tuple[Any, Any, Any], m: int, virtual: int, transfer: Any = 0.0, hidden: Any = 0.0
) -> Any:
    """Ends of plans whose passes are [plans, ranks], chunks of a rank taken as equal."""
    f, b, w = (np.asarray(x) / virtual for x in passes)
    ranks = f.shape[-1]
    waves = to_waves(build_steps(name, ranks, m, virtual))
    home = [rank_of_stage(stage, ranks, name in V_SHAPED) for stage in range(ranks * virtual)]
    seconds = np.stack([np.stack([x[:, rank] for x in (f, b + w, b, w)]) for rank in home])
    return rank_ends(waves, seconds, transfer, hidden).max(axis=0)


def unequal(kind: str, plans: int, ranks: int, seed: int) -> tuple[Any, Any, Any]:
    """Stages as they come: heavier ends, one block more on the first ranks, and any; f, b, w in one proportion."""
    rng = np.random.default_rng(seed)
    size = np.ones((plans, ranks))
    if kind == "ends":
        size[:, 0] += rng.uniform(0, 0.3, plans)
        size[:, -1] += rng.uniform(0, 0.8, plans)
    elif kind == "split":
        more = np.arange(ranks) < rng.integers(1, ranks + 1, (plans, 1))
        size += more / rng.integers(1, 12, (plans, 1))
    elif kind == "any":
        size = rng.uniform(0.5, 2.0, (plans, ranks))
    return size, size * rng.uniform(0.8, 1.6, (plans, 1)), size * rng.uniform(0.5, 1.1, (plans, 1))


EQUAL = [
    (ScheduleName.GPIPE, 1, 0),
    (ScheduleName.ONE_F_ONE_B, 1, 0),
    (ScheduleName.INTERLEAVED, 2, 0),
    (ScheduleName.INTERLEAVED, 3, 0),
    (ScheduleName.ZB_H1, 1, 0),
    (ScheduleName.ZB_H2, 1, 1),
    (ScheduleName.ZB_V, 2, 1),
    (ScheduleName.DUALPIPE_V, 2, 1),
]
PASS = st.floats(0.4, 2.0)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(EQUAL), st.integers(2, 8), st.integers(1, 40), PASS, PASS, PASS, st.floats(0, 0.02))
def test_equal_stages_are_exact(
    kind: tuple[ScheduleName, int, int], ranks: int, m: int, f: float, b: float, w: float, transfer: float
) -> None:
    name, virtual, full = kind
    m += full * 2 * ranks
    row = np.ones((1, ranks))
    hidden = 0.1 if name is ScheduleName.DUALPIPE_V else 0.0
    exact = simulated(name, (f * row, b * row, w * row), m, virtual, transfer, hidden)[0]
    closed = schedule_seconds(name, f * row[0], b * row[0], w * row[0], m, virtual, transfer, hidden=hidden)
    assert float(closed) == pytest.approx(exact, rel=1e-9)


BOUNDS = [
    # Largest error either way and mean error, for transfers of none and of a twentieth of a forward.
    (ScheduleName.GPIPE, 1, 1e-9, 1e-9, 1e-9),
    (ScheduleName.ONE_F_ONE_B, 1, 3e-3, 1e-9, 1e-5),
    (ScheduleName.INTERLEAVED, 2, 3e-2, 1e-9, 5e-4),
    (ScheduleName.INTERLEAVED, 4, 3e-2, 1e-9, 5e-4),
    (ScheduleName.ZB_H1, 1, 1e-2, 1e-9, 5e-4),
    (ScheduleName.ZB_H2, 1, 3e-2, 1e-9, 5e-4),
    (ScheduleName.ZB_V, 2, 0.0, 0.12, 0.03),
    (ScheduleName.DUALPIPE_V, 2, 0.0, 0.18, 0.07),
]


@pytest.mark.parametrize(("name", "virtual", "low", "high", "mean"), BOUNDS)
def test_unequal_stages_are_within_bounds(
    name: ScheduleName, virtual: int, low: float, high: float, mean: float
) -> None:
    errors = []
    for i, (ranks, m) in enumerate(SIZES):
        for kind in ("ends", "split", "any"):
            for transfer in (0.0, 0.05):
                passes = unequal(kind, 60, ranks, i)
                closed = schedule_seconds(name, *passes, m, virtual, transfer)
                errors.append(closed / simulated(name, passes, m, virtual, transfer) - 1)
    found = np.concatenate(errors)
    assert -low - 1e-9 <= found.min() and found.max() <= high
    assert np.abs(found).mean() <= mean


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 1000))
def test_1f1b_and_gpipe_are_exact_without_transfers_whatever_the_stages(ranks: int, m: int, seed: int) -> None:
    passes = tuple(np.random.default_rng(seed).uniform(0.1, 3.0, (3, 20, ranks)))
    for name in (ScheduleName.ONE_F_ONE_B, ScheduleName.GPIPE):
        closed = schedule_seconds(name, *passes, m)
        np.testing.assert_allclose(closed, simulated(name, passes, m, 1), rtol=1e-9)


@pytest.mark.parametrize(("name", "virtual"), [(kind[0], kind[1]) for kind in EQUAL])
def test_many_plans_simulated_at_once(name: ScheduleName, virtual: int) -> None:
    """Exact up to six rounds of microbatches; beyond, the growth of one more round stands for all."""
    ranks = 4
    home = [rank_of_stage(stage, ranks, name in V_SHAPED) for stage in range(ranks * virtual)]
    for kind in ("equal", "ends", "split", "any"):
        passes = unequal(kind, 50, ranks, 1)
        chunks = [x[:, home] / virtual for x in passes]
        for m, mean in ((ranks * 4, 1e-12), (ranks * 16, 1e-3), (ranks * 5 + 2, 1e-12)):
            found = simulated_ends(name, ranks, m, virtual, *chunks, 0.02).max(axis=-1)
            exact = simulated(name, passes, m, virtual, 0.02)
            assert np.abs(found / exact - 1).mean() <= mean


@given(st.integers(2, 8), st.integers(1, 15), PASS, PASS, PASS)
def test_few_microbatches_of_zb_v(ranks: int, m: int, f: float, b: float, w: float) -> None:
    """Fewer than fill the pipeline: near the simulation."""
    row = np.ones((1, ranks))
    exact = simulated(ScheduleName.ZB_V, (f * row, b * row, w * row), m, 2)[0]
    assert float(schedule_seconds("zb-v", f * row[0], b * row[0], w * row[0], m)) == pytest.approx(exact, rel=0.12)


def test_the_two_number_form_is_too_high_for_unequal_stages() -> None:
    """The control: a slow last stage is waited for once, not added to the stages before it."""
    f, b, w = (np.asarray([[1.0, 1.0, 1.0, x]]) for x in (2.0, 2.0, 2.0))
    total = f + b + w
    exact = simulated(ScheduleName.ONE_F_ONE_B, (f, b, w), 8, 1)
    assert schedule_seconds("1f1b", f, b, w, 8) == pytest.approx(exact)
    slow_first = tuple(x[:, ::-1] for x in (f, b, w))
    exact = simulated(ScheduleName.ONE_F_ONE_B, slow_first, 8, 1)
    assert schedule_seconds("1f1b", *slow_first, 8) == pytest.approx(exact)
    assert pipeline_seconds(total.max(), total.sum(), 4, 8) > 1.05 * exact[0]


def test_many_plans_at_once_are_each_alone() -> None:
    """Rows padded to the largest number of ranks, arrays of microbatches, virtual stages and transfers."""
    rng = np.random.default_rng(0)
    ranks, m, v = np.asarray([1, 2, 4, 4, 8]), np.asarray([3, 4, 8, 9, 16]), np.asarray([1, 2, 1, 2, 3])
    passes = rng.uniform(0.5, 1.0, (3, 5, 8)) * (np.arange(8) < ranks[:, None])
    transfer = rng.uniform(0, 0.1, 5)
    for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"):
        together = schedule_seconds(name, *passes, m, v, transfer, num_ranks=ranks)
        alone = [schedule_seconds(name, *passes[:, i, : ranks[i]], m[i], v[i], transfer[i]) for i in range(len(ranks))]
        np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_hidden_transfers_cost_nothing() -> None:
    row = np.ones(4)
    shown, none = (schedule_seconds("interleaved", row, row, row, 8, 2, 0.1, exposed=x) for x in (1.0, 0.0))
    assert none == schedule_seconds("interleaved", row, row, row, 8, 2) < shown
    half = schedule_seconds("interleaved", row, row, row, 8, 2, 0.1, exposed=0.5)
    assert half == schedule_seconds("interleaved", row, row, row, 8, 2, 0.05)


@given(st.integers(2, 8), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_the_published_bubble(ranks: int, groups: int, virtual: int) -> None:
    """(p-1)/(v m), Narayanan et al. 2021. Powers of two as durations: sums are exact, so equality is too."""
    m, row = ranks * groups, np.ones((1, ranks))
    name = ScheduleName.INTERLEAVED if virtual > 1 else ScheduleName.ONE_F_ONE_B
    end = simulated(name, (row, row, row), m, virtual)[0]
    assert end == float(pipeline_seconds(3.0, 3.0 * ranks, ranks, m, virtual))
    assert end == pytest.approx(3.0 * m * (1 + float(bubble_fraction(ranks, m, virtual))), rel=1e-12)


@given(st.integers(2, 8), st.integers(1, 24), st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0, 3))
def test_1f1b_transfers_for_any_number_of_microbatches(ranks: int, m: int, f: float, b: float, c: float) -> None:
    row = np.ones((1, ranks))
    end = simulated(ScheduleName.ONE_F_ONE_B, (f * row, b * row, 0 * row), m, 1, c)[0]
    assert end == pytest.approx(float(pipeline_seconds(f + b, (f + b) * ranks, ranks, m, 1, c)), rel=1e-9)
    assert end == pytest.approx(float(schedule_seconds("1f1b", f * row[0], b * row[0], 0 * row[0], m, 1, c)), rel=1e-9)


def test_the_control_that_must_fail() -> None:
    """GPipe's formula for transfers does not describe 1F1B."""
    row = np.ones((1, 4))
    end = simulated(ScheduleName.ONE_F_ONE_B, (row, row, row), 8, 1, 0.25)[0]
    assert end != float(pipeline_seconds(3.0, 12.0, 4, 8, 1, 0.25, all_forward_first=True))


def test_unknown_schedules_are_errors() -> None:
    with pytest.raises(InputError, match="no closed form for the schedule 'chimera'"):
        schedule_seconds("chimera", [1.0], [1.0], [1.0], 1)
    with pytest.raises(InputError, match="no closed form"):
        peak_in_flight("chimera", 0, 4, 8)
