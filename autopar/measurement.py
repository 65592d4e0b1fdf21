"""What a real run measured, under the same names as the prediction: measurement.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autopar.errors import InputError
from autopar.model.spec import ModelSpec
from autopar.plan import Plan
from autopar.workload import Workload
from costmodels.records import from_plain, read_json, write_record

MEASUREMENT_SCHEMA = 2
OLDER_SCHEMAS = (1,)
"""Still read: what their files lack has a default here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedCollective:
    """Collectives of one kind, on one axis, of one rank, in one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, send or recv.
        axis: mesh axis of the group: tp, cp, pp, dp (all ranks that reduce a dense weight's gradient: data and context
            parallel ones), dp_shard (with context parallel ones) and dp_replicate where both divide them, or world.
        group_size: ranks in the group.
        count: calls.
        num_bytes: payload summed over the calls: the whole (unsharded) tensor for all_reduce, all_gather and
            reduce_scatter, the message for send and recv.
    """

    kind: str
    axis: str
    group_size: int
    count: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something a rank did: ``phase`` is forward, backward, optimizer or communication.

    ``start_s`` counts from the beginning of the step, on a clock common to all ranks of a machine. ``name`` is an
    action such as ``2F0`` (stage 2, forward, microbatch 0), or the collective and its axis (``all_gather dp_shard``).

    Attributes:
        num_bytes: of communication, as in CountedCollective; 0 where it is not known.
        exposed_s: of communication, seconds in which this rank computed nothing meanwhile; None where only the span
            was measured.
    """

    name: str
    phase: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    exposed_s: float | None = None

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Bytes allocated since the step began, around one action: as it began, at its highest, as it ended."""

    name: str
    begin_bytes: int
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMeasurement:
    """One rank, inspected over a step each for collectives, memory and spans.

    Attributes:
        peak_bytes: highest sum of allocated bytes.
        memory: bytes of ``parameters``, ``gradients`` (once they are whole), ``optimizer`` and ``buffers`` (all else
            that stays between steps), and ``transient``, what the peak adds to those that stay.
        moments: allocated bytes around every action, in order. ``measured.peak_items`` reads the items of the peak
            from them.
    """

    rank: int
    peak_bytes: int
    memory: Mapping[str, int]
    collectives: tuple[CountedCollective, ...]
    spans: tuple[Span, ...]
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeTraffic:
    """Bytes that a node's interface counters saw per step, headers included."""

    node: int
    sent_bytes: float
    received_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One plan's run.

    Attributes:
        slug: of the plan.
        backend: gloo or nccl.
        device: what it ran on.
        versions: of python, torch and autopar.
        date: ISO, UTC.
        losses: mean loss of the global batch, each step.
        step_s: wall seconds of each timed step (the slowest rank's), warm-up and inspected steps left out.
        grad_norms: norm of the global gradient, each step, where it was taken.
        yardstick_s: seconds of the profile's yardstick on all ranks at once after each timed step, the mean of the
            ranks; empty where it was not taken.
        ranks: by rank.
        traffic: by node, where interfaces were counted.
    """

    slug: str
    model: ModelSpec
    workload: Workload
    plan: Plan
    backend: str
    device: str
    versions: Mapping[str, str]
    date: str
    losses: tuple[float, ...]
    step_s: tuple[float, ...]
    ranks: tuple[RankMeasurement, ...]
    traffic: tuple[NodeTraffic, ...] = field(default=())
    grad_norms: tuple[float, ...] = ()
    yardstick_s: tuple[float, ...] = ()

    @property
    def median_step_s(self) -> float:
        """Median of the timed steps."""
        ordered, middle = sorted(self.step_s), len(self.step_s) // 2
        if len(ordered) % 2:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def peak_bytes(self) -> int:
        """Peak of the rank that held most."""
        return max(rank.peak_bytes for rank in self.ranks)


def together(runs: Sequence[Measurement]) -> Measurement:
    """Runs of one plan as one: the first with the timed steps of all.

    Raises:
        InputError: none, or unlike plans.
    """
    if len({run.plan for run in runs}) != 1:
        raise InputError("only runs of one and the same plan are one measurement")
    return dataclasses.replace(
        runs[0], step_s=tuple(s for run in runs for s in run.step_s),
        yardstick_s=tuple(s for run in runs for s in run.yardstick_s),
    )  # fmt: skip


def read_measurement(path: str | Path) -> Measurement:
    """Read measurement.json, of this or an older version. Raises InputError."""
    data = read_json(path)
    found = data.pop("schema_version", None)
    if found not in (*OLDER_SCHEMAS, MEASUREMENT_SCHEMA):
        raise InputError(
            f"{path}: schema_version is {found!r}, this program reads {MEASUREMENT_SCHEMA} and older: run the plan "
            "again, or use the program that wrote it"
        )
    return from_plain(Measurement, data, str(path))


def write_measurement(path: str | Path, measurement: Measurement) -> None:
    """Write measurement.json whole."""
    write_record(path, measurement, MEASUREMENT_SCHEMA)
