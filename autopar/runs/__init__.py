"""Measured runs as data: CSV rows and training logs -> model, cluster, workload, plan and stack.

``read_runs`` reads rows, ``interpret`` turns one into a RunCase (or Unsupported, with the reason), ``write_runs``
writes rows. ``read_torchtitan_log`` and ``read_megatron_log`` make rows of what these engines print.
"""

from autopar.runs.interpret import Coverage, RunCase, Unsupported, coverage, interpret
from autopar.runs.log_megatron import read_megatron_log
from autopar.runs.log_torchtitan import read_torchtitan_log
from autopar.runs.rows import RunRow, read_runs, write_runs

__all__ = [
    "Coverage",
    "RunCase",
    "RunRow",
    "Unsupported",
    "coverage",
    "interpret",
    "read_megatron_log",
    "read_runs",
    "read_torchtitan_log",
    "write_runs",
]
