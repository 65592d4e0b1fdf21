"""What a profile of a machine holds: measured points and what was fitted to them; profile.json.

Seconds are medians over repeats; ``spread`` is the distance between their quartiles as a share of the median.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from costmodels.errors import InputError
from costmodels.records import read_record, write_record

PROFILE_SCHEMA = 1

PRODUCT_KINDS = ("matmul", "attention")
STREAM_KINDS = ("normalization", "activation", "elementwise", "embedding", "loss", "optimizer")
PHASES = ("forward", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputePoint:
    """One operation, measured on one rank while the others were idle.

    Attributes:
        kind: matmul, attention, or a memory-bound kind (``STREAM_KINDS``).
        phase: forward or backward; the backward of a matmul is both of its products.
        dims: matmul: m, n, k of the forward product. attention: batch, heads, seq, head_size (causal).
            normalization, elementwise: tokens, width. activation: tokens, width (of the inner layer). embedding:
            tokens, width, vocab. loss: tokens, vocab. optimizer: parameters.
        flops: 2mnk forward and 4mnk backward; attention as attention_seconds counts, half of the mask subtracted.
        num_bytes: traffic of a memory-bound operation, by the convention of ``stream_bytes``; 0 for products.
        seconds: median.
        spread: distance of the quartiles as a share of the median.
    """

    kind: str
    phase: str
    dims: Mapping[str, int]
    flops: float
    num_bytes: float
    seconds: float
    spread: float

    def __post_init__(self) -> None:
        if self.kind not in (*PRODUCT_KINDS, *STREAM_KINDS) or self.phase not in PHASES:
            raise InputError(f"a measured point of unknown kind '{self.kind}' or phase '{self.phase}'")
        if not self.seconds > 0:
            raise InputError(f"a measured {self.kind} took {self.seconds} seconds; it must be more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingPoint:
    """How much longer a rank computes when ``active`` ranks of its machine do so at once."""

    active: int
    slowdown: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectivePoint:
    """One collective; all groups of this size ran it at once, as in a mesh; the slowest rank counts.

    Attributes:
        num_bytes: of the whole tensor (all_reduce: what each rank holds; all_gather: the result; reduce_scatter and
            all_to_all: the input), or the message of a send.
        num_nodes: nodes that the group lies on.
    """

    kind: str
    group_size: int
    num_bytes: float
    seconds: float
    spread: float
    num_nodes: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants fitted to points, and how well they predict those points.

    Attributes:
        name: the kind of operation, with ``.backward`` for backward passes.
        constants: by name.
        num_points: that it was fitted on.
        median_error, worst_error: relative, |predicted / measured - 1|.
        origin: one sentence for a reader.
    """

    name: str
    constants: Mapping[str, float]
    num_points: int
    median_error: float
    worst_error: float
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """A part of a profile whose measured seconds were scaled to what training runs showed (see ``corrections``).

    Attributes:
        name: forward, backward, optimizer, or a kind of collective.
        factor: new seconds over old ones.
        measurements: runs that it was fitted on, as plan and date.
        num_points: items of these runs that the part had a share in.
        date: ISO, UTC.
    """

    name: str
    factor: float
    measurements: tuple[str, ...]
    num_points: int
    date: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineProfile:
    """Everything measured on one machine (or emulated cluster) for one precision.

    Attributes:
        device_name: model of the processor or GPU.
        device: cpu or cuda.
        backend: gloo or nccl.
        precision: fp32 or bf16.
        ranks, num_nodes: processes in all, and nodes that they are spread over evenly.
        cores: processor cores that the ranks share.
        memory_bytes: that a rank may use.
        versions: of python, torch and autopar.
        date: ISO, UTC.
        peaks: highest measured ``flops`` and ``memory_bandwidth`` (a large copy), per second.
        link_rate: bytes/s of each node's link in an emulated cluster; None where links are as they are.
        link_efficiency: share of link_rate that is payload.
        host_overheads: seconds per call that the training software adds on the host, by what is called:
            ``tensor_parallel.linear.forward`` and ``.backward`` (a column- or row-parallel linear layer, its
            collective not included), ``tensor_parallel.norm.forward`` and ``.backward`` (a norm under sequence
            parallelism, likewise), ``fsdp.module.forward`` and ``.backward`` (a module wrapped by fully_shard),
            ``pipeline.action`` (one forward or backward of one microbatch), ``collective.wait`` (a collective
            between passes, while ranks that share processors wait for one).
        yardstick_s: seconds of a fixed piece of work on every rank at once, by which runs at other times know how much
            faster or slower the machine is then; 0 where it was not measured.
        fits: see Fit.
        corrections: made to the points since they were measured.
    """

    device_name: str
    device: str
    backend: str
    precision: str
    ranks: int
    num_nodes: int
    cores: int
    memory_bytes: float
    versions: Mapping[str, str]
    date: str
    peaks: Mapping[str, float]
    compute: tuple[ComputePoint, ...]
    sharing: tuple[SharingPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    link_rate: float | None = None
    link_efficiency: float = 1.0
    host_overheads: Mapping[str, float] = field(default_factory=dict)
    yardstick_s: float = 0.0
    fits: tuple[Fit, ...] = ()
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.num_nodes < 1 or self.ranks % self.num_nodes:
            raise InputError(f"a profile of {self.ranks} ranks on {self.num_nodes} nodes: nodes must divide ranks")
        for name in ("flops", "memory_bandwidth"):
            if not self.peaks.get(name, 0.0) > 0:
                raise InputError(f"the profile of {self.device_name} has no peak '{name}' above 0")

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks // self.num_nodes


def stream_bytes(kind: str, phase: str, dims: Mapping[str, int], itemsize: int) -> float:
    """Bytes that a memory-bound operation reads and writes, as an OpGraph counts them.

    T tokens, h width, V vocabulary, P parameters, e itemsize. normalization and activation: forward 2The (read,
    write), backward 3The (read gradient and input, write gradient). elementwise: forward 3The (an addition), backward
    0 (it passes the gradient on). embedding: forward 2The, backward 2The + Vhe (the dense gradient is zeroed first).
    loss: 3TVe each way (cross entropy from logits). optimizer: 7Pe (AdamW: read parameter, gradient and two
    moments, write parameter and moments; 28 bytes in fp32); it has no backward.
    """
    if kind == "optimizer":
        return 7.0 * dims["parameters"] * itemsize
    backward = phase == "backward"
    if kind == "loss":
        return 3.0 * dims["tokens"] * dims["vocab"] * itemsize
    size = float(dims["tokens"] * dims["width"] * itemsize)
    if kind in ("normalization", "activation"):
        return (3 if backward else 2) * size
    if kind == "elementwise":
        return 0.0 if backward else 3 * size
    if kind == "embedding":
        return 2 * size + (float(dims["vocab"] * dims["width"] * itemsize) if backward else 0.0)
    raise InputError(f"'{kind}' is not a memory-bound kind of operation; known: {', '.join(STREAM_KINDS)}")


def read_profile(path: str | Path) -> MachineProfile:
    """Read profile.json. Raises InputError if it is missing, torn or of another version."""
    return read_record(MachineProfile, path, PROFILE_SCHEMA)


def write_profile(path: str | Path, profile: MachineProfile) -> None:
    """Write profile.json whole."""
    write_record(path, profile, PROFILE_SCHEMA)
