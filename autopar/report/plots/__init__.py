"""Figures, each a function from records to a matplotlib Figure. matplotlib is imported when a figure is drawn."""

from autopar.report.plots.bars import memory_items, step_breakdown
from autopar.report.plots.losses import loss_curves
from autopar.report.plots.machine import collective_curves, matmul_efficiency
from autopar.report.plots.scatter import predicted_measured
from autopar.report.plots.steps import step_timeline

__all__ = [
    "collective_curves",
    "loss_curves",
    "matmul_efficiency",
    "memory_items",
    "predicted_measured",
    "step_breakdown",
    "step_timeline",
]
