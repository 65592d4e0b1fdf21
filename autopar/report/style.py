"""One look for all figures: colours, fonts, scales, and figures as PNG files or as SVG for a page.

Each part of a step and each item of memory has one colour wherever it appears. Compute is blue to teal, communication
warm, waiting grey, upkeep green: the family is told by hue, its members by lightness. Neighbours in a bar differ for
readers with any of the three colour blindnesses (tests/report/test_style.py). SVG figures take ink, accent, grid and
background from the page's CSS variables, so that one figure serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodels.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 9.0
"""Inches of a figure's width."""

INK, MUTED, GRID, PAPER = "#1d2430", "#5d6675", "#d9dde3", "#ffffff"
ACCENT = "#1e5ea7"

TERM_COLORS = {
    "forward": "#8cc4f0",
    "backward": "#1f5fa8",
    "recompute": "#1fa79a",
    "tensor_parallel": "#d55e00",
    "context_parallel": "#8f2d56",
    "expert_parallel": "#2f3f8f",
    "launch_bound": "#9a86c8",
    "pipeline_bubble": "#d3d6db",
    "pipeline_transfer": "#f0a830",
    "processor_sharing": "#6f7783",
    "gradient_accumulation": "#d3e07a",
    "data_parallel": "#f08cc0",
    "optimizer": "#23814c",
    "step_overhead": "#4a4f57",
    "stragglers": "#a8b0ba",
}

MEMORY_COLORS = {
    "parameters": "#6a51a3",
    "gradients": "#d3e07a",
    "optimizer": "#23814c",
    "activations": "#8cc4f0",
    "working": "#35b5a6",
    "buffers": "#c2187f",
    "fragmentation": "#7e5aa8",
    "reserve": "#c9ced5",
}

SERIES = (ACCENT, "#d55e00", "#23814c", "#d987b4", "#f0a830", "#35b5a6", "#6a51a3", "#8b929c")
"""Colours of lines and points that stand for neither terms nor items."""

DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)), (0, (10, 3)), (0, (1, 1.5)), (0, (4, 1, 1, 1)),
)  # fmt: skip

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12.0,
    "axes.labelsize": 11.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "autopar",
}

_CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", ACCENT: "--accent"}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style; matplotlib's own settings come back afterwards."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure of this size in inches, without pyplot and its global state. Call it inside ``styled``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``svg`` element for a page: scalable, with ids of its own and the page's colours.

    Args:
        figure: to draw.
        name: unique on the page; prefixes the ids.
        description: what the figure shows, for readers who cannot see it.
    """
    from html import escape

    stream = io.StringIO()
    with styled():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    for color, variable in _CSS_VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    head, tail = text[: text.index(">")], text[text.index(">") :]
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    label = escape(description, quote=True)
    text = f'{head} role="img" aria-label="{label}"{tail}'
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--figure-font)", text)
    return re.sub(r"\n\s*", "\n", text).strip()


def time_scale(seconds: float) -> tuple[float, str]:
    """Return (seconds per unit, unit) in which durations up to ``seconds`` are drawn."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return scale, unit
    return 1e-6, "µs"


def memory_scale(num_bytes: float) -> tuple[float, str]:
    """Return (bytes per unit, unit) in which memory up to ``num_bytes`` is drawn."""
    for scale, unit in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= scale:
            return scale, unit
    return KIB, "KiB"


def legend_above(axes: Axes, columns: int, **kwargs: Any) -> None:
    """Put the legend between title and plot, in columns."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.1,
        handleheight=1.0, handletextpad=0.5, columnspacing=1.0, borderpad=0.2, **kwargs,
    )  # fmt: skip
