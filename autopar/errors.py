"""Errors of the program as a user meets them, with the exit code that each ends in."""

from __future__ import annotations

from collections.abc import Mapping

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
    """The search found nothing that fits. The message carries the nearest miss with its numbers.

    Attributes:
        rejected: plans ruled out, by reason.
        least_bytes: memory of the nearest miss; None where every plan is ruled out before memory is looked at.
    """

    def __init__(
        self, message: str, *, rejected: Mapping[str, int] | None = None, least_bytes: float | None = None
    ) -> None:
        super().__init__(message)
        self.rejected, self.least_bytes = dict(rejected or {}), least_bytes


class RunError(Exception):
    """A started run failed: a rank died, hung, or computed something that cannot be used."""
