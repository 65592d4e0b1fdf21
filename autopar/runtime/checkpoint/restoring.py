"""A checkpoint into a model and its optimizer, under whatever plan: on every rank what it holds."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule

from autopar.errors import InputError
from autopar.runtime.checkpoint.contents import Content, model_contents, new_state, optimizer_name
from autopar.runtime.checkpoint.manifest import BUFFER, WEIGHT, Damaged, Manifest
from autopar.runtime.checkpoint.random_state import (
    CPU,
    CUDA,
    seed_anew,
    set_random_states,
    source_of,
)
from autopar.runtime.checkpoint.reading import Reader
from autopar.runtime.parallel.parallel_model import ParallelModel


def check_fits(
    manifest: Manifest, contents: list[Content], names: set[str], optimizer: torch.optim.Optimizer | None
) -> None:
    """Compare a checkpoint with what it is to be read into, before anything is changed.

    Args:
        manifest: of the checkpoint.
        contents: what this rank has of the model.
        names: of all weights and buffers on all ranks.
        optimizer: to be restored, or None.

    Raises:
        InputError: it is of another model, or of another update rule.
    """
    saved = {(tensor.name, tensor.kind): tensor for tensor in manifest.tensors}
    where = f"the checkpoint of step {manifest.step} (model {manifest.model or 'without a name'}, plan {manifest.plan})"
    for content in contents:
        tensor = saved.get((content.name, content.kind))
        if tensor is None:
            raise InputError(f"{where} has no {content.kind} {content.name}: it is of another model")
        if (tensor.shape, tensor.dtype) != (content.shape, content.dtype):
            raise InputError(
                f"{where} has {content.name} as {tensor.dtype} {list(tensor.shape)}, but the model has it as "
                f"{content.dtype} {list(content.shape)}: load it into the model and precision that it was saved from"
            )
    extra = [tensor.name for tensor in manifest.tensors if tensor.name not in names]
    if extra:
        raise InputError(f"{where} has {extra[0]}, which the model does not have: it is of another model")
    name = optimizer_name(optimizer)
    if optimizer is not None and manifest.optimizer and manifest.optimizer != name:
        raise InputError(f"{where} was trained with {manifest.optimizer}, but this run uses {name}")


def restore(
    reader: Reader,
    manifest: Manifest,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer | None,
    names: set[str],
    rank: int,
) -> None:
    """Read this rank's part of a checkpoint. Arguments as in ``check_fits``. Raises InputError and Damaged."""
    contents = model_contents(model)
    check_fits(manifest, contents, names, optimizer)
    _drop_gathered(model)
    try:
        with torch.no_grad():
            _fill(reader, contents)
            if optimizer is not None and manifest.optimizer:
                _fill(reader, new_state(model, optimizer, _moments(manifest), manifest.scalars))
            _restore_random(reader, manifest, model, rank)
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise Damaged(f"a file cannot be read: {error}") from error


def _fill(reader: Reader, contents: list[Content]) -> None:
    for content in contents:
        tensor = reader.find(content.name, content.kind)
        if tensor is None:
            raise Damaged(f"{content.kind} of {content.name} is missing")
        reader.fill(tensor, content.pieces, content.local)


def _moments(manifest: Manifest) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for tensor in manifest.tensors:
        if tensor.kind not in (WEIGHT, BUFFER):
            found.setdefault(tensor.name, {})[tensor.kind] = tensor.dtype
    return found


def _restore_random(reader: Reader, manifest: Manifest, model: ParallelModel, rank: int) -> None:
    source = source_of(manifest.plan, model.plan, rank)
    if source is None:
        seed_anew(manifest.step, model.plan.layout.data_share(rank))
    else:
        set_random_states(reader.random_states(source, (CPU, CUDA)), model.device)


def _drop_gathered(model: ParallelModel) -> None:
    """Sharded modules may still have whole parameters, of before, from a forward pass without backward."""
    for module in model.modules:
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()
