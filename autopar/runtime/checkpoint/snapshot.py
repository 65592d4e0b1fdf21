"""What one rank has to write of a step, taken while the model rests between two steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopar.errors import InputError
from autopar.runtime.checkpoint.contents import Content, model_contents, optimizer_contents, optimizer_name
from autopar.runtime.checkpoint.manifest import Scalar
from autopar.runtime.checkpoint.random_state import random_states
from autopar.runtime.checkpoint.ranks import Ranks
from autopar.runtime.checkpoint.writing import Part, part_of
from autopar.runtime.parallel.holdings import number_copies
from autopar.runtime.parallel.parallel_model import ParallelModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Of one step, on one rank; fields as in ``Manifest``.

    Attributes:
        part: the tensors that this rank writes.
        scalars: the optimizer's numbers for this rank's parameters.
    """

    step: int
    part: Part
    scalars: Mapping[str, Mapping[str, Scalar]]
    plan: str
    model: str
    optimizer: str
    state: Mapping[str, Any]


def take_snapshot(
    ranks: Ranks,
    step: int,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    *,
    copy: bool,
) -> Snapshot:
    """This rank's part of a checkpoint. All ranks compare what they have, to divide what they have in common.

    Args:
        ranks: all of them.
        step: as in ``Checkpoints.save``, like the rest.
        model: between two steps.
        optimizer: of it, or None.
        state: the caller's.
        copy: take values as they are now; else the model must not change until they are written.
    """

    def look() -> tuple[list[Content], Mapping[str, Mapping[str, Scalar]], Mapping[str, Any]]:
        contents, plain = model_contents(model), _plain(state)
        if optimizer is None:
            return contents, {}, plain
        moments, scalars = optimizer_contents(model, optimizer)
        return contents + moments, scalars, plain

    contents, scalars, plain = ranks.each(look)
    everyone = ranks.gather([content.key for content in contents])
    part = part_of(contents, number_copies(everyone, ranks.rank), ranks.rank, copy=copy)
    values = (*part.values, *random_states(model.device).items())
    return Snapshot(
        step=step, part=Part(tensors=part.tensors, values=values), scalars=scalars, plan=model.plan.slug,
        model=model.name, optimizer=optimizer_name(optimizer), state=plain,
    )  # fmt: skip


def _plain(state: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        plain: Mapping[str, Any] = json.loads(json.dumps(dict(state)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the state of a checkpoint must be JSON: {error}") from error
    return plain
