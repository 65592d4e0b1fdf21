"""Gradients of a model under a plan against those of one process, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor


def worst_gradient(model: ParallelModel, whole: Mapping[str, Tensor]) -> float:
    """The largest difference of this rank's gradients from those of one process, relative to the largest of each."""
    worst = 0.0
    # Some gradients are zero but for rounding: attention does not see what is added to all keys alike.
    least = 1e-3 * max(gradient.abs().max().item() for gradient in whole.values())
    for (name, parameter), holding in zip(model.named_parameters(), model.holdings, strict=True):
        expected = whole[holding.name]
        assert parameter.grad is not None or not holding.pieces, name
        for piece in holding.pieces:
            part = _held(parameter)[cut(piece.local, piece.shape)]
            difference = (part - expected[cut(piece.offset, piece.shape)]).abs().max().item()
            worst = max(worst, difference / max(expected.abs().max().item(), least))
        held = sum(math.prod(piece.shape) for piece in holding.pieces)
        assert held == local_tensor(parameter).numel(), name
    return worst


def _held(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, divided as its parameter is: some gradients are whole on every rank."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and local_tensor(gradient).shape != local_tensor(parameter).shape:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_tensor(gradient)


def cut(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
