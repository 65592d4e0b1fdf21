"""Words for plans, terms and memory items, short enough for an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.layout import USUAL_ORDER
from autopar.plan import V_SCHEDULES, Plan, Recompute, default_schedule

TERM_LABELS = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "recomputation",
    "tensor_parallel": "tensor parallel",
    "context_parallel": "context parallel",
    "expert_parallel": "expert parallel",
    "launch_bound": "kernel launches",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_transfer": "pipeline transfers",
    "processor_sharing": "shared processors",
    "gradient_accumulation": "gradient accumulation",
    "data_parallel": "data parallel",
    "optimizer": "optimizer",
    "step_overhead": "overhead of a step",
    "stragglers": "stragglers",
}

MEMORY_LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "working": "working tensors",
    "buffers": "gathered parameters",
    "fragmentation": "fragmentation",
    "reserve": "reserve",
}


def sharding_name(plan: Plan) -> str:
    """``-``, ``ZeRO-2``, or ``ZeRO-3 x2`` for two replicas of sharded groups."""
    if plan.zero_stage == 0:
        return "-"
    replicas = plan.layout.dp_replicate
    return f"ZeRO-{plan.zero_stage}" + (f" x{replicas}" if replicas > 1 else "")


def layout_name(plan: Plan) -> str:
    """The degrees that are used, the schedule if it is no usual one, and how data parallelism shards.

    ``tp2 pp2``, ``pp4 zb-v``, ``dp4 ZeRO-3``, ``1 rank``.
    """
    layout = plan.layout
    parts = [
        f"{axis}{degree}"
        for axis, degree in (
            ("tp", layout.tp), ("pp", layout.pp), ("vp", 1 if plan.schedule in V_SCHEDULES else layout.vp),
            ("cp", layout.cp), ("ep", layout.ep), ("etp", layout.etp), ("dp", layout.dp),
        )
        if degree > 1
    ]  # fmt: skip
    if plan.sequence_parallel:
        parts.insert(1, "sp")
    if plan.schedule is not default_schedule(layout.vp):
        parts.append(str(plan.schedule))
    if plan.zero_stage:
        parts.append(sharding_name(plan))
    return " ".join(parts) or "1 rank"


def degrees_name(plan: Plan) -> str:
    """The mesh alone, for places with little room: ``tp2 pp2 dp4``."""
    layout = plan.layout
    axes = (("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp), ("ep", layout.ep), ("dp", layout.dp))
    return " ".join(f"{axis}{degree}" for axis, degree in axes if degree > 1) or "1 rank"


def recompute_name(plan: Plan) -> str:
    """``none``, ``selective+mlp``, ``full``, ``full 5`` for the first 5 blocks of each virtual stage."""
    layers = f" {plan.recompute_layers}" if plan.recompute_layers else ""
    return "+".join((f"{plan.recompute}{layers}", *plan.recompute_modules))


def layout_words(plan: Plan) -> str:
    """The same for a headline: ``pipeline of 2 ranks × 2-way data parallel (ZeRO-2)``."""
    layout, parts = plan.layout, []
    if layout.tp > 1:
        parts.append(f"{layout.tp}-way tensor parallel" + (" with sequence parallel" if plan.sequence_parallel else ""))
    if layout.pp > 1:
        virtual = f", {layout.vp} virtual stages each" if layout.vp > 1 else ""
        parts.append(f"pipeline of {layout.pp} ranks{virtual}")
    if layout.cp > 1:
        parts.append(f"{layout.cp}-way context parallel")
    if layout.dp > 1:
        parts.append(f"{layout.dp}-way data parallel" + (f" ({sharding_name(plan)})" if plan.zero_stage else ""))
    return " × ".join(parts) or "one rank"


_DETAILS: tuple[Callable[[Plan], str], ...] = (
    lambda plan: f"mb{plan.microbatch_size}",
    lambda plan: "" if plan.recompute is Recompute.NONE else f"ac-{recompute_name(plan)}",
    lambda plan: "/".join(map(str, plan.stage_blocks)),
    lambda plan: "offload" if plan.offload_optimizer else "",
    lambda plan: "" if plan.layout.order == USUAL_ORDER else plan.layout.order,
)


def short_names(plans: Sequence[Plan]) -> dict[str, str]:
    """A name for every plan by slug, different for different plans, with no more detail than that takes."""
    slugs = list(dict.fromkeys(plan.slug for plan in plans))
    of_slug = {plan.slug: plan for plan in plans}
    names = {slug: layout_name(of_slug[slug]) for slug in slugs}
    for detail in _DETAILS:
        groups: dict[str, list[str]] = {}
        for slug, name in names.items():
            groups.setdefault(name, []).append(slug)
        for name, alike in groups.items():
            words = {slug: detail(of_slug[slug]) for slug in alike}
            if len(set(words.values())) > 1:
                names.update({slug: f"{name} {word}".rstrip() for slug, word in words.items()})
    assert len(set(names.values())) == len(slugs), "different plans have different names"
    return names
