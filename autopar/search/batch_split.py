"""A batch over data parallel ranks of unlike speed: whole sequences, so that the last rank ends as soon as it can."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from autopar.errors import InputError


def split_batch(
    seconds: Sequence[float], batch: int, *, limits: Sequence[int] | None = None, multiple: int = 1
) -> tuple[int, ...]:
    """Shares n_i that minimise max_i n_i t_i, with sum n_i = batch and every n_i at least ``multiple``.

    Shares are handed out a multiple at a time, each to the rank that would end first with it (the earlier of equals).
    That is optimal: a rank gets its k-th only if all others would end with their next no sooner. Equal ranks get equal
    shares, the first ones what is left over. The gradient is the sum over sequences divided by the batch, so a rank's
    mean counts n_i / batch and not 1 / ranks.

    Args:
        seconds: t_i of one sequence on each rank.
        batch: sequences in all.
        limits: most sequences of each rank.
        multiple: sequences of a microbatch.

    Raises:
        InputError: a batch that is no multiple, too small for the ranks or too large for their limits.
    """
    most = [batch] * len(seconds) if limits is None else list(limits)
    if batch % multiple or batch < multiple * len(seconds):
        raise InputError(
            f"a batch of {batch} over {len(seconds)} ranks: give a multiple of {multiple}, one or more each"
        )
    room = sum(limit // multiple for limit in most)
    if min(most) < multiple or room * multiple < batch:
        raise InputError(f"a batch of {batch}: limits {most} leave room for {room * multiple} sequences")
    shares = [multiple] * len(seconds)
    left = (batch - sum(shares)) // multiple
    queue = [(2 * multiple * t, i) for i, t in enumerate(seconds) if most[i] >= 2 * multiple]
    heapq.heapify(queue)
    for _ in range(left):
        _, i = heapq.heappop(queue)
        shares[i] += multiple
        if shares[i] + multiple <= most[i]:
            heapq.heappush(queue, ((shares[i] + multiple) * seconds[i], i))
    return tuple(shares)


def reachable_totals(units: Sequence[tuple[int, int, int]], batch: int) -> int:
    """Totals up to ``batch`` that a line reaches by any of its options, as bits of a number.

    An option (sequences of a microbatch u, least k, most K) reaches u k, u (k + 1), ..., u K.
    """
    bits = 0
    for unit, least, most in units:
        for count in range(least, min(most, batch // unit) + 1):
            bits |= 1 << (unit * count)
    return bits


def totals_that_add_up(lines: Sequence[int], batch: int) -> tuple[int, ...] | None:
    """One total of each line, of those in its bits, that make the batch; the largest of the first lines first."""
    suffix = [1]
    for bits in reversed(lines):
        sums, rest = 0, suffix[-1]
        while rest:
            low = rest & -rest
            sums |= bits << (low.bit_length() - 1)
            rest ^= low
        suffix.append(sums & ((1 << (batch + 1)) - 1))
    suffix.reverse()
    if not suffix[0] >> batch & 1:
        return None
    found, left = [], batch
    for bits, after in zip(lines, suffix[1:], strict=True):
        total = next(t for t in range(left, -1, -1) if bits >> t & 1 and after >> (left - t) & 1)
        found.append(total)
        left -= total
    return tuple(found)
