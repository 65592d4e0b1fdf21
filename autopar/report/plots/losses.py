"""Losses of all plans: the same curve, and how nearly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autopar.errors import InputError
from autopar.measurement import Measurement
from autopar.report.style import ACCENT, DASHES, MUTED, SERIES, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curves(
    measurements: Sequence[Measurement], names: Mapping[str, str], reference: Measurement | None = None
) -> Figure:
    """Loss over steps of every plan on one axis; below, how far the plans lie apart at each step.

    Apart from the reference (one process) where there is one, from each other otherwise.

    Raises InputError if no run has a loss.
    """
    base = reference is not None and bool(reference.losses)
    runs = [m for m in (*([reference] if reference else []), *measurements) if m.losses]
    if not runs:
        raise InputError("no run has losses to draw")
    steps = min(len(m.losses) for m in runs)
    losses = np.asarray([m.losses[:steps] for m in runs])
    apart = np.abs(losses - losses[0]).max(axis=0) if base else losses.max(axis=0) - losses.min(axis=0)
    with styled():
        from matplotlib.ticker import MaxNLocator

        figure = new_figure(5.8)
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.2))
        x = np.arange(1, steps + 1)
        for i, run in enumerate(runs):
            # Each curve is drawn thinner over the last, so that all can be seen where they coincide.
            width = 7.0 - 5.4 * i / max(1, len(runs) - 1)
            top.plot(
                x, losses[i], linewidth=width, label=names[run.slug], color=SERIES[i % len(SERIES)],
                linestyle=DASHES[i % len(DASHES)], solid_capstyle="round",
            )  # fmt: skip
        top.set(ylabel="loss [nats per token]")
        top.set_title("The same training under every plan")
        top.grid(axis="y")
        legend = top.legend(ncols=2 if len(runs) > 5 else 1, loc="upper right", handlelength=2.6)
        for line in legend.get_lines():
            line.set_linewidth(2.6)
        below.set(xlabel="step", ylabel="max |Δ|" if base else "max − min")
        below.grid(axis="y")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        seen = apart[apart > 0]
        if len(seen):
            below.plot(x, np.where(apart > 0, apart, np.nan), linewidth=1.6, marker="o", markersize=4, color=ACCENT)
            below.set_yscale("log")
            below.set_ylim(10 ** np.floor(np.log10(seen.min()) - 0.05), 10 ** np.ceil(np.log10(seen.max()) + 0.05))
        note = f"at most {apart.max():.1e} " + (f"from {names[runs[0].slug]}" if base else "apart")
        note = note if len(runs) > 1 else "one run"
        below.annotate(note, (1.0, 1.0), xycoords="axes fraction", ha="right", va="bottom", fontsize=10.5, color=MUTED)
    return figure
