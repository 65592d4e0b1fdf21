"""Errors of the program as a user meets them, with the exit code that each ends in."""

from __future__ import annotations

from costmodels.errors import InputError, nearest

__all__ = [
    "EXIT_NO_PLAN",
    "EXIT_OK",
    "EXIT_RUN_FAILED",
    "EXIT_USAGE",
    "InputError",
    "NoFeasiblePlan",
    "PlanError",
    "RunError",
    "nearest",
]

EXIT_OK, EXIT_RUN_FAILED, EXIT_USAGE, EXIT_NO_PLAN = 0, 1, 2, 3


class PlanError(InputError):
    """A plan that contradicts itself, the model, the workload or the number of ranks."""


class NoFeasiblePlan(Exception):
    """The search found nothing that fits. The message carries the nearest miss with its numbers."""


class RunError(Exception):
    """A started run failed: a rank died, hung, or computed something that cannot be used."""
