"""What a training engine does on top of the hardware: kernels, host, overlap, sharding habits, buffers.

A Stack is data (``specs/stacks/*.toml``). Estimates name the stack that they assume, since the same plan costs
differently under different engines. A stack may stand on another one (``base``) and state only what differs, and has
named variants, settings that its users turn on or off: ``megatron-bridge+cuda-graph-full+a2a-overlap``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from costmodels.errors import InputError, nearest
from costmodels.records import from_plain
from costmodels.shipped import merged, read_shipped, shipped_names
from costmodels.units import MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """How operations execute on a device.

    Attributes:
        attention: fused attention kernels by preference, the first that the device knows is used; ``unfused`` for
            two batched products; empty for what the device's own profile measured.
        fused_softmax: unfused attention scales, masks and normalises in one kernel.
        softmax_heads: that kernel takes only a number of (sequences x heads) that this divides.
        matmul_rate: level of matrix products relative to the device's.
        stream_rate: level of memory-bound operations relative to the device's.
        attention_rate: level of attention relative to the device's.
        traffic: bytes that a kind of operation moves, relative to one fused kernel, by kind.
        quantize_bytes: moved per element that is cast to a narrower type before a product.
        fused_accumulation: weight gradients are added to their sum by the product that makes them.
        fused_projections: products of one input with several weights (queries, keys, values; gate and up) are one.
        recompute_stops_early: recomputing a block leaves out its last product, whose result backward does not need.
    """

    attention: tuple[str, ...] = ()
    fused_softmax: bool = True
    softmax_heads: int = 1
    matmul_rate: float = 1.0
    stream_rate: float = 1.0
    attention_rate: float = 1.0
    traffic: Mapping[str, float] = field(default_factory=dict)
    quantize_bytes: float = 5.0
    fused_accumulation: bool = False
    fused_projections: bool = False
    recompute_stops_early: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The processor that launches kernels: a pass takes (device^q + host^q)^(1/q).

    Attributes:
        launch_seconds: of an operation's forward; backward takes twice that.
        calls: launches of a kind of operation, relative to one; ``collective`` for tensor parallel ones,
            ``permute tensor parallel`` for what dispatching adds under tensor parallelism, ``plain softmax`` for what
            unfused attention adds where its fused softmax does not fit.
        graphed: share of launches that CUDA graphs save.
        exponent: q; 1 where launches block the device, large where they run ahead.
        step_seconds: per step, beside everything else.
        waits_for_blocks: launches run ahead within a block only, not over a whole pass.
    """

    launch_seconds: float = 0.0
    calls: Mapping[str, float] = field(default_factory=dict)
    graphed: float = 0.0
    exponent: float = 4.0
    step_seconds: float = 0.0
    waits_for_blocks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHabits:
    """Tensor and sequence parallel habits.

    Attributes:
        exposed: share of communication that is not hidden; above 1 where it runs slower than alone.
        vocab_parallel: embedding and head are divided.
        pads_vocab: the head computes a multiple of 128 rows on each rank.
        keeps_gathered: under sequence parallelism a column product keeps its gathered input, not its shard.
        sequence_copies: tensors of the whole sequence alive around a gather or scatter along it.
        recompute_reduces_last: recomputing a block reduces the result of its last product again, which nobody needs.
    """

    exposed: float = 1.0
    vocab_parallel: bool = True
    pads_vocab: bool = False
    keeps_gathered: bool = False
    sequence_copies: float = 3.0
    recompute_reduces_last: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextHabits:
    """Context parallel habits.

    Attributes:
        exposed: share of the exchange of keys and values that attention does not hide.
        copies: of queries, keys and values that attention keeps beside its inputs.
        recompute_gathers: where attention is recomputed, its backward gathers keys and values beside that once more.
    """

    exposed: float = 1.0
    copies: float = 0.0
    recompute_gathers: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHabits:
    """Expert parallel habits.

    Attributes:
        exposed: share of all-to-all time that is not hidden.
        deduplicates: a token goes to a node once, however many of its experts are there.
        bandwidth_share, network_share: of the links in a node and between nodes, that dispatch and combine reach,
            relative to large collectives.
        dispatch_bytes: per element of a dispatched token; 0 means as activations are.
        shares: what ranks that divide an expert do with the rows of each other: ``gather`` them and scatter the
            results, or hand all to each by ``all_to_all``.
    """

    exposed: float = 1.0
    deduplicates: bool = False
    bandwidth_share: float = 1.0
    network_share: float = 1.0
    dispatch_bytes: float = 2.0
    shares: str = "gather"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataHabits:
    """Data parallel habits: replicated and sharded.

    Attributes:
        gradient_bytes: of a kept gradient element under 2-byte types.
        reduce_bytes: of a gradient element in data parallel reduction under 2-byte types.
        gather_bytes: of a weight element in a gather; 0 means as weights are.
        master_weights: the optimizer keeps an fp32 copy of 2-byte weights and fp32 moments.
        master_bytes: of an element of that copy; 2 where only what the 2-byte weight lacks is kept.
        moment_bytes: of an element of each moment beside it.
        quantized_weights: under FP8 the weights of the blocks are kept in 1 byte.
        shards_fp32: ZeRO-3 keeps its shards in fp32 and casts what it gathers.
        casts_weights: so do all stages: weights are the fp32 master copy, and 2-byte copies of them last from a step's
            first pass to its last.
        bucketed_overlap: unsharded data parallel gradients are reduced in buckets during the last backward.
        overlap_single_stage: only where there is no pipeline.
        bucket_bytes, first_bucket_bytes: of those buckets.
        persistent_gradients: gradients lie in buffers that stay between steps; else they come with each backward, and
            where replicated ones are reduced in buckets, the buckets stay beside them.
        copies_buffers: gradients and gathered weights are copied to and from the buffers that are sent.
        shard_hidden, shard_leak: how sharded communication hides behind compute (see overlap).
        replicated_leak: share of a hidden replicated reduction that still costs.
        accumulates_sharded: gradients to shard are scattered after every microbatch, not once a step.
        gathered_blocks: blocks whose gathered parameters exist at once under ZeRO-3.
        owner_seconds: per rank that shards, where each owner broadcasts its parameters one after another.
        shardable: ZeRO stages that the engine has.
        stage_one: ZeRO stage whose memory stage 1 takes: 2 where whole weights and gradients are let go as early.
    """

    gradient_bytes: float = 4.0
    reduce_bytes: float = 4.0
    gather_bytes: float = 0.0
    master_weights: bool = True
    master_bytes: float = 4.0
    moment_bytes: float = 4.0
    quantized_weights: bool = False
    shards_fp32: bool = False
    casts_weights: bool = False
    bucketed_overlap: bool = True
    overlap_single_stage: bool = False
    bucket_bytes: float = 25 * MIB
    first_bucket_bytes: float = 1 * MIB
    persistent_gradients: bool = False
    copies_buffers: bool = True
    shard_hidden: float = 0.0
    shard_leak: float = 0.0
    replicated_leak: float = 0.0
    accumulates_sharded: bool = False
    gathered_blocks: float = 2.0
    owner_seconds: float = 0.0
    shardable: tuple[int, ...] = (0, 1, 2, 3)
    stage_one: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineHabits:
    """Pipeline habits.

    Attributes:
        buffers: a stage has receive buffers for all microbatches and keeps its results until their backward.
        serial_stages: a stage's gathers and reductions happen within its passes, so that its neighbours wait for them.
        reduces_last: of such stages, those that reduce replicated gradients once the gradient of their input is on its
            way, so that the stage before need not wait for that.
        scatters: a stage sends 1/tp of an activation per rank, and the receivers gather it.
        node_share: share of the links inside a node that one transfer reaches: a send uses few of their channels.
        interleaved_exposed: share of transfers that interleaved stages wait for.
        balanced_ends: embedding and head count as a block each when blocks are divided over stages.
    """

    buffers: bool = True
    serial_stages: bool = True
    reduces_last: bool = False
    scatters: bool = False
    node_share: float = 1.0
    interleaved_exposed: float = 1.0
    balanced_ends: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryHabits:
    """What is held beside states and activations.

    Attributes:
        fused_activations: activation functions keep their inputs only, not what lies between them.
        quantized_inputs: products keep their inputs in the type in which they multiply.
        expert_outputs: experts' results are kept for the gradient of the routing weights; not where these are
            multiplied into the activation.
        op_level_recomputes: precisions whose products recomputation by operation does not know, so that it computes
            all of them again.
        working: temporary tensors of backward: of the largest ``operation``, or whole activations at the stage's
            ``boundary`` alone, where the engine frees and reuses everything else.
        loss_copies: logit-sized tensors (of the activations' type) alive in the loss's backward, beside what forward
            kept.
        loss_bytes: that the loss keeps per logit from forward to backward; 0 means what the graph says.
        loss_fp32: the loss computes in fp32: what it keeps and its copies have 4 bytes per logit.
        vocab_bytes: per element of the embedding and of the head.
        block_share: times that a block's activations are held again in its backward, as gradients and copies.
        step_bytes: per weight whose optimizer state is here, while the optimizer steps.
        step_stays: where nothing is sharded, these stay from step to step.
        workspace_bytes: of libraries, from the allocator.
        fragmentation: share of everything else that the allocator cannot use.
        reserve_bytes: context, communicators and libraries outside the allocator.
    """

    fused_activations: bool = False
    quantized_inputs: bool = False
    expert_outputs: bool = True
    op_level_recomputes: tuple[str, ...] = ()
    working: str = "operation"
    loss_copies: float = 2.0
    loss_bytes: float = 0.0
    loss_fp32: bool = False
    vocab_bytes: float = 0.0
    block_share: float = 0.0
    step_bytes: float = 0.0
    step_stays: bool = False
    workspace_bytes: float = 0.0
    fragmentation: float = 0.0
    reserve_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Offers:
    """Decisions that an engine leaves to its user: what a search may choose from. Words, never costs.

    Attributes:
        axes: of parallelism beside data parallelism: tp, cp, pp, ep.
        schedules: of pipelines; none where pp is not among the axes.
        selective: modules that selective recomputation may cover.
        partial_recompute: full recomputation may cover the first blocks of every virtual stage alone.
        uneven_ends: the first and the last virtual stage may have fewer blocks than the equal others.
        offload: optimizer state may lie in host memory.
        orders: of mesh axes on the machine, fastest first.
    """

    axes: tuple[str, ...] = ("tp", "cp", "pp", "ep")
    schedules: tuple[str, ...] = ("1f1b", "interleaved")
    selective: tuple[str, ...] = ("core_attn",)
    partial_recompute: bool = False
    uneven_ends: bool = False
    offload: bool = False
    orders: tuple[str, ...] = ("tp-cp-dp-pp",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Traits of one engine.

    Attributes:
        straggler: longer step per doubling of data parallel replicas on machines of their own, of eight devices or of
            as many as NVLink joins.
        algorithms: collective kind to algorithm, where it is not the ring (see costmodels.collectives).
        overheads: host seconds per call, by name, beside the device's op_overhead.
        origins: where numbers come from, by ``group.field``.
    """

    name: str
    description: str
    kernels: Kernels = field(default_factory=Kernels)
    host: Host = field(default_factory=Host)
    tensor: TensorHabits = field(default_factory=TensorHabits)
    context: ContextHabits = field(default_factory=ContextHabits)
    experts: ExpertHabits = field(default_factory=ExpertHabits)
    data: DataHabits = field(default_factory=DataHabits)
    pipeline: PipelineHabits = field(default_factory=PipelineHabits)
    memory: MemoryHabits = field(default_factory=MemoryHabits)
    offers: Offers = field(default_factory=Offers)
    straggler: float = 0.0
    algorithms: Mapping[str, str] = field(default_factory=dict)
    overheads: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


def stack_names() -> tuple[str, ...]:
    """Stacks that ship with the program."""
    return shipped_names("stacks")


def stack_variants(name: str) -> tuple[str, ...]:
    """Variants of a shipped stack, those of its bases included."""
    return tuple(sorted(_tables(name)[1]))


@cache
def load_stack(text: str) -> Stack:
    """Load ``NAME`` or ``NAME+VARIANT+...``; later variants win. Raises InputError with the nearest name."""
    name, *chosen = text.split("+")
    plain, variants = _tables(name)
    for variant in chosen:
        if variant not in variants:
            raise InputError(f"stack {name} has no variant '{variant}'{nearest(variant, variants)}")
        plain = merged(plain, variants[variant])
    return from_plain(Stack, {**plain, "name": text}, f"stack {text}")


def _tables(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stack's plain data and its variants, with what its bases say underneath."""
    found = dict(read_shipped("stacks", name))
    variants = found.pop("variants", {})
    base = found.pop("base", None)
    if base is None:
        return found, variants
    below, below_variants = _tables(base)
    return merged(below, found), merged(below_variants, variants)
