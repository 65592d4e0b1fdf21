"""Context parallelism: the ranks of a group divide every sequence, and gather keys and values for attention.

A sequence is cut into 2 cp chunks, of which rank r has r and 2 cp - 1 - r: under a causal mask all ranks then have
equally much to do (Llama 3 2024, section 3.3.2). Keys and values of all ranks are gathered in one call for each
attention; each chunk attends to what lies before its end, so that no mask is larger than a chunk times that. Between
forward and backward a rank keeps its own keys and values alone and gathers the others again.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import PlanError
from autopar.model.sequence import SequencePart
from autopar.runtime.private import gather_first, lower_right_mask, scatter_first, storage_of

SEQUENCE_DIM = 1
ATTRIBUTE = "sequence_part"


class ContextPart(SequencePart):
    """One rank's two chunks of every sequence.

    Args:
        mesh: the context parallel ranks, one axis.
        gathers_again: backward gathers keys and values anew; not where attention is recomputed, which does that.
    """

    def __init__(self, mesh: DeviceMesh, *, gathers_again: bool = True) -> None:
        self.group = mesh.get_group()
        self.num_ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.gathers_again = gathers_again
        # On a CPU a mask has values, which all blocks share; elsewhere it is a mark that chooses a fused kernel.
        self._masks: dict[Any, Tensor] = {}

    @property
    def chunks(self) -> tuple[int, int]:
        """Indices of this rank's chunks."""
        return self.rank, 2 * self.num_ranks - 1 - self.rank

    def local(self, whole: Tensor) -> Tensor:
        """This rank's tokens of [batch, sequence, ...]."""
        chunks = whole.chunk(2 * self.num_ranks, SEQUENCE_DIM)
        return torch.cat([chunks[index] for index in self.chunks], SEQUENCE_DIM)

    def whole_length(self, length: int) -> int:
        """Tokens of a whole sequence of which ``length`` are seen."""
        return length * self.num_ranks

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Places of this rank's tokens in the whole sequence."""
        size = length // 2
        return torch.cat([torch.arange(index * size, (index + 1) * size, device=device) for index in self.chunks])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """Attention of this rank's tokens over the whole sequence, see SequencePart."""
        local = torch.cat((key, value), dim=-1)
        gathered: Tensor = _GatherSequence.apply(local, self)  # type: ignore[no-untyped-call]
        if not (self.gathers_again and gathered.requires_grad):
            return self._attend(query, gathered, key.shape[-1], causal)
        with _kept_as_part(local.detach(), gathered, self):
            return self._attend(query, gathered, key.shape[-1], causal)

    def _attend(self, query: Tensor, gathered: Tensor, key_size: int, causal: bool) -> Tensor:
        key, value = gathered.split((key_size, gathered.shape[-1] - key_size), dim=-1)
        grouped = key.shape[1] < query.shape[1]
        if not causal:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
        attended, size = [], query.shape[2] // 2
        for index, part in zip(self.chunks, query.chunk(2, dim=2), strict=True):
            end = (index + 1) * size
            attended.append(
                F.scaled_dot_product_attention(
                    part, key[:, :, :end], value[:, :, :end], attn_mask=self._mask(part, end), is_causal=end == size,
                    enable_gqa=grouped,
                )
            )  # fmt: skip
        return torch.cat(attended, dim=2)

    def _mask(self, query: Tensor, end: int) -> Tensor | None:
        """Which of the first ``end`` tokens a chunk that ends there sees; None where no more than a flag is needed."""
        size = query.shape[2]
        if end == size:
            return None
        key = (size, end, query.dtype, query.device)
        if key not in self._masks:
            self._masks[key] = (
                torch.full((size, end), -torch.inf, dtype=query.dtype).triu(end - size + 1)
                if query.device.type == "cpu"
                else lower_right_mask(size, end)
            )
        return self._masks[key]

    def gather(self, local: Tensor) -> Tensor:
        """[batch, heads, length, size] of all ranks in the order of the sequence, without gradient."""
        ranks = gather_first(local.unsqueeze(0).contiguous(), self.group)
        early, late = ranks.chunk(2, dim=3)
        whole = torch.cat((early, late.flip(0)))
        return whole.movedim(0, 2).flatten(2, 3)

    def reduce(self, whole: Tensor) -> Tensor:
        """The sum over all ranks of [batch, heads, whole length, size], of which this rank gets its chunks."""
        chunks = whole.unflatten(2, (2 * self.num_ranks, -1)).movedim(2, 0)
        early, late = chunks.chunk(2)
        ranks = torch.cat((early, late.flip(0)), dim=3)
        return scatter_first(ranks.contiguous(), self.group).squeeze(0)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, part: ContextPart) -> Tensor:
        ctx.part = part
        return part.gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.part.reduce(gradients[0]), None


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """A view of gathered keys and values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _kept_as_part(local: Tensor, gathered: Tensor, part: ContextPart) -> AbstractContextManager[Any]:
    """Operations within keep, instead of views of ``gathered``, how to take them from what ``local`` gathers to."""
    storage = storage_of(gathered)
    pending, again = 0, None

    def pack(tensor: Tensor) -> Tensor | _View:
        nonlocal pending
        if storage_of(tensor) != storage:
            return tensor
        pending += 1
        return _View(size=tuple(tensor.shape), stride=tensor.stride(), offset=int(tensor.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        nonlocal pending, again
        if isinstance(kept, Tensor):
            return kept
        whole = part.gather(local) if again is None else again
        pending -= 1
        again = whole if pending > 0 else None
        return whole.as_strided(kept.size, kept.stride, kept.offset)

    return saved_tensors_hooks(pack, unpack)


def check_parts_known(module: nn.Module, cp: int) -> None:
    """Raise PlanError if no submodule asks for its part of the sequence: attention would see its own chunks alone."""
    if not any(True for _ in _asking(module)):
        raise PlanError(
            f"cp={cp} divides sequences, but no submodule has the attribute {ATTRIBUTE}: let attention and positions "
            "ask one (see autopar.model.sequence), or use cp=1"
        )


def set_part(module: nn.Module, part: SequencePart) -> None:
    """Give every submodule that asks its part of the sequence."""
    for child in _asking(module):
        setattr(child, ATTRIBUTE, part)


def _asking(module: nn.Module) -> Iterable[nn.Module]:
    return (child for child in module.modules() if hasattr(child, ATTRIBUTE))
