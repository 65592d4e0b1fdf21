"""``autopar check``: whether the executor runs a plan, and what one of its ranks would call, without the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli.common import JsonFlag, app, show, terminal_width
from autopar.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopar.measurement import CountedCollective
    from autopar.plan import PlanFile


@app.command()
def check(
    plan_file: Annotated[Path, typer.Argument(help="plan.json, as `autopar plan -o` writes it.")],
    rank: Annotated[int, typer.Option(min=0, help="Which rank to be.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Ask the executor whether it runs a plan; run one rank's step dry and compare its calls with those expected."""
    from autopar.plan import read_plan_file
    from autopar.runtime.support import check_supported, unsupported_workload

    content = read_plan_file(plan_file)
    plan, workload = content.plan, content.workload
    for reason in unsupported_workload(workload):
        raise PlanError(reason.detail)
    check_supported(plan, content.model, plan.num_microbatches(workload))
    if rank >= plan.layout.world_size:
        raise PlanError(f"plan {plan.slug} has {plan.layout.world_size} ranks: --rank {rank} is none of them")
    from autopar.runtime.step.dry_run import dry_run

    rows = _rows(_expected(content, rank), dry_run(plan, content.model, workload, rank))
    agree = all(row["expected"] == row["counted"] for row in rows)
    if as_json:
        print(json.dumps({"slug": plan.slug, "rank": rank, "agree": agree, "collectives": rows}))
        return
    show(_table(rows), "", f"{plan.slug}: rank {rank} calls {'what' if agree else 'other than'} the plan expects")


def _expected(content: PlanFile, rank: int) -> Sequence[CountedCollective]:
    from autopar.estimate import Setting
    from autopar.estimate.traffic import expected_collectives
    from autopar.model.build import build_graph
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    workload, world = content.workload, content.plan.layout.world_size
    setting = Setting(
        graph=build_graph(content.model, seq_len=workload.seq_len, precision=workload.precision), workload=workload,
        cluster=load_cluster(f"cpu:1x{world}"), stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    return expected_collectives(setting, content.plan)[rank]


def _rows(expected: Sequence[CountedCollective], counted: Sequence[CountedCollective]) -> list[dict[str, Any]]:
    sides = [{(c.kind, c.axis, c.group_size): [c.count, c.num_bytes] for c in side} for side in (expected, counted)]
    keys = sorted(sides[0].keys() | sides[1].keys(), key=lambda key: (key[1], key[0]))
    return [
        {"kind": kind, "axis": axis, "group_size": size, "expected": sides[0].get(key, [0, 0]),
         "counted": sides[1].get(key, [0, 0])}
        for key in keys for kind, axis, size in [key]
    ]  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from autopar.report.columns import Column, terminal_table
    from costmodels.units import format_bytes

    def cells(side: str, index: int) -> tuple[str, ...]:
        return tuple(format_bytes(row[side][1]) if index else str(row[side][0]) for row in rows)

    columns = [
        Column(header="collective", cells=tuple(f"{row['kind']} on {row['axis']}" for row in rows), text=True),
        Column(header="ranks", cells=tuple(str(row["group_size"]) for row in rows)),
        Column(header="calls", cells=cells("counted", 0)),
        Column(header="bytes", cells=cells("counted", 1)),
        Column(header="expected", cells=cells("expected", 0)),
        Column(header="bytes ", cells=cells("expected", 1)),
    ]
    return terminal_table(columns, terminal_width(), title="Collectives of a step")
