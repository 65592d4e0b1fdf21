"""Which repeated block of the model each operation belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from autopar.errors import InputError


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks, in order; empty if the model has none.

    They are what ``module.pipeline_parts()`` declares, else the children of an nn.Sequential, else the longest
    nn.ModuleList or nn.Sequential inside the module whose two or more members are of one class.

    Raises:
        InputError: a declared block is no module of the model.
    """
    declare = getattr(module, "pipeline_parts", None)
    if callable(declare):
        _, blocks, _ = declare()
        known = dict(module.named_modules())
        for path in blocks:
            if path not in known:
                raise InputError(f"pipeline_parts() of {type(module).__name__} names '{path}', which it does not have")
        return tuple(blocks)
    if isinstance(module, nn.Sequential):
        return tuple(path for path, _ in module.named_children())
    longest: tuple[str, ...] = ()
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList | nn.Sequential):
            continue
        members = list(child.named_children())
        if len(members) > max(1, len(longest)) and len({type(member) for _, member in members}) == 1:
            longest = tuple(f"{path}.{name}" for name, _ in members)
    return longest


def block_indices(modules: Sequence[str | None], blocks: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Block index of each operation, and the number of blocks.

    What runs before the first block is -1; what runs after the last is the number of blocks, as is the loss. What
    runs between two blocks belongs to the earlier one. A model without blocks, or one that runs them in another
    order or more than once, is one block.

    Args:
        modules: path of the module of each operation, in order; None for the loss.
        blocks: paths of the blocks, in order.
    """
    inside = [_index(module, blocks) for module in modules]
    found = [index for index in inside if index is not None]
    if not found or any(later < earlier for earlier, later in pairwise(found)):
        return tuple(1 if module is None else 0 for module in modules), 1
    count = len(blocks)
    last = max(position for position, index in enumerate(inside) if index is not None)
    indices: list[int] = []
    current = -1
    for position, index in enumerate(inside):
        current = current if index is None else index
        indices.append(count if position > last else current)
    return tuple(indices), count


def _index(module: str | None, blocks: Sequence[str]) -> int | None:
    if module is None:
        return None
    return next((i for i, path in enumerate(blocks) if module == path or module.startswith(f"{path}.")), None)
