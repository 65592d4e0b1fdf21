"""Read one dispatched operation: the tensors that it touches, its FLOPs, its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from autopar.graph import AttentionShape, MatmulShape
from autopar.model.capture.records import Kernel, Use

# Results that no input's values reach: they read nothing, and the empty ones write nothing either.
FILLS = (
    "arange",
    "eye",
    "full",
    "linspace",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones",
    "rand",
    "scalar_tensor",
    "zeros",
)
EMPTIES = ("empty", "new_empty")
RECURRENT = ("cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer")


class Storages:
    """Gives each storage a small number, and keeps it alive so that the number stays its own."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._alive.append(storage)
        return self._numbers[key]

    def use(self, tensor: Tensor) -> Use:
        """Describe a tensor."""
        size = tensor.numel() * tensor.element_size()
        return Use(
            storage=self.number(tensor),
            shape=tuple(tensor.shape),
            num_bytes=min(size, tensor.untyped_storage().nbytes()),
            floating=tensor.is_floating_point() or tensor.is_complex(),
        )

    def uses(self, values: Any) -> tuple[Use, ...]:
        """Describe the distinct tensors among nested values."""
        found: dict[Any, Use] = {}
        for tensor in tensors(values):
            use = self.use(tensor)
            found.setdefault((use.storage, tensor.storage_offset(), tensor.shape, tensor.stride()), use)
        return tuple(found.values())


def tensors(values: Any) -> Iterator[Tensor]:
    """All strided tensors among nested values."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)


def read_kernel(func: Any, args: Any, kwargs: Any, out: Any, storages: Storages) -> Kernel | None:
    """Describe a dispatched operation; None for a view or anything else that moves no data."""
    name = func._overloadpacket.__name__.strip("_")
    if name.startswith(EMPTIES):
        return None
    writes = storages.uses(out)
    reads = () if name.startswith(FILLS) else storages.uses((args, kwargs))
    if not writes or (reads and not func._schema.is_mutable and _shares(writes, reads)):
        return None
    flops = _flops(func, name, args, kwargs, out)
    return Kernel(
        name=name, reads=reads, writes=writes, flops=flops, product=_product(name, args, flops) if flops else None
    )


def _shares(writes: Iterable[Use], reads: Iterable[Use]) -> bool:
    known = {use.storage for use in reads}
    return all(use.storage in known for use in writes)


def is_attention(name: str) -> bool:
    """Whether a kernel is fused attention, forward or backward."""
    return "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if "scaled_dot_product" in name:
        return _attention_flops(name, args)
    if name.startswith(RECURRENT):
        return _recurrent_flops(name, args)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _attention_flops(name: str, args: Any) -> int:
    """FLOPs of fused attention; keys and values count for all query heads, also where heads share them."""
    backward = "backward" in name
    query, key, value = (
        (tuple(tensor.shape) for tensor in args[1:4]) if backward else (tuple(tensor.shape) for tensor in args[:3])
    )
    heads = query[1]
    key, value = ((*shape[:1], heads, *shape[2:]) for shape in (key, value))
    if backward:
        return int(sdpa_backward_flop_count(tuple(args[0].shape), query, key, value))
    return int(sdpa_flop_count(query, key, value))


def _recurrent_flops(name: str, args: Any) -> int:
    """Products of a fused recurrent layer: every step of every sequence meets every weight matrix."""
    steps = args[0].shape[0] * args[0].shape[1]
    forward = 2 * steps * sum(weight.numel() for weight in _recurrent_weights(args))
    return forward * (2 if "backward" in name else 1)


def _recurrent_weights(args: Any) -> list[Tensor]:
    """Matrices of a recurrent layer: a list of weights and biases (cuDNN), or input and hidden weights (oneDNN)."""
    weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:3]
    return [weight for weight in weights if weight.dim() == 2]


def attention_shape(query: Tensor, key: Tensor, *, causal: bool) -> AttentionShape | None:
    """Shape of attention over [batch, heads, length, head size]; fewer or more dimensions count as one batch."""
    if query.dim() < 3:
        return None
    batch = query.shape[:-3].numel()
    return AttentionShape(
        batch=batch,
        num_heads=query.shape[-3],
        num_kv_heads=key.shape[-3],
        query_len=query.shape[-2],
        key_len=key.shape[-2],
        head_size=query.shape[-1],
        causal=causal,
    )


def _product(name: str, args: Any, flops: int) -> MatmulShape | None:
    """[m, k] x [k, n] with the batch in m; m of a convolution are its output positions."""
    if name in ("mm", "bmm", "addmm", "baddbmm", "scaled_mm"):
        left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        return MatmulShape(m=left.numel() // left.shape[-1], n=right.shape[-1], k=left.shape[-1])
    if "convolution" in name or "conv2d" in name:
        weight = args[1]
    elif name.startswith(RECURRENT):
        weight = max(_recurrent_weights(args), key=Tensor.numel)
    else:
        return None
    n, k = weight.shape[0], weight.numel() // weight.shape[0]
    return MatmulShape(m=max(1, flops // (2 * n * k)), n=n, k=k)
