"""Which plans this executor runs, told without importing torch, so that a planner can ask.

What every plan must obey (``autopar.plan.violations``) is not repeated here, except for what the executor itself
relies on when a user calls it with a module of their own.
"""

from __future__ import annotations

import math

from autopar.errors import PlanError
from autopar.model.spec import ModelSpec
from autopar.plan import SPLIT_SCHEDULES, Plan, Recompute, Rejected, ScheduleName, fewest_microbatches
from autopar.runtime.sources import unsupported_source
from autopar.workload import Precision, Workload

RECOMPUTED = ("core_attn", "mlp", "layernorm", "moe_act", "moe")
"""Parts of a block that selective recomputation covers."""


def unsupported(
    plan: Plan, spec: ModelSpec | None = None, num_microbatches: int | None = None, source: str = ""
) -> tuple[Rejected, ...]:
    """Every reason why this executor cannot run a plan, each with what to use instead; empty if it can.

    Args:
        plan: the plan.
        spec: numbers of the model; None for a module without them, whose own limits are then found while it is
            divided.
        num_microbatches: forward passes per step and data parallel rank; None leaves out what depends on it.
        source: of the module, see ``autopar.runtime.sources``.

    Raises:
        InputError: the source names a class that is not supported.
    """
    found = _unsupported_layout(plan) + unsupported_source(plan, source)
    if spec is not None:
        found += [] if source else _unsupported_module(plan, spec)
        found += _unsupported_model(plan, spec)
    if num_microbatches is not None:
        found += _unsupported_microbatches(plan, num_microbatches)
    return tuple(found)


def unsupported_compiled(plan: Plan) -> tuple[Rejected, ...]:
    """Reasons why the blocks of a plan cannot be compiled one by one; empty if they can."""
    layout, found = plan.layout, []
    divided = [f"{axis}={degree}" for axis in ("tp", "cp", "ep") if (degree := getattr(layout, axis)) > 1]
    if divided:
        detail = (
            f"{', '.join(divided)} communicates inside blocks, which are compiled over data parallel and pipeline "
            "ranks alone: use a plan of those, or do not compile"
        )
        found.append(_reject("compile", detail))
    if plan.schedule in SPLIT_SCHEDULES:
        detail = (
            f"the {plan.schedule} schedule takes backward of a block apart, which a compiled one does not allow: use "
            "1f1b, interleaved or gpipe, or do not compile"
        )
        found.append(_reject("compile", detail))
    remade = [module for module in plan.recomputed_modules if module in ("layernorm", "moe_act")]
    if remade and plan.recompute is Recompute.SELECTIVE:
        detail = f"recomputing {' and '.join(remade)} reaches into compiled blocks: leave it out, or do not compile"
        found.append(_reject("compile", detail))
    return tuple(found)


def check_supported(
    plan: Plan, spec: ModelSpec | None = None, num_microbatches: int | None = None, source: str = ""
) -> None:
    """Raise PlanError with every reason of ``unsupported``."""
    found = unsupported(plan, spec, num_microbatches, source)
    if found:
        raise PlanError(f"plan {plan.slug} cannot be run here: " + "; ".join(reason.detail for reason in found))


def unsupported_workload(workload: Workload) -> tuple[Rejected, ...]:
    """Reasons why this executor cannot train a workload under any plan."""
    if workload.precision is Precision.FP16:
        return (_reject("precision", "fp16 needs loss scaling, which this executor does not have: use bf16 or fp32"),)
    if workload.precision is not workload.precision.base:
        return (_reject("precision", f"{workload.precision} products are not supported: use bf16 or fp32"),)
    return ()


def sequence_divisor(plan: Plan) -> int:
    """Equal parts into which a plan cuts sequences.

    Context parallel ranks have two each; under sequence parallelism tensor parallel ranks divide those of a rank.
    """
    context = 2 * plan.layout.cp if plan.layout.cp > 1 else 1
    return math.lcm(context, plan.layout.cp * plan.layout.tp) if plan.sequence_parallel else context


def _reject(reason: str, detail: str, **numbers: float) -> Rejected:
    return Rejected(reason=reason, detail=detail, numbers=numbers)


def _unsupported_layout(plan: Plan) -> list[Rejected]:
    layout, found = plan.layout, []
    if plan.sequence_parallel and "layernorm" in plan.recomputed_modules:
        found.append(
            _reject(
                "recompute",
                "recomputing layernorm frees nothing under sequence parallelism, where products keep the gathered "
                "input: drop layernorm or sp",
            )
        )
    unknown = [module for module in plan.recomputed_modules if module not in RECOMPUTED]
    if unknown:
        found.append(
            _reject(
                "recompute",
                f"recomputation of {', '.join(unknown)} alone is not supported: use {', '.join(RECOMPUTED)}, none or "
                "full",
            )
        )
    if plan.sequence_parallel and layout.tp == 1:
        found.append(_reject("sequence parallel", "sequence parallelism divides over tp ranks: use tp>=2 or drop sp"))
    return found


