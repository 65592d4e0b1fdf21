"""A plan: every decision that turns a model and a workload into what each rank does, and what forbids it.

The slug ``tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-selective`` names a plan and is parsed back. Parts that differ from the
usual follow it: ``ep8`` and ``etp2`` (expert parallel, after ``cp``), ``ac-selective+mlp+layernorm`` (what is
recomputed), ``ac-full5`` (in the first 5 blocks of each virtual stage), ``sp`` (sequence parallel), ``rep2`` (replicas
around sharded groups), ``sched-gpipe``, ``split-7-8x6-7`` (blocks per virtual stage, where they are not even),
``offload`` (optimizer state in host memory) and ``order-tp-pp-cp-dp`` (of the axes on the machine, fastest first).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TypedDict, TypeVar

from autopar.errors import PlanError, nearest
from autopar.graph import RECOMPUTE_MODULES, OpGraph
from autopar.layout import USUAL_ORDER, Layout
from autopar.model.spec import ModelSpec
from autopar.workload import Workload
from costmodels.records import read_record, write_record

PLAN_SCHEMA = 1
MEMORY_ITEM = "memory/"

Member = TypeVar("Member", bound=StrEnum)


class Recompute(StrEnum):
    """What forward keeps: everything, everything but attention's inner tensors, or only block inputs."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class ScheduleName(StrEnum):
    """Order of forward and backward microbatches on a pipeline rank."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    ZB_H2 = "zb-h2"
    ZB_V = "zb-v"
    DUALPIPE_V = "dualpipe-v"


V_SCHEDULES = (ScheduleName.ZB_V, ScheduleName.DUALPIPE_V)
VIRTUAL_SCHEDULES = (ScheduleName.INTERLEAVED, *V_SCHEDULES)
SPLIT_SCHEDULES = (ScheduleName.ZB_H1, ScheduleName.ZB_H2, *V_SCHEDULES)
"""Schedules that take gradients of weights apart from those of inputs."""
DEFAULT_MODULES = ("core_attn",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """Why a plan cannot be used: a short key, a sentence with the fix, and the numbers in it."""

    reason: str
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A layout and the decisions beside it.

    Attributes:
        layout: degrees of parallelism.
        microbatch_size: sequences per forward pass of a data parallel rank.
        zero_stage: 0 replicates; 1 shards optimizer state; 2 gradients too; 3 parameters too.
        sequence_parallel: norms and residuals divided along the sequence over the tp ranks.
        schedule: pipeline schedule.
        recompute: what backward computes again.
        stage_blocks: blocks of each virtual stage in the order of the model; empty means as even as possible,
            earlier stages taking what is left over.
        recompute_modules: parts of a block that selective recomputation covers, of autopar.graph.RECOMPUTE_MODULES;
            empty means attention without its products (``core_attn``). Kept in that order, without repetition, and
            without ``moe_act`` beside ``moe``, which covers it.
        recompute_layers: first blocks of every virtual stage that full recomputation covers; 0 means all.
        offload_optimizer: optimizer state lies in host memory, where the processor updates it.
    """

    layout: Layout
    microbatch_size: int
    zero_stage: int = 0
    sequence_parallel: bool = False
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B
    recompute: Recompute = Recompute.NONE
    stage_blocks: tuple[int, ...] = ()
    recompute_modules: tuple[str, ...] = ()
    recompute_layers: int = 0
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.microbatch_size < 1:
            raise PlanError(f"plan: microbatch_size is {self.microbatch_size}; it must be at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise PlanError(f"plan: zero_stage is {self.zero_stage}; it is 0, 1, 2 or 3")
        if self.zero_stage == 0 and self.layout.dp_shard > 1:
            raise PlanError(f"plan: dp_shard={self.layout.dp_shard} needs zero_stage 1, 2 or 3")
        if self.zero_stage > 0 and self.layout.dp_shard == 1 and self.layout.dp_replicate > 1:
            raise PlanError(f"plan: zero_stage={self.zero_stage} shards over dp_shard, which is 1")
        if self.layout.vp > 1 and self.schedule not in VIRTUAL_SCHEDULES:
            raise PlanError(f"plan: vp={self.layout.vp} needs the interleaved schedule, not {self.schedule}")
        if self.schedule in V_SCHEDULES and self.layout.vp != 2:
            raise PlanError(f"plan: the {self.schedule} schedule has two virtual stages per rank: use vp=2")
        if self.stage_blocks and len(self.stage_blocks) != self.num_stages:
            raise PlanError(
                f"plan: stage_blocks has {len(self.stage_blocks)} entries for pp*vp={self.num_stages} stages"
            )
        if any(blocks < 0 for blocks in self.stage_blocks) or 0 in self.stage_blocks[1:-1]:
            raise PlanError(
                f"plan: stage_blocks {self.stage_blocks} leaves a stage without work: only the first stage, which has "
                "the embedding, and the last, which has the head, can do without blocks"
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        for module in self.recompute_modules:
            if module not in RECOMPUTE_MODULES:
                raise PlanError(f"plan: unknown recompute module '{module}'{nearest(module, RECOMPUTE_MODULES)}")
        if self.recompute_modules and self.recompute is not Recompute.SELECTIVE:
            raise PlanError(f"plan: recompute_modules need recompute selective, not {self.recompute}")
        if self.recompute_layers < 0:
            raise PlanError(f"plan: recompute_layers is {self.recompute_layers}; it is 0 (all blocks) or more")
        if self.recompute_layers and self.recompute is not Recompute.FULL:
            raise PlanError(f"plan: recompute_layers={self.recompute_layers} needs recompute full")
        given = set(self.recompute_modules) - ({"moe_act"} if "moe" in self.recompute_modules else set())
        modules = tuple(module for module in RECOMPUTE_MODULES if module in given)
        object.__setattr__(self, "recompute_modules", () if modules == DEFAULT_MODULES else modules)

    @property
    def recomputed_modules(self) -> tuple[str, ...]:
        """Tags of the operations that selective recomputation covers; none with another setting."""
        if self.recompute is not Recompute.SELECTIVE:
            return ()
        modules = self.recompute_modules or DEFAULT_MODULES
        return (*modules, "moe_act") if "moe" in modules else modules

    @property
    def num_stages(self) -> int:
        """Virtual stages of the pipeline."""
        return self.layout.pp * self.layout.vp

    @property
    def slug(self) -> str:
        """The plan's name, see the module's docstring."""
        layout = self.layout
        parts = [
            f"tp{layout.tp}", f"pp{layout.pp}", f"vp{layout.vp}", f"cp{layout.cp}",
            *(f"{axis}{degree}" for axis, degree in (("ep", layout.ep), ("etp", layout.etp)) if degree > 1),
            f"dp{layout.dp}", f"z{self.zero_stage}", f"mb{self.microbatch_size}",
            "+".join((f"ac-{self.recompute}{self.recompute_layers or ''}", *self.recompute_modules)),
        ]  # fmt: skip
        if self.sequence_parallel:
            parts.append("sp")
        if layout.dp_replicate > 1 and layout.dp_shard > 1:
            parts.append(f"rep{layout.dp_replicate}")
        if self.schedule is not default_schedule(layout.vp):
            parts.append(f"sched-{self.schedule}")
        if self.stage_blocks:
            parts.append("split-" + _split_text(self.stage_blocks))
        if self.offload_optimizer:
            parts.append("offload")
        if layout.order != USUAL_ORDER:
            parts.append(f"order-{layout.order}")
        return ".".join(parts)

    def num_microbatches(self, workload: Workload) -> int:
        """Forward passes per step of each data parallel rank; the batch must divide (see ``violations``)."""
        return workload.global_batch // (self.layout.dp * self.microbatch_size)

    def blocks_of_stages(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks per virtual stage, in the order of the model."""
        return self.stage_blocks or even_split(num_blocks, self.num_stages)


def _split_text(blocks: tuple[int, ...]) -> str:
    """Blocks per stage; three or more equal neighbours as ``8x6``."""
    runs = [(number, len(list(alike))) for number, alike in groupby(blocks)]
    return "-".join(f"{number}x{times}" if times > 2 else "-".join([str(number)] * times) for number, times in runs)


def default_schedule(vp: int) -> ScheduleName:
    """The schedule that a slug without ``sched-`` means."""
    return ScheduleName.INTERLEAVED if vp > 1 else ScheduleName.ONE_F_ONE_B


def fewest_microbatches(schedule: ScheduleName, pp: int) -> int:
    """Microbatches without which a schedule does not start: Megatron interleaves p or more, DualPipeV fills with 2p."""
    return {ScheduleName.INTERLEAVED: pp, ScheduleName.DUALPIPE_V: 2 * pp}.get(schedule, 1) if pp > 1 else 1


def even_split(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """Blocks per stage as even as possible; earlier stages take the remainder."""
    quotient, remainder = divmod(num_blocks, num_stages)
    return tuple(quotient + (stage < remainder) for stage in range(num_stages))


_PART = re.compile(
    r"(?P<key>tp|pp|vp|cp|ep|etp|dp|z|mb|rep)(?P<number>\d+)|(?P<word>ac|sched|split|order)-(?P<value>[\w+-]+)|(?P<flag>sp|offload)"
)


def parse_slug(slug: str) -> Plan:
    """Parse a slug. Degrees that are left out are 1, ``z`` is 0. Raises PlanError."""
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    for part in slug.strip().split("."):
        match = _PART.fullmatch(part)
        if not match:
            raise PlanError(
                f"plan '{slug}': cannot read '{part}'; a slug looks like tp2.pp4.vp1.cp1.dp2.z1.mb1.ac-none"
            )
        key = match["key"] or match["word"] or match["flag"]
        if key in numbers or key in words:
            raise PlanError(f"plan '{slug}': '{key}' is given twice")
        if match["key"]:
            numbers[key] = int(match["number"])
        else:
            words[key] = match["value"] or ""
    if "mb" not in numbers:
        raise PlanError(f"plan '{slug}': the microbatch is missing; add for example .mb1")
    dp, zero, replicas = numbers.get("dp", 1), numbers.get("z", 0), numbers.get("rep")
    if replicas is not None and (zero == 0 or replicas < 1 or dp % replicas):
        raise PlanError(f"plan '{slug}': rep{replicas} must divide dp{dp} and needs z1, z2 or z3")
    replicate = dp if zero == 0 else (replicas or 1)
    vp = numbers.get("vp", 1)
    return Plan(
        layout=Layout(
            tp=numbers.get("tp", 1), cp=numbers.get("cp", 1), pp=numbers.get("pp", 1), vp=vp,
            dp_replicate=replicate, dp_shard=dp // replicate if replicate else 0,
            ep=numbers.get("ep", 1), etp=numbers.get("etp", 1), order=words.get("order", USUAL_ORDER),
        ),
        microbatch_size=numbers["mb"],
        zero_stage=zero,
        sequence_parallel="sp" in words,
        schedule=_member(ScheduleName, words.get("sched", default_schedule(vp).value), slug),
        stage_blocks=_parse_split(words["split"], slug) if "split" in words else (),
        offload_optimizer="offload" in words,
        **_parse_recompute(words.get("ac", "none"), slug),
    )  # fmt: skip


def _member(kind: type[Member], word: str, slug: str) -> Member:
    known = [member.value for member in kind]
    if word not in known:
        raise PlanError(f"plan '{slug}': unknown {kind.__name__.lower()} '{word}'{nearest(word, known)}")
    return kind(word)


class _RecomputeFields(TypedDict):
    recompute: Recompute
    recompute_modules: tuple[str, ...]
    recompute_layers: int


def _parse_recompute(text: str, slug: str) -> _RecomputeFields:
    setting, *modules = text.split("+")
    layers = re.fullmatch(r"full(\d+)", setting)
    return {
        "recompute": Recompute.FULL if layers else _member(Recompute, setting, slug),
        "recompute_modules": tuple(modules),
        "recompute_layers": int(layers[1]) if layers else 0,
    }


def _parse_split(text: str, slug: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)?(-\d+(x\d+)?)*", text):
        raise PlanError(f"plan '{slug}': split-{text} is not a list of blocks such as split-7-8-8-7 or split-7-8x6-7")
    runs = (run.partition("x") for run in text.split("-"))
    return tuple(int(blocks) for blocks, _, times in runs for _ in range(int(times or 1)))


def violations(plan: Plan, graph: OpGraph, workload: Workload, world_size: int) -> tuple[Rejected, ...]:
    """Everything that forbids a plan before memory and time are looked at, each with the fix."""
    layout, found = plan.layout, []

    def reject(reason: str, detail: str, **numbers: float) -> None:
        found.append(Rejected(reason=reason, detail=detail, numbers=numbers))

    if layout.world_size != world_size:
        product = " * ".join(
            f"{axis}={degree}"
            for axis, degree in (("tp", layout.tp), ("cp", layout.cp), ("pp", layout.pp), ("dp", layout.dp))
        )
        reject(
            "world size", f"{product} is {layout.world_size}, but there are {world_size} ranks: change one of them",
            product=layout.world_size, world_size=world_size,
        )  # fmt: skip
    attention = graph.attention
    if attention is not None:
        for name, heads in (("query", attention.num_heads), ("key-value", attention.num_kv_heads)):
            if heads % layout.tp:
                reject(
                    f"{name} heads", f"tp={layout.tp} does not divide {heads} {name} heads: use a divisor of {heads}",
                    tp=layout.tp, heads=heads,
                )  # fmt: skip
    _reject_experts(plan, graph, reject)
    if plan.offload_optimizer and plan.zero_stage == 0 and layout.dp * layout.cp > 1:
        reject(
            "offload", f"the host would update the same weights for all {layout.dp * layout.cp} data parallel ranks: "
            "use zero_stage 1 or more with offload",
            replicas=layout.dp * layout.cp,
        )  # fmt: skip
    features = [p for op in graph.block_ops(0) for p in op.parameters] if layout.tp > 1 else []
    if plan.sequence_parallel and layout.tp == 1:
        reject(
            "sequence parallel",
            "sequence parallelism divides over tp ranks, but tp=1: drop sp or use tp>=2",
            tp=1,
        )
    if layout.tp > 1 and attention is None and not features:
        reject(
            "tensor parallel",
            f"tp={layout.tp}, but the model has nothing that tensor parallelism divides",
            tp=layout.tp,
        )
    for axis, degree in (
        ("tp", layout.tp if plan.sequence_parallel else 1),
        ("cp", 2 * layout.cp if layout.cp > 1 else 1),
    ):
        if workload.seq_len % degree:
            reject(
                "sequence", f"a sequence of {workload.seq_len} tokens does not divide into {degree} parts for {axis}",
                seq_len=workload.seq_len, parts=degree,
            )  # fmt: skip
    if plan.num_stages > graph.num_blocks + plan.stage_blocks.count(0):
        reject(
            "stages", f"pp*vp={plan.num_stages} stages for {graph.num_blocks} blocks: use {graph.num_blocks} or fewer",
            stages=plan.num_stages, blocks=graph.num_blocks,
        )  # fmt: skip
    elif plan.stage_blocks and sum(plan.stage_blocks) != graph.num_blocks:
        reject(
            "stages", f"stage_blocks adds up to {sum(plan.stage_blocks)} of {graph.num_blocks} blocks",
            assigned=sum(plan.stage_blocks), blocks=graph.num_blocks,
        )  # fmt: skip
    per_pass = layout.dp * plan.microbatch_size
    if workload.global_batch % per_pass:
        reject(
            "batch", f"dp={layout.dp} times microbatch {plan.microbatch_size} is {per_pass}, which does not divide the "
            f"global batch of {workload.global_batch}",
            per_pass=per_pass, global_batch=workload.global_batch,
        )  # fmt: skip
    elif plan.num_microbatches(workload) < (fewest := fewest_microbatches(plan.schedule, layout.pp)):
        reject(
            "microbatches", f"the {plan.schedule} schedule over pp={layout.pp} ranks takes at least {fewest} "
            f"microbatches, not {plan.num_microbatches(workload)}",
            microbatches=plan.num_microbatches(workload), fewest=fewest,
        )  # fmt: skip
    return tuple(found)


def _reject_experts(plan: Plan, graph: OpGraph, reject: Callable[..., None]) -> None:
    layout, experts, width = plan.layout, graph.num_experts, graph.expert_width
    if not experts:
        for axis, degree in (("ep", layout.ep), ("etp", layout.etp)):
            if degree > 1:
                reject("experts", f"{axis}={degree}, but the model has no experts: use {axis}=1", **{axis: degree})
        return
    if experts % layout.ep:
        reject(
            "experts", f"ep={layout.ep} does not divide {experts} experts: use a divisor of {experts}",
            ep=layout.ep, experts=experts,
        )  # fmt: skip
    if width % layout.etp:
        reject(
            "expert width", f"etp={layout.etp} does not divide the experts' width of {width}: use a divisor of {width}",
            etp=layout.etp, width=width,
        )  # fmt: skip


def check_plan(plan: Plan, graph: OpGraph, workload: Workload, world_size: int) -> None:
    """Raise PlanError with every violation."""
    found = violations(plan, graph, workload, world_size)
    if found:
        raise PlanError(f"plan {plan.slug}: " + "; ".join(rejected.detail for rejected in found))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """plan.json: a plan with the model and the workload that it is for.

    Attributes:
        slug: of the plan, for readers.
        predicted: what the planner expected, by name (``step_s``, ``memory_gib``, ...; ``memory/parameters`` and so on
            are the bytes of an item on the fullest rank).
    """

    slug: str
    model: ModelSpec
    workload: Workload
    plan: Plan
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def predicted_memory(self) -> dict[str, float]:
        """Bytes by item of the fullest rank; empty if nobody predicted."""
        found = self.predicted.items()
        return {name.removeprefix(MEMORY_ITEM): value for name, value in found if name.startswith(MEMORY_ITEM)}


def read_plan_file(path: str | Path) -> PlanFile:
    """Read plan.json. Raises InputError if it is missing, torn or contradicts itself."""
    found = read_record(PlanFile, path, PLAN_SCHEMA)
    if found.slug != found.plan.slug:
        raise PlanError(
            f"{path}: slug '{found.slug}' is not that of the plan, '{found.plan.slug}': was it edited by hand?"
        )
    return found


def write_plan_file(path: str | Path, content: PlanFile) -> None:
    """Write plan.json whole."""
    write_record(path, content, PLAN_SCHEMA)
