"""Shortest paths through a chain whose runs of equal layers are crossed in powers of two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autopar.search.layerwise.chain import Chain, Floats, Ints

LONG_RUN = 128
"""Layers from which on doubling beats a step per layer."""


def runs(chain: Chain) -> list[tuple[int, int]]:
    """(first layer, layers) of each run of equal layers, in order."""
    starts = np.concatenate(([0], np.flatnonzero(~chain.like_next) + 1, [chain.num_layers]))
    return list(zip(starts[:-1].tolist(), np.diff(starts).tolist(), strict=True))


def shortest_path(
    chain: Chain, cost: Floats, extra: Mapping[int, Floats] | None = None, transition: Floats | None = None
) -> tuple[float, Ints]:
    """(length, nodes) of the shortest path; of equally short ones the lower strategy, from the last layer on.

    A run of n layers is crossed in about log n hops. A hop of 2^k arcs is the min-plus square of one of 2^(k-1), so
    the work grows with the logarithm of a run's length.

    Args:
        cost: of nodes, [layers, strategies], equal where layers are.
        extra: added to the transitions inside the run that starts at this layer, [strategies, strategies].
        transition: instead of the chain's, [layers - 1, strategies, strategies].
    """
    moves = chain.transition if transition is None else transition
    extra = extra or {}
    hops: list[tuple[Floats, list[Ints]]] = []
    last = 0
    for start, length in runs(chain):
        if start:
            hops.append((moves[start - 1] + cost[start], []))
        last = start
        if length == 1:
            continue
        single = moves[last] + cost[last] + extra.get(start, 0.0)
        hops.extend([(single, [])] * (length - 1) if length < LONG_RUN else _doubled(single, length - 1))
    reached = [cost[0]]
    for hop, _ in hops:
        reached.append((reached[-1][:, None] + hop).min(axis=0))
    node = int(reached[-1].argmin())
    value, pieces = float(reached[-1][node]), [np.asarray([node])]
    for (hop, middles), before in zip(reversed(hops), reversed(reached[:-1]), strict=True):
        previous = int((before + hop[:, node]).argmin())
        piece = np.asarray([previous, node])
        for middle in reversed(middles):
            unfolded = np.empty(2 * len(piece) - 1, dtype=np.int64)
            unfolded[::2], unfolded[1::2] = piece, middle[piece[:-1], piece[1:]]
            piece = unfolded
        pieces.append(piece[:-1])
        node = previous
    return value, np.concatenate(pieces[::-1])


def _doubled(single: Floats, arcs: int) -> list[tuple[Floats, list[Ints]]]:
    """Hops that add up to ``arcs`` arcs, each with the middle node of every halving, coarsest last."""
    found, hop, middles = [], single, list[Ints]()
    while arcs:
        if arcs & 1:
            found.append((hop, middles))
        arcs >>= 1
        if arcs:
            through = hop[:, None, :] + hop.T[None, :, :]
            middle = through.argmin(axis=2)
            hop = np.take_along_axis(through, middle[:, :, None], axis=2)[:, :, 0]
            middles = [*middles, middle]
    return found