def _unsupported_module(plan: Plan, spec: ModelSpec) -> list[Rejected]:
    """Limits of the project's own transformer."""
    found = []
    if spec.unbuilt:
        fields = ", ".join(spec.unbuilt)
        found.append(_reject("model", f"models with {fields} are not supported: use one without"))
    return found + _unsupported_experts(plan, spec)


def _unsupported_model(plan: Plan, spec: ModelSpec) -> list[Rejected]:
    """Limits of any module of these numbers."""
    layout, found = plan.layout, list[Rejected]()
    if spec.tied_embeddings and layout.pp == 1 and layout.tp > 1 and plan.zero_stage == 0 and layout.dp * layout.cp > 1:
        found.append(
            _reject(
                "tied embeddings",
                f"DDP takes embedding and head apart where tp={layout.tp} divides the weight that they share: use "
                "zero_stage 1, 2 or 3, or tied_embeddings=false",
                tp=layout.tp,
            )
        )
    dense = spec.dense_layers or not spec.num_experts
    for name, size in (
        ("query heads", spec.num_heads), ("key-value heads", spec.num_kv_heads),
        ("feed-forward width", spec.ffn_size if dense else 0), ("shared expert's width", spec.shared_ffn_size),
    ):  # fmt: skip
        if size % layout.tp:
            found.append(
                _reject(
                    name, f"tp={layout.tp} does not divide the {name}, {size}: use a divisor", tp=layout.tp, size=size
                )
            )
    if plan.num_stages > spec.num_layers and not plan.stage_blocks:
        found.append(
            _reject(
                "stages",
                f"pp*vp={plan.num_stages} stages for {spec.num_layers} blocks: use {spec.num_layers} or fewer, or "
                "a split with 0 blocks on the first and last stage",
                stages=plan.num_stages, blocks=spec.num_layers,
            )
        )  # fmt: skip
    elif plan.stage_blocks and sum(plan.stage_blocks) != spec.num_layers:
        found.append(
            _reject(
                "stages", f"stage_blocks adds up to {sum(plan.stage_blocks)} of {spec.num_layers} blocks",
                assigned=sum(plan.stage_blocks), blocks=spec.num_layers,
            )
        )  # fmt: skip
    return found


def _unsupported_experts(plan: Plan, spec: ModelSpec) -> list[Rejected]:
    layout, found = plan.layout, []
    if not spec.num_experts:
        for axis, degree in (("ep", layout.ep), ("etp", layout.etp)):
            if degree > 1:
                found.append(
                    _reject("experts", f"{axis}={degree}, but the model has no experts: use {axis}=1", **{axis: degree})
                )
        return found
    for name, size, axis, degree in (
        ("experts", spec.num_experts, "ep", layout.ep), ("experts' width", spec.expert_ffn_size, "etp", layout.etp),
    ):  # fmt: skip
        if size % degree:
            detail = f"{axis}={degree} does not divide the {name}, {size}: use a divisor"
            found.append(_reject("experts", detail, size=size, **{axis: degree}))
    if layout.tp > 1 and not plan.sequence_parallel:
        detail = (
            f"tp={layout.tp} without sequence parallelism would send every token to the experts {layout.tp} times: "
            "use sp"
        )
        found.append(_reject("experts", detail, tp=layout.tp))
    if layout.dp_shard > 1 and layout.edp % layout.dp_replicate:
        detail = (
            f"ep*etp={layout.ep * layout.etp} ranks reach over the rep{layout.dp_replicate} replicas of sharded "
            "groups, which then have no equal experts: use smaller ep or etp, or no replicas"
        )
        found.append(_reject("experts", detail, ep=layout.ep, etp=layout.etp, replicas=layout.dp_replicate))
    return found


def _unsupported_microbatches(plan: Plan, num_microbatches: int) -> list[Rejected]:
    pp = plan.layout.pp
    fewest = fewest_microbatches(plan.schedule, pp)
    if plan.schedule is not ScheduleName.DUALPIPE_V or num_microbatches >= fewest:
        return []
    detail = (
        f"the dualpipe-v schedule over pp={pp} ranks takes at least {fewest} microbatches, not {num_microbatches}: use "
        "a smaller microbatch or sched-zb-v"
    )
    return [_reject("microbatches", detail, microbatches=num_microbatches, pp=pp)]
