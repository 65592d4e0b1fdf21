"""The ends of a language model divided along the vocabulary: token embedding, head, and the loss over its logits.

Each tensor parallel rank has a range of the vocabulary's rows (the last ones fewer where the ranks do not divide it).
An embedding adds up over the ranks, a head's logits stay divided, and the cross entropy over them exchanges a maximum
and two sums per token instead of logits (``loss_parallel``; Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, loss_parallel

from autopar.model.sequence import SequencePart
from autopar.runtime.parallel.context_parallel import ATTRIBUTE

VOCAB = "vocab"


class ScatteredPart(SequencePart):
    """Positions of the tokens that an embedding hands on where its result is scattered along the sequence.

    Args:
        whole: of the tokens that it is given.
        mesh: the tensor parallel ranks.
    """

    def __init__(self, whole: SequencePart, mesh: DeviceMesh) -> None:
        self._whole, self._ranks, self._rank = whole, mesh.size(), mesh.get_local_rank()

    def whole_length(self, length: int) -> int:
        """Tokens of a whole sequence of which ``length`` are given."""
        return self._whole.whole_length(length)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Places of this rank's share of ``length`` given tokens."""
        return self._whole.positions(length, device).chunk(self._ranks)[self._rank]


def vocabulary_styles(
    chain: nn.Module, names: Iterable[str], *, streams: Mapping[str, Placement]
) -> dict[str, ParallelStyle]:
    """Styles of embeddings and heads.

    Args:
        chain: has them.
        names: of those that are divided along the vocabulary.
        streams: how the result of an embedding and the input of a head are to be placed, where not whole.
    """
    styles: dict[str, ParallelStyle] = {}
    for name in names:
        stream = streams.get(name, Replicate())
        if isinstance(chain.get_submodule(name), nn.Embedding):
            styles[name] = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
        else:
            styles[name] = ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)
    return styles


def scatters_itself(chain: nn.Module, part: str, embeddings: Iterable[str]) -> bool:
    """Whether the last part before the blocks can scatter in its embedding, the only one: it is that, or asks for
    positions of what it hands on."""
    inside = [name for name in embeddings if name == part or name.startswith(f"{part}.")]
    return len(inside) == 1 and (inside[0] == part or hasattr(chain.get_submodule(part), ATTRIBUTE))


def scatter_positions(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let a module with a scattering embedding ask for positions of its share."""
    if hasattr(module, ATTRIBUTE):
        setattr(module, ATTRIBUTE, ScatteredPart(getattr(module, ATTRIBUTE), mesh))


def loss_context(divided: bool) -> AbstractContextManager[Any]:
    """Where a loss over divided logits is computed, and its backward."""
    return loss_parallel() if divided else nullcontext()  # type: ignore[no-untyped-call]
