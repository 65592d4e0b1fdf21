"""A chain of layers, each with its strategies: their seconds, their bytes, and what neighbours cost each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopar.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDING = 1e-12
"""Relative difference below which two sums of floats count as equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Layers in order.

    Attributes:
        time: cost of a strategy, [layers, strategies]; inf forbids it.
        memory: likewise; finite wherever time is.
        transition: cost of strategy a in a layer and b in the next, [layers - 1, strategies, strategies].
        like_next: the layer after has equal arrays, [layers - 1]; a run of such layers shares its transitions too.
    """

    time: Floats
    memory: Floats
    transition: Floats
    like_next: NDArray[np.bool_]

    @property
    def num_layers(self) -> int:
        """Layers of the chain."""
        return len(self.time)

    @property
    def num_strategies(self) -> int:
        """Strategies of every layer."""
        return int(self.time.shape[1])

    def totals(self, choice: Ints) -> tuple[float, float]:
        """(cost, memory) of one strategy per layer, each the correctly rounded sum."""
        layers = np.arange(self.num_layers)
        moves = self.transition[layers[:-1], choice[:-1], choice[1:]]
        cost = math.fsum((*self.time[layers, choice].tolist(), *moves.tolist()))
        return cost, math.fsum(self.memory[layers, choice].tolist())

    def magnitude(self, choice: Ints) -> tuple[float, float]:
        """Like ``totals`` of absolute values: what rounding errors are measured against."""
        layers = np.arange(self.num_layers)
        moves = self.transition[layers[:-1], choice[:-1], choice[1:]]
        cost = np.abs(self.time[layers, choice]).sum() + np.abs(moves).sum()
        return float(cost), float(np.abs(self.memory[layers, choice]).sum())


def chain_of(time: ArrayLike, memory: ArrayLike, transition: ArrayLike) -> Chain:
    """Check arrays and make a chain of them. Raises InputError."""
    times, bytes_, moves = (np.asarray(array, dtype=np.float64) for array in (time, memory, transition))
    if times.ndim != 2 or 0 in times.shape:
        raise InputError(f"layerwise: time has shape {times.shape}; it is [layers, strategies], one of each or more")
    layers, strategies = times.shape
    if bytes_.shape != times.shape:
        raise InputError(f"layerwise: memory has shape {bytes_.shape}, time {times.shape}; they must be equal")
    if moves.shape not in ((strategies, strategies), (layers - 1, strategies, strategies)):
        raise InputError(
            f"layerwise: transition has shape {moves.shape}; it is [{strategies}, {strategies}] or "
            f"[{layers - 1}, {strategies}, {strategies}]"
        )
    for name, array in (("time", times), ("memory", bytes_), ("transition", moves)):
        if np.isnan(array).any() or np.isneginf(array).any():
            raise InputError(f"layerwise: {name} contains nan or -inf; use inf for what is forbidden")
    shared = moves.ndim == 2
    if shared:
        moves = np.broadcast_to(moves, (layers - 1, strategies, strategies))
    allowed = np.isfinite(times) & np.isfinite(bytes_)
    times, bytes_ = np.where(allowed, times, np.inf), np.where(allowed, bytes_, 0.0)
    like_next = (times[1:] == times[:-1]).all(axis=1) & (bytes_[1:] == bytes_[:-1]).all(axis=1)
    if not shared and layers > 2:
        like_next[1:] &= (moves[1:] == moves[:-1]).all(axis=(1, 2)) | ~like_next[:-1]
    return Chain(time=times, memory=bytes_, transition=moves, like_next=like_next)


def without_layers(chain: Chain, kept: NDArray[np.bool_]) -> Chain:
    """The chain without some layers, of each run of equal ones the last few: ``kept`` is [layers]."""
    arrived = np.flatnonzero(kept)[1:] - 1
    shared = chain.transition.strides[0] == 0
    moves = np.broadcast_to(chain.transition[0], (len(arrived), *chain.transition.shape[1:]))
    return Chain(
        time=chain.time[kept], memory=chain.memory[kept], like_next=chain.like_next[arrived],
        transition=moves if shared else chain.transition[arrived],
    )  # fmt: skip


def mirrored(chain: Chain) -> Chain:
    """The same chain read from its end."""
    return Chain(
        time=chain.time[::-1], memory=chain.memory[::-1], transition=chain.transition[::-1].transpose(0, 2, 1),
        like_next=chain.like_next[::-1],
    )  # fmt: skip


def grid(*arrays: Floats) -> int:
    """The largest integer of which every finite number is a multiple; 0 where some is no integer."""
    divisor: int = 0
    for array in arrays:
        finite = array[np.isfinite(array)]
        if (finite != np.floor(finite)).any() or np.abs(finite).max(initial=0.0) > 2.0**53:
            return 0
        divisor = math.gcd(divisor, int(np.gcd.reduce(finite.astype(np.int64), initial=0)))
    return int(divisor)
