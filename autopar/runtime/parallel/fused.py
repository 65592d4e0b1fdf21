"""Linear products of several parts in one, such as queries, keys and values: divided so that every rank has each part.

A plain division of the rows would give the first rank queries alone. Rows are put in another order first: for each rank
its share of every part. The module then splits what it sees in the proportions of the parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from autopar.runtime.parallel.holdings import Runs

FUSED = "colwise-fused"


def fused_widths(style: str) -> tuple[int, ...]:
    """Rows of each part in a style such as ``colwise-fused 64 32 32``; none of any other style.

    Raises:
        ValueError: what follows are no numbers.
    """
    kind, *widths = style.split()
    return tuple(map(int, widths)) if kind == FUSED else ()


def row_order(widths: Sequence[int], ranks: int) -> Runs:
    """Ranges of rows in the order in which they are put before they are divided equally over ranks.

    Args:
        widths: of the parts, one after another; ``ranks`` divides each.
        ranks: tensor parallel ranks.
    """
    starts = list(itertools.accumulate(widths, initial=0))
    return tuple(
        (start + rank * (width // ranks), start + (rank + 1) * (width // ranks))
        for rank in range(ranks)
        for start, width in zip(starts, widths, strict=False)
    )


def put_rows(product: nn.Module, order: Runs) -> None:
    """Put the rows of a product's weight and bias in an order, in place."""
    with torch.no_grad():
        for parameter in product.parameters(recurse=False):
            parameter.copy_(torch.cat([parameter[start:stop] for start, stop in order]))
