"""Answers on the terminal: the front, why a plan is not chosen, and where its time goes against the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.estimate import Estimate
from autopar.report.columns import Column, terminal_table
from autopar.report.names import TERM_LABELS
from autopar.report.numbers import percent, signed_percent, significant
from autopar.report.style import time_scale
from autopar.search.pareto import Front, FrontPoint, spread
from autopar.search.why_not import WhyNot, waterfall

if TYPE_CHECKING:
    from rich.console import RenderableType

POINTS_PER_SIZE = 4
BAR = 24
"""Characters of the longest bar."""
SMALLEST = 5e-4
"""Share of the best step below which a difference is not shown by itself."""
LABELS = {**TERM_LABELS, "other": "other terms"}


def bar(value: float, largest: float, width: int = BAR) -> str:
    """A bar of characters in eighths, as long as ``value`` against ``largest``."""
    eighths = round(8 * width * min(1.0, abs(value) / largest)) if largest else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def front_columns(points: Sequence[FrontPoint]) -> list[Column]:
    """Points of a front, the largest cluster first."""
    rows = sorted(points, key=lambda p: (-p.world_size, p.estimate.step_s))
    scale, unit = time_scale(min(p.estimate.step_s for p in rows))
    return [
        Column(header="GPUs", cells=tuple(str(p.world_size) for p in rows)),
        Column(header=f"step {unit}", cells=tuple(significant(p.estimate.step_s / scale) for p in rows)),
        Column(header="tokens/s", cells=tuple(significant(p.tokens_per_s) for p in rows)),
        Column(header="MFU", cells=tuple(percent(p.estimate.mfu) for p in rows), drop=1),
        Column(header="GiB", cells=tuple(f"{p.estimate.memory_gib:.1f}" for p in rows)),
        Column(header="free", cells=tuple(percent(p.headroom, 0) for p in rows)),
        Column(header="GPU s/step", cells=tuple(significant(p.estimate.step_s * p.world_size) for p in rows), drop=2),
        Column(header="plan", cells=tuple(p.estimate.plan.slug for p in rows), text=True, code=True),
    ]


def front_table(front: Front, *, width: int = 120, title: str = "") -> RenderableType:
    """The front, thinned to a few points of each size, and the sizes on which nothing fits."""
    from rich.console import Group
    from rich.text import Text

    shown = spread(front.points, POINTS_PER_SIZE)
    considered = sum(front.considered.values())
    lines = [
        f"{len(front.points)} plans that none beats in step time, memory and GPUs at once, {len(shown)} of them shown; "
        f"{considered:,} considered on {len(front.considered)} cluster sizes."
    ]
    if front.unfit:
        sizes = ", ".join(f"{size} GPUs ({reason})" for size, reason in front.unfit.items())
        lines.append(f"Nothing fits on {sizes}.")
    return Group(terminal_table(front_columns(shown), width, title=title), Text(), *(Text(line) for line in lines))


def waterfall_columns(other: Estimate, best: Estimate) -> list[Column]:
    """Terms in which a plan differs from the best, largest loss first, with the whole; bars go right for losses."""
    scale, unit = time_scale(best.step_s)
    steps = waterfall(other, best, smallest=SMALLEST)
    names = sorted(steps, key=lambda name: (name == "other", -steps[name]))
    largest = max((abs(seconds) for seconds in steps.values()), default=0.0)
    changes = [steps[name] for name in names]

    def of(estimate: Estimate) -> list[str]:
        rest = estimate.step_s - sum(estimate.breakdown[name] for name in names if name != "other")
        return [significant((estimate.breakdown[n] if n != "other" else rest) / scale) for n in names]

    difference = other.step_s - best.step_s
    return [
        Column(header="part of the step", cells=(*(LABELS[name] for name in names), "step"), text=True),
        Column(header=f"best {unit}", cells=(*of(best), significant(best.step_s / scale))),
        Column(header=f"this {unit}", cells=(*of(other), significant(other.step_s / scale))),
        Column(
            header="difference",
            cells=tuple(signed_percent(change / best.step_s) for change in (*changes, difference)),
        ),
        Column(header="faster", cells=(*(bar(c, largest).rjust(BAR) if c < 0 else "" for c in changes), ""), drop=1),
        Column(header="slower", cells=(*(bar(c, largest) if c > 0 else "" for c in changes), ""), text=True, drop=1),
    ]


def why_not_verdict(answer: WhyNot) -> str:
    """One line: whether the plan can be used, and what it loses."""
    slug, best = answer.plan.slug, answer.best
    if answer.rejections:
        return f"{slug} cannot be used: {', '.join(dict.fromkeys(r.reason for r in answer.rejections))}"
    assert answer.slower is not None
    if answer.plan == best.plan:
        return f"{slug} is the best plan"
    place = f"rank {answer.rank}" if answer.rank is not None else f"not among the best {answer.looked_at}"
    if answer.slower < 0:
        return f"{slug} can be used and is {percent(-answer.slower)} faster than the best of the space that is searched"
    return f"{slug} can be used ({place}): {percent(answer.slower)} slower than the best, {best.plan.slug}"


def remedy_columns(answer: WhyNot) -> list[Column]:
    """Plans near a refused one that can be used."""
    found = answer.remedies
    scale, unit = time_scale(answer.best.step_s)
    return [
        Column(header="change", cells=tuple(r.words for r in found), text=True, wraps=True),
        Column(header=f"step {unit}", cells=tuple(significant(r.estimate.step_s / scale) for r in found)),
        Column(
            header="against best",
            cells=tuple(signed_percent(r.estimate.step_s / answer.best.step_s - 1) for r in found),
        ),
        Column(header="GiB", cells=tuple(f"{r.estimate.memory_gib:.1f}" for r in found)),
        Column(header="plan", cells=tuple(r.estimate.plan.slug for r in found), text=True, code=True),
    ]


def why_not_table(answer: WhyNot, *, width: int = 120) -> RenderableType:
    """Verdict, limits, remedies, and the difference to the best by terms."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Text(why_not_verdict(answer), style="bold")]
    parts += [Padding(Text(f"{r.reason}: {r.detail}"), (0, 0, 0, 2)) for r in answer.rejections]
    if answer.rejections and answer.remedies:
        pairs = all(" and " in remedy.words for remedy in answer.remedies)
        title = "Two changes that make it fit" if pairs else "One change that makes it fit"
        parts += [Text(), terminal_table(remedy_columns(answer), width, title=title)]
    elif answer.rejections:
        parts.append(Text("No plan within two changes can be used."))
    if answer.estimate is not None and answer.plan != answer.best.plan:
        columns = waterfall_columns(answer.estimate, answer.best)
        title = "Against the best plan" + (", if it did fit" if answer.rejections else "")
        parts += [Text(), terminal_table(columns, width, title=title, strong=(len(columns[0].cells) - 1,))]
    return Group(*parts)
