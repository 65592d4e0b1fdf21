"""``autopar explain`` and ``compare``, and what ``plan`` answers beside its ranking."""

from __future__ import annotations

import json
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
    progress,
    say,
    setting_of,
    show,
    terminal_width,
)  # fmt: skip
from autopar.workload import Optimizer, Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autopar.estimate import Setting
    from autopar.search.space import Space

RANKED = 100
"""Plans among which the rank of one that is asked about is known."""


@app.command()
def explain(
    model: Model,
    cluster: ClusterOption,
    global_batch: Batch,
    seq_len: SeqLen,
    slug: Annotated[str, typer.Argument(help="Plan; without it the best one.")] = "",
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    offload: Offload = True,
    replan: Annotated[bool, typer.Option(help="Search anew with each improvement.")] = True,
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Say what binds a plan, and what 10 percent more of each resource would buy."""
    from autopar.cli.answers_json import explain_json
    from autopar.search.exhaustive import search
    from autopar.search.explain import explain as explain_plan
    from autopar.search.space import Space
    from autopar.search.why_not import whole_slug

    _, setting = setting_of(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    space = Space(offload=offload)
    named = whole_slug(slug, setting.cluster.world_size) if slug else None
    chosen = named or search(setting, top=1, space=space).best[0].plan
    answer = explain_plan(setting, chosen, replan=replan, space=space)
    if as_json:
        print(json.dumps({"schema_version": 1, **explain_json(answer)}))
    else:
        from autopar.report.binding_tables import explain_table

        show(explain_table(answer, width=terminal_width()))
    if out is not None:
        from autopar.report.plots.binding import what_binds

        _write(out, {"explain": explain_json(answer)}, {"explain": what_binds(answer)})


@app.command()
def compare(
    model: Model,
    cluster: ClusterOption,
    global_batch: Batch,
    seq_len: SeqLen,
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    offload: Offload = True,
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Hold strategies, cluster sizes and degrees side by side; draw them with -o."""
    from autopar.cli.answers_json import comparison_json
    from autopar.search.space import Space
    from autopar.search.strategies import compare_strategies

    spec, setting = setting_of(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    with progress() as on_message:
        found = compare_strategies(
            setting,
            space=Space(offload=offload),
            on_size=lambda done, of: on_message(_part("cluster sizes", done, of)),
        )
    title = f"{spec.name} on {cluster}"
    if as_json:
        print(json.dumps({"schema_version": 1, **comparison_json(found)}))
    else:
        from autopar.report.strategy_tables import comparison_table

        show(comparison_table(found, width=terminal_width(), title=title))
    if out is not None:
        from autopar.report.plots.strategies import degree_map, scaling_curves, strategy_bars

        figures = {
            "strategies": strategy_bars(found, title),
            "scaling": scaling_curves(found, title),
            "map": degree_map(found, title),
        }
        _write(out, {"compare": comparison_json(found)}, figures)


def plan_answers(
    setting: Setting,
    space: Space,
    title: str,
    *,
    pareto: bool,
    why_not: str,
    sensitivity: bool,
    as_json: bool,
    out: Path | None,
) -> dict[str, Any]:
    """What options of ``plan`` ask for: shown unless ``as_json``, drawn into ``out``, and returned as plain data."""
    document: dict[str, Any] = {}
    tables: list[Any] = []
    figures: dict[str, Figure] = {}
    with progress() as on_message:
        if why_not:
            _why_not(setting, space, why_not, document, tables, figures, out is not None)
        if pareto:
            _pareto(setting, space, title, document, tables, figures, out is not None, on_message)
        if sensitivity:
            _sensitivity(setting, space, document, tables, figures, out is not None, on_message)
    if not as_json and tables:
        show(*[part for table in tables for part in (table, "")][:-1])
    if out is not None and document:
        _write(out, document, figures)
    return document


def _why_not(
    setting: Setting, space: Space, slug: str, document: dict[str, Any], tables: list[Any],
    figures: dict[str, Figure], draw: bool,
) -> None:  # fmt: skip
    from autopar.cli.answers_json import why_not_json
    from autopar.report.answer_tables import why_not_table
    from autopar.search.exhaustive import search
    from autopar.search.why_not import whole_slug
    from autopar.search.why_not import why_not as ask

    plan = whole_slug(slug, setting.cluster.world_size)
    answer = ask(setting, plan, search(setting, top=RANKED, space=space))
    document["why_not"] = why_not_json(answer)
    tables.append(why_not_table(answer, width=terminal_width()))
    if draw and answer.estimate is not None and answer.plan != answer.best.plan:
        from autopar.report.plots.waterfall import step_waterfall

        figures["why-not"] = step_waterfall(answer.estimate, answer.best)


def _pareto(
    setting: Setting, space: Space, title: str, document: dict[str, Any], tables: list[Any],
    figures: dict[str, Figure], draw: bool, on_message: Any,
) -> None:  # fmt: skip
    from autopar.cli.answers_json import front_json
    from autopar.report.answer_tables import front_table
    from autopar.search.pareto import pareto_front

    front = pareto_front(setting, space=space, on_size=lambda done, of: on_message(_part("cluster sizes", done, of)))
    document["pareto"] = front_json(front)
    tables.append(front_table(front, width=terminal_width(), title=title))
    if draw:
        from autopar.report.plots.front import pareto_plot

        figures["pareto"] = pareto_plot(front, title)


def _sensitivity(
    setting: Setting, space: Space, document: dict[str, Any], tables: list[Any], figures: dict[str, Figure],
    draw: bool, on_message: Any,
) -> None:  # fmt: skip
    from autopar.cli.answers_json import sensitivity_json
    from autopar.report.binding_tables import sensitivity_table
    from autopar.validate.sensitivity import sensitivity as judge

    answer = judge(setting, space=space, on_trial=lambda done, of: on_message(_part("fitted numbers", done, of)))
    document["sensitivity"] = sensitivity_json(answer)
    tables.append(sensitivity_table(answer, width=terminal_width()))
    if draw:
        from autopar.report.plots.binding import sensitivity_bars

        figures["sensitivity"] = sensitivity_bars(answer)


def _part(what: str, done: int, of: int) -> dict[str, Any]:
    return {"answer": what, "done": done, "of": of}


def _write(out: Path, documents: dict[str, Any], figures: dict[str, Figure]) -> None:
    from autopar.report.style import save_png
    from costmodels.records import write_json

    for name, content in documents.items():
        path = out / f"{name.replace('_', '-')}.json"
        write_json(path, {"schema_version": 1, **content})
        say(f"wrote {path}")
    for name, figure in figures.items():
        path = out / f"{name}.png"
        save_png(figure, path)
        say(f"wrote {path}")
