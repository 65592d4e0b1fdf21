"""``autopar plan``, ``estimate`` and ``models``: answers from data sheets, without a GPU."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli.common import (
    Batch,
    ClusterOption,
    JsonFlag,
    Model,
    Offload,
    OptimizerOption,
    OutOption,
    PrecisionOption,
    SeqLen,
    StackOption,
    app,
    estimate_json,
    say,
    setting_of,
    show,
    terminal_width,
)  # fmt: skip
from autopar.cli.mixed import mixed_setting_of, plan_mixed
from autopar.errors import InputError
from autopar.workload import Optimizer, Precision

if TYPE_CHECKING:
    from autopar.estimate import Estimate, Setting


@app.command()
def plan(
    cluster: ClusterOption,
    model: Annotated[
        str, typer.Argument(help="Preset (llama3-70b), config.json or its folder, or model.toml; not with --from.")
    ] = "",
    global_batch: Annotated[int | None, typer.Option(min=1, help="Sequences per optimizer step.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")] = None,
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    top: Annotated[int, typer.Option(min=1, help="Plans to show.")] = 10,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="Raw ranks, also of plans with the same degrees and sharding.")
    ] = False,
    offload: Offload = True,
    why_not: Annotated[
        str, typer.Option("--why-not", metavar="PLAN", help="Say why this plan is not the answer.")
    ] = "",
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Front of step time, free memory and GPUs over parts of the cluster.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Does the choice survive errors of the fitted numbers?")
    ] = False,
    old_plan: Annotated[
        Path | None, typer.Option("--from", help="plan.json that runs now: what to change for this cluster.")
    ] = None,
    lost: Annotated[str, typer.Option(help="With --from: ranks or nodes that are gone, such as 3,8-15,node2.")] = "",
    remaining_steps: Annotated[int, typer.Option(min=0, help="With --from: steps still to train; 0 unknown.")] = 0,
    renumber: Annotated[bool, typer.Option("--renumber", help="With --from: order nodes so that less moves.")] = False,
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Rank the parallel plans of a model on a cluster, from data sheets alone."""
    if old_plan is not None:
        _replan(
            old_plan, cluster, stack, lost=lost, remaining_steps=remaining_steps, renumber=renumber, as_json=as_json,
            out=out,
        )  # fmt: skip
        return
    for name, given in (("MODEL", model), ("--global-batch", global_batch), ("--seq-len", seq_len)):
        if not given:
            raise InputError(f"plan needs {name}; only --from a plan.json goes without")
    assert global_batch is not None and seq_len is not None
    from autopar.search.exhaustive import search
    from autopar.search.reason import reason
    from autopar.search.space import Space

    mixed = mixed_setting_of(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    if mixed is not None:
        if why_not or pareto or sensitivity or all_variants:
            raise InputError(f"{cluster} is a mixed cluster: its plans are ranked without further options")
        plan_mixed(mixed[1], top=top, as_json=as_json, out=out, title=f"{mixed[0].name} on {cluster}")
        return
    spec, setting = setting_of(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    title, more = f"{spec.name} on {cluster}", {}
    space = Space(offload=offload)
    result = search(setting, top=top, space=space, distinct=not all_variants)
    best = result.best[0]
    asked = bool(why_not) or pareto or sensitivity
    if asked:
        from autopar.cli.answers import plan_answers

        more = plan_answers(
            setting, space, title, pareto=pareto, why_not=why_not, sensitivity=sensitivity, as_json=as_json, out=out
        )
    if as_json:
        plans = [{"rank": i + 1, **estimate_json(e), "reason": reason(e, best)} for i, e in enumerate(result.best)]
        found = {
            "considered": result.considered,
            "priced": result.priced,
            "feasible": result.feasible,
            "rejected": dict(result.rejected),
            "bound_s": result.bound_s if isfinite(result.bound_s) else None,
            "seconds": result.seconds,
        }
        document = {"schema_version": 1, "plans": plans, "search": found, "assumptions": best.assumptions}
        print(json.dumps({**document, **more}))
    elif not asked:
        from autopar.report.tables import plans_table, search_line

        show(plans_table(result.best, width=terminal_width(), title=title), search_line(result))
    if out is not None:
        _write_plan(out, spec, setting, best)


def _write_plan(out: Path, spec: Any, setting: Setting, best: Estimate) -> None:
    from autopar.plan import PlanFile, write_plan_file

    content = PlanFile(
        slug=best.plan.slug,
        model=spec,
        workload=setting.workload,
        plan=best.plan,
        predicted=best.headline,
    )
    write_plan_file(out / "plan.json", content)
    say(f"wrote {out / 'plan.json'}")


def _replan(
    path: Path, cluster: str, stack: str, *, lost: str, remaining_steps: int, renumber: bool, as_json: bool,
    out: Path | None,
) -> None:  # fmt: skip
    """``plan --from``: go on with a run on another cluster."""
    from autopar.plan import read_plan_file
    from autopar.report.replan_tables import replan_json, replan_table
    from autopar.search.replan import replan
    from autopar.search.replan import setting_of as setting_for
    from autopar.search.reshard import parse_lost
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    old = read_plan_file(path)
    setting = setting_for(old, load_cluster(cluster), load_stack(stack))
    gone = parse_lost(lost, setting.cluster.devices_per_node, old.plan.layout.world_size)
    found = replan(old, setting, lost=gone, remaining_steps=remaining_steps or None, renumber=renumber)
    if as_json:
        print(json.dumps({"schema_version": 1, **replan_json(found)}))
    else:
        show(replan_table(found, width=terminal_width()))
    if out is not None:
        _write_plan(out, old.model, setting, found.new.estimate)


@app.command()
def estimate(
    model: Model,
    slug: Annotated[str, typer.Argument(help="Plan, such as tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-none.sp")],
    cluster: ClusterOption,
    global_batch: Batch,
    seq_len: SeqLen,
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Price one plan: step time by terms, memory by items, and what the numbers rest on."""
    from autopar.estimate import estimate as price
    from autopar.plan import parse_slug

    _, setting = setting_of(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    result = price(setting, parse_slug(slug))
    document = {"schema_version": 1, **estimate_json(result), "assumptions": list(result.assumptions)}
    if as_json:
        print(json.dumps(document))
    else:
        from autopar.report.tables import plan_detail

        show(plan_detail(result, width=terminal_width()))
    if out is not None:
        from costmodels.records import write_json

        write_json(out / "estimate.json", document)
        say(f"wrote {out / 'estimate.json'}")


@app.command()
def models() -> None:
    """List the models, devices and stacks that ship with the program."""
    from autopar.model.presets import preset_names
    from costmodels.hardware import device_names
    from costmodels.stack import stack_names

    for title, names in (("models", preset_names()), ("devices", device_names()), ("stacks", stack_names())):
        print(f"{title}: {', '.join(names)}")
