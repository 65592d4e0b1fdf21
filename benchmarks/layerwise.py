"""CPU seconds of the layer-wise core by family and size: ``python benchmarks/layerwise.py [--quick]``.

Each row is the mean and the largest of a few instances (seed and tightness of the limit). ``gap`` is how far the proved
bound lies below the cost, relative; 0 is a proved optimum. The last table holds 1,000 equal layers against 80.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

from autopar.search.layerwise import solve

Instance = tuple[np.ndarray, np.ndarray, np.ndarray, float]
SIZES = ((32, 22), (80, 40))
FAMILIES = ("uncorrelated", "trade-off", "weakly correlated", "strongly correlated", "integers")
MOVES = ("none", "dense", "metric")
TIGHTNESS = (0.1, 0.5, 0.9)


def strategies(family: str, layers: int, number: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times and memories, [layers, strategies] each."""
    memory = random.random((layers, number))
    noise = random.random((layers, number))
    if family == "integers":
        return np.floor(1 + 99 * noise), np.floor(1 + 99 * memory)
    times = {
        "uncorrelated": noise, "trade-off": (0.8 + 0.4 * noise) / (memory + 0.1),
        "weakly correlated": 1 - memory + 0.2 * noise, "strongly correlated": 1 - memory + 0.01 * noise,
    }  # fmt: skip
    return times[family], memory


def transitions(kind: str, number: int, scale: float, random: np.random.Generator) -> np.ndarray:
    """Cost between neighbours, [strategies, strategies]."""
    if kind == "metric":
        points = random.random((number, 2))
        return scale * np.abs(points[:, None] - points).sum(axis=2)
    return scale * random.random((number, number)) * (kind == "dense")


def instances(family: str, moves: str, layers: int, number: int, *, alike: bool, seeds: int) -> Iterator[Instance]:
    """Times, memories, transitions and limit of each."""
    for seed in range(seeds):
        for tightness in TIGHTNESS:
            random = np.random.default_rng(seed)
            seconds, memory = strategies(family, 1 if alike else layers, number, random)
            table = transitions(moves, number, 0.1 * float(seconds.mean()), random)
            if alike:
                seconds, memory = (np.repeat(array, layers, axis=0) for array in (seconds, memory))
            least = memory.min(axis=1).sum()
            fastest = memory[np.arange(layers), seconds.argmin(axis=1)].sum()
            yield seconds, memory, table, float(least + tightness * (fastest - least) - 1e-4 * alike)


def measure(
    family: str, moves: str, layers: int, number: int, *, alike: bool, seeds: int
) -> tuple[float, float, float]:
    """Mean and largest CPU seconds, and the largest gap."""
    spent, gaps = [], []
    for instance in instances(family, moves, layers, number, alike=alike, seeds=seeds):
        start = time.process_time()
        found = solve(*instance)
        spent.append(time.process_time() - start)
        gaps.append((found.cost - found.bound) / abs(found.cost))
    return float(np.mean(spent)), max(spent), max(gaps)


def main(seeds: int) -> None:
    """Print both tables."""
    print(f"{'layers':>12}  {'family':20} {'moves':8} {'mean s':>8} {'max s':>8} {'gap':>8}")
    for layers, number in SIZES:
        for family in FAMILIES:
            for moves in MOVES:
                mean, most, gap = measure(family, moves, layers, number, alike=False, seeds=seeds)
                print(
                    f"{layers:>6} x {number:<3}  {family:20} {moves:8} {mean:8.3f} {most:8.3f} {gap:8.1e}", flush=True
                )
    print(f"\n{'equal layers':34} {'80: s':>8} {'1000: s':>8} {'ratio':>6} {'gap':>8}")
    for family in ("uncorrelated", "trade-off", "weakly correlated", "integers"):
        for moves in MOVES:
            short, _, _ = measure(family, moves, 80, 40, alike=True, seeds=seeds)
            long, _, gap = measure(family, moves, 1000, 40, alike=True, seeds=seeds)
            print(f"{family:25} {moves:8} {short:8.3f} {long:8.3f} {long / short:6.1f} {gap:8.1e}", flush=True)


if __name__ == "__main__":
    main(1 if "--quick" in sys.argv[1:] else 3)
