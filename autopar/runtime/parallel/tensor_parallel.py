"""Tensor and sequence parallelism by DTensor: column and row products, and what has to surround them.

A *region* is a module that holds column products and the row products behind them, such as an attention. Its input
is made a DTensor once, so that backward reduces the gradient of that input once and not per projection. Under sequence
parallelism the stream between regions is divided along the sequence (dim 1): regions gather it and scatter their
result. What is not a column or row product then sees only a part of the tokens, or of the heads, and its gradients are
summed over the tensor parallel ranks once per step (as Megatron-LM does for its norms). Whether a further module with
weights inside a region sees a part (``inner``, between the products) or everything (``whole``) cannot be told from
outside, so that the plan has to say it (``autopar.runtime.parallel.tensor_styles``).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from autopar.errors import PlanError
from autopar.runtime.parallel.context_parallel import SEQUENCE_DIM
from autopar.runtime.parallel.fused import FUSED, fused_widths, put_rows, row_order
from autopar.runtime.parallel.holdings import Runs
from autopar.runtime.parallel.parts import Parts
from autopar.runtime.parallel.tensor_styles import COLWISE, INNER, ROWWISE, WHOLE, kind_of, shared_names
from autopar.runtime.parallel.vocabulary import VOCAB, scatter_positions, scatters_itself, vocabulary_styles


@dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """What dividing changed beside the modules.

    Attributes:
        partial: names of parameters whose gradients are partial: ``reduce_partial`` sums them after the last backward.
        rows: names of parameters to the order in which their rows were put before they were divided.
    """

    partial: tuple[str, ...]
    rows: dict[str, Runs]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Region:
    """A module with its products; ``single_input`` if its forward takes one positional argument."""

    name: str
    single_input: bool


def divide(
    chain: nn.Module, mesh: DeviceMesh, products: Mapping[str, str], parts: Parts, *, sequence_parallel: bool
) -> Divided:
    """Divide the products of a module (the whole model or a stage) over a one-dimensional mesh, in place.

    Args:
        chain: holds parts of the model under their names in the whole.
        mesh: the tensor parallel ranks.
        products: as from ``resolve_plan``; those of other stages are passed over.
        parts: of the whole model.
        sequence_parallel: divide the stream along the sequence.

    Raises:
        PlanError: sequence parallelism, and the model's structure does not tell where the stream runs.
    """
    names = {name for name, _ in chain.named_modules()}
    local = {name: style for name, style in products.items() if name in names}
    vocabulary = [name for name, style in local.items() if style == VOCAB]
    regions, shared = _regions(chain, local), shared_names(chain)
    stream = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()
    styles: dict[str, ParallelStyle] = {
        name: RowwiseParallel(output_layouts=stream) if style == ROWWISE else ColwiseParallel()
        for name, style in local.items()
        if kind_of(style) in (COLWISE, FUSED, ROWWISE)
    }
    streams: dict[str, Placement] = {}
    if sequence_parallel:
        _check_sequence_parallel(regions, parts)
        ends, streams = _stream_ends(chain, parts, vocabulary)
        styles |= ends
    for region in regions:
        if region.single_input:
            styles[region.name] = PrepareModuleInput(
                input_layouts=(stream,), desired_input_layouts=(Replicate(),), use_local_output=False
            )
    scattering = tuple(name for name in parts.first if any(_within(end, name) for end in streams))
    partial = _partial_names(chain, local, regions, parts, scattering, sequence_parallel)
    for name in scattering:
        scatter_positions(chain.get_submodule(name), mesh)
    rows = _put_rows(chain, local, mesh.size())
    parallelize_module(chain, mesh, styles | vocabulary_styles(chain, vocabulary, streams=streams))
    _share_again(chain, shared)
    return Divided(partial=partial, rows=rows)


def _put_rows(chain: nn.Module, products: Mapping[str, str], tp: int) -> dict[str, Runs]:
    rows: dict[str, Runs] = {}
    for name, style in products.items():
        if kind_of(style) == FUSED:
            product, order = chain.get_submodule(name), row_order(fused_widths(style), tp)
            put_rows(product, order)
            rows |= {f"{name}.{parameter}": order for parameter, _ in product.named_parameters()}
    return rows


def _share_again(chain: nn.Module, shared: Iterable[Sequence[str]]) -> None:
    """Parameters that were one are one again: dividing makes one for each module."""
    for first, *others in shared:
        for name in others:
            path, _, leaf = name.rpartition(".")
            setattr(chain.get_submodule(path), leaf, chain.get_parameter(first))


def _regions(chain: nn.Module, products: Mapping[str, str]) -> tuple[_Region, ...]:
    found: dict[str, _Region] = {}
    for name, style in products.items():
        region, rows = name.rpartition(".")[0], [n for n, s in products.items() if s == ROWWISE]
        while kind_of(style) in (COLWISE, FUSED) and region and not any(row.startswith(f"{region}.") for row in rows):
            region = region.rpartition(".")[0]
        if kind_of(style) in (COLWISE, FUSED) and region not in found:
            forward = inspect.signature(chain.get_submodule(region).forward)
            direct = name.rpartition(".")[0] == region
            single_input = bool(region) and direct and len(forward.parameters) == 1
            found[region] = _Region(name=region, single_input=single_input)
    return tuple(found.values())


def _check_sequence_parallel(regions: Iterable[_Region], parts: Parts) -> None:
    unclear = [region.name or "the model itself" for region in regions if not region.single_input]
    if not parts.chained or not parts.first or not parts.last or unclear:
        raise PlanError(
            "sequence parallelism needs to know where the stream of tokens runs: the model must declare pipeline_parts "
            "with parts before and after the blocks, and modules that hold column and row products must take one "
            f"argument{' (not so: ' + ', '.join(unclear) + ')' if unclear else ''}; or drop sp"
        )


def _stream_ends(
    chain: nn.Module, parts: Parts, vocabulary: Sequence[str]
) -> tuple[dict[str, ParallelStyle], dict[str, Placement]]:
    """Divide the stream behind the parts before the blocks, gather it before the first part after that is no norm.

    Returns:
        Styles of those parts, and where embedding or head, divided along the vocabulary, do it themselves.
    """
    names = {name for name, _ in chain.named_modules()}
    styles: dict[str, ParallelStyle] = {}
    divided: Placement = Shard(SEQUENCE_DIM)
    streams: dict[str, Placement] = {}
    if parts.first[-1] in names:
        embeddings = [name for name in vocabulary if isinstance(chain.get_submodule(name), nn.Embedding)]
        if scatters_itself(chain, parts.first[-1], embeddings):
            streams |= {name: divided for name in embeddings if _within(name, parts.first[-1])}
        else:
            styles[parts.first[-1]] = PrepareModuleOutput(
                output_layouts=Replicate(), desired_output_layouts=divided, use_local_output=True
            )
    gathering = next((name for name in parts.last if name in names and not _is_norm(chain, name)), None)
    if gathering is not None and gathering in vocabulary:
        streams[gathering] = divided
    elif gathering is not None:
        styles[gathering] = PrepareModuleInput(
            input_layouts=(divided,), desired_input_layouts=(Replicate(),), use_local_output=True
        )
    return styles, streams


def _is_norm(chain: nn.Module, name: str) -> bool:
    return isinstance(chain.get_submodule(name), nn.LayerNorm | nn.RMSNorm)


def _partial_names(
    chain: nn.Module,
    products: Mapping[str, str],
    regions: Iterable[_Region],
    parts: Parts,
    scattering: Sequence[str],
    sequence_parallel: bool,
) -> tuple[str, ...]:
    streams = (*scattering, *parts.blocks, *_leading_norms(chain, parts)) if sequence_parallel else ()
    partial = []
    for name, _ in chain.named_parameters():
        style = next((style for module, style in products.items() if _within(name, module)), None)
        inside = any(_within(name, region.name) for region in regions)
        if inside and (style is None or (sequence_parallel and style == WHOLE)):
            raise PlanError(
                f"tensor_parallel_plan: '{name}' lies between or beside divided products; declare its module as "
                "'inner' if it sees only each rank's features, or as 'whole' if it sees all of them (not under sp)"
            )
        if style == INNER or (style is None and any(_within(name, stream) for stream in streams)):
            partial.append(name)
    return tuple(partial)


def _leading_norms(chain: nn.Module, parts: Parts) -> tuple[str, ...]:
    """Norms right after the blocks: they work on the divided stream."""
    names = {name for name, _ in chain.named_modules()}
    local = [name for name in parts.last if name in names]
    return tuple(itertools.takewhile(lambda name: _is_norm(chain, name), local))


def _within(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def place_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Divide gradients as their parameters are: that of an embedding divided along the vocabulary comes whole."""
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def reduce_partial(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum partial gradients over the tensor parallel ranks, all in one all-reduce per type."""
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        same = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in same])
        dist.all_reduce(flat, group=mesh.get_group())
        for grad, summed in zip(same, flat.split([grad.numel() for grad in same]), strict=True):
            grad.copy_(summed.view_as(grad))


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters have the gradients of what runs there alone; behind it, those of before are added to them.

    For gradients that are reduced at the end of a step: what earlier steps left is reduced already.
    """
    # Copies, since DDP writes the next gradients where it has left the last ones.
    before = [(p, p.grad.clone()) for p in parameters if p.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    yield
    for parameter, gradient in before:
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            local_tensor(parameter.grad).add_(local_tensor(gradient))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
