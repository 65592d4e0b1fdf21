"""Fits ``specs/memory_bands.toml``: how far the memory of left-out runs lay from its prediction, in spreads of its
items (``costmodels.memory_bands``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.validate.bands import FEWEST, SHARE, quantiles
from costmodels.memory_bands import MemoryBands, MemoryRule, item_bands, load_memory_bands, widths

Floats = NDArray[np.float64]

COUNTED = 0.005
"""Half width of what is counted: padding, alignment, small weights that the graph leaves out."""

COUNTED_UNKNOWN = 0.05
"""The same for engines of which nobody knows the types of gradients and states."""

NARROWEST = 0.5
"""Spreads that a modelled item keeps however well left-out runs were met."""

UNKNOWN_WIDER = 1.2
"""Widening for engines that nothing was fitted on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRow:
    """One measured run.

    Attributes:
        stack: engine, with variants or without.
        items: predicted bytes by name.
        measured: bytes.
        model_out, source_out: predicted bytes without the model, or the source, in the fit.
        model, source: keys of what was left out.
    """

    stack: str
    items: Mapping[str, float]
    measured: float
    model_out: float
    source_out: float
    model: str = ""
    source: str = ""


def score(row: MemoryRow, predicted: float, bands: MemoryBands, counted: float = COUNTED) -> float:
    """Error in spreads beyond what counting allows: sign(e) sqrt(max(e^2 - C^2, 0)) / S, e = measured - predicted."""
    error = row.measured - predicted
    allowed, spread = widths(row.items, bands, counted)
    beyond = math.sqrt(max(error**2 - allowed**2, 0.0))
    return math.copysign(beyond / spread, error) if spread else 0.0


def fit_memory_bands(rows: Sequence[MemoryRow], bands: MemoryBands | None = None) -> MemoryBands:
    """Rules by engine where at least FEWEST runs were left out; of the other engines that were fitted; of all others.

    Spreads are those of ``bands``, the shipped ones by default.
    """
    shape = bands or load_memory_bands()
    by_stack: dict[str, list[float]] = {}
    for row in rows:
        by_stack.setdefault(row.stack.split("+")[0], []).append(score(row, row.model_out, shape))
    rules = [
        _rule(quantiles(np.asarray(scores)), len(scores), f"published runs: model left out, {stack}", stacks=(stack,))
        for stack, scores in by_stack.items()
        if len(scores) >= FEWEST
    ]
    few = tuple(stack for stack, scores in by_stack.items() if len(scores) < FEWEST)
    sources = [row.source for row in rows]
    if few:
        everything = [score(row, row.model_out, shape) for row in rows]
        origin = "published runs: model left out, all engines, every source alike"
        rules.append(_rule(fair_quantiles(everything, sources), len(rows), origin, stacks=few))
    unseen = [score(row, row.source_out, shape, COUNTED_UNKNOWN) for row in rows]
    low, high = fair_quantiles(unseen, sources)
    origin = "published runs: source left out, every source alike, widened by a fifth"
    interval = (UNKNOWN_WIDER * low, UNKNOWN_WIDER * high)
    rules.append(_rule(interval, len(rows), origin, counted=COUNTED_UNKNOWN))
    return replace(shape, rule=tuple(rules))


def fair_quantiles(scores: Sequence[float], sources: Sequence[str]) -> tuple[float, float]:
    """Interval that holds SHARE of scores where every source weighs the same, 0 included."""
    order = np.argsort(scores)
    counts = Counter(sources)
    weight = np.asarray([1.0 / counts[sources[i]] for i in order])
    below = np.cumsum(weight) / weight.sum()
    tail = (1 - SHARE) / 2
    low = scores[order[int(np.searchsorted(below, tail))]]
    high = scores[order[min(int(np.searchsorted(below, 1 - tail)), len(order) - 1)]]
    return min(float(low), 0.0), max(float(high), 0.0)


def _rule(
    interval: tuple[float, float], rows: int, origin: str, *, stacks: tuple[str, ...] = (), counted: float = COUNTED
) -> MemoryRule:
    low, high = interval
    return MemoryRule(
        stacks=stacks, counted=counted, low=round(max(-low, NARROWEST), 3),
        high=round(max(high, NARROWEST), 3), rows=rows, origin=origin,
    )  # fmt: skip


def memory_coverage(rows: Sequence[MemoryRow], bands: MemoryBands | None = None) -> float:
    """Share of left-out runs inside the band of their peak, each in bands made without its model."""
    inside = []
    for model in dict.fromkeys(row.model for row in rows):
        others = [row for row in rows if row.model != model]
        if not others:
            continue
        made = fit_memory_bands(others, bands)
        for row in (row for row in rows if row.model == model):
            band = item_bands(row.items, row.stack, made)["total"]
            shift = row.model_out - sum(row.items.values())
            inside.append(band.low + shift <= row.measured <= band.high + shift)
    return float(np.mean(inside)) if inside else float("nan")


def memory_bands_toml(bands: MemoryBands) -> str:
    """The file's text."""
    lines = [
        "# Intervals of predicted memory that hold four of five left-out runs; see costmodels/memory_bands.py.",
        "# Rules are written by `autopar validate --report DIR --ship-bands`; the first that matches applies.",
        "", "# Uncertainty of a modelled item against that of others, as a share of it; items not named are counted.",
        "[spread]", *(f"{name} = {value}" for name, value in bands.spread.items()),
        "", "[origins]", *(f'{name} = "{origin}"' for name, origin in bands.origins.items()),
    ]  # fmt: skip
    for rule in bands.rule:
        lines += ["", "[[rule]]"]
        if rule.stacks:
            lines.append(f"stacks = [{', '.join(repr(stack).replace(chr(39), chr(34)) for stack in rule.stacks)}]")
        lines += [f"counted = {rule.counted}", f"low = {rule.low}", f"high = {rule.high}", f"rows = {rule.rows}"]
        lines.append(f'origin = "{rule.origin}"')
    return "\n".join(lines) + "\n"
