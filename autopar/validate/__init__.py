"""Prediction held against measurement: plans that this program ran (here), published runs (``runs``, ``study``)."""

from autopar.validate.plans import (
    CollectiveCheck,
    CollectiveDifference,
    Collectives,
    Comparison,
    StageMemory,
    Validation,
    check_collectives,
    compare,
    compare_one,
    kendall_tau,
    relative_error,
    summarise,
)

__all__ = [
    "CollectiveCheck",
    "CollectiveDifference",
    "Collectives",
    "Comparison",
    "StageMemory",
    "Validation",
    "check_collectives",
    "compare",
    "compare_one",
    "kendall_tau",
    "relative_error",
    "summarise",
]
