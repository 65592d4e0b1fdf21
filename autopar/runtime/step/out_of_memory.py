"""An allocation that failed, told as what the rank held, item by item, beside what was predicted."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from autopar.errors import RunError
from costmodels.units import format_bytes

PARAMETERS, GRADIENTS, OPTIMIZER, REST = "parameters", "gradients", "optimizer", "activations"
KNOBS: Mapping[str, str] = {
    PARAMETERS: "zero_stage 3, or larger tp or pp",
    GRADIENTS: "zero_stage 2 or 3, or larger tp or pp",
    OPTIMIZER: "zero_stage 1, 2 or 3, or larger tp or pp",
    REST: "a smaller microbatch, recompute full or selective, sp with tp, or cp",
}
# Items of a prediction that are part of what is measured as the rest.
PREDICTED_REST = ("activations", "working", "buffers", "fragmentation")
_CPU_FAILURE = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_CUDA_FAILURE = re.compile(r"Tried to allocate ([\d.]+ \w+)")

Held = Callable[[], Mapping[str, int]]
"""Bytes of parameters, gradients and optimizer state on this rank, those that there are."""


@contextmanager
def naming_memory(
    doing: str, held: Held, device: torch.device, predicted: Mapping[str, float] | None = None
) -> Iterator[None]:
    """Turn an allocation that fails inside into a RunError that says what took the memory and what reduces it.

    Args:
        doing: what is done inside, as ``step 3``.
        held: asked when it happens.
        device: that of the rank.
        predicted: bytes by item, as an estimate names them; without it only what was held is told.
    """
    try:
        yield
    except RuntimeError as error:
        asked = _asked(error)
        if asked is None:
            raise
        raise RunError(describe(doing, asked, _items(held(), device), _limit(device), predicted or {})) from error


def describe(doing: str, asked: str, items: Mapping[str, int], limit: float, predicted: Mapping[str, float]) -> str:
    """The message: items with the largest first, each beside its prediction, and what makes the first one smaller."""
    expected = {item: predicted[item] for item in (PARAMETERS, GRADIENTS, OPTIMIZER) if item in predicted}
    if predicted:
        expected[REST] = sum(predicted.get(item, 0.0) for item in PREDICTED_REST)
    order = sorted(items, key=lambda item: -items[item])
    parts = [
        f"{_title(item)} {format_bytes(items[item])}"
        + (f" (predicted {format_bytes(expected[item])})" if item in expected else "")
        for item in order
    ]
    of_limit = f" of {format_bytes(limit)}" if limit else ""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (
        f"out of memory on rank {rank} in {doing}, asking for {asked}. Held {format_bytes(sum(items.values()))}"
        f"{of_limit}: {', '.join(parts)}. The largest are {_title(order[0])}: use {KNOBS[order[0]]}"
    )


def _title(item: str) -> str:
    return {OPTIMIZER: "optimizer state", REST: "activations and everything else"}.get(item, item)


def _asked(error: BaseException | None) -> str | None:
    """What the failed allocation asked for; None if the error is another one. Pipelines wrap the error in their own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            found = _CUDA_FAILURE.search(str(error))
            return found[1] if found else "more"
        found = _CPU_FAILURE.search(str(error))
        if found:
            return format_bytes(int(found[1]))
        error = error.__cause__
    return None


def _items(held: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """With the rest of all that was allocated at most; on a CPU of all that the process has had, its code included."""
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated(device)
    else:
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**held, REST: max(total - sum(held.values()), 0)}


def _limit(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 0.0 if soft == resource.RLIM_INFINITY else float(soft)
