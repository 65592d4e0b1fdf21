"""Bytes that training holds per parameter and how sharding divides them. Arrays broadcast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

MASTER_BYTES = 4.0


def optimizer_bytes_per_parameter(
    optimizer: str,
    itemsize: float,
    master_weights: bool,
    *,
    master_bytes: float = MASTER_BYTES,
    moment_bytes: float = MASTER_BYTES,
) -> float:
    """State beside weight and gradient: Adam's two moments, and an fp32 master copy where weights are 2 bytes wide.

    With master weights the moments are fp32: 8 + 4 bytes, K = 12 of Rajbhandari et al. 2020 (ZeRO), section 3; an
    optimizer that knows narrower types keeps 2 ``moment_bytes`` + ``master_bytes``. Without master weights, moments
    have the weights' type. SGD without momentum keeps nothing but the master copy.
    """
    mixed = master_weights and itemsize < MASTER_BYTES
    moment = moment_bytes if mixed else itemsize
    return (2 * moment if optimizer == "adamw" else 0.0) + (master_bytes if mixed else 0.0)


def sharded(num_bytes: ArrayLike, stage: ArrayLike, from_stage: int, num_shards: ArrayLike) -> Any:
    """Bytes left on a rank when ZeRO ``stage`` is at least ``from_stage`` (1 optimizer, 2 gradients, 3 parameters)."""
    n = np.where(np.asarray(stage) >= from_stage, np.asarray(num_shards, dtype=float), 1.0)
    return np.asarray(num_bytes, dtype=float) / n
