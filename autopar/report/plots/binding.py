"""What binds a plan and what more of it would buy; which fitted numbers its choice hangs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.report.binding_tables import SHARE_LABELS
from autopar.report.names import degrees_name, layout_name
from autopar.report.numbers import percent, signed_percent
from autopar.report.style import ACCENT, GRID, INK, MUTED, PAPER, legend_above, new_figure, styled
from autopar.search.explain import MORE, Explanation
from autopar.validate.sensitivity import Sensitivity, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.46
SHARE_COLORS = {
    "compute": "#1f5fa8",
    "memory bandwidth": "#1fa79a",
    "node link": "#d55e00",
    "network link": "#f0a830",
    "launches": "#9a86c8",
    "host": "#8f2d56",
    "pipeline_bubble": "#c3c8cf",
    "processor_sharing": "#6f7783",
    "stragglers": "#a8b0ba",
    "fixed": "#4a4f57",
}
REPLANNED = "#8cc4f0"


def what_binds(answer: Explanation) -> Figure:
    """Shares of the step by resource, and beside each what 10 percent more buys, with the same plan and replanned."""
    gains = {found.resource.value: found for found in answer.improvements}
    names = sorted({*answer.shares, *gains}, key=lambda name: (-answer.shares.get(name, 0.0), name))
    with styled():
        from matplotlib.ticker import PercentFormatter

        figure = new_figure(1.9 + ROW * len(names), width=10.5)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1.0))
        rows = range(len(names))
        shares = [max(0.0, answer.shares.get(name, 0.0)) for name in names]
        left.barh(rows, shares, height=0.66, color=[SHARE_COLORS.get(name, GRID) for name in names])
        for row, share in enumerate(shares):
            _note(left, share, row, percent(share) if share else "")
        left.set_yticks(rows, [SHARE_LABELS[name] for name in names])
        left.set_xlabel("share of the step")
        left.set_xlim(0, 1.16 * max(shares))
        replanned = any(found.replanned_gain is not None for found in gains.values())
        height = 0.33 if replanned else 0.66
        for row, name in enumerate(names):
            found = gains.get(name)
            if found is None:
                continue
            shift = 0.17 if replanned else 0.0
            label = {"label": "the same plan"} if row == 0 else {}
            right.barh(row - shift, found.gain, height=height, color=ACCENT, **label)
            end = found.gain
            if found.replanned_gain is not None:
                label = {"label": "the best plan then"} if row == 0 else {}
                right.barh(row + shift, found.replanned_gain, height=height, color=REPLANNED, **label)
                end = max(end, found.replanned_gain)
            other = found.replanned is not None and found.replanned != answer.estimate.plan
            text = signed_percent(end) if end > 5e-5 else "0"
            _note(right, end, row, f"{text}  {degrees_name(found.replanned)}" if other and found.replanned else text)
        largest = max((max(f.gain, f.replanned_gain or 0.0) for f in gains.values()), default=MORE)
        elsewhere = any(f.replanned not in (None, answer.estimate.plan) for f in gains.values())
        right.set_xlim(0, (1.9 if elsewhere else 1.25) * largest)
        right.set_xlabel(f"throughput gained by {MORE:.0%} more of it")
        for axes in (left, right):
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        left.set_ylim(len(names) - 0.45, -0.55)
        pad = 30.0 if replanned else 12.0
        if replanned:
            legend_above(right, 2)
        left.set_title(f"What binds {layout_name(answer.estimate.plan)}", pad=pad)
        right.set_title("What more would buy", pad=pad)
    return figure


OUTCOMES = {"the same plan": ACCENT, "a variant of it": "#8cc4f0", "another answer": "#d55e00", "it does not fit": INK}


def outcome(trial: Trial) -> str:
    """What a trial did to the choice."""
    if not trial.fits or trial.best is None:
        return "it does not fit"
    if trial.same_plan:
        return "the same plan"
    return "a variant of it" if trial.survives else "another answer"


def sensitivity_bars(answer: Sensitivity) -> Figure:
    """How the chosen plan's step moves with each number, both signs; the colour says which plan is then the best."""
    by: dict[str, list[Trial]] = {}
    for trial in answer.trials:
        by.setdefault(trial.doubt.name, []).append(trial)
    now = answer.chosen.step_s

    def reach(name: str) -> float:
        return max(abs(trial.chosen.step_s / now - 1) for trial in by[name])

    names = sorted(by, key=lambda name: (-reach(name), name))
    with styled():
        from matplotlib.patches import Patch
        from matplotlib.ticker import PercentFormatter

        figure = new_figure(2.1 + ROW * len(names), width=10.5)
        axes = figure.add_subplot()
        used = []
        for row, name in enumerate(names):
            for trial in by[name]:
                high = trial.factor > 1
                change, kind = trial.chosen.step_s / now - 1, outcome(trial)
                used.append(kind)
                axes.barh(
                    row + (0.17 if high else -0.17), change, height=0.31, color=OUTCOMES[kind],
                    hatch=None if high else "////", edgecolor=PAPER, linewidth=0.0,
                )  # fmt: skip
                if trial.regret:
                    text = f"{layout_name(trial.best.plan)} is {percent(trial.regret)} faster" if trial.best else ""
                    axes.annotate(
                        text, (change, row + (0.17 if high else -0.17)), xytext=(5 if change >= 0 else -5, 0),
                        textcoords="offset points", va="center", ha="left" if change >= 0 else "right", fontsize=9,
                        color=MUTED,
                    )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(names)), names, fontsize=9.5)
        axes.set_ylim(len(names) - 0.45, -0.55)
        edge = 1.25 * max(reach(name) for name in names)
        axes.set_xlim(-edge, edge)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("change of the chosen plan's step")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        handles = [Patch(facecolor=OUTCOMES[kind], label=kind) for kind in OUTCOMES if kind in used]
        handles += [
            Patch(facecolor=MUTED, label=f"{answer.error:.0%} too high"),
            Patch(facecolor=MUTED, hatch="////", edgecolor=PAPER, linewidth=0.0, label=f"{answer.error:.0%} too low"),
        ]
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=len(handles), handlelength=1.4,
            handleheight=1.0, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
        name = layout_name(answer.chosen.plan)
        figure.suptitle(
            f"Does the choice of {name} survive errors of {answer.error:.0%}?", x=0.01, ha="left", fontweight="bold",
            fontsize=13.5,
        )  # fmt: skip
    return figure


def _note(axes: Axes, end: float, row: float, text: str) -> None:
    axes.annotate(
        text, (end, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10.5, color=MUTED
    )  # fmt: skip
