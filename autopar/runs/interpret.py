"""A measured run as a question to the estimate: row -> RunCase, or why it is none.

Rows are read by general rules: numbers of columns first, then words of the notes, then what is usual with the engine
and its year. Everything that the row does not say is listed in ``assumptions``.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.errors import InputError
from autopar.layout import Layout
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, ScheduleName, default_schedule
from autopar.runs.batches import Batch, read_batch, read_seq_len
from autopar.runs.degrees import Degrees, read_degrees
from autopar.runs.engines import Engine, read_engine, read_stack
from autopar.runs.habits import read_recompute, read_sequence_parallel, read_sharding
from autopar.runs.machines import read_cluster, read_precision
from autopar.runs.models import read_model
from autopar.runs.reading import CannotRead, Read, Value, has
from autopar.runs.rows import RunRow
from autopar.runs.stages import read_stages
from autopar.workload import Workload
from costmodels.hardware import Cluster
from costmodels.units import GB, GIB

# (pattern of the notes, what the prediction does not know of)
CAVEATS: tuple[tuple[str, str], ...] = (
    (r"\boom\b|out of memory", "ran out of memory"),
    (r"(activation offload|act_cpu_offload true|cpu offload|optimizer cpu offload)", "offloads to the host"),
    (r"\bsft\b|fine-?tuning|packed", "fine-tuning with packed sequences"),
    (r"known perf regression", "known regression of the software"),
    (r"deterministic-mode", "deterministic kernels"),
    (r"tokendrop", "experts drop tokens"),
)
SCHEDULES: tuple[tuple[str, ScheduleName], ...] = (
    (r"zb-?h1|zero[- ]bubble h1", ScheduleName.ZB_H1), (r"zb-?h2", ScheduleName.ZB_H2),
    (r"zb-?v\b", ScheduleName.ZB_V), (r"dualpipe-?v\b", ScheduleName.DUALPIPE_V), (r"\bgpipe\b", ScheduleName.GPIPE),
)  # fmt: skip
MEMORY_BASES: tuple[tuple[str, str], ...] = (
    (r"nvidia-smi", "device"), (r"reserved", "reserved"), (r"allocated|allocator", "allocated"),
)  # fmt: skip


ALLOCATOR_LOGS = ("megatron-bridge",)
"""Engines that log their allocator's peak in decimal gigabytes, to their loggers from the last rank."""

COUNTS = ("n_layers", "hidden", "n_heads", "n_kv_heads", "ffn_hidden", "vocab", "seq_len", "n_gpus", "gpus_per_node",
          "global_batch", "micro_batch", "tp", "pp", "dp", "cp", "ep", "vp")  # fmt: skip
