"""Where backward starts, and the sums of gradients that it makes where a tensor has several users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autopar.model.capture.kernels import tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientSum:
    """Gradients of one tensor that are added up.

    Attributes:
        node: autograd node that receives them: the tensor's producer, or the accumulator of a parameter.
        senders: nodes that send one each.
        num_bytes: of all sums; each reads two gradients and writes one.
    """

    node: Any
    senders: tuple[Any, ...]
    num_bytes: int

    @property
    def parameter(self) -> Tensor | None:
        """The parameter whose gradients these are, None for an activation."""
        return getattr(self.node, "variable", None)


def backward_roots(output: Any) -> list[Tensor]:
    """What backward starts from: the first scalar, or every result that needs gradients."""
    results = [tensor for tensor in tensors(output) if tensor.requires_grad]
    scalars = [tensor for tensor in results if tensor.numel() == 1]
    return scalars[:1] or results


def gradient_sums(roots: Iterable[Tensor]) -> list[GradientSum]:
    """Every tensor below ``roots`` whose gradient has several senders: n of them make n - 1 sums."""
    users: Counter[tuple[Any, int]] = Counter()
    senders: dict[tuple[Any, int], list[Any]] = {}
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for following in node.next_functions:
            if following[0] is None:
                continue
            users[following] += 1
            senders.setdefault(following, []).append(node)
            if following[0] not in seen:
                seen.add(following[0])
                pending.append(following[0])
    found = []
    for (node, position), count in users.items():
        if count > 1:
            metadata = node._input_metadata[position]
            size = math.prod(metadata.shape) * metadata.dtype.itemsize
            found.append(
                GradientSum(
                    node=node, senders=tuple(dict.fromkeys(senders[node, position])), num_bytes=3 * (count - 1) * size
                )
            )
    return found
