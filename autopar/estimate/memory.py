"""Bytes that each pipeline rank holds at its peak, by item, arrays [plans, ranks].

The peak of a step is one of two moments. At the first backward of the last microbatch to arrive all activations in
flight are held, and the gradients only if an earlier backward or a persistent bucket has made them. At the end of the
last backward the gradients are whole and one microbatch's activations are gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.estimate.arrays import PlanArrays
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork
from costmodels.memory import optimizer_bytes_per_parameter, sharded
from costmodels.pipeline import in_flight

ITEMS = ("parameters", "gradients", "optimizer", "activations", "working", "buffers", "reserve")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Items at the peak, arrays [plans, ranks] in bytes; their sum is the peak."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    working: Floats
    buffers: Floats
    reserve: Floats

    @property
    def total(self) -> Floats:
        """Peak of every rank."""
        return sum((getattr(self, item) for item in ITEMS), np.zeros_like(self.parameters))


def rank_memory(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> RankMemory:
    """Peak of every rank. ``num_microbatches`` is [plans]; the other arrays are [plans, ranks]."""
    stack, column = setting.stack, (slice(None), None)
    ranks = work.parameters.shape[1]
    zero, shards = plans.zero[column], plans.shards[column]
    m = num_microbatches[column]
    flight = in_flight(
        np.arange(ranks)[None, :], plans.pp[column], m, plans.vp[column], all_forward_first=plans.gpipe[column]
    )
    weights = work.parameters * setting.weight_bytes
    parameters = sharded(weights, zero, 3, shards)
    gradients = sharded(work.parameters * setting.gradient_bytes, zero, 2, shards)
    state = optimizer_bytes_per_parameter(setting.workload.optimizer.value, setting.weight_bytes, stack.master_weights)
    optimizer = sharded(work.parameters * state, zero, 1, shards)
    gathered = _gathered_bytes(setting, plans, work)

    replicated = (zero == 0) & (plans.replicas[column] > 1)
    early = (m > flight) | (replicated & stack.persistent_buckets)
    full = work.kept * flight + work.block_kept
    late = work.kept * np.maximum(flight - 1, 0.0)
    gradient_of_largest = work.largest * setting.gradient_bytes
    at_start = np.where(early, gradients, 0.0) + full + work.working
    at_end = gradients + late + gradient_of_largest
    first = at_start >= at_end
    chosen_gradients = np.where(first & ~early, 0.0, gradients)
    activations = np.where(first, full, late)
    working = np.where(first, work.working, gradient_of_largest)
    used = parameters + chosen_gradients + optimizer + activations + working + gathered
    return RankMemory(
        parameters=parameters,
        gradients=chosen_gradients,
        optimizer=optimizer,
        activations=activations,
        working=working,
        buffers=gathered,
        reserve=stack.reserve_bytes + stack.fragmentation * used,
    )


def _gathered_bytes(setting: Setting, plans: PlanArrays, work: RankWork) -> Floats:
    """Blocks' gathered parameters under ZeRO-3, and the gradients of one block before they are scattered."""
    zero = plans.zero[:, None]
    block = work.block_parameters * setting.weight_bytes
    gradient = work.block_parameters * setting.gradient_bytes
    sharded_axis = plans.shards[:, None] > 1
    some = block * setting.stack.gathered_blocks + gradient
    return np.where(sharded_axis & (zero == 3), some, np.where(sharded_axis & (zero == 2), gradient, 0.0))
