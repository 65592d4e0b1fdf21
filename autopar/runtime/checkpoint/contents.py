"""What of a model and its optimizer lies on this rank: tensors with their places in the whole, and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autopar.errors import InputError
from autopar.runtime.checkpoint.manifest import BUFFER, WEIGHT, Scalar
from autopar.runtime.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from autopar.runtime.parallel.holdings import Holding, Piece, pieces_of
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.tensor_parallel import local_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """A tensor on this rank.

    Attributes:
        name: of the parameter or buffer in the whole model.
        kind: as in ``StoredTensor``.
        shape: of the whole tensor.
        pieces: what of it this rank has.
        local: the values; changing them changes the model.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    local: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        if self.local.dtype not in DTYPE_NAMES:
            raise InputError(f"{self.kind} {self.name} is {self.local.dtype}, which a checkpoint cannot hold")
        return DTYPE_NAMES[self.local.dtype]

    @property
    def key(self) -> bytes:
        """Equal for equal pieces of the same tensor, on any rank."""
        where = [(piece.offset, piece.shape) for piece in self.pieces]
        return hashlib.blake2b(repr((self.name, self.kind, where)).encode(), digest_size=12).digest()


def model_contents(model: ParallelModel) -> list[Content]:
    """Weights and persistent buffers."""
    found = []
    for (_, parameter), holding in zip(model.owned, model.holdings, strict=True):
        found.append(_content(holding, WEIGHT, local_tensor(parameter.detach())))
    for name, buffer in _buffers(model):
        shape = tuple(buffer.shape)
        found.append(Content(name=name, kind=BUFFER, shape=shape, pieces=pieces_of(shape, ()), local=buffer))
    return found


def _content(holding: Holding, kind: str, local: Tensor) -> Content:
    return Content(name=holding.name, kind=kind, shape=holding.shape, pieces=holding.pieces, local=local)


def _buffers(model: ParallelModel) -> Iterator[tuple[str, Tensor]]:
    for wrapped in model.modules:
        module: nn.Module = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        persistent = module.state_dict()
        yield from ((name, buffer.detach()) for name, buffer in module.named_buffers() if name in persistent)


def rule_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has this rank's state: the one inside of a ``ZeroRedundancyOptimizer``, else itself."""
    inner = getattr(optimizer, "optim", optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    """Class of an update rule."""
    return "" if optimizer is None else type(rule_of(optimizer)).__name__


def optimizer_contents(
    model: ParallelModel, optimizer: torch.optim.Optimizer
) -> tuple[list[Content], dict[str, dict[str, Scalar]]]:
    """States of parameters that this rank has: those shaped as the parameter, and numbers by parameter.

    Raises:
        InputError: the optimizer has a parameter that the model has not, or a state that cannot be divided anew.
    """
    holdings = {id(parameter): (parameter, holding) for (_, parameter), holding in _owned(model)}
    tensors: list[Content] = []
    numbers: dict[str, dict[str, Scalar]] = {}
    for parameter, state in rule_of(optimizer).state.items():
        if id(parameter) not in holdings:
            raise InputError("the optimizer has state of a parameter that is not the model's: pass model.parameters()")
        _, holding = holdings[id(parameter)]
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                tensors.append(_content(holding, kind, local_tensor(value.detach())))
            elif isinstance(value, Tensor) and value.numel() == 1:
                scalar = Scalar(value=local_tensor(value.detach()).item(), dtype=DTYPE_NAMES[value.dtype])
                numbers.setdefault(holding.name, {})[kind] = scalar
            elif isinstance(value, bool | int | float):
                numbers.setdefault(holding.name, {})[kind] = Scalar(value=value, dtype="")
            elif value is not None:
                shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                raise InputError(
                    f"the optimizer's {kind}{shape} for {holding.name} is neither as large as the parameter nor a "
                    "number: it cannot be divided anew"
                )
    return tensors, numbers


def _owned(model: ParallelModel) -> Iterator[tuple[tuple[str, nn.Parameter], Holding]]:
    yield from zip(model.owned, model.holdings, strict=True)


def new_state(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    kinds: Mapping[str, Mapping[str, str]],
    numbers: Mapping[str, Mapping[str, Scalar]],
) -> list[Content]:
    """Replace an optimizer's state by an empty one of a saved form, for the parameters that it has on this rank.

    Args:
        model: whose parameters they are.
        optimizer: to change.
        kinds: parameter to the tensors that are kept for it, with their types.
        numbers: parameter to its numbers, which are set.

    Returns:
        The tensors, to be filled.
    """
    holdings = {id(parameter): holding for (_, parameter), holding in _owned(model)}
    rule = rule_of(optimizer)
    rule.state.clear()
    found: list[Content] = []
    for group in rule.param_groups:
        for parameter in group["params"]:
            holding = holdings.get(id(parameter))
            if holding is None:
                raise InputError("the optimizer has a parameter that is not the model's: pass model.parameters()")
            if holding.name not in kinds and holding.name not in numbers:
                continue
            state: dict[str, Any] = {}
            for kind, scalar in numbers.get(holding.name, {}).items():
                state[kind] = _number(scalar, parameter, group)
            for kind, dtype in kinds.get(holding.name, {}).items():
                state[kind] = torch.zeros_like(parameter.detach(), dtype=DTYPES[dtype])
                found.append(_content(holding, kind, local_tensor(state[kind])))
            rule.state[parameter] = state
    return found


def _number(scalar: Scalar, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """Where torch's optimizers want it: on the device only if their step runs there as a whole."""
    if not scalar.dtype:
        return scalar.value
    on_device = group.get("fused") or group.get("capturable")
    device = local_tensor(parameter.detach()).device if on_device else torch.device("cpu")
    return torch.tensor(scalar.value, dtype=DTYPES[scalar.dtype], device=device)
