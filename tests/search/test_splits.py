"""Layers over unlike stages and sequences over unlike ranks, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.search.batch_split import reachable_totals, split_batch, totals_that_add_up
from autopar.search.stage_split import split_front, splits_below


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=4), st.integers(1, 9), st.sampled_from([1, 2]))
def test_a_batch_over_unlike_ranks_is_that_of_brute_force(seconds: list[float], units: int, multiple: int) -> None:
    batch = multiple * (units + len(seconds) - 1)
    shares = split_batch(seconds, batch, multiple=multiple)
    assert sum(shares) == batch and all(share % multiple == 0 and share > 0 for share in shares)
    counts = range(multiple, batch + 1, multiple)
    every = [c for c in itertools.product(counts, repeat=len(seconds)) if sum(c) == batch]
    slowest = min(max(n * t for n, t in zip(c, seconds, strict=True)) for c in every)
    assert max(n * t for n, t in zip(shares, seconds, strict=True)) == slowest


def test_equal_ranks_take_equal_shares_the_first_what_is_left() -> None:
    assert split_batch([0.3] * 4, 12) == (3, 3, 3, 3)
    assert split_batch([0.3] * 7, 32) == (5, 5, 5, 5, 4, 4, 4)
    assert split_batch([1.0, 0.5], 9) == (3, 6)
    assert split_batch([1.0, 0.5], 9, limits=(9, 4)) == (5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], 1), "a batch of 1 over 2 ranks"),
        (([1.0, 1.0], 4, (1, 2)), "leave room for 3 sequences"),
    ],
)
def test_batches_that_cannot_be_shared(arguments: tuple, message: str) -> None:
    seconds, batch, *limits = arguments
    with pytest.raises(InputError, match=message):
        split_batch(seconds, batch, limits=limits[0] if limits else None)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)), min_size=1, max_size=3))
def test_totals_of_lines_are_those_of_brute_force(options: list[tuple[int, int, int]]) -> None:
    batch = 14
    lines = [[option] for option in options]
    bits = [reachable_totals(line, batch) for line in lines]
    reached = [{u * k for u, low, high in line for k in range(low, high + 1) if u * k <= batch} for line in lines]
    assert [{t for t in range(batch + 1) if b >> t & 1} for b in bits] == reached
    found = totals_that_add_up(bits, batch)
    possible = [c for c in itertools.product(*reached) if sum(c) == batch]
    assert (found in possible) if possible else found is None


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 4), st.booleans())
def test_layers_over_stages_are_those_of_brute_force(seed: int, stages: int, more: int, alike: bool) -> None:
    rng, size = np.random.default_rng(seed), stages + more
    each = np.ones(size) if alike else rng.integers(1, 6, size).astype(float)
    total = np.concatenate([[0.0], np.cumsum(each)])
    held = np.where(np.triu(np.ones((size + 1, size + 1), dtype=bool), 1), total[None, :] - total[:, None], np.inf)
    time, pace = (rng.integers(1, high, (stages, 1, 1)) * held for high in (5, 20))
    time = np.where(held <= rng.integers(3, 30, (stages, 1, 1)), time, np.inf)  # memory
    cost = {}
    for cuts in itertools.combinations(range(1, size), stages - 1):
        b = (0, *cuts, size)
        parts = [(time[s, b[s], b[s + 1]], pace[s, b[s], b[s + 1]]) for s in range(stages)]
        cost[tuple(np.diff(b).tolist())] = sum(t for t, _ in parts) + max(p for _, p in parts)
    best = min(cost.values())
    front = split_front(time, pace, slack=0.5)
    if not np.isfinite(best):
        assert front == ()
        return
    assert min(split.cost for split in front) == best
    assert all(cost[split.items] == split.cost for split in front)
    below = splits_below(time, pace, best * 1.3, most=100_000)
    assert below is not None
    assert {tuple(row) for row in below.tolist()} == {split for split, c in cost.items() if c < best * 1.3}
    assert splits_below(time, pace, best * 1.3, most=0) is None