MEASURED = ("iter_time_s", "tokens_per_s_per_gpu", "mem_gb_per_gpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCase:
    """A measured run that can be predicted.

    Attributes:
        id: of the row.
        source: rows that belong together, the id without its number.
        spec, workload, cluster, plan: what ran, on what, and how.
        stack: name for costmodels.stack.load_stack, with variants.
        measured_s: seconds of a step; None where they were not measured or the row does not say of what.
        measured_memory_gib: peak of a device; None where not measured.
        memory_basis: ``allocated``, ``reserved``, ``device`` (all that the driver counts), or empty if unknown.
        memory_rank: whose peak it is: ``max``, ``first``, ``last``, or ``ends`` (the larger of first and last).
        assumptions: what the row does not say.
        caveats: what happened in the run that a prediction does not know of.
    """

    id: str
    source: str
    spec: ModelSpec
    workload: Workload
    cluster: Cluster
    plan: Plan
    stack: str
    measured_s: float | None
    measured_memory_gib: float | None
    memory_basis: str = ""
    memory_rank: str = "max"
    assumptions: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``moe`` or ``dense``."""
        return "moe" if self.spec.num_experts else "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsupported:
    """A run that cannot be predicted, and why."""

    id: str
    source: str
    reason: str


def source_of(row: RunRow) -> str:
    """Name of the rows that belong together: the id without its trailing number, else the source column."""
    stem = re.sub(r"[-_]\d+$", "", row.id)
    return stem if stem and not stem.isdigit() else row.source or "unknown"


def interpret(row: RunRow) -> RunCase | Unsupported:
    """Read one run. Never raises: a run that cannot be represented is Unsupported with the reason."""
    try:
        return _interpret(row)
    except InputError as error:
        return Unsupported(id=row.id, source=source_of(row), reason=str(error))


def _interpret(row: RunRow) -> RunCase:
    assumed: list[str] = []

    def take(read: Read[Value]) -> Value:
        value, notes = read
        assumed.extend(notes)
        return value

    row = take(_without_zeros(row))
    engine = take(read_engine(row))
    degrees = take(read_degrees(row, engine))
    seq_len = take(read_seq_len(row))
    spec = take(read_model(row, engine, seq_len, degrees.tp))
    if spec.num_heads % degrees.tp:
        raise CannotRead(f"tp={degrees.tp} does not divide {spec.num_heads} heads")
    if not spec.num_experts:
        degrees = dataclasses.replace(degrees, ep=1, etp=1)
    degrees, split = take(read_stages(row.notes or "", degrees, spec.num_layers, spec.mtp_layers))
    batch = take(read_batch(row, degrees, seq_len))
    cluster = take(read_cluster(row, degrees.num_devices))
    precision = take(read_precision(row, cluster.device))
    stack = take(read_stack(row, engine, spec.latent is not None))
    sharding = take(read_sharding(row, engine, degrees, cluster.devices_per_node))
    sequence = take(read_sequence_parallel(row, engine, degrees, seq_len))
    per_stage = -(-spec.num_layers // (degrees.pp * degrees.vp))
    again = take(read_recompute(row, engine, spec.latent is not None, per_stage))
    if degrees.cp > 1 and seq_len % (2 * degrees.cp):
        raise CannotRead(f"{seq_len} tokens do not divide into {2 * degrees.cp} parts for cp={degrees.cp}")
    plan = Plan(
        layout=Layout(
            tp=degrees.tp, cp=degrees.cp, pp=degrees.pp, vp=degrees.vp, ep=degrees.ep, etp=degrees.etp,
            dp_replicate=degrees.dp // sharding.dp_shard, dp_shard=sharding.dp_shard,
        ),
        microbatch_size=batch.micro_batch, zero_stage=sharding.zero_stage, sequence_parallel=sequence,
        schedule=_schedule(row, degrees), recompute=again.recompute, recompute_modules=again.modules,
        recompute_layers=again.layers, stage_blocks=split,
    )  # fmt: skip
    workload = Workload(global_batch=batch.global_batch, seq_len=seq_len, precision=precision)
    basis, rank = _memory_basis(row, engine)
    return RunCase(
        id=row.id, source=source_of(row), spec=spec, workload=workload, cluster=cluster, plan=plan, stack=stack,
        measured_s=_seconds(row, degrees, batch, seq_len),
        measured_memory_gib=_memory(row, engine, degrees, sharding.zero_stage), memory_basis=basis,
        memory_rank=rank, assumptions=tuple(assumed), caveats=_caveats(row),
    )  # fmt: skip


def _without_zeros(row: RunRow) -> Read[RunRow]:
    """Counts and measurements of 0 or less are not stated."""
    zeros = [name for name in (*COUNTS, *MEASURED) if (value := getattr(row, name)) is not None and value <= 0]
    notes = tuple(f"{name} of {getattr(row, name)} taken as not stated" for name in zeros if name in COUNTS)
    empty: dict[str, Any] = dict.fromkeys(zeros)
    return dataclasses.replace(row, **empty), notes


def _schedule(row: RunRow, degrees: Degrees) -> ScheduleName:
    if degrees.pp > 1:
        for pattern, schedule in SCHEDULES:
            fits = degrees.vp == (2 if schedule in (ScheduleName.ZB_V, ScheduleName.DUALPIPE_V) else 1)
            if fits and has(row.words("notes"), pattern):
                return schedule
    return default_schedule(degrees.vp)


def _ran_out(row: RunRow) -> bool:
    return has(row.words("notes"), CAVEATS[0][0]) and row.iter_time_s is None and row.tokens_per_s_per_gpu is None


def _seconds(row: RunRow, degrees: Degrees, batch: Batch, seq_len: int) -> float | None:
    """Seconds of a step, stated or from tokens/s; None where nobody can say what was timed."""
    if _ran_out(row) or not degrees.counted:
        return None
    if row.iter_time_s and (batch.stated or not row.tokens_per_s_per_gpu):
        return row.iter_time_s if batch.stated else None
    if row.tokens_per_s_per_gpu:
        return batch.global_batch * seq_len / (row.tokens_per_s_per_gpu * degrees.num_devices)
    return None


def _memory(row: RunRow, engine: Engine, degrees: Degrees, zero_stage: int) -> float | None:
    """GiB of a device; None for what was computed, not measured, or divided over nobody knows how many ranks.

    Megatron-Bridge logs decimal gigabytes (``mem-max-allocated-gigabytes``).
    """
    computed = has(row.words("notes"), r"analytic|not profiler|computed from its formula|no absolute value")
    derived = "mem_gb_per_gpu" in (row.derived_fields or "").split() or has(row.words("notes"), r"values derived")
    unknown = zero_stage > 0 and not degrees.counted
    if computed or derived or unknown or _ran_out(row) or row.mem_gb_per_gpu is None:
        return None
    words = row.words("mem_basis", "notes")
    binary = has(words, r"\bgib\b") and not has(words, r"value in gb\b")
    decimal = engine.stack in ALLOCATOR_LOGS and not binary
    return row.mem_gb_per_gpu * (GB / GIB if decimal else 1.0)


def _memory_basis(row: RunRow, engine: Engine) -> tuple[str, str]:
    """What was counted, and on which rank."""
    words = row.words("mem_basis") or row.words("notes")
    logged = engine.stack in ALLOCATOR_LOGS
    basis = next((basis for pattern, basis in MEMORY_BASES if has(words, pattern)), "allocated" if logged else "")
    if has(words, r"first/last"):
        return basis, "ends"
    if has(words, r"last (global )?rank|last pipeline stage"):
        return basis, "last"
    if has(row.words("notes"), r"rank[- ]0"):
        return basis, "first"
    return basis, "last" if logged and basis == "allocated" else "max"


def _caveats(row: RunRow) -> tuple[str, ...]:
    words = row.words("model_name", "notes")
    found = [text for pattern, text in CAVEATS if has(words, pattern)]
    if row.check and row.check.startswith("FLAG"):
        found.append(f"inconsistent at the source: {row.check.removeprefix('FLAG').strip()}")
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How rows were read.

    Attributes:
        sources: source -> (rows, of them cases, of those timed, with memory).
        reasons: why rows are unsupported, with their number.
        assumptions: with the number of cases that rest on each.
    """

    sources: Mapping[str, tuple[int, int, int, int]]
    reasons: Mapping[str, int]
    assumptions: Mapping[str, int]


def coverage(results: Iterable[RunCase | Unsupported]) -> Coverage:
    """Count what was read, most frequent first."""
    sources: dict[str, tuple[int, int, int, int]] = {}
    reasons: Counter[str] = Counter()
    assumptions: Counter[str] = Counter()
    for result in results:
        rows, cases, timed, sized = sources.get(result.source, (0, 0, 0, 0))
        if isinstance(result, Unsupported):
            reasons[result.reason] += 1
        else:
            assumptions.update(result.assumptions)
            cases, timed = cases + 1, timed + (result.measured_s is not None)
            sized += result.measured_memory_gib is not None
        sources[result.source] = (rows + 1, cases, timed, sized)
    return Coverage(sources=sources, reasons=dict(reasons.most_common()), assumptions=dict(assumptions.most_common()))
