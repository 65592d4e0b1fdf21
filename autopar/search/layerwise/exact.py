"""From the relaxed bound to the optimum: passes of labels that widen until bound and choice meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.search.layerwise.chain import ROUNDING, Chain, grid
from autopar.search.layerwise.labels import Goal, fields_of, sweep
from autopar.search.layerwise.relaxation import Path, Relaxation, nearby_path, path_of

FIRST_WIDTH, WIDENING = 500, 4
TABLE_CELLS = 6_000_000
"""Labels times strategies that one step may look at together: what bounds the memory of a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A path, a bound that no path within the limit falls below, and the labels that it took."""

    path: Path
    bound: float
    states: int


def close_gap(chain: Chain, limit: float, slack: float, relaxation: Relaxation, effort: int) -> Solution:
    """Find the optimum, or the best found when ``effort`` labels do not prove it.

    A pass looks for choices below the incumbent. Its threshold sinks where labels grow too many, and all choices below
    what it sank to were looked at: the pass proves that much even if it finds nothing.
    """
    best, bound, states = relaxation.light, relaxation.bound, 0
    rounding = ROUNDING * chain.magnitude(best.choice)[0]
    if best.cost - bound <= 2 * rounding:
        return Solution(path=best, bound=best.cost, states=0)
    if chain.num_layers == 1:
        costs = np.where(chain.memory[0] <= limit + slack, chain.time[0], np.inf)
        best = path_of(chain, np.asarray([costs.argmin()]))
        return Solution(path=best, bound=best.cost, states=chain.num_strategies)
    ahead, back = fields_of(chain, limit, slack, relaxation.price)
    near = nearby_path(chain, relaxation.price, back.after[0, ::-1], ahead.after[0], limit + slack)
    best = near if near is not None and near.cost < best.cost else best
    rounding = ROUNDING * chain.magnitude(best.choice)[0]
    step, width = grid(chain.time, chain.transition), FIRST_WIDTH
    widest = max(FIRST_WIDTH, TABLE_CELLS // chain.num_strategies)
    while best.cost - bound > 2 * rounding:
        threshold = best.cost - max(rounding, step - rounding)
        if threshold < bound:
            break
        goal = Goal(threshold=threshold, least=bound + rounding, width=width, rounding=rounding)
        found = sweep(ahead, back, goal)
        states += found.candidates
        if found.choice is not None:
            path = path_of(chain, found.choice)
            best = path if path.cost < best.cost else best
        bound = max(bound, min(found.proved, best.cost))
        if width >= widest or (found.proved < np.inf and states + WIDENING * found.candidates > effort):
            break
        width = min(WIDENING * width, widest)
    proved = best.cost - bound <= 2 * rounding or best.cost - max(rounding, step - rounding) < bound
    return Solution(path=best, bound=best.cost if proved else bound, states=states)
