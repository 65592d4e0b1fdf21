"""What a training engine does on top of the hardware: overlap, sharding habits, buffers, algorithms.

A Stack is data (``specs/stacks/*.toml``). Estimates name the stack that they assume, since the same plan costs
differently under different engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from costmodels.shipped import load_shipped, shipped_names
from costmodels.units import MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Traits of one engine.

    Attributes:
        gradient_bytes: of a kept gradient element under fp16 and bf16 (fp32 runs keep 4).
        reduce_bytes: of a gradient element in data parallel reduction under fp16 and bf16.
        master_weights: the optimizer keeps an fp32 copy of 2-byte weights and fp32 moments.
        vocab_parallel: tensor parallelism divides embedding and head.
        keeps_gathered: under sequence parallelism a column product keeps its gathered input, not its shard.
        fused_accumulation: weight gradients are added to their sum by the product that makes them.
        bucketed_overlap: unsharded data parallel gradients are reduced in buckets during the last backward.
        bucket_bytes, first_bucket_bytes: of those buckets.
        persistent_gradients: gradients lie in buffers that stay between steps; else they come with each backward, and
            where replicated ones are reduced in buckets, the buckets stay beside them.
        copies_buffers: gradients and gathered weights are copied to and from the buffers that are sent.
        shard_hidden, shard_leak: how sharded data parallel communication hides behind compute (see overlap).
        tensor_exposed: share of tensor parallel communication that is not hidden.
        accumulates_sharded: gradients to shard are scattered after every microbatch, not once a step.
        pipeline_buffers: a stage has receive buffers for all microbatches and keeps its results until their backward.
        serial_stages: a stage's gathers and reductions happen within its passes, so that its neighbours wait for them.
        gathered_blocks: blocks whose gathered parameters exist at once under ZeRO-3.
        sequence_copies: tensors of the whole sequence alive around a gather or scatter along it.
        loss_copies: logit-sized tensors alive in the loss's backward, beside what forward kept.
        reserve_bytes: context, communicators and libraries.
        fragmentation: share of everything else that the allocator cannot use.
        shardable: ZeRO stages that the engine has.
        algorithms: collective kind to algorithm, where it is not the ring (see costmodels.collectives).
        overheads: host seconds per call, by name, beside the device's op_overhead.
        origins: where numbers come from.
    """

    name: str
    description: str
    gradient_bytes: float = 4.0
    reduce_bytes: float = 4.0
    master_weights: bool = True
    vocab_parallel: bool = True
    keeps_gathered: bool = False
    fused_accumulation: bool = False
    bucketed_overlap: bool = True
    bucket_bytes: float = 25 * MIB
    first_bucket_bytes: float = 1 * MIB
    persistent_gradients: bool = False
    accumulates_sharded: bool = False
    pipeline_buffers: bool = True
    serial_stages: bool = True
    copies_buffers: bool = True
    shard_hidden: float = 0.0
    shard_leak: float = 0.0
    tensor_exposed: float = 1.0
    gathered_blocks: float = 2.0
    sequence_copies: float = 3.0
    loss_copies: float = 2.0
    reserve_bytes: float = 0.0
    fragmentation: float = 0.0
    shardable: tuple[int, ...] = (0, 1, 2, 3)
    algorithms: Mapping[str, str] = field(default_factory=dict)
    overheads: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


def stack_names() -> tuple[str, ...]:
    """Stacks that ship with the program."""
    return shipped_names("stacks")


def load_stack(name: str) -> Stack:
    """Load a shipped stack by name. Raises InputError with the nearest name."""
    return load_shipped(Stack, "stacks", name)
