"""Simulator and automatic planner of hybrid parallel training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.model.capture import capture as capture
    from autopar.runtime.checkpoint import Checkpoints as Checkpoints
    from autopar.runtime.parallel.parallelize import parallelize as parallelize
    from autopar.runtime.step.optimizer import build_optimizer as build_optimizer

__version__ = "0.1.0"

# What needs torch is imported when it is first asked for: importing autopar must stay quick.
_LAZY = {
    "Checkpoints": "autopar.runtime.checkpoint",
    "build_optimizer": "autopar.runtime.step.optimizer",
    "capture": "autopar.model.capture",
    "parallelize": "autopar.runtime.parallel.parallelize",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
