"""The order of samples: a permutation of any size that is computed where it is needed and never stored."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.uint64]
ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def permuted(indices: npt.ArrayLike, size: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of ``range(size)`` sends indices.

    A Feistel network over the smallest even number of bits that holds ``size`` (Luby and Rackoff 1988), walked on
    from values outside until it is inside (Black and Rogaway 2002): one permutation per seed and epoch, no memory.

    Args:
        indices: in ``range(size)``, of any shape.
        size: length of the permutation.
        seed: of the run.
        epoch: another permutation for each.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = _keys(seed, epoch)
    found = np.array(indices, dtype=np.uint64, ndmin=1)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        found[outside] = _feistel(found[outside], half, keys)
        outside = found >= size
    return found.astype(np.int64).reshape(np.shape(indices))


def _keys(seed: int, epoch: int) -> Indices:
    digest = hashlib.sha512(f"order {seed} {epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:ROUNDS].astype(np.uint64)


def _feistel(values: Indices, half: np.uint64, keys: Indices) -> Indices:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(values: Indices) -> Indices:
    """The finalizer of splitmix64 (Steele et al. 2014)."""
    for shift, factor in zip((30, 27), _MULTIPLIERS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))
