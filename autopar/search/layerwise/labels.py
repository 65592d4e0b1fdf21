"""The exact part: partial choices as labels (cost, memory), extended layer by layer from both ends until they meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autopar.search.layerwise.chain import Chain, Floats, Ints, mirrored
from autopar.search.layerwise.relaxation import PRICE_FACTORS, least_before


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A chain with what is known about completions of a partial choice.

    Attributes:
        chain: read in the direction of the labels.
        limit, slack: of the memory, and by how much rounding may exceed it.
        prices: of memory, [prices].
        after: least priced cost after a node, [prices, layers, strategies].
        lightest: least memory after a node, [layers, strategies]; inf where nothing follows.
        kind: nodes of equal number have equal transitions to the next layer, [layers, strategies].
    """

    chain: Chain
    limit: float
    slack: float
    prices: Floats
    after: Floats
    lightest: Floats
    kind: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Partial choices that end in some layer, [labels], sorted by kind of the node, then by memory.

    ``parent`` is the index of the label in the layer before that each extends.
    """

    cost: Floats
    memory: Floats
    node: Ints
    parent: Ints

    def __len__(self) -> int:
        return len(self.cost)

    def take(self, chosen: Ints) -> Labels:
        """Some of them."""
        return Labels(
            cost=self.cost[chosen], memory=self.memory[chosen], node=self.node[chosen], parent=self.parent[chosen]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What labels must be able to reach.

    Attributes:
        threshold: labels whose bound exceeds it are dropped. It sinks where more than ``width`` would stay.
        least: below which it does not sink.
        width: labels that a layer keeps.
        rounding: differences of cost up to this are none.
    """

    threshold: float
    least: float
    width: int
    rounding: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Result of one pass.

    Attributes:
        choice: the best full choice that was met, if any.
        proved: every choice that costs less than this was looked at; inf if nothing was left out for width.
        candidates: labels looked at.
    """

    choice: Ints | None
    proved: float
    candidates: int


def fields_of(chain: Chain, limit: float, slack: float, price: float) -> tuple[Field, Field]:
    """The chain from its start and from its end."""
    back = mirrored(chain)
    prices = price * np.asarray(PRICE_FACTORS)
    weights = np.where(np.isfinite(chain.time), chain.memory, np.inf)
    priced = chain.time + prices[:, None, None] * chain.memory
    shared = chain.transition.strides[0] == 0 if chain.num_layers > 1 else True
    open_moves = np.where(np.isfinite(chain.transition[:1] if shared else chain.transition), 0.0, np.inf)
    moves = np.broadcast_to(open_moves, chain.transition.shape)

    def field(one: Chain, costs: Floats, bytes_: Floats, to_here: Floats) -> Field:
        """``costs`` and ``bytes_`` read against the direction of ``one``, as are the moves ``to_here``."""
        after = least_before(costs, mirrored(one).transition)[..., ::-1, :]
        lightest = least_before(bytes_, to_here)[::-1]
        return Field(
            chain=one, limit=limit, slack=slack, prices=prices, after=after, lightest=lightest, kind=_kinds(one, shared)
        )

    ahead = field(chain, priced[:, ::-1], weights[::-1], moves[::-1].transpose(0, 2, 1))
    return ahead, field(back, priced, weights, moves)


def _kinds(chain: Chain, shared: bool) -> Ints:
    kinds = np.zeros(chain.time.shape, dtype=np.int64)
    if chain.num_layers > 1:
        tables = chain.transition[:1] if shared else chain.transition
        rows = [np.unique(table, axis=0, return_inverse=True)[1].reshape(-1) for table in tables]
        kinds[:-1] = np.stack(rows)
    return kinds


def sweep(ahead: Field, back: Field, goal: Goal) -> Sweep:
    """Extend labels from both ends, the shorter list first, and join them where they meet."""
    last = ahead.chain.num_layers - 1
    fields, threshold, candidates = (ahead, back), goal.threshold, 0
    trails: tuple[list[Labels], list[Labels]] = ([], [])
    for field, trail in zip(fields, trails, strict=True):
        nodes = np.argsort(field.kind[0], kind="stable")
        start = Labels(cost=field.chain.time[0][nodes], memory=field.chain.memory[0][nodes], node=nodes, parent=nodes)
        kept, threshold = _settle(field, start, 0, goal, threshold)
        trail.append(kept)
    while len(trails[0]) + len(trails[1]) <= last:
        side = int(len(trails[0][-1]) > len(trails[1][-1]))
        trail, layer = trails[side], len(trails[side]) - 1
        found = _extend(fields[side], trail[-1], layer, threshold)
        candidates += len(found)
        kept, threshold = _settle(fields[side], found, layer + 1, goal, threshold)
        trail.append(kept)
    ends = _join(ahead, back, trails[0][-1], trails[1][-1], len(trails[0]) - 1)
    proved = threshold - 2 * goal.rounding if threshold < goal.threshold else np.inf
    if ends is None:
        return Sweep(choice=None, proved=proved, candidates=candidates)
    choice = np.concatenate([_follow(trails[0], ends[0])[::-1], _follow(trails[1], ends[1])])
    return Sweep(choice=choice, proved=proved, candidates=candidates)


def _extend(field: Field, labels: Labels, layer: int, threshold: float) -> Labels:
    """All extensions to the next layer whose bound at the first price is within the threshold, grouped by kind."""
    chain, price = field.chain, field.prices[0]
    step = chain.transition[layer] + chain.time[layer + 1]
    toll = step + price * chain.memory[layer + 1] + field.after[0, layer + 1]
    room = threshold + price * field.limit - labels.cost - price * labels.memory
    order = np.argsort(field.kind[layer + 1], kind="stable")
    row, parent = np.nonzero(toll.T[order][:, labels.node] <= room)
    node = order[row]
    return Labels(
        cost=labels.cost[parent] + step[labels.node[parent], node],
        memory=labels.memory[parent] + chain.memory[layer + 1, node],
        node=node,
        parent=parent,
    )


def _settle(field: Field, labels: Labels, layer: int, goal: Goal, threshold: float) -> tuple[Labels, float]:
    """Drop labels that cannot fit, cannot be within the threshold, or are dominated; then those beyond the width."""
    chosen = np.flatnonzero(labels.memory + field.lightest[layer, labels.node] <= field.limit + field.slack)
    labels = labels.take(chosen)
    bound = np.full(len(labels), -np.inf)
    for price, after in zip(field.prices, field.after[:, layer], strict=True):
        ahead = after[labels.node] + price * (labels.memory - field.limit)
        bound = np.maximum(bound, labels.cost + ahead)
        within = bound <= threshold
        if not within.all():
            chosen = np.flatnonzero(within)
            labels, bound = labels.take(chosen), bound[chosen]
    for width, thin in ((4 * goal.width, False), (goal.width, True)):
        if thin:
            chosen = _undominated(field, labels, layer, goal.rounding / (4 * field.chain.num_layers))
            labels, bound = labels.take(chosen), bound[chosen]
        if len(labels) > width:
            chosen = _lowest(bound, width, goal.rounding)
            labels, bound = labels.take(chosen), bound[chosen]
            threshold = min(threshold, max(float(bound.max()), goal.least))
    return labels, threshold


def _lowest(bound: Floats, width: int, rounding: float) -> Ints:
    """The ``width`` labels of lowest bound in their order; of equal ones some from everywhere."""
    edge = np.partition(bound, width - 1)[width - 1]
    below = np.flatnonzero(bound < edge - rounding)
    equal = np.flatnonzero(np.abs(bound - edge) <= rounding)
    spread = np.linspace(0, len(equal) - 1, width - len(below)).astype(np.int64)
    return np.sort(np.concatenate([below, equal[spread]]))


def _undominated(field: Field, labels: Labels, layer: int, rounding: float) -> Ints:
    """Labels that no other of their kind beats in both cost and memory; the first of equal ones. Sorted by memory."""
    if not len(labels):
        return np.empty(0, dtype=np.int64)
    kinds = field.kind[layer, labels.node]
    ends = np.concatenate(([0], np.flatnonzero(np.diff(kinds)) + 1, [len(labels)])).tolist()
    cell = field.slack / (4 * field.chain.num_layers)
    kept = []
    for start, end in pairwise(ends):
        order = np.argsort(labels.memory[start:end], kind="stable")
        cost = labels.cost[start:end][order]
        better = np.empty(len(order), dtype=np.bool_)
        better[0], better[1:] = True, cost[1:] < np.minimum.accumulate(cost)[:-1] - rounding
        order = order[better]
        memory = labels.memory[start:end][order]
        # Sums that differ by rounding alone are one: the last of them is the cheapest.
        cells = np.round(memory / cell) if cell else memory
        kept.append(start + order[np.append(cells[1:] > cells[:-1], True)])
    return np.concatenate(kept)


def _join(ahead: Field, back: Field, left: Labels, right: Labels, layer: int) -> tuple[int, int] | None:
    """The cheapest pair of labels, one ending in ``layer`` and one beginning in the next, that fits together."""
    if not (len(left) and len(right)):
        return None
    order = np.argsort(left.memory, kind="stable")
    memory, cost = left.memory[order], left.cost[order]
    moves = ahead.chain.transition[layer][left.node[order]]
    kinds = back.kind[back.chain.num_layers - 2 - layer, right.node]
    best, pair = np.inf, None
    for kind in np.unique(kinds):
        ends = np.flatnonzero(kinds == kind)
        reached = cost + moves[:, right.node[ends[0]]]
        least = np.minimum.accumulate(reached)
        fits = np.searchsorted(memory, ahead.limit + ahead.slack - right.memory[ends], side="right") - 1
        total = np.where(fits >= 0, right.cost[ends] + least[np.maximum(fits, 0)], np.inf)
        chosen = int(total.argmin())
        if total[chosen] < best:
            best = float(total[chosen])
            pair = int(order[np.argmin(reached[: fits[chosen] + 1])]), int(ends[chosen])
    return pair


def _follow(trail: list[Labels], label: int) -> Ints:
    """Nodes of a label from its end back to where it started."""
    nodes = []
    for labels in reversed(trail):
        nodes.append(int(labels.node[label]))
        label = int(labels.parent[label])
    return np.asarray(nodes, dtype=np.int64)
