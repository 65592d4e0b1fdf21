"""Clipping by the norm of the whole gradient, however it is divided and repeated over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from autopar.runtime.parallel.holdings import Holding
from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.private import multiply_all

# As torch.nn.utils.clip_grad_norm_, which divides by the norm plus this.
TINY = 1e-6


def clip_grad_norm_(held: Iterable[tuple[nn.Parameter, Holding]], max_norm: float, device: torch.device) -> Tensor:
    """Shorten the whole gradient to ``max_norm`` if it is longer. Every rank calls it; one all-reduce over all ranks.

    Of a gradient of which several ranks hold equal pieces, each of them counts its share: |g|^2 is the sum over ranks
    of |piece|^2 / copies.

    Args:
        held: this rank's parameters, with what of the whole model they are.
        max_norm: inf only measures.
        device: of the gradients.

    Returns:
        The norm before, a scalar in fp32, equal on all ranks. Not finite if any gradient is not; then the gradients are
        left as they are, and it is for the caller not to use them.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter, holding in held:
        if parameter.grad is not None:
            by_copies.setdefault(holding.copies, []).append(local_tensor(parameter.grad))
    square = torch.zeros((), dtype=torch.float64, device=device)
    for copies, gradients in by_copies.items():
        square += get_total_norm(gradients).to(torch.float64).square() / copies
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(square)
    norm = square.sqrt().to(torch.float32)
    if not math.isinf(max_norm):
        factor = torch.where(norm.isfinite(), (max_norm / (norm + TINY)).clamp(max=1.0), 1.0)
        multiply_all([gradient for each in by_copies.values() for gradient in each], factor)
    return norm
