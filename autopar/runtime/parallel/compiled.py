"""Compiled blocks: each is compiled by itself, so that equal blocks share their code and hooks around them stay.

Sharding, replication and pipelines act between blocks and are not touched. Memory-bound operations inside a block
become one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from autopar.errors import PlanError


def compile_blocks(chain: nn.Module, blocks: Iterable[str]) -> None:
    """Let blocks of a chain compile at their first call, in place; their parameters keep their names.

    Raises:
        PlanError: the model does not say what its blocks are.
    """
    names = {name for name, _ in chain.named_modules()}
    blocks = tuple(blocks)
    if not blocks:
        raise PlanError("compiling needs to know the model's blocks: declare pipeline_parts(), or do not compile")
    for name in blocks:
        if name in names:
            chain.get_submodule(name).compile()
