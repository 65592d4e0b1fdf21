"""Intervals of memory: between which sizes an item, and the peak, lay in four of five runs that no fit had seen.

Weights, gradients and optimizer state are counted, everything else is modelled. ``specs/memory_bands.toml`` holds how
uncertain one modelled item is against another, and by engine how far left-out runs spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from costmodels.records import from_plain, read_toml

TOTAL = "total"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBand:
    """An interval in bytes."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRule:
    """For the engines that match; without names for all.

    Attributes:
        stacks: engines, without their variants.
        counted: half width of a counted item, as a share of it.
        low, high: half widths of a modelled item in its spreads, below and above.
        rows: left-out runs behind them.
        origin: which.
    """

    counted: float
    low: float
    high: float
    rows: int
    origin: str
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBands:
    """Spreads of modelled items, as shares of them, and rules; the first rule that matches applies.

    Items without a spread are counted.
    """

    spread: Mapping[str, float]
    origins: Mapping[str, str]
    rule: tuple[MemoryRule, ...]

    def rule_of(self, stack: str) -> MemoryRule:
        """The rule of an engine, named with variants or without. The last rule is for all."""
        name = stack.split("+")[0]
        return next((rule for rule in self.rule if not rule.stacks or name in rule.stacks), self.rule[-1])


def memory_bands_file() -> Path:
    """The file that ships."""
    return Path(str(resources.files("costmodels"))) / "specs" / "memory_bands.toml"


@cache
def load_memory_bands(path: Path | None = None) -> MemoryBands:
    """Read spreads and rules, the shipped ones by default. Raises InputError."""
    where = path or memory_bands_file()
    return from_plain(MemoryBands, read_toml(where), str(where))


def widths(items: Mapping[str, float], bands: MemoryBands, counted: float) -> tuple[float, float]:
    """Half widths in bytes of all counted items together, and one spread of all modelled ones.

    C = sqrt(sum (c x_i)^2), S = sqrt(sum (s_i x_i)^2) with items x_i, share c and spreads s_i: errors of items are
    taken as independent.
    """
    counted_part = math.sqrt(sum((counted * size) ** 2 for name, size in items.items() if name not in bands.spread))
    modelled = math.sqrt(sum((bands.spread.get(name, 0.0) * size) ** 2 for name, size in items.items()))
    return counted_part, modelled


def item_bands(items: Mapping[str, float], stack: str, bands: MemoryBands | None = None) -> dict[str, MemoryBand]:
    """Interval of each item in bytes, and of their sum under ``total``.

    Item: x (1 -+ c) where counted, x - low s x to x + high s x where modelled. Sum: T - sqrt(C^2 + (low S)^2) to
    T + sqrt(C^2 + (high S)^2), see ``widths``.
    """
    known = bands or load_memory_bands()
    rule = known.rule_of(stack)

    def around(size: float, below: float, above: float) -> MemoryBand:
        return MemoryBand(low=max(size - below, 0.0), high=size + above)

    found = {}
    for name, size in items.items():
        spread = known.spread.get(name)
        low, high = (rule.counted, rule.counted) if spread is None else (rule.low * spread, rule.high * spread)
        found[name] = around(size, low * size, high * size)
    counted, modelled = widths(items, known, rule.counted)
    whole = sum(items.values())
    found[TOTAL] = around(whole, math.hypot(counted, rule.low * modelled), math.hypot(counted, rule.high * modelled))
    return found
