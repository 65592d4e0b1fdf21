"""The optimizer of a model under a plan: AdamW or plain gradient descent over this rank's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.errors import InputError
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.workload import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWOptions:
    """What AdamW (Loshchilov and Hutter 2019) takes beside a learning rate; torch's own values.

    Attributes:
        betas: decay of the first and of the second moment, per step.
        eps: added to the root of the second moment.
        weight_decay: share of a weight that a step of learning rate 1 takes away; of norms and biases nothing.
        fused: one kernel for all parameters of a kind.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    fused: bool = True

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; each is at least 0 and below 1")
        if self.eps <= 0 or self.weight_decay < 0:
            raise InputError(f"eps is {self.eps} and weight_decay {self.weight_decay}; use eps>0 and weight_decay>=0")


def build_optimizer(
    model: ParallelModel,
    kind: Optimizer = Optimizer.ADAMW,
    *,
    learning_rate: float,
    adamw: AdamWOptions | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of what ``autopar.parallelize`` returned. Sharded parameters have sharded state (ZeRO).

    Args:
        model: its parameters are those that the optimizer updates.
        kind: update rule.
        learning_rate: of all groups; a schedule may change it through ``param_groups``.
        adamw: for AdamW; its defaults if None.
    """
    if learning_rate < 0:
        raise InputError(f"learning_rate is {learning_rate}; it is not negative")
    if kind is Optimizer.SGD:
        return torch.optim.SGD(model.parameter_groups(), lr=learning_rate)
    options = adamw or AdamWOptions()
    return torch.optim.AdamW(
        decay_groups(model.named_parameters(), options.weight_decay),
        lr=learning_rate, betas=options.betas, eps=options.eps, fused=options.fused,
    )  # fmt: skip


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Named parameters in groups for AdamW: with weight decay, and without it (norms and biases).

    Each is divided into those of one kind (plain tensors; DTensors of one mesh), as fused optimizers need them.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in named:
        share = decay if parameter.ndim > 1 and not name.endswith("bias") else 0.0
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, share > 0), {"params": [], "weight_decay": share})["params"].append(parameter)
    return list(groups.values())
