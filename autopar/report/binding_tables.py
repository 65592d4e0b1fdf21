"""What binds a plan, and whether its choice survives errors, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.report.answer_tables import bar
from autopar.report.columns import Column, terminal_table
from autopar.report.names import TERM_LABELS
from autopar.report.numbers import parts_of, percent, signed_percent, significant
from autopar.report.style import time_scale
from autopar.search.explain import FIXED, MORE, WAITING, Explanation
from autopar.search.resources import Resource
from autopar.validate.sensitivity import Sensitivity, Trial
from costmodels.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

SHARE_LABELS = {
    "compute": "compute (FLOP/s)",
    "memory bandwidth": "memory bandwidth",
    "node link": "link in the node",
    "network link": "network",
    "launches": "launches of kernels",
    "host": "host (offload)",
    "memory capacity": "memory capacity",
    **{term: f"{TERM_LABELS[term]} (waiting)" for term in WAITING},
    FIXED: "fixed",
}


def binding_verdict(answer: Explanation) -> str:
    """One line: what binds, and whether memory does."""
    share = answer.shares[answer.binding]
    free = f"{percent(answer.headroom, 0)} of the memory is free"
    if answer.headroom < 0:
        free = f"it needs {percent(-answer.headroom, 0)} more memory than a device has"
    capacity = next(i for i in answer.improvements if i.resource is Resource.MEMORY_CAPACITY)
    first = answer.improvements[0]
    if capacity.replanned_gain is not None and capacity.replanned_gain > 1e-6:
        free += f", yet {MORE:.0%} more would make a plan possible that is {percent(capacity.replanned_gain)} faster"
    return (
        f"{SHARE_LABELS[answer.binding]} binds: {percent(share, 0)} of the step; {MORE:.0%} more {first.resource} buys "
        f"{percent(first.gain)} with this plan; {free}"
    )


def share_columns(answer: Explanation) -> list[Column]:
    """Shares of the step by resource and what more of each buys, the largest share first."""
    gains = {i.resource.value: i for i in answer.improvements}
    names = sorted({*answer.shares, *gains}, key=lambda name: (-answer.shares.get(name, 0.0), name))
    scale, unit = time_scale(answer.estimate.step_s)
    shares = [max(0.0, answer.shares.get(name, 0.0)) for name in names]
    rounded = parts_of([100 * share / sum(shares) for share in shares], 100.0, 1)
    plans = [gains[n].replanned if n in gains else None for n in names]
    same = answer.estimate.plan
    return [
        Column(header="what the step waits for", cells=tuple(SHARE_LABELS[n] for n in names), text=True),
        Column(header=unit, cells=tuple(significant(s * answer.estimate.step_s / scale) if s else "" for s in shares)),
        Column(header="%", cells=tuple(text if s else "" for text, s in zip(rounded, shares, strict=True))),
        Column(header="", cells=tuple(bar(share, max(shares), 20) for share in shares), text=True, drop=2),
        Column(
            header=f"{MORE:.0%} more buys",
            cells=tuple(signed_percent(gains[n].gain) if n in gains else "" for n in names),
        ),
        Column(
            header="replanned",
            cells=tuple(
                signed_percent(gains[n].replanned_gain or 0.0)
                if n in gains and gains[n].replanned_gain is not None else ""
                for n in names
            ),
        ),
        Column(
            header="with",
            cells=tuple("" if p is None else "the same plan" if p == same else p.slug for p in plans),
            text=True, code=True, drop=1,
        ),
    ]  # fmt: skip


def term_columns(answer: Explanation) -> list[Column]:
    """Percent of the step by term and resource."""
    step = answer.estimate.step_s
    rows = {term: row for term, row in answer.by_term.items() if abs(sum(row.values())) > 5e-4 * step}
    resources = [
        name
        for name in (*(r.value for r in Resource), FIXED)
        if any(abs(row.get(name, 0.0)) > 5e-4 * step for row in answer.by_term.values())
    ]

    def cell(value: float) -> str:
        return percent(value / step) if abs(value) > 5e-4 * step else ""

    return [
        Column(header="part of the step", cells=tuple(TERM_LABELS[term] for term in rows), text=True),
        Column(header="% of step", cells=tuple(percent(sum(row.values()) / step) for row in rows.values())),
        *(Column(header=name, cells=tuple(cell(row.get(name, 0.0)) for row in rows.values())) for name in resources),
    ]


def explain_table(answer: Explanation, *, width: int = 120) -> RenderableType:
    """Verdict, shares and gains, and terms by resource."""
    from rich.console import Group
    from rich.text import Text

    price = answer.estimate
    scale, unit = time_scale(price.step_s)
    headline = Text.assemble(
        (price.plan.slug, "bold"),
        f"\n{significant(price.step_s / scale)} {unit} per step, MFU {percent(price.mfu)}, "
        f"{price.memory_gib:.1f} of {price.memory_limit / GIB:.1f} GiB\n",
        f"{binding_verdict(answer)}\n",
    )
    caption = Text(
        "Shares: the step times its elasticity by each rate, what an infinite rate would save on the same critical "
        "path; waiting ranks count by themselves. buys: throughput of the same plan; replanned: of the best plan then.",
        style="dim",
    )
    return Group(
        headline, terminal_table(share_columns(answer), width), Text(), terminal_table(term_columns(answer), width),
        Text(), caption,
    )  # fmt: skip


def sensitivity_verdict(answer: Sensitivity) -> str:
    """One line: whether the choice survives."""
    trials, changes = len(answer.trials), answer.changes
    numbers = len({trial.doubt.name for trial in answer.trials})
    tried = f"{numbers} fitted numbers, each {answer.error:.0%} too high and too low"
    if not changes:
        return f"{answer.chosen.plan.slug} stays the answer under all of {tried}"
    lost = f"another answer wins in {len(changes)} of {trials} trials ({tried})"
    return f"{answer.chosen.plan.slug}: {lost}; keeping it costs at most {percent(answer.worst_regret)}"


def band_sentence(answer: Sensitivity) -> str:
    """How far the runner-up is, against how well steps like this are known."""
    chosen, rule = answer.chosen, answer.chosen.step_rule
    band = f"{signed_percent(rule.low - 1, 0)} to {signed_percent(rule.high - 1, 0)}"
    fits = "" if answer.fits_at_high else " At the upper end of its memory band it does not fit: watch its peak."
    if answer.runner_up is None or answer.margin is None:
        return f"There is no other answer.{fits}"
    apart = (
        "the order holds even if their errors were independent"
        if answer.told_apart
        else "the order rests on their errors being alike, as they are for plans of one engine on one machine"
    )
    return (
        f"The next answer, {answer.runner_up.plan.slug}, is {percent(answer.margin)} slower. Steps like {chosen.stack} "
        f"on {chosen.device} lie within {band} of their prediction in four of five runs: {apart}.{fits}"
    )


def _outcome(trial: Trial) -> str:
    if trial.best is None:
        return "nothing fits"
    if not trial.fits:
        return f"does not fit; {trial.best.plan.slug}"
    return trial.best.plan.slug


def change_columns(answer: Sensitivity) -> list[Column]:
    """Trials in which another answer wins."""
    rows = answer.changes
    return [
        Column(header="number", cells=tuple(t.doubt.name for t in rows), text=True),
        Column(header="off by", cells=tuple(signed_percent(t.factor - 1, 0) for t in rows)),
        Column(header="then best", cells=tuple(_outcome(t) for t in rows), text=True, code=True),
        Column(header="regret", cells=tuple("-" if t.regret is None else percent(t.regret) for t in rows)),
    ]


def trial_columns(answer: Sensitivity) -> list[Column]:
    """Every number: how the chosen plan's step moves, and what keeping it costs."""
    names = list(dict.fromkeys(t.doubt.name for t in answer.trials))
    signs = sorted({trial.factor for trial in answer.trials})
    by = {(t.doubt.name, t.factor): t for t in answer.trials}
    columns = [Column(header="number", cells=tuple(names), text=True)]
    for factor in signs:
        found = [by[name, factor] for name in names]
        header = signed_percent(factor - 1, 0)
        moved = tuple(signed_percent(t.chosen.step_s / answer.chosen.step_s - 1) for t in found)
        regret = tuple("does not fit" if t.regret is None else percent(t.regret, 2) for t in found)
        verdict = tuple("same" if t.same_plan else "variant" if t.survives else "another" for t in found)
        columns += [
            Column(header=f"{header}: step", cells=moved),
            Column(header="regret", cells=regret),
            Column(header="answer", cells=verdict, text=True),
        ]
    return columns


def sensitivity_table(answer: Sensitivity, *, width: int = 120) -> RenderableType:
    """Verdict, all numbers, what wins where another answer does, and what to measure then."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text(sensitivity_verdict(answer), style="bold"), Text(band_sentence(answer)), Text()]
    parts.append(terminal_table(trial_columns(answer), width))
    if answer.changes:
        parts += [Text(), terminal_table(change_columns(answer), width, title="Where another answer wins"), Text()]
        parts.append(Text("To decide, measure", style="bold"))
        by_measure: dict[str, list[str]] = {}
        for trial in answer.changes:
            names = by_measure.setdefault(trial.doubt.measure, [])
            names += [trial.doubt.name] if trial.doubt.name not in names else []
        parts += [Padding(Text(f"{words} ({', '.join(n)})"), (0, 0, 0, 2)) for words, n in by_measure.items()]
    return Group(*parts)
